// A linear layer with its activation over all steps of a sequence: values, or gradients. Rows m of every member are independent of
// one another; the gradients of the weights are summed in the order of m, whatever the number of threads.

// Runs task(member, first row, last row + 1) for parts of each member's rows.
template <class Part>
bool share_out_rows(const Linear& p, const Part& task) {
    const int64_t parts = std::min(p.rows, (p.threads + p.members - 1) / p.members);
    return share_out(static_cast<size_t>(p.members * parts), p.threads, [&](size_t i) {
        const int64_t member = static_cast<int64_t>(i) / parts, part = static_cast<int64_t>(i) % parts;
        task(member, p.rows * part / parts, p.rows * (part + 1) / parts);
    });
}

// rows[m] = values + (first + m) * width
template <class Value>
void point_at_rows(std::vector<Value*>& rows, Value* values, int64_t count, int64_t width) {
    rows.resize(static_cast<size_t>(count));
    for (int64_t m = 0; m < count; ++m) rows[static_cast<size_t>(m)] = values + m * width;
}

bool linear_forward(const Linear& p, const Kernel& kernel) {
    static thread_local Workspace panels;
    const int64_t stride = ((1 + p.inputs) * (p.outputs + WIDEST) + WIDEST - 1) / WIDEST * WIDEST;  // panels are aligned
    // Where the derivative is not to be had from the result, what goes into the activation is kept.
    const bool apart = p.before != nullptr;
    const Layer layer{apart ? LINEAR : p.kind, p.inputs, p.outputs, -1, 0, 0, stride, p.weight, p.bias,
                      nullptr, nullptr, panels.aligned(p.members * stride), nullptr};
    const bool packed = share_out(
        static_cast<size_t>(p.members), p.threads, [&](size_t member) { kernel.pack(layer, static_cast<int64_t>(member)); });
    return packed && share_out_rows(p, [&](int64_t member, int64_t first, int64_t last) {
        static thread_local Workspace space;
        const int64_t at = member * p.rows + first, count = last - first;
        point_at_rows(space.x, p.x + at * p.inputs, count, p.inputs);
        point_at_rows(space.to, (apart ? p.before : p.output) + at * p.outputs, count, p.outputs);
        kernel.run_layer(layer, member, {space.x.data(), nullptr, nullptr, space.to.data(), nullptr}, count);
        if (apart) kernel.activate(p.kind, p.before + at * p.outputs, count * p.outputs, p.output + at * p.outputs);
    });
}

// Into each part of rows: gradients ahead of the activation, and of the inputs.
bool linear_backward_rows(const Linear& p, const Kernel& kernel) {
    return share_out_rows(p, [&](int64_t member, int64_t first, int64_t last) {
        static thread_local Workspace space;
        const int64_t begin = member * p.rows + first, at = begin * p.outputs, count = last - first;
        if (p.kind != LINEAR)
            kernel.deactivate(
                p.kind, p.before == nullptr ? nullptr : p.before + at, p.output + at, count * p.outputs, p.grad_output + at,
                p.grad_output + at);
        if (p.grad_x == nullptr) return;
        point_at_rows<const float>(space.from, p.grad_output + at, count, p.outputs);
        point_at_rows(space.to, p.grad_x + begin * p.inputs, count, p.inputs);
        point_at_rows(space.x, p.weight + member * p.outputs * p.inputs, p.outputs, p.inputs);
        kernel.linear_inputs_back(
            space.x.data(), p.inputs, p.outputs, space.from.data(), count, p.adds != 0, space.aligned(p.outputs * WIDEST),
            space.to.data());
    });
}

// The weights' gradients: as W, or, of few inputs, transposed, which fills vectors with outputs instead of inputs.
bool linear_backward_weights(const Linear& p, const Kernel& kernel) {
    const float* const sums = p.grad_output;
    const bool transposed = p.inputs < p.outputs && p.inputs < kernel.wide;
    const int64_t lines = transposed ? p.inputs : p.outputs, columns = transposed ? p.outputs : p.inputs;
    std::vector<float> turned(static_cast<size_t>(transposed ? p.members * lines * columns : 0));
    std::vector<std::vector<const float*>> factor(static_cast<size_t>(p.members));
    std::vector<Block> blocks;
    for (int64_t member = 0; member < p.members; ++member) {
        const float *const x = p.x + member * p.rows * p.inputs, *const of_sums = sums + member * p.rows * p.outputs;
        auto& rows = factor[static_cast<size_t>(member)];
        point_at_rows(rows, transposed ? of_sums : x, p.rows, columns);
        float* const gradient = (transposed ? turned.data() : p.grad_weight) + member * lines * columns;
        for (int64_t at = 0; at < columns; at += kernel.wide)
            blocks.push_back({rows.data(), transposed ? x : of_sums, p.rows, lines, columns, 0, lines, at, gradient,
                              at == 0 && !transposed ? p.grad_bias + member * p.outputs : nullptr});
    }
    const bool done = share_out(blocks.size(), p.threads, [&](size_t i) {
        static thread_local Workspace space;
        space.from.resize(static_cast<size_t>(lines));
        space.to.resize(static_cast<size_t>(lines));
        kernel.weight_gradient(blocks[i], space.aligned(128 * WIDEST), space.from.data(), space.to.data());
    });
    if (!done || !transposed) return done;
    for (int64_t member = 0; member < p.members; ++member) {
        kernel.column_sums(
            sums + member * p.rows * p.outputs, p.rows, p.outputs, 0, p.outputs, false, p.grad_bias + member * p.outputs);
        const float* const from = turned.data() + member * lines * columns;
        float* const to = p.grad_weight + member * lines * columns;
        for (int64_t o = 0; o < columns; ++o)
            for (int64_t i = 0; i < lines; ++i) to[o * lines + i] = from[i * columns + o];
    }
    return true;
}

int run(const Linear& problem) {
    const Kernel kernel = choose(problem.level);
    if (problem.grad_output == nullptr) return linear_forward(problem, kernel) ? 0 : 1;
    return linear_backward_rows(problem, kernel) && linear_backward_weights(problem, kernel) ? 0 : 1;
}
