// One member's step, pass by pass, by one thread or several. `_upgd.cpp` includes this file in its namespace, behind the
// structures of the problem and the kernels.

// The threads that work on one member together, each with a number of its own.
class Team {
  public:
    explicit Team(int64_t size) : size(size) {}

    void wait() {
        if (size == 1) return;
        const int64_t round = round_.load();
        if (++arrived_ == size) {
            arrived_ = 0;
            ++round_;
        } else {
            while (round_.load() == round) std::this_thread::yield();
        }
    }

    const int64_t size;

  private:
    std::atomic<int64_t> arrived_{0}, round_{0};
};

// Where the blocks of each tensor begin, the same for all members.
struct Plan {
    explicit Plan(const Problem& p) {
        for (int64_t k = 0; k < p.tensors; ++k) {
            first.push_back(static_cast<int64_t>(tensor.size()));
            for (int64_t begin = 0; begin < p.sizes[k]; begin += BLOCK) tensor.push_back(k);
            largest = std::max(largest, static_cast<int64_t>(tensor.size()) - first.back());
            first_row.push_back(rows);
            if (gating(p, k) == Gating::local) rows += p.sizes[k] / p.row_lengths[k];
        }
        first.push_back(static_cast<int64_t>(tensor.size()));
    }

    static Gating gating(const Problem& p, int64_t k) { return static_cast<Gating>(p.gating[k]); }

    std::vector<int64_t> first;      // block of each tensor, and behind the last
    std::vector<int64_t> tensor;     // of each block
    std::vector<int64_t> first_row;  // of each locally gated tensor
    int64_t rows = 0;
    int64_t largest = 0;  // blocks of the largest tensor
};

// Everything one member's step needs to remember; its memory is used again for the next member.
class Member {
  public:
    // `memory` has room for the largest tensor, or where several threads share a member for all of them.
    Member(const Problem& problem, const Plan& plan, const Kernel& kernel, float* memory)
        : p_(problem), plan_(plan), kernel_(kernel), memory_(memory), sums_(plan.tensor.size()), total_(static_cast<size_t>(problem.tensors)),
          numbers_(total_.size()), coefficient_(total_.size()), noise_coefficient_(total_.size()), correction_(total_.size()),
          rows_(static_cast<size_t>(plan.rows)), totals_(static_cast<size_t>(2 * problem.scopes)),
          most_steps_(static_cast<size_t>(problem.scopes)) {}

    // Called by every thread of the team, with ranks 0 to size - 1.
    void run(int64_t member, Team& team, int64_t rank) {
        if (rank == 0) begin(member);
        team.wait();
        const int64_t blocks = plan_.first.back();
        if (p_.clips) {
            each_block(0, blocks, team, rank, [&](const Block& block, int64_t, const Numbers&, Sums& sums) {
                sums.gradient = kernel_.squares(block.gradient, block.count);
            });
            team.wait();
            if (rank == 0) clip();
            team.wait();
        }
        const Pass advance = kernel_.advance_for(p_.adam, p_.estimator == 1);
        each_block(0, blocks, team, rank, [&](const Block& block, int64_t, const Numbers& numbers, Sums& sums) {
            advance(block, numbers, sums);
        });
        team.wait();
        if (rank == 0) compare();
        rows(team, rank);
        team.wait();
        // One thread takes tensor after tensor, while they are in its cache; several share all blocks, to wait less often.
        const int64_t stride = team.size == 1 ? 1 : p_.tensors;
        for (int64_t k = 0; k < p_.tensors; k += stride) finish(k, std::min(k + stride, p_.tensors), team, rank);
        if (rank == 0) end();
        team.wait();
    }

  private:
    double number(Number which, int64_t k) const {
        const int64_t width = p_.numbers_width;
        return p_.numbers[(which * p_.members + member_) * width + (width == 1 ? 0 : k)];
    }

    int64_t place(int64_t k) const { return member_ * p_.columns + p_.column[k]; }

    double correction(Number beta, int64_t k) const {
        return 1 - std::pow(number(beta, k), static_cast<double>(p_.step[place(k)]));
    }

    bool noisy(int64_t k) const { return p_.noise[k] >= 0 && number(SIGMA, k) > 0; }

    bool proportional(int64_t k) const { return noisy(k) && p_.adaptive_noise[k] != 0; }

    template <class Body>
    void each_block(int64_t begin, int64_t end, const Team& team, int64_t rank, Body body) {
        for (int64_t b = begin + rank; b < end; b += team.size) {
            const int64_t k = plan_.tensor[static_cast<size_t>(b)], from = (b - plan_.first[static_cast<size_t>(k)]) * BLOCK;
            const int64_t at = member_ * p_.sizes[k] + from;
            const auto of = [&](float* const* tensors) { return tensors == nullptr ? nullptr : tensors[k] + at; };
            const Block block{
                from, std::min(BLOCK, p_.sizes[k] - from), of(p_.gradient), of(p_.weight), of(p_.utility),
                of(p_.first), of(p_.second), of(p_.mean), nullptr, nullptr};
            body(block, k, numbers_[static_cast<size_t>(k)], sums_[static_cast<size_t>(b)]);
        }
    }

    // Adds up the blocks of each tensor of [begin, end).
    void add_up(int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
            const auto at = static_cast<size_t>(k);
            Sums sum{0, 0, -std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity(), 0, 0, 0};
            for (int64_t b = plan_.first[at]; b < plan_.first[at + 1]; ++b) {
                const Sums& one = sums_[static_cast<size_t>(b)];
                sum.gradient += one.gradient;
                sum.mean += one.mean;
                sum.largest = std::max(one.largest, sum.largest);
                sum.smallest = std::min(one.smallest, sum.smallest);
                sum.direction += one.direction;
                sum.gate += one.gate;
                sum.noise += one.noise;
            }
            total_[at] = sum;
        }
    }

    void begin(int64_t member) {
        member_ = member;
        for (int64_t k = 0; k < p_.tensors; ++k) {
            Numbers& n = numbers_[static_cast<size_t>(k)];
            ++p_.step[place(k)];
            if (p_.estimator != 0) ++p_.vgs_steps[place(k)];
            n = {};
            n.shrink = 1;
            n.mean = static_cast<float>(p_.estimator != 0 ? average_weight(k) : 0);
            n.utility = static_cast<float>(1 - number(BETA_UTILITY, k));
            n.first = static_cast<float>(1 - number(BETA1, k));
            n.second = static_cast<float>(1 - number(BETA2, k));
            n.decay = static_cast<float>(number(COUPLED_DECAY, k));
            n.keep = static_cast<float>(1 - number(LR, k) * number(DECOUPLED_DECAY, k));
            n.protects = p_.protecting[k] != 0;
            n.key = p_.keys[member];
            n.tensor = static_cast<uint64_t>(p_.noise[k]);
        }
        std::fill(sums_.begin(), sums_.end(), Sums{});
    }

    double average_weight(int64_t k) const {
        const double beta = number(VGS_BETA, k);
        return (1 - beta) / (1 - std::pow(beta, static_cast<double>(p_.vgs_steps[place(k)])));
    }

    void clip() {
        add_up(0, p_.tensors);
        const double norm = gradient_norm();
        for (int64_t k = 0; k < p_.tensors; ++k) {
            const double limit = number(MAX_GRAD_NORM, k);
            if (norm > limit) numbers_[static_cast<size_t>(k)].shrink = static_cast<float>(limit / norm);
        }
    }

    double gradient_norm() const {
        double square = 0;
        for (const Sums& sum : total_) square += sum.gradient;
        return std::sqrt(square);
    }

    // `update_statistics_` of vgs.py for one tensor.
    void update_statistics(int64_t k) {
        const int64_t at = place(k);
        const double weight = average_weight(k), square = total_[static_cast<size_t>(k)].gradient;
        const auto average = [weight](double& value, double newest) {
            value = weight < 0.5 ? value + weight * (newest - value) : newest - (newest - value) * (1 - weight);
        };
        average(p_.second_moment[at], square);
        if (p_.estimator == 1) {
            const double beta = number(VGS_BETA, k), power = std::pow(beta, static_cast<double>(p_.vgs_steps[at]));
            const double share = (1 - beta) * (1 + power) / ((1 + beta) * (1 - power));
            const double mean_square = total_[static_cast<size_t>(k)].mean;
            p_.variance[at] = share < 1 ? (p_.second_moment[at] - mean_square) / (1 - share) : 0.0;
            p_.signal[at] = p_.second_moment[at] - p_.variance[at];
        } else {
            const double count = static_cast<double>(p_.microbatches[member_]);
            const double variance = count * (p_.microbatch_squares[at] - square / count) / (count - 1);
            average(p_.variance[at], variance);
            average(p_.signal[at], square - variance);
        }
    }

    // `scope_factors` of vgs.py: one factor for each scope, written among the metrics behind their means.
    void scope_factors(double* metrics) {
        std::fill(totals_.begin(), totals_.end(), 0.0);
        std::fill(most_steps_.begin(), most_steps_.end(), 0);
        for (int64_t c = 0; c < p_.columns; ++c) {
            const auto s = static_cast<size_t>(p_.scope[c]);
            const int64_t at = member_ * p_.columns + c;
            totals_[2 * s] += p_.variance[at];
            totals_[2 * s + 1] += p_.signal[at];
            most_steps_[s] = std::max(most_steps_[s], p_.vgs_steps[at]);
        }
        for (int64_t s = 0; s < p_.scopes; ++s) {
            const double variance = totals_[static_cast<size_t>(2 * s)], signal = totals_[static_cast<size_t>(2 * s + 1)];
            const double floor = std::max(number(VGS_SIGNAL_FLOOR, 0) * (variance + signal), DBL_MIN);
            const double ratio = std::max(variance, 0.0) / std::max(signal, floor);
            const bool warm = most_steps_[static_cast<size_t>(s)] > p_.warmup;
            metrics[2 * s] = warm ? std::max(1 / (1 + number(VGS_ALPHA, 0) * ratio), number(VGS_MIN_SCALE, 0)) : 1.0;
            metrics[2 * s + 1] = ratio;
        }
    }

    // The largest utility, what the gates make of it, and the coefficients of the update.
    void compare() {
        add_up(0, p_.tensors);
        double* const metrics = p_.metrics + member_ * (3 + 2 * p_.scopes);
        if (p_.estimator != 0) {
            for (int64_t k = 0; k < p_.tensors; ++k) update_statistics(k);
            scope_factors(metrics + 3);
        }
        double largest = -std::numeric_limits<double>::infinity(), smallest = -largest;
        bool any = false;
        for (int64_t k = 0; k < p_.tensors; ++k) {
            const auto at = static_cast<size_t>(k);
            correction_[at] = correction(BETA_UTILITY, k);
            if (Plan::gating(p_, k) != Gating::global) continue;
            const double divisor = p_.raw_maximum ? 1.0 : correction_[at];
            largest = any ? std::max(total_[at].largest / divisor, largest) : total_[at].largest / divisor;
            smallest = std::min(total_[at].smallest / divisor, smallest);
            any = true;
        }
        const double used = largest <= 0 && !p_.raw_maximum ? -smallest : largest;
        for (int64_t k = 0; k < p_.tensors; ++k) set_coefficients(k, used, metrics + 3);
        metrics[0] = gradient_norm();
        metrics[1] = any ? largest : 0.0;
    }

    void set_coefficients(int64_t k, double largest, const double* by_scope) {
        const auto at = static_cast<size_t>(k);
        Numbers& n = numbers_[at];
        const double uncorrected = largest * correction_[at];
        // The inverse must be finite in float: infinity times a utility of 0 is NaN.
        n.scale = p_.raw_maximum || uncorrected > static_cast<double>(FLT_MIN) ? static_cast<float>(LOG2_E / uncorrected) : 0.0f;
        double coefficient = 1;
        if (p_.adam) {
            const double root = std::sqrt(correction(BETA2, k));
            n.eps = static_cast<float>(number(EPS, k) * root);
            coefficient = root / correction(BETA1, k);
        }
        if (n.protects && Plan::gating(p_, k) != Gating::none) coefficient *= number(STEP_FACTOR, k);
        if (p_.factor != nullptr) coefficient *= p_.factor[member_ * p_.tensors + k];
        if (p_.estimator != 0) coefficient *= by_scope[2 * p_.scope[p_.column[k]]];
        coefficient_[at] = coefficient;
        n.amount = static_cast<float>(-number(LR, k) * coefficient);
        if (!proportional(k)) set_noise(k);
    }

    // Norms of the utilities' rows, inverted, where gating is local.
    void rows(const Team& team, int64_t rank) {
        for (int64_t k = rank; k < p_.tensors; k += team.size) {
            if (Plan::gating(p_, k) != Gating::local) continue;
            const int64_t length = p_.row_lengths[k];
            const float* const utility = p_.utility[k] + member_ * p_.sizes[k];
            float* const inverse = rows_.data() + plan_.first_row[static_cast<size_t>(k)];
            for (int64_t r = 0; r < p_.sizes[k] / length; ++r) {
                const double norm = std::sqrt(kernel_.squares(utility + r * length, length));
                inverse[r] = static_cast<float>(LOG2_E / (norm == 0 ? 1.0 : norm));
            }
        }
    }

    void finish(int64_t begin, int64_t end, Team& team, int64_t rank) {
        const int64_t from = plan_.first[static_cast<size_t>(begin)], to = plan_.first[static_cast<size_t>(end)];
        // Of each tensor the memory holds whole blocks, from the first of `begin` on.
        const auto kept = [&](Block block, int64_t k) {
            const int64_t before = (plan_.first[static_cast<size_t>(k)] - from) * BLOCK + block.begin;
            block.noise = proportional(k) ? memory_ + before : nullptr;
            return block;
        };
        each_block(from, to, team, rank, [&](const Block& block, int64_t k, const Numbers& numbers, Sums& sums) {
            descend(kept(block, k), k, numbers, sums);
        });
        team.wait();
        if (rank == 0) {
            add_up(begin, end);
            for (int64_t k = begin; k < end; ++k) set_noise(k);
        }
        team.wait();
        each_block(from, to, team, rank, [&](const Block& block, int64_t k, const Numbers& numbers, Sums& sums) {
            if (proportional(k)) kernel_.shake(kept(block, k), numbers, sums);
        });
        team.wait();
    }

    void descend(Block block, int64_t k, const Numbers& numbers, Sums& sums) {
        const Gating gating = Plan::gating(p_, k);
        float scale[BLOCK];
        if (gating == Gating::local) {
            const float* const inverse = rows_.data() + plan_.first_row[static_cast<size_t>(k)];
            const int64_t length = p_.row_lengths[k];
            int64_t row = block.begin / length, left = length - block.begin % length;
            for (int64_t i = 0; i < block.count; ++i, --left) {
                if (left == 0) {
                    ++row;
                    left = length;
                }
                scale[i] = inverse[row];
            }
            block.scale = scale;
        }
        kernel_.descend_for(p_.adam != 0, gating, noisy(k))(block, numbers, sums);
    }

    // The noise's standard deviation in units of the update before the learning rate.
    double noise_coefficient(int64_t k) const {
        const auto at = static_cast<size_t>(k);
        if (!noisy(k)) return 0;
        const bool gated = Plan::gating(p_, k) != Gating::none;
        if (!proportional(k)) return number(SIGMA, k) * (gated ? number(STEP_FACTOR, k) : 1.0);
        const double gate = gated ? total_[at].gate : static_cast<double>(p_.sizes[k]);
        return number(SIGMA, k) * std::sqrt(total_[at].direction) * std::abs(coefficient_[at]) / std::sqrt(gate);
    }

    void set_noise(int64_t k) {
        const auto at = static_cast<size_t>(k);
        noise_coefficient_[at] = noise_coefficient(k);
        numbers_[at].noise_amount = static_cast<float>(-number(LR, k) * noise_coefficient_[at]);
    }

    void end() {
        double noise = 0, update = 0;
        for (int64_t k = 0; k < p_.tensors; ++k) {
            const auto at = static_cast<size_t>(k);
            noise += total_[at].noise * noise_coefficient_[at] * noise_coefficient_[at];
            update += total_[at].direction * coefficient_[at] * coefficient_[at];
        }
        p_.metrics[member_ * (3 + 2 * p_.scopes) + 2] = noise > 0 ? std::sqrt(noise / update) : 0.0;
    }

    const Problem& p_;
    const Plan& plan_;
    const Kernel& kernel_;
    float* const memory_;
    int64_t member_ = 0;
    std::vector<Sums> sums_;   // by block
    std::vector<Sums> total_;  // by tensor
    std::vector<Numbers> numbers_;
    std::vector<double> coefficient_, noise_coefficient_, correction_;
    std::vector<float> rows_;
    std::vector<double> totals_;
    std::vector<int64_t> most_steps_;
};
