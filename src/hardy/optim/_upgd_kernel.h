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
    const float round = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the rounded number
    const Vector shifted = x + round;
    const Vector f = x - (shifted - round);
    Vector sum = f * 0.00132647269f + 0.00967151266f;
    sum = sum * f + 0.0555073374f;
    sum = sum * f + 0.240222421f;
    sum = sum * f + 0.693146978f;
    const Vector power = (Vector)(((Integers)shifted << 23) + 0x3f800000);
    return power * (sum * f) + (power + 1.0f);
}

// -2 ln x for 0 < x < infinity and not denormal.
INLINE Vector minus_two_log(Vector x) {
    const Integers bits = (Integers)x;
    // The exponent of x / sqrt(1/2), rounded down, leaves a mantissa in [sqrt(1/2), sqrt(2)).
    const Integers exponent = (bits - 0x3f3504f3) >> 23;
    const Vector f = (Vector)(bits - (exponent << 23)) - 1.0f;
    Vector sum = f * 0.203834495f - 0.320487587f;
    sum = sum * f + 0.342742558f;
    sum = sum * f - 0.398490073f;
    sum = sum * f + 0.499665338f;
    sum = sum * f - 0.666684914f;
    const Vector square = f * f;
    sum = (sum * f + 1.0f) * square - 2.0f * f;
    return __builtin_convertvector(exponent, Vector) * -1.38629436f + sum;
}

// Two normal numbers of two words (Box & Muller 1958), as `box_muller` in noise.py.
INLINE void box_muller(Words radius, Words angle, Vector& one, Vector& other) {
    const Vector uniform = __builtin_convertvector((Integers)(radius >> 1), Vector) * 0x1p-31f + 0x1p-32f;
    const Vector length = ROOT(minus_two_log(uniform));
    // A whole number of quarter turns, the first two bits of `turned`, plus a rest of at most half a quarter.
    const Words turned = angle + 0x20000000u;
    const Vector phi = __builtin_convertvector((Integers)(angle << 2), Vector) * 3.65729520e-10f;  // 2 pi / 2^34
    const Vector square = phi * phi;
    Vector sine = square * -0.000195173f + 0.008332178f;
    sine = (sine * square - 0.16666655f) * (square * phi) + phi;
    Vector cosine = square * 2.4438452e-05f - 0.0013887368f;
    cosine = cosine * square + 0.041666646f;
    cosine = (cosine * square - 0.5f) * square + 1.0f;
    const Integers odd = (Integers)(turned & 0x40000000u) != 0;
    const Vector across = odd ? sine : cosine, along = odd ? cosine : sine;
    one = length * (Vector)((Words)across ^ ((turned + 0x40000000u) & 0x80000000u));
    other = length * (Vector)((Words)along ^ (turned & 0x80000000u));
}

// 32 normal numbers, places 32 * group onwards of one tensor, as `standard_normal` in noise.py: SplitMix64 (Steele, Lea & Flood
// 2014) of 16 counters.
INLINE void normals(uint64_t key, uint64_t tensor, uint64_t group, Vector* numbers) {
    const uint64_t step = 0x9E3779B97F4A7C15u;
    for (int share = 0; share < 16 / LANES; ++share) {
        Wide offset = {};
        for (int lane = 0; lane < LANES / 2; ++lane) offset[lane] = static_cast<uint64_t>(share * LANES + 2 * lane) * step;
        const uint64_t first = ((tensor << 40) + 16 * group + 1) * step + key;
        Wide bits[2] = {offset + first, offset + (first + step)};  // of the even and of the odd counters
        for (Wide& each : bits) {
            each = (each ^ (each >> 30)) * 0xBF58476D1CE4E5B9u;
            each = (each ^ (each >> 27)) * 0x94D049BB133111EBu;
            each = each ^ (each >> 31);
        }
        const Wide low = Wide{} + 0xffffffffu;
        const Words radius = (Words)((bits[0] & low) | (bits[1] << 32));
        const Words angle = (Words)((bits[0] >> 32) | (bits[1] & ~low));
        box_muller(radius, angle, numbers[share], numbers[16 / LANES + share]);
    }
}

// Sum of squares of a row.
double squares(const float* row, int64_t count) {
    Vector sum = {};
    each_vector(count, [&](int64_t i, auto size) {
        const Vector value = load(row + i, size);
        sum += value * value;
    });
    return total(sum);
}

// The raw gradient's norm and the running mean of VGS, if there is one, with its norm.
void measure(const Block& of, const Numbers& its, Sums& sums) {
    const Block block = of;  // copies, which the stores cannot change
    const Numbers numbers = its;
    Vector gradient_square = {}, mean_square = {};
    if (block.mean == nullptr) {
        sums.gradient = squares(block.gradient, block.count);
        return;
    }
    each_vector(block.count, [&](int64_t i, auto size) {
        const Vector gradient = load(block.gradient + i, size);
        const Vector mean = lerp(load(block.mean + i, size), gradient, numbers.mean);
        store(block.mean + i, mean, size);
        gradient_square += gradient * gradient;
        mean_square += mean * mean;
    });
    sums.gradient = total(gradient_square);
    sums.mean = total(mean_square);
}

// Utilities, their extremes, and the moments.
template <bool ADAM>
void advance(const Block& of, const Numbers& its, Sums& sums) {
    const Block block = of;  // copies, which the stores cannot change
    const Numbers numbers = its;
    Vector gradient_square = {}, largest = all(-__builtin_inff()), smallest = all(__builtin_inff());
    each_vector(block.count, [&](int64_t i, auto size) {
        const Vector raw = load(block.gradient + i, size);
        gradient_square += raw * raw;
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
        direction = load(block.gradient + i, size) * numbers.shrink;
        if (numbers.decay != 0.0f) direction += load(block.weight + i, size) * numbers.decay;
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
    constexpr int64_t together = NOISE ? 32 : LANES;
    Vector noise[32 / LANES];
    for (int64_t begin = 0; begin < block.count; begin += together) {
        if (NOISE) normals(numbers.key, numbers.tensor, static_cast<uint64_t>(block.begin + begin) / 32, noise);
        const auto move = [&](int64_t i, int64_t j, auto size) INLINE_LAMBDA {
            const Update update = gated<ADAM, GATING>(block, numbers, i, size);
            direction_square += update.direction * update.direction;
            Vector weight = load(block.weight + i, size) * numbers.keep + update.direction * numbers.amount;
            if (NOISE) {
                const Vector shaken = GATING == Gating::none ? cut(noise[j], size) : cut(update.gate * noise[j], size);
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
        };
        if (begin + together <= block.count) {
#pragma GCC unroll 16
            for (int64_t j = 0; j < together / LANES; ++j) move(begin + j * LANES, j, Whole{});
        } else {
            for (int64_t j = 0; begin + j * LANES < block.count; ++j) {
                const int64_t i = begin + j * LANES;
                if (i + LANES <= block.count)
                    move(i, j, Whole{});
                else
                    move(i, j, Part{block.count - i});
            }
        }
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

Pass descend_for(bool adam, Gating gating, bool noise) {
    return adam ? descend_with<true>(gating, noise) : descend_with<false>(gating, noise);
}

const Kernel kernel = {squares, measure, advance<false>, advance<true>, descend_for, shake};

#undef INLINE
