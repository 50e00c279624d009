// The arithmetic of one block of one member's tensor, for one instruction set. `_upgd.cpp` includes this file once for each, in
// a namespace of its own that has set LANES (floats in a vector), ROOT, LARGER and SMALLER (see there).
// Nothing from the standard library is instantiated here: the linker could give the copy made for one CPU to all.

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t Wide __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))

// What is left of a block behind its last whole vector; a whole vector needs no such care.
struct Whole {};
struct Part {
    int64_t count;
};

INLINE Vector load(const float* from, Whole) { return *reinterpret_cast<const Unaligned*>(from); }
INLINE void store(float* to, Vector value, Whole) { *reinterpret_cast<Unaligned*>(to) = value; }
INLINE Vector cut(Vector value, Whole) { return value; }
INLINE Vector cut(Vector value, Part part, float fill = 0.0f) {
    for (int64_t lane = part.count; lane < LANES; ++lane) value[lane] = fill;
    return value;
}
INLINE Vector cut(Vector value, Whole, float) { return value; }
INLINE Vector load(const float* from, Part part) {
    Vector value = {};
    for (int64_t lane = 0; lane < part.count; ++lane) value[lane] = from[lane];
    return value;
}
INLINE void store(float* to, Vector value, Part part) {
    for (int64_t lane = 0; lane < part.count; ++lane) to[lane] = value[lane];
}

template <class Body>
INLINE void each_vector(int64_t count, Body body) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) body(i, Whole{});
    if (i < count) body(i, Part{count - i});
}

INLINE Vector all(float value) { return Vector{} + value; }

INLINE double total(Vector value) {
    double sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += static_cast<double>(value[lane]);
    return sum;
}

// As torch.lerp: exact at both ends.
INLINE Vector lerp(Vector from, Vector to, float weight) {
    return weight < 0.5f ? from + (to - from) * weight : to - (to - from) * (1.0f - weight);
}

// 1 + 2^x, |x| kept below 86, so that the result can still be multiplied. NaN stays NaN.
INLINE Vector one_plus_exp2(Vector x) {
    x = LARGER(all(-86.0f), x);
    x = SMALLER(all(86.0f), x);
    const float round = 12582912.0f + 127.0f;  // 1.5 * 2^23: the sum's last bits are the rounded number, biased as an exponent
    const Vector shifted = x + round;
    const Vector f = x - (shifted - round);
    Vector sum = f * 0.00132647269f + 0.00967151266f;
    sum = sum * f + 0.0555073374f;
    sum = sum * f + 0.240222421f;
    sum = sum * f + 0.693146978f;
    const Vector power = (Vector)((Integers)shifted << 23);
    return power * (sum * f) + (power + 1.0f);
}

// -2 ln x for 0 < x < infinity and not denormal.
INLINE Vector minus_two_log(Vector x) {
    const Integers bits = (Integers)x;
    // The exponent of x / sqrt(1/2), rounded down and at its place in a float, leaves a mantissa in [sqrt(1/2), sqrt(2)).
    const Integers exponent = (bits - 0x3f3504f3) & static_cast<int32_t>(0xff800000);
    const Vector f = (Vector)(bits - exponent) - 1.0f;
    Vector sum = f * 0.203834693f - 0.320487735f;
    sum = sum * f + 0.342742558f;
    sum = sum * f - 0.398490059f;
    sum = sum * f + 0.499665338f;
    sum = sum * f - 0.666684914f;
    sum = sum * f + 1.0f;
    sum = sum * f - 2.0f;
    return sum * f + __builtin_convertvector(exponent, Vector) * (-1.38629436f * 0x1p-23f);
}

// Two normal numbers of two words (Box & Muller 1958), as `box_muller` in noise.py.
INLINE void box_muller(Words radius, Words angle, Vector& one, Vector& other) {
    const Vector uniform = __builtin_convertvector((Integers)(radius >> 1), Vector) * 0x1p-31f + 0x1p-32f;
    const Vector length = ROOT(minus_two_log(uniform));
    // Twice the sine and the cosine of half the angle: it is in [-pi / 2, pi / 2), so that there are no quarters to tell apart.
    const Vector half = __builtin_convertvector((Integers)angle, Vector) * 7.31459039e-10f;  // pi / 2^32
    const Vector square = half * half;
    Vector sine = square * 5.20010924e-06f - 0.000396132303f;
    sine = sine * square + 0.0166660346f;
    sine = sine * square - 0.333333142f;
    sine = sine * (square * half) + (half + half);
    Vector cosine = square * 2.31943849e-05f - 0.00138559271f;
    cosine = cosine * square + 0.0416639894f;
    cosine = cosine * square - 0.499999323f;
    cosine = cosine * square + 1.0f;
    const Vector across = length * sine;
    one = length - across * (sine * 0.5f);
    other = across * cosine;
}

// Normal numbers, places `begin` onwards of one tensor, as `standard_normal` in noise.py; `begin` is a multiple of 32. All
// words come before the first number: two short loops leave a processor more to do at once than one long one.
struct Normals {
    static constexpr int64_t COUNT = 512;
    Words words[COUNT / LANES];
    Vector numbers[COUNT / LANES];

    void draw(uint64_t key, uint64_t tensor, int64_t begin, int64_t count) {
        split_mix(((tensor << 40) + static_cast<uint64_t>(begin) / 2 + 1) * STEP + key, count);
        each_pair(count, [this](int64_t i, int64_t j) INLINE_LAMBDA {
            box_muller(words[i], words[j], numbers[i], numbers[j]);
        });
    }

  private:
    static constexpr uint64_t STEP = 0x9E3779B97F4A7C15u;

    // Of 32 numbers, vector i of the first half belongs to vector j of the second.
    template <class Body>
    static INLINE void each_pair(int64_t count, Body body) {
        for (int64_t i = 0; i * LANES < count; i += 32 / LANES) {
#pragma GCC unroll 4
            for (int64_t share = 0; share < 16 / LANES; ++share) body(i + share, i + share + 16 / LANES);
        }
    }

    // SplitMix64 (Steele, Lea & Flood 2014): of 16 results the lower halves for the radii of 32 numbers, the upper ones for
    // the angles.
    INLINE void split_mix(uint64_t first, int64_t count) {
        Wide counter = {};
        Integers odd = {};
        for (int lane = 0; lane < LANES / 2; ++lane) {
            counter[lane] = static_cast<uint64_t>(2 * lane) * STEP;
            odd[2 * lane + 1] = -1;
        }
        counter += first;
        each_pair(count, [&](int64_t i, int64_t j) INLINE_LAMBDA {
            Wide bits[2] = {counter, counter + STEP};  // of the even and of the odd lanes
            counter += LANES * STEP;
#pragma GCC unroll 2
            for (Wide& each : bits) {
                each = (each ^ (each >> 30)) * 0xBF58476D1CE4E5B9u;
                each = (each ^ (each >> 27)) * 0x94D049BB133111EBu;
                each = each ^ (each >> 31);
            }
            words[i] = odd ? (Words)(bits[1] << 32) : (Words)bits[0];
            words[j] = odd ? (Words)bits[1] : (Words)(bits[0] >> 32);
        });
    }
};

// Sum of squares of a row.
double squares(const float* row, int64_t count) {
    Vector sum = {};
    each_vector(count, [&](int64_t i, auto size) {
        const Vector value = load(row + i, size);
        sum += value * value;
    });
    return total(sum);
}

// Norm of the raw gradient; utilities, their extremes, and the moments; the running mean of VGS, if there is one, with its norm.
template <bool ADAM, bool MEAN>
void advance(const Block& of, const Numbers& its, Sums& sums) {
    const Block block = of;  // copies, which the stores cannot change
    const Numbers numbers = its;
    Vector gradient_square = {}, mean_square = {}, largest = all(-__builtin_inff()), smallest = all(__builtin_inff());
    each_vector(block.count, [&](int64_t i, auto size) {
        const Vector raw = load(block.gradient + i, size);
        gradient_square += raw * raw;
        if (MEAN) {
            const Vector mean = lerp(load(block.mean + i, size), raw, numbers.mean);
            store(block.mean + i, mean, size);
            mean_square += mean * mean;
        }
        const Vector gradient = raw * numbers.shrink;
        const Vector instant = -(gradient * load(block.weight + i, size));
        const Vector utility = lerp(load(block.utility + i, size), instant, numbers.utility);
        store(block.utility + i, utility, size);
        const Vector high = cut(utility, size, -__builtin_inff()), low = cut(utility, size, __builtin_inff());
        largest = LARGER(high, largest);
        smallest = SMALLER(low, smallest);
        if (ADAM) {
            store(block.first + i, lerp(load(block.first + i, size), gradient, numbers.first), size);
            store(block.second + i, lerp(load(block.second + i, size), gradient * gradient, numbers.second), size);
        }
    });
    sums.gradient = total(gradient_square);
    sums.mean = total(mean_square);
    sums.largest = sums.smallest = static_cast<double>(block.utility[0]);
    for (int lane = 0; lane < LANES; ++lane) {
        const double high = static_cast<double>(largest[lane]), low = static_cast<double>(smallest[lane]);
        sums.largest = high > sums.largest ? high : sums.largest;
        sums.smallest = low < sums.smallest ? low : sums.smallest;
    }
}

struct Update {
    Vector direction, gate;
};

// Direction of the update, behind its gate if that protects, and the gate: 1 / (1 + 2^(scale * utility)).
template <bool ADAM, Gating GATING, class Size>
INLINE Update gated(const Block& block, const Numbers& numbers, int64_t i, Size size) {
    Vector direction, divisor = all(1.0f);
    if (ADAM) {
        direction = load(block.first + i, size);
        divisor = ROOT(load(block.second + i, size)) + numbers.eps;
    } else {
        // A decay of 0 adds NaN where a weight is infinite: there is nothing left to lose there.
        direction = load(block.gradient + i, size) * numbers.shrink + load(block.weight + i, size) * numbers.decay;
    }
    if (GATING == Gating::none) return {ADAM ? direction / divisor : direction, all(1.0f)};
    const Vector scale = GATING == Gating::local ? load(block.scale + i, size) : all(numbers.scale);
    const Vector inverse_gate = one_plus_exp2(load(block.utility + i, size) * scale);
    // One division serves both: it is what takes longest.
    const Vector inverse = 1.0f / (divisor * inverse_gate);
    const Vector gate = ADAM ? divisor * inverse : inverse;
    if (numbers.protects) return {direction * inverse, gate};
    return {ADAM ? direction * (inverse * inverse_gate) : direction, gate};
}

// Move the weights; norms of update, gate and gated noise. Noise in proportion to the update is only kept: how much of it is
// added follows from these norms.
template <bool ADAM, Gating GATING, bool NOISE>
void descend(const Block& of, const Numbers& its, Sums& sums) {
    const Block block = of;  // copies, which the stores cannot change
    const Numbers numbers = its;
    Vector direction_square = {}, gate_square = {}, noise_square = {};
    Normals normals;
    for (int64_t begin = 0; begin < block.count; begin += Normals::COUNT) {
        const int64_t count = block.count - begin < Normals::COUNT ? block.count - begin : Normals::COUNT;
        if (NOISE) normals.draw(numbers.key, numbers.tensor, block.begin + begin, count);
        each_vector(count, [&](int64_t at, auto size) INLINE_LAMBDA {
            const int64_t i = begin + at;
            const Update update = gated<ADAM, GATING>(block, numbers, i, size);
            direction_square += update.direction * update.direction;
            Vector weight = load(block.weight + i, size) * numbers.keep + update.direction * numbers.amount;
            if (NOISE) {
                const Vector normal = normals.numbers[at / LANES];
                const Vector shaken = GATING == Gating::none ? cut(normal, size) : cut(update.gate * normal, size);
                noise_square += shaken * shaken;
                if (GATING != Gating::none) {
                    const Vector gate = cut(update.gate, size);
                    gate_square += gate * gate;
                }
                if (block.noise == nullptr)
                    weight += shaken * numbers.noise_amount;
                else
                    store(block.noise + i, shaken, size);
            }
            store(block.weight + i, weight, size);
        });
    }
    sums.direction = total(direction_square);
    sums.gate = total(gate_square);
    sums.noise = total(noise_square);
}

// Add the noise that was kept.
void shake(const Block& of, const Numbers& its, Sums&) {
    const Block block = of;
    const float amount = its.noise_amount;
    each_vector(block.count, [&](int64_t i, auto size) {
        store(block.weight + i, load(block.weight + i, size) + load(block.noise + i, size) * amount, size);
    });
}

template <bool ADAM>
Pass descend_with(Gating gating, bool noise) {
    if (gating == Gating::global) return noise ? descend<ADAM, Gating::global, true> : descend<ADAM, Gating::global, false>;
    if (gating == Gating::local) return noise ? descend<ADAM, Gating::local, true> : descend<ADAM, Gating::local, false>;
    return noise ? descend<ADAM, Gating::none, true> : descend<ADAM, Gating::none, false>;
}

Pass advance_for(bool adam, bool mean) {
    if (adam) return mean ? advance<true, true> : advance<true, false>;
    return mean ? advance<false, true> : advance<false, false>;
}

Pass descend_for(bool adam, Gating gating, bool noise) {
    return adam ? descend_with<true>(gating, noise) : descend_with<false>(gating, noise);
}

const Kernel kernel = {squares, advance_for, descend_for, shake};

#undef INLINE
