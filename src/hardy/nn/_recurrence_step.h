// One layer of a policy for one time step of some environments of one member, for one instruction set. Included beside
// `_recurrence_kernel.h`, whose loops it uses: sums are taken in the same order as over whole sequences.

// Columns of outputs that one panel of a layer holds: LANES units with their four gates, or WIDE outputs.
inline int64_t panel_outputs(const Layer& layer) { return layer.kind == LSTM ? LANES : WIDE; }

inline int64_t panel_depth(const Layer& layer) { return layer.inputs + (layer.kind == LSTM ? layer.outputs : 0); }

// Panels of one member: a line of biases, then a line for each input and, for an LSTM, each hidden unit. The places of outputs
// that the last panel lacks keep any number; what is computed from them is never stored.
void pack(const Layer& layer, int64_t member) {
    const int64_t tile = 16, depth = panel_depth(layer), inputs = layer.inputs, outputs = layer.outputs;
    const int64_t rows = layer.kind == LSTM ? 4 * outputs : outputs;
    const float* weight = layer.weight + member * rows * inputs;
    const float* bias = layer.bias + member * rows;
    const float* weight_hh = layer.kind == LSTM ? layer.weight_hh + member * rows * outputs : nullptr;
    const float* bias_hh = layer.kind == LSTM ? layer.bias_hh + member * rows : nullptr;
    float* panel = layer.panels + member * layer.panel_stride;
    for (int64_t at = 0; at < outputs; at += panel_outputs(layer), panel += (1 + depth) * WIDE)
        for (int64_t begin = 0; begin < depth; begin += tile) {
            const int64_t end = begin + tile < depth ? begin + tile : depth;
            for (int64_t lane = 0; lane < WIDE; ++lane) {
                const int64_t unit = layer.kind == LSTM ? at + lane % LANES : at + lane;
                if (unit >= outputs) continue;
                const int64_t row = layer.kind == LSTM ? lane / LANES * outputs + unit : unit;
                if (begin == 0) panel[lane] = layer.kind == LSTM ? bias[row] + bias_hh[row] : bias[row];
                for (int64_t k = begin; k < end; ++k)
                    panel[(1 + k) * WIDE + lane] = k < inputs ? weight[row * inputs + k] : weight_hh[row * outputs + k - inputs];
            }
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

struct LayerBlock {
    const Layer& layer;
    const LayerRows& rows;
    const float* panel;
    int64_t at;  // first output of the panel

    template <int COUNT>
    void run(int64_t first) {
        Vector sums[COUNT][4];
        for (int v = 0; v < 4; ++v)
            for (int r = 0; r < COUNT; ++r) sums[r][v] = reinterpret_cast<const Vector*>(panel)[v];
        accumulate<COUNT>(sums, rows.in + first, 1, panel + WIDE, layer.inputs);
        if (layer.kind == LSTM) {
            accumulate<COUNT>(sums, rows.hidden + first, 1, panel + (1 + layer.inputs) * WIDE, layer.outputs);
            for (int r = 0; r < COUNT; ++r) cell(first + r, sums[r]);
            return;
        }
        for (int r = 0; r < COUNT; ++r)
            for (int64_t v = 0, unit = at; v < 4 && unit < layer.outputs; ++v, unit += LANES)
                store(rows.out[first + r] + unit, activated(sums[r][v], layer.kind), layer.outputs - unit);
    }

    inline __attribute__((always_inline)) void cell(int64_t row, const Vector (&sums)[4]) {
        const int64_t units = layer.outputs - at;
        const Vector cell = sigmoid(sums[0]) * tanh(sums[2]) + sigmoid(sums[1]) * load(rows.cell_before[row] + at, units);
        store(rows.cell[row] + at, cell, units);
        store(rows.out[row] + at, sigmoid(sums[3]) * tanh(cell), units);
    }
};

void run_layer(const Layer& layer, int64_t member, const LayerRows& rows, int64_t count) {
    const float* panel = layer.panels + member * layer.panel_stride;
    for (int64_t at = 0; at < layer.outputs; at += panel_outputs(layer), panel += (1 + panel_depth(layer)) * WIDE) {
        LayerBlock block{layer, rows, panel, at};
        in_blocks(0, count, block);
    }
}
