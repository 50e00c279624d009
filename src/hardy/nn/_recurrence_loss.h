// PPO's loss of one member and its gradients, as `hardy.ppo.loss` without an adversary, for one instruction set. Included beside
// `_recurrence_kernel.h`. Every lane is a step: steps are independent of one another up to the sums.

// e^x, to rounding relative to itself; 0 where it would be next to the smallest number.
inline Vector exponential(Vector x) {
    Vector power;
    const Vector sum = reduced_power(x, power), zero = {};
    return x < zero - 87.0f ? zero : power * sum + power;
}

inline Vector absolute(Vector x) { return x < 0.0f ? -x : x; }

// Column j of rows first .. of a matrix with so many columns; 0 in the lanes behind the last row.
inline Vector column(const float* matrix, int64_t first, int64_t count, int64_t width, int64_t j) {
    if (width == 1) return load(matrix + first, count);
    Vector value = {};
    for (int64_t r = 0; r < LANES && r < count; ++r) value[r] = matrix[(first + r) * width + j];
    return value;
}

inline void store_column(float* matrix, int64_t first, int64_t count, int64_t width, int64_t j, Vector value) {
    for (int64_t r = 0; r < LANES && r < count; ++r) matrix[(first + r) * width + j] = value[r];
}

// Some steps, one a lane.
struct Steps {
    int64_t first, count;
    Integers valid;

    double sum(Vector value) const {
        double total = 0;
        for (int lane = 0; lane < LANES; ++lane)
            if (valid[lane]) total += static_cast<double>(value[lane]);
        return total;
    }
    // What is not valid has a gradient of 0, whatever it holds.
    Vector masked(Vector value) const { return valid ? value : Vector{}; }
};

// The surrogate (Schulman et al. 2017, eq. 7) from the log-probabilities; returns its derivative by them.
inline Vector surrogate(const Loss& loss, int64_t member, const Steps& steps, Vector log_prob, double* parts) {
    const int64_t at = member * loss.rows + steps.first;
    const Vector advantage = load(loss.advantage + at, steps.count), zero = {};
    const Vector difference = log_prob - load(loss.old_log_prob + at, steps.count), most = zero + loss.most_log_ratio;
    const Vector log_ratio = difference > most ? most : difference;
    Vector power;
    const Vector less_one = exp_minus_one(log_ratio, power), ratio = less_one + 1.0f;
    const Vector low = zero + (1.0f - loss.clip_range[member]), high = zero + (1.0f + loss.clip_range[member]);
    const Vector limited = ratio < low ? low : ratio > high ? high : ratio;
    const Vector free = ratio * advantage, bound = limited * advantage;
    parts[0] -= steps.sum(bound < free ? bound : free);
    parts[3] += steps.sum(less_one - log_ratio);
    const Vector one = zero + 1.0f;
    parts[4] += steps.sum(absolute(less_one) > zero + loss.clip_range[member] ? one : zero);
    const Vector derivative = bound < free ? zero : -free;
    return steps.masked(difference > most ? zero : derivative);
}

// Entropy and log-probability of choices by their logits.
inline void choices(const Loss& loss, int64_t member, const Steps& steps, Vector* log_probs, double* parts) {
    const int64_t A = loss.actions, at = member * loss.rows;
    const float* const logits = loss.actor + at * A;
    const Vector zero = {};
    Vector largest = column(logits, steps.first, steps.count, A, 0), total = {};
    for (int64_t j = 0; j < A; ++j) {
        log_probs[j] = column(logits, steps.first, steps.count, A, j);
        largest = log_probs[j] > largest ? log_probs[j] : largest;
    }
    for (int64_t j = 0; j < A; ++j) {
        log_probs[j] -= largest;
        total += exponential(log_probs[j]);
    }
    for (int lane = 0; lane < LANES; ++lane) total[lane] = __builtin_logf(total[lane]);
    Integers choice = {};
    for (int64_t r = 0; r < LANES && r < steps.count; ++r) choice[r] = static_cast<int32_t>(loss.choices[at + steps.first + r]);
    Vector chosen = {}, entropy = {};
    for (int64_t j = 0; j < A; ++j) {
        log_probs[j] -= total;
        chosen = choice == static_cast<int32_t>(j) ? log_probs[j] : chosen;
        entropy -= log_probs[j] < zero - 87.0f ? zero : exponential(log_probs[j]) * log_probs[j];
    }
    parts[2] += steps.sum(entropy);
    const Vector by_log_prob = surrogate(loss, member, steps, chosen, parts), one = zero + 1.0f;
    for (int64_t j = 0; j < A; ++j) {
        const Vector probability = exponential(log_probs[j]);
        const Vector of_chosen = (choice == static_cast<int32_t>(j) ? one : zero) - probability;
        const Vector of_entropy = log_probs[j] < zero - 87.0f ? zero : probability * (log_probs[j] + entropy);
        const Vector gradient = by_log_prob * of_chosen + loss.entropy_weight[member] * of_entropy;
        store_column(
            loss.grad_actor + at * A, steps.first, steps.count, A, j, steps.masked(gradient / loss.steps[member]));
    }
}

// Entropy and log-density of actions by their means, with a standard deviation for each component.
inline void actions(const Loss& loss, int64_t member, const Steps& steps, double* of_log_std, double* parts) {
    const int64_t A = loss.actions, at = member * loss.rows * A;
    const float *const mean = loss.actor + at, *const action = loss.action + at, *const log_std = loss.log_std + member * A;
    const float half_log_two_pi = 0.918938533f;
    const auto standard = [&](int64_t j) {
        const Vector distance = column(action, steps.first, steps.count, A, j) - column(mean, steps.first, steps.count, A, j);
        return distance * loss.precision[member * A + j];
    };
    Vector log_prob = {}, one = Vector{} + 1.0f;
    for (int64_t j = 0; j < A; ++j) {
        const Vector z = standard(j);
        log_prob -= 0.5f * z * z + (log_std[j] + half_log_two_pi);
        parts[2] += steps.sum(one * (log_std[j] + 0.5f + half_log_two_pi));
    }
    const Vector by_log_prob = surrogate(loss, member, steps, log_prob, parts);
    for (int64_t j = 0; j < A; ++j) {
        const Vector z = standard(j), gradient = by_log_prob * z * loss.precision[member * A + j];
        store_column(loss.grad_actor + at, steps.first, steps.count, A, j, steps.masked(gradient / loss.steps[member]));
        // A ratio of 0 has no gradient, however far the action is.
        const Vector pull = by_log_prob == Vector{} ? by_log_prob : by_log_prob * (z * z - 1.0f);
        of_log_std[j] += steps.sum(pull - loss.entropy_weight[member]);
    }
}

// Quantile Huber loss (Dabney et al. 2018, eq. 10), or half the squared error.
inline void values(const Loss& loss, int64_t member, const Steps& steps, Vector* targets, double* parts) {
    const int64_t N = loss.quantiles, G = loss.targets, K = loss.critics * N, at = member * loss.rows;
    const Vector zero = {}, one = zero + 1.0f;
    for (int64_t g = 0; g < G; ++g) targets[g] = column(loss.target + at * G, steps.first, steps.count, G, g);
    const float pairs = static_cast<float>(K * G), kappa = loss.kappa;
    const float factor = loss.value_weight[member] / (pairs * loss.steps[member]);
    Vector total = {};
    for (int64_t k = 0; k < K; ++k) {
        const Vector prediction = column(loss.critic + at * K, steps.first, steps.count, K, k);
        const Vector above = zero + (static_cast<float>(k % N) + 0.5f) / static_cast<float>(N), below = one - above;
        Vector gradient = {};
        for (int64_t g = 0; g < G; ++g) {
            const Vector error = targets[g] - prediction;
            if (loss.squared) {
                total += 0.5f * error * error;
                gradient -= error;
                continue;
            }
            const Vector size = absolute(error), width = zero + kappa, weight = error < zero ? below : above;
            const Vector inside = size > width ? width : size;
            const Vector sign = error < zero ? -one : error > zero ? one : error;  // NaN stays
            total += weight * (kappa > 0 ? inside * (size - 0.5f * inside) / kappa : size);
            gradient -= weight * sign * (kappa > 0 ? inside / kappa : one);
        }
        store_column(loss.grad_critic + at * K, steps.first, steps.count, K, k, steps.masked(gradient * factor));
    }
    parts[1] += steps.sum(total / pairs);
}

// `space` holds as many vectors as there are actions or targets, and of_log_std one number for each component.
void loss_of(const Loss& loss, int64_t member, float* space, double* of_log_std) {
    double* const parts = loss.parts + member * 5;
    for (int part = 0; part < 5; ++part) parts[part] = 0;
    for (int64_t j = 0; j < loss.actions; ++j) of_log_std[j] = 0;
    Vector* const vectors = reinterpret_cast<Vector*>(space);
    for (int64_t first = 0; first < loss.rows; first += LANES) {
        Steps steps{first, loss.rows - first < LANES ? loss.rows - first : LANES, {}};
        for (int64_t r = 0; r < steps.count; ++r) steps.valid[r] = loss.valid[member * loss.rows + first + r] ? -1 : 0;
        if (loss.log_std == nullptr)
            choices(loss, member, steps, vectors, parts);
        else
            actions(loss, member, steps, of_log_std, parts);
        values(loss, member, steps, vectors, parts);
    }
    const double count = static_cast<double>(loss.steps[member]);
    for (int part = 0; part < 5; ++part) parts[part] /= count;
    if (loss.log_std == nullptr) return;
    for (int64_t j = 0; j < loss.actions; ++j)
        loss.grad_log_std[member * loss.actions + j] = static_cast<float>(of_log_std[j] / count);
}
