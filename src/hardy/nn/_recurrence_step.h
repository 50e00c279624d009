// One layer of a policy on some rows of one member, for one instruction set: environments in one time step, or, of a linear layer,
// the steps of a sequence. Included beside `_recurrence_kernel.h`, whose loops it uses: sums are taken in the same order as over
// whole sequences.

// A layer of few outputs, as heads are, fills one vector only: four would compute mostly what nobody asked for.
inline bool narrow(const Layer& layer) { return layer.kind != LSTM && layer.outputs <= LANES; }

// Outputs that one panel of a layer holds (an LSTM's with their four gates), and the length of its lines.
inline int64_t panel_outputs(const Layer& layer) { return layer.kind == LSTM || narrow(layer) ? LANES : WIDE; }
inline int64_t panel_width(const Layer& layer) { return narrow(layer) ? LANES : WIDE; }

inline int64_t panel_depth(const Layer& layer) { return layer.inputs + (layer.kind == LSTM ? layer.outputs : 0); }

// Panels of one member: a line of biases, then a line for each input and, for an LSTM, each hidden unit.
void pack(const Layer& layer, int64_t member) {
    const int64_t depth = panel_depth(layer), inputs = layer.inputs, outputs = layer.outputs, width = panel_width(layer);
    const bool cells = layer.kind == LSTM;
    const int64_t rows = cells ? 4 * outputs : outputs;
    float* panel = layer.panels + member * layer.panel_stride;
    for (int64_t at = 0; at < outputs; at += panel_outputs(layer), panel += (1 + depth) * width)
        for (int64_t lane = 0; lane < width; lane += LANES) {
            // Of the row that comes first, and how many there are: a gate's units, or outputs side by side.
            const int64_t row = cells ? lane / LANES * outputs + at : at + lane, count = cells ? outputs - at : outputs - row;
            for (int64_t i = 0; i < LANES; ++i) {
                const int64_t place = member * rows + row + i;
                panel[lane + i] = i >= count ? 0.0f : cells ? layer.bias[place] + layer.bias_hh[place] : layer.bias[place];
            }
            float* const to = panel + width + lane;
            pack_lanes(layer.weight + (member * rows + row) * inputs, count, inputs, to, width);
            if (cells)
                pack_lanes(layer.weight_hh + (member * rows + row) * outputs, count, outputs, to + inputs * width, width);
        }
}

inline Vector activated(Vector x, int64_t kind) {
    const Vector zero = {};
    Vector power;
    switch (kind) {
        case TANH: return tanh(x);
        case RELU: return x < zero ? zero : x;
        case ELU: return x > zero ? x : exp_minus_one(x, power);
        case SILU: return x * sigmoid(x);
        default: return x;
    }
}

template <int VECTORS>
struct LinearBlock {
    const Layer& layer;
    const LayerRows& rows;
    const float* panel;
    int64_t at;  // first output of the panel

    template <int COUNT>
    void run(int64_t first) {
        Vector sums[COUNT][VECTORS];
        for (int v = 0; v < VECTORS; ++v)
            for (int r = 0; r < COUNT; ++r) sums[r][v] = reinterpret_cast<const Vector*>(panel)[v];
        accumulate(sums, rows.in + first, 1, panel + VECTORS * LANES, layer.inputs);
        for (int r = 0; r < COUNT; ++r)
            for (int64_t v = 0, unit = at; v < VECTORS && unit < layer.outputs; ++v, unit += LANES)
                store(rows.out[first + r] + unit, activated(sums[r][v], layer.kind), layer.outputs - unit);
    }
};

struct CellBlock {
    const Layer& layer;
    const LayerRows& rows;
    const float* panel;
    int64_t at;

    template <int COUNT>
    void run(int64_t first) {
        Vector sums[COUNT][4];
        for (int v = 0; v < 4; ++v)
            for (int r = 0; r < COUNT; ++r) sums[r][v] = reinterpret_cast<const Vector*>(panel)[v];
        accumulate(sums, rows.in + first, 1, panel + WIDE, layer.inputs);
        accumulate(sums, rows.hidden + first, 1, panel + (1 + layer.inputs) * WIDE, layer.outputs);
        for (int r = 0; r < COUNT; ++r) cell(first + r, sums[r]);
    }

    INLINE void cell(int64_t row, const Vector (&sums)[4]) {
        const int64_t units = layer.outputs - at;
        const Vector cell = sigmoid(sums[0]) * tanh(sums[2]) + sigmoid(sums[1]) * load(rows.cell_before[row] + at, units);
        store(rows.cell[row] + at, cell, units);
        store(rows.out[row] + at, sigmoid(sums[3]) * tanh(cell), units);
    }
};

template <class Block>
void run_panels(const Layer& layer, int64_t member, const LayerRows& rows, int64_t count) {
    const float* panel = layer.panels + member * layer.panel_stride;
    const int64_t size = (1 + panel_depth(layer)) * panel_width(layer);
    for (int64_t at = 0; at < layer.outputs; at += panel_outputs(layer), panel += size) {
        Block block{layer, rows, panel, at};
        in_blocks(0, count, block);
    }
}

void run_layer(const Layer& layer, int64_t member, const LayerRows& rows, int64_t count) {
    if (layer.kind == LSTM)
        run_panels<CellBlock>(layer, member, rows, count);
    else if (narrow(layer))
        run_panels<LinearBlock<1>>(layer, member, rows, count);
    else
        run_panels<LinearBlock<4>>(layer, member, rows, count);
}

// to[i] = activation of from[i]
void activate(int64_t kind, const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, activated(load(from + i, count - i), kind), count - i);
}

// gradient[i] *= the activation's derivative, from its result, or for SILU from what went in
void deactivate(int64_t kind, const float* before, const float* after, int64_t count, const float* gradient, float* to) {
    const Vector zero = {}, one = zero + 1.0f;
    for (int64_t i = 0; i < count; i += LANES) {
        const Vector y = load(after + i, count - i), from = load(gradient + i, count - i);
        Vector slope;
        switch (kind) {
            case TANH: slope = one - y * y; break;
            case RELU: slope = y > zero ? one : zero; break;
            case ELU: slope = y > zero ? one : one + y; break;
            default: {
                const Vector x = load(before + i, count - i), s = sigmoid(x);
                slope = s + s * (x * (one - s));
            }
        }
        store(to + i, from * slope, count - i);
    }
}

// The gradients of a linear layer's inputs, for some rows: to[r] (+)= from[r] W
void linear_inputs_back(
    const float* const* weight, int64_t inputs, int64_t outputs, const float* const* from, int64_t count, bool add,
    float* panel, float* const* to) {
    for (int64_t at = 0; at < inputs; at += WIDE) {
        pack_columns(weight, outputs, inputs, at, panel);
        Product product{from, 1, panel, outputs, to, at, inputs, add};
        in_blocks(0, count, product);
    }
}
