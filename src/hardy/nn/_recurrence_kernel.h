// The arithmetic of one part of one member, for one instruction set. `_recurrence.cpp` includes this file once for each, in a
// namespace of its own that has set LANES (floats in a vector) and ROWS (rows whose sums stay in registers together).
// Nothing from the standard library is instantiated here: the linker could give the copy made for one CPU to all.

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr int64_t WIDE = 4 * LANES;  // four vectors side by side: the four gates of LANES units, or 4 LANES columns
constexpr int64_t DEPTH = 128;       // steps whose outer products are summed while their panel stays in the nearest cache

// A number known when this is compiled: what a whole vector holds needs no look at how much is left.
template <int64_t VALUE>
struct Constant {
    constexpr operator int64_t() const { return VALUE; }
};

INLINE Vector load(const float* from, int64_t count) {
    if (count >= LANES) return *reinterpret_cast<const Unaligned*>(from);
    Vector value = {};
    std::memcpy(&value, from, static_cast<size_t>(count) * sizeof(float));
    return value;
}

INLINE void store(float* to, Vector value, int64_t count) {
    if (count >= LANES)
        *reinterpret_cast<Unaligned*>(to) = value;
    else
        std::memcpy(to, &value, static_cast<size_t>(count) * sizeof(float));
}

// e^r - 1 and 2^n with x = n ln 2 + r, |r| <= ln 2 / 2, where Taylor's polynomial of degree 7 suffices. Written so that a
// comparison with NaN keeps NaN.
inline Vector reduced_power(Vector x, Vector& power) {
    const Vector zero = {};
    x = x < zero - 87.0f ? zero - 87.0f : x;
    x = x > zero + 87.0f ? zero + 87.0f : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the rounded number
    const Vector shifted = x * 1.44269504f + round;
    const Vector n = shifted - round;
    const Vector r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vector sum = r * (1.0f / 5040) + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * (r * r) + r;
    power = (Vector)(((Integers)shifted << 23) + 0x3f800000);
    return sum;
}

// e^x - 1 = 2^n (e^r - 1) + (2^n - 1): nothing cancels around zero.
inline Vector exp_minus_one(Vector x, Vector& power) {
    const Vector sum = reduced_power(x, power);
    return power * sum + (power - 1.0f);
}

inline Vector sigmoid(Vector x) {
    Vector power;
    return 1.0f / (exp_minus_one(-x, power) + 2.0f);
}

inline Vector tanh(Vector x) {
    Vector power;
    const Vector e = exp_minus_one(x + x, power);
    return e / (e + 2.0f);
}

// sums[r][v] += sum over k of rows[r][k * stride] * panel[k][v]
template <int COUNT, int VECTORS>
INLINE void accumulate(
    Vector (&sums)[COUNT][VECTORS], const float* const* rows, int64_t stride, const float* panel, int64_t depth) {
    const float* row[COUNT];
    for (int r = 0; r < COUNT; ++r) row[r] = rows[r];
    for (int64_t k = 0; k < depth; ++k, panel += VECTORS * LANES) {
        Vector column[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) column[v] = reinterpret_cast<const Vector*>(panel)[v];
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; ++r) {
            const float scale = row[r][k * stride];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += scale * column[v];
        }
    }
}

template <int COUNT, int VECTORS>
INLINE void clear(Vector (&sums)[COUNT][VECTORS]) {
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = Vector{};
}

// Runs `block.run<COUNT>(first)` over rows begin .. end - 1 in blocks of at most ROWS, all of nearly the same size.
template <class Block>
inline void in_blocks(int64_t begin, int64_t end, Block& block) {
    for (int64_t blocks = (end - begin + ROWS - 1) / ROWS; blocks > 0; --blocks) {
        const int64_t count = (end - begin + blocks - 1) / blocks;
        switch (count) {
            case 1: block.template run<1>(begin); break;
            case 2: block.template run<2>(begin); break;
#if ROWS > 2
            case 3: block.template run<3>(begin); break;
#endif
#if ROWS > 3
            case 4: block.template run<4>(begin); break;
            case 5: block.template run<5>(begin); break;
            case 6: block.template run<6>(begin); break;
#endif
        }
        begin += count;
    }
}

// The first (or, from `half` = LANES / 2 on, the second) halves of two vectors, number by number in turns.
INLINE Vector in_turns(Vector one, Vector other, int32_t half) {
    Integers from = {};
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; ++lane) from[lane] = half + lane / 2 + lane % 2 * LANES;
#if defined(__clang__)
    Vector taken = {};
    for (int lane = 0; lane < LANES; ++lane) taken[lane] = from[lane] < LANES ? one[from[lane]] : other[from[lane] - LANES];
    return taken;
#else
    return __builtin_shuffle(one, other, from);
#endif
}

// to[k * stride + lane] = rows[lane][k] for LANES rows, each `depth` behind the one before, and LANES columns.
INLINE void transpose(const float* rows, int64_t depth, float* to, int64_t stride) {
    Vector lines[LANES];
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; ++lane) lines[lane] = load(rows + lane * depth, Constant<LANES>{});
#pragma GCC unroll 4
    for (int size = 1; size < LANES; size *= 2) {  // after each round, every vector holds parts of twice as many rows
        Vector mixed[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; ++i) {
            mixed[2 * i] = in_turns(lines[i], lines[i + LANES / 2], 0);
            mixed[2 * i + 1] = in_turns(lines[i], lines[i + LANES / 2], LANES / 2);
        }
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; ++lane) lines[lane] = mixed[lane];
    }
#pragma GCC unroll 16
    for (int k = 0; k < LANES; ++k) store(to + k * stride, lines[k], Constant<LANES>{});
}

// The same for `count` rows, at most LANES, and any number of columns; the lanes of rows that are not there become 0.
inline void pack_lanes(const float* rows, int64_t count, int64_t depth, float* to, int64_t stride) {
    int64_t k = 0;
    if (count >= LANES)
        for (; k + LANES <= depth; k += LANES) transpose(rows + k, depth, to + k * stride, stride);
    for (; k < depth; ++k)
        for (int64_t lane = 0; lane < LANES; ++lane) to[k * stride + lane] = lane < count ? rows[lane * depth + k] : 0.0f;
}

// Panels of a matrix [4 hidden, depth], transposed: panel j holds [depth][4 gates][LANES units].
inline void pack_gates(const float* weight, int64_t hidden, int64_t depth, float* panels) {
    for (int64_t unit = 0; unit < hidden; unit += LANES, panels += depth * WIDE)
        for (int64_t gate = 0; gate < 4; ++gate)
            pack_lanes(weight + (gate * hidden + unit) * depth, hidden - unit, depth, panels + gate * LANES, WIDE);
}

// One panel: columns first .. first + WIDE - 1, where they exist, of the given rows of a matrix with that many columns.
inline void pack_columns(const float* const* rows, int64_t count, int64_t columns, int64_t first, float* panel) {
    const int64_t width = columns - first < WIDE ? columns - first : WIDE;
    for (int64_t k = 0; k < count; ++k) std::memcpy(panel + k * WIDE, rows[k] + first, static_cast<size_t>(width) * sizeof(float));
}

// What the input gives to the gates: bias + W_ih x[m].
struct Projection {
    const Problem& problem;
    const float* panel;
    const float* bias;
    const Rows& rows;
    int64_t unit;

    template <int COUNT>
    void run(int64_t first) {
        problem.hidden - unit >= LANES ? run<COUNT>(first, Constant<LANES>{}) : run<COUNT>(first, problem.hidden - unit);
    }

    template <int COUNT, class Count>
    INLINE void run(int64_t first, Count units) {
        const int64_t hidden = problem.hidden;
        Vector sums[COUNT][4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const Vector start = load(bias + v * hidden + unit, units);
#pragma GCC unroll 8
            for (int r = 0; r < COUNT; ++r) sums[r][v] = start;
        }
        accumulate(sums, rows.x + first, 1, panel, problem.inputs);
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) store(rows.gates + (rows.at[first + r] * 4 + v) * hidden + unit, sums[r][v], units);
    }
};

// One time step: gates come in as sums over the input, go out activated.
struct Step {
    const Problem& problem;
    const Rows& rows;
    const float* panel;
    int64_t unit;
    bool starting;

    template <int COUNT>
    void run(int64_t first) {
        problem.hidden - unit >= LANES ? run<COUNT>(first, Constant<LANES>{}) : run<COUNT>(first, problem.hidden - unit);
    }

    template <int COUNT, class Count>
    INLINE void run(int64_t first, Count units) {
        const int64_t hidden = problem.hidden;
        Vector sums[COUNT][4];
        bool stored = !starting;
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; ++r) {
            stored |= rows.hidden[first + r] != rows.zeros;
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) sums[r][v] = load(rows.gates + (rows.at[first + r] * 4 + v) * hidden + unit, units);
        }
        if (stored) accumulate(sums, rows.hidden + first, 1, panel, hidden);
        for (int r = 0; r < COUNT; ++r) {
            const int64_t m = first + r, at = rows.at[m];
            const Vector input = sigmoid(sums[r][0]), forget = sigmoid(sums[r][1]);
            const Vector candidate = tanh(sums[r][2]), output = sigmoid(sums[r][3]);
            const Vector cell = input * candidate + forget * load(rows.cell_before[m] + unit, units);
            float* gates = rows.gates + at * 4 * hidden + unit;
            store(gates, input, units);
            store(gates + hidden, forget, units);
            store(gates + 2 * hidden, candidate, units);
            store(gates + 3 * hidden, output, units);
            store(rows.cell + at * hidden + unit, cell, units);
            store(rows.output + at * hidden + unit, output * tanh(cell), units);
        }
    }
};

// One time step backwards: gradients of the sums into the gates, in place of these, and of the cell before (in `carry`, by row).
struct StepBack {
    const Problem& problem;
    const Rows& rows;
    const float* panel;
    const float* const* gradient_after;  // of the gates one step later, by row
    float* carry;
    int64_t begin;  // m of the first row's step
    int64_t unit;
    bool ending;

    template <int COUNT>
    void run(int64_t first) {
        Vector sums[COUNT][4];
        clear(sums);
        if (!ending) accumulate(sums, gradient_after + first, 1, panel, 4 * problem.hidden);
        for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 1  // the code would be long, and no faster
            for (int v = 0; v < 4; ++v) {
                const int64_t at = unit + v * LANES, left = problem.hidden - at;
                if (left >= LANES)
                    one(first + r, at, Constant<LANES>{}, sums[r][v]);
                else if (left > 0)
                    one(first + r, at, left, sums[r][v]);
            }
    }

    template <class Count>
    INLINE void one(int64_t row, int64_t at, Count units, Vector from_later) {
        const int64_t hidden = problem.hidden, m = begin + row, flat = rows.at[m];
        const float* gates = rows.gates + flat * 4 * hidden + at;
        const Vector input = load(gates, units), forget = load(gates + hidden, units);
        const Vector candidate = load(gates + 2 * hidden, units), output = load(gates + 3 * hidden, units);
        const Vector squashed = tanh(load(rows.cell + flat * hidden + at, units));
        const Vector grad_hidden = from_later + load(rows.grad_output + flat * hidden + at, units);
        Vector grad_cell = grad_hidden * output * (1.0f - squashed * squashed);
        if (!ending) grad_cell += load(carry + row * hidden + at, units);
        float* gradient = rows.gates + flat * 4 * hidden + at;
        store(gradient, grad_cell * candidate * input * (1.0f - input), units);
        store(gradient + hidden, grad_cell * load(rows.cell_before[m] + at, units) * forget * (1.0f - forget), units);
        store(gradient + 2 * hidden, grad_cell * input * (1.0f - candidate * candidate), units);
        store(gradient + 3 * hidden, grad_hidden * squashed * output * (1.0f - output), units);
        store(carry + row * hidden + at, grad_cell * forget, units);
    }
};

// to[r] (+)= sum over k of from[r][k * stride] * panel[k]
struct Product {
    const float* const* from;
    int64_t stride;
    const float* panel;
    int64_t depth;
    float* const* to;
    int64_t at;
    int64_t columns;
    bool add;

    template <int COUNT>
    void run(int64_t first) {
        columns - at >= WIDE ? run<COUNT, true>(first) : run<COUNT, false>(first);
    }

    template <int COUNT, bool WHOLE>
    INLINE void run(int64_t first) {
        Vector sums[COUNT][4];
        clear(sums);
        accumulate(sums, from + first, stride, panel, depth);
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                const int64_t column = at + v * LANES, left = WHOLE ? LANES : columns - column;
                if (left <= 0) continue;
                float* const target = to[first + r] + column;
                store(target, add ? sums[r][v] + load(target, left) : sums[r][v], left);
            }
    }
};

void forward(const Problem& problem, const Rows& rows, float* workspace) {
    const int64_t hidden = problem.hidden, inputs = problem.inputs;
    float* bias = workspace;
    float* panels = bias + (4 * hidden + 15) / 16 * 16;
    for (int64_t i = 0; i < 4 * hidden; ++i) bias[i] = rows.bias_ih[i] + rows.bias_hh[i];
    pack_gates(rows.weight_ih, hidden, inputs, panels);
    for (int64_t unit = 0; unit < hidden; unit += LANES) {
        Projection projection{problem, panels + unit * 4 * inputs, bias, rows, unit};
        in_blocks(0, rows.count, projection);
    }
    pack_gates(rows.weight_hh, hidden, hidden, panels);
    int64_t begin = 0;
    for (int64_t s = 0; s < rows.steps; begin += rows.sizes[s++])
        for (int64_t unit = 0; unit < hidden; unit += LANES) {
            Step step{problem, rows, panels + unit * 4 * hidden, unit, s == 0};
            in_blocks(begin, begin + rows.sizes[s], step);
        }
}

// to[i] (+)= sum over m of values[m][i] for columns first .. last - 1
inline void column_sums(const float* values, int64_t count, int64_t width, int64_t first, int64_t last, bool add, float* to) {
    if (!add) std::memset(to + first, 0, static_cast<size_t>(last - first) * sizeof(float));
    for (int64_t m = 0; m < count; ++m)
        for (int64_t i = first; i < last; ++i) to[i] += values[m * width + i];
}

void weight_gradient(const Block& block, float* panel, const float** from, float** to) {
    for (int64_t begin = 0; begin < block.count; begin += DEPTH) {
        const int64_t count = block.count - begin < DEPTH ? block.count - begin : DEPTH;
        const float* grad_gates = block.grad_gates + begin * block.gates;
        for (int64_t i = block.first; i < block.last; ++i) {
            from[i] = grad_gates + i;
            to[i] = block.gradient + i * block.columns;
        }
        pack_columns(block.factor + begin, count, block.columns, block.at, panel);
        Product product{from, block.gates, panel, count, to, block.at, block.columns, begin > 0};
        in_blocks(block.first, block.last, product);
        if (block.bias != nullptr) column_sums(grad_gates, count, block.gates, block.first, block.last, begin > 0, block.bias);
    }
}

void backward(const Problem& problem, const Rows& rows, float* workspace, const float** from, float** to) {
    const int64_t hidden = problem.hidden, inputs = problem.inputs, gates = 4 * hidden;
    float* carry = workspace;
    float* panels = carry + (rows.sizes[0] * hidden + 15) / 16 * 16;
    for (int64_t k = 0; k < gates; ++k) from[k] = rows.weight_hh + k * hidden;
    for (int64_t unit = 0; unit < hidden; unit += WIDE) pack_columns(from, gates, hidden, unit, panels + unit * gates);
    int64_t begin = rows.count;
    for (int64_t s = rows.steps - 1; s >= 0; --s) {
        const int64_t size = rows.sizes[s], later = s + 1 < rows.steps ? rows.sizes[s + 1] : 0;
        for (int64_t r = 0; r < later; ++r) from[r] = rows.gates + rows.at[begin + r] * gates;
        begin -= size;
        for (int64_t unit = 0; unit < hidden; unit += WIDE) {
            StepBack step{problem, rows, panels + unit * gates, from, carry, begin, unit, false};
            in_blocks(0, later, step);
            step.ending = true;
            in_blocks(later, size, step);
        }
    }
    if (rows.grad_x == nullptr) return;
    for (int64_t k = 0; k < gates; ++k) from[k] = rows.weight_ih + k * inputs;
    for (int64_t at = 0; at < inputs; at += WIDE) pack_columns(from, gates, inputs, at, panels + at * gates);
    for (int64_t m = 0; m < rows.count; ++m) {
        from[m] = rows.gates + rows.at[m] * gates;
        to[m] = rows.grad_x + rows.at[m] * inputs;
    }
    for (int64_t at = 0; at < inputs; at += WIDE) {
        Product product{from, 1, panels + at * gates, gates, to, at, inputs, false};
        in_blocks(0, rows.count, product);
    }
}
