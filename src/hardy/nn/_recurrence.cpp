// The LSTM over whole sequences with exact resets, float32, for the CPU: values and gradients of one layer of all members.
//
// Sequences [T, E] are cut at their episode starts into rows whose initial state is known: the stored one or zero. Rows, longest
// first, run side by side one time step after another, so that every product takes several rows. What a row computes does not
// depend on its neighbours, and the gradients of the weights are summed in the order of t * E + e, whatever rows ran together:
// neither the number of threads nor that of parts changes a bit.
//
// Linear layers over whole sequences (see `_recurrence_linear.h`) and PPO's loss (`_recurrence_loss.h`), so that an update needs
// nothing else. And one time step of a whole policy, weights packed beforehand: the rollout's case.
//
// Plain C interface, no Python or PyTorch headers. Called by hardy/nn/compiled.py, whose `_Problem` mirrors the one here, by
// hardy/nn/compiled_sequence.py, whose `_Linear` does, by hardy/nn/compiled_loss.py, whose `_Loss` does, and by
// hardy/nn/compiled_step.py, whose `_Layer` and `_Network` do.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "../_entry.h"
#include "../_threads.h"

namespace {

using hardy::share_out;

struct Problem {
    int64_t members, steps, envs, inputs, hidden;
    int64_t state_stride;  // from one environment's stored state to the next one's
    int64_t parts;         // of each member's rows, run apart
    int64_t threads;
    int64_t level;  // newest instruction set allowed: 2 is AVX-512, 1 is AVX2, 0 is what every CPU of this kind has
    const float* x;                                              // [P, T, E, I]
    const unsigned char* is_first;                               // [P, T, E]
    const float *state_hidden, *state_cell;                      // [P, E, state_stride]
    const float *weight_ih, *weight_hh, *bias_ih, *bias_hh;      // as in torch.nn.LSTM, P in front
    float* output;                                               // [P, T, E, H]
    float* gates;                                                // [P, T, E, 4 H] activated; gradients: written over with theirs
    float* cell;                                                 // [P, T, E, H]
    const float* grad_output;                                    // [P, T, E, H]
    float* grad_x;                                               // [P, T, E, I], or null
    float *grad_weight_ih, *grad_weight_hh, *grad_bias;          // [P, ...]
};

// What one task works on: the rows of one part of one member. `m` counts their steps, all rows' first step first.
struct Rows {
    int64_t steps;         // of the longest row
    int64_t count;         // steps of all rows
    const int64_t* sizes;  // rows alive in each step
    const int64_t* at;     // by m: t * E + e
    const float* zeros;    // [H]
    const float *const *x, *const *hidden, *const *cell_before;  // by m: input, state before the step
    float *output, *gates, *cell;                                // the member's, by `at`
    const float* grad_output;
    float* grad_x;
    const float *weight_ih, *weight_hh, *bias_ih, *bias_hh;
};

// A block of the gradient of one weight matrix of one member, and of the biases: gates first .. last - 1.
struct Block {
    const float* const* factor;  // by t * E + e: what the weights were multiplied with
    const float* grad_gates;     // [T * E, 4 H]
    int64_t count, gates, columns;
    int64_t first, last, at;  // at: first column
    float* gradient;          // [4 H, columns]
    float* bias;              // [4 H], or null
};

enum Kind : int64_t { LINEAR, TANH, RELU, ELU, SILU, LSTM };

// A linear layer with its activation on the rows of every member.
struct Linear {
    int64_t members, rows, inputs, outputs;
    int64_t kind;  // the activation, or LINEAR
    int64_t adds;  // 1: the gradients of the inputs are added to what is there
    int64_t threads, level;
    const float* x;              // [P, M, I]
    const float *weight, *bias;  // [P, O, I], [P, O]
    float* output;               // [P, M, O]
    float* before;               // [P, M, O] what goes into a SILU, else null
    float* grad_output;          // [P, M, O], written over with the gradients ahead of an activation; null: values are wanted
    float* grad_x;               // [P, M, I], or null
    float *grad_weight, *grad_bias;
};

// PPO's loss from the outputs of actor and critics over M steps of every member.
struct Loss {
    int64_t members, rows, actions;  // actions: to choose from, or components of one
    int64_t critics, quantiles, targets;
    int64_t squared;  // 1: half the squared error instead of the quantile loss
    int64_t threads, level;
    float kappa;           // of the quantile Huber loss
    float most_log_ratio;  // beyond which a ratio does not grow
    const float *actor, *critic;       // [P, M, A], [P, M, C N]
    const float *log_std, *precision;  // [P, A] of a Gaussian and one over the deviation; null: actions are choices
    const int64_t* choices;            // [P, M]
    const float* action;               // [P, M, A]
    const float *old_log_prob, *advantage, *target;  // [P, M], [P, M], [P, M, G]
    const unsigned char* valid;                      // [P, M]
    const float *clip_range, *value_weight, *entropy_weight, *steps;  // [P]; steps: what sums are divided by
    float *grad_actor, *grad_critic, *grad_log_std;  // as what they are gradients of
    double* parts;  // [P, 5]: losses of policy and critics, entropy, KL, share of clipped ratios
};

// One layer of a policy: a linear one with its activation, or an LSTM cell.
struct Layer {
    int64_t kind, inputs, outputs;
    int64_t source;              // the layer whose output comes in; -1 is the observation
    int64_t hidden_at, cell_at;  // of an LSTM, where in the state its vectors begin
    int64_t panel_stride;        // from one member's panels to the next one's
    const float *weight, *bias;  // [P, O, I], [P, O]; an LSTM's as in torch.nn.LSTM, P in front
    const float *weight_hh, *bias_hh;
    float* panels;  // [P, panel_stride]
    float* output;  // [P, E, O]; an LSTM's is the hidden vector in `next_state`
};

struct Network {
    int64_t members, envs, state_size, layers;
    int64_t parts;  // of each member's environments, run apart
    int64_t threads, level;
    int64_t packing;  // 1: fill the panels from the weights; 0: take a step
    int64_t actor;    // the layer from whose outputs actions are drawn
    const Layer* layer;
    const float* obs;               // [P, E, I], as they come where `mean` is given
    const unsigned char* is_first;  // [P, E]
    const float* state;             // [P, E, state_size]
    float* next_state;              // [P, E, state_size]
    const double *mean, *inverse;   // [P, I] of the observations and one over their deviation; null: they come normalised
    float* normalized;              // [P, E, I], or null
    const float* noise;             // [P, E] for choices, [P, E, A] for actions; null: none are drawn
    const float* deviation;         // [P, A], or null
    int64_t* choices;               // [P, E], or null
    float* actions;                 // [P, E, A], or null
    double clip;                    // of normalised observations
};

// What one layer works on, by environment; all but `in` and `out` are an LSTM's.
struct LayerRows {
    const float *const *in, *const *hidden, *const *cell_before;
    float *const *out, *const *cell;
};

#define INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HARDY_DISPATCH
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
#define LANES 16
#define ROWS 6
namespace avx512 {
#include "_recurrence_kernel.h"
#include "_recurrence_step.h"
#include "_recurrence_loss.h"
}
#undef LANES
#undef ROWS
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
#define ROWS 3
namespace avx2 {
#include "_recurrence_kernel.h"
#include "_recurrence_step.h"
#include "_recurrence_loss.h"
}
#undef LANES
#undef ROWS
#pragma GCC pop_options
#endif

#define LANES 4
#if defined(__aarch64__)
#define ROWS 6
#else
#define ROWS 2
#endif
namespace plain {
#include "_recurrence_kernel.h"
#include "_recurrence_step.h"
#include "_recurrence_loss.h"
}

// A number no smaller than any width of a panel, for the size of the workspace.
constexpr int64_t WIDEST = 64;

struct Kernel {
    void (*forward)(const Problem&, const Rows&, float*);
    void (*backward)(const Problem&, const Rows&, float*, const float**, float**);
    void (*weight_gradient)(const Block&, float*, const float**, float**);
    void (*pack)(const Layer&, int64_t member);
    void (*run_layer)(const Layer&, int64_t member, const LayerRows&, int64_t count);
    void (*activate)(int64_t kind, const float* from, int64_t count, float* to);
    void (*deactivate)(int64_t kind, const float* before, const float* after, int64_t count, const float* gradient, float* to);
    void (*linear_inputs_back)(
        const float* const* weight, int64_t inputs, int64_t outputs, const float* const* from, int64_t count, bool add, float*,
        float* const* to);
    void (*column_sums)(const float*, int64_t count, int64_t width, int64_t first, int64_t last, bool add, float* to);
    void (*loss_of)(const Loss&, int64_t member, float*, double*);
    int64_t wide;  // columns of a panel
};

#define KERNEL(set) \
    {set::forward, set::backward, set::weight_gradient, set::pack, set::run_layer, set::activate, set::deactivate, \
     set::linear_inputs_back, set::column_sums, set::loss_of, set::WIDE}

Kernel choose(int64_t level) {
#ifdef HARDY_DISPATCH
    if (level >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return KERNEL(avx512);
    if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return KERNEL(avx2);
#endif
    static_cast<void>(level);
    return KERNEL(plain);
}

struct Row {
    int64_t begin, env, length;
    bool stored;
};

struct Part {
    std::vector<Row> rows;  // longest first
    int64_t count = 0;
};

// The rows of one member, dealt out longest first to the part with the fewest steps.
std::vector<Part> plan(const Problem& problem, int64_t member) {
    const unsigned char* is_first = problem.is_first + member * problem.steps * problem.envs;
    std::vector<Row> rows;
    for (int64_t env = 0; env < problem.envs; ++env) {
        int64_t begin = 0;
        for (int64_t t = 1; t <= problem.steps; ++t)
            if (t == problem.steps || is_first[t * problem.envs + env]) {
                rows.push_back({begin, env, t - begin, begin == 0 && !is_first[env]});
                begin = t;
            }
    }
    std::stable_sort(rows.begin(), rows.end(), [](const Row& one, const Row& other) { return one.length > other.length; });
    std::vector<Part> parts(static_cast<size_t>(problem.parts));
    for (const Row& row : rows) {
        Part& part = *std::min_element(
            parts.begin(), parts.end(), [](const Part& one, const Part& other) { return one.count < other.count; });
        part.rows.push_back(row);
        part.count += row.length;
    }
    return parts;
}

struct Task {
    int64_t member;
    Part rows;
};

// Memory that a thread keeps between calls.
struct Workspace {
    std::vector<float> memory;
    std::vector<const float*> from, x, hidden, cell_before;
    std::vector<float*> to;
    std::vector<int64_t> sizes, at;

    float* aligned(int64_t size) {
        if (memory.size() < static_cast<size_t>(size + 16)) memory.resize(static_cast<size_t>(size + 16));
        const auto address = reinterpret_cast<uintptr_t>(memory.data());
        return memory.data() + (64 - address % 64) % 64 / sizeof(float);
    }
};

void run_rows(const Problem& p, const Task& task, const float* zeros, const Kernel& kernel, Workspace& space) {
    const int64_t count = task.rows.count, H = p.hidden, I = p.inputs, block = task.member * p.steps * p.envs;
    const bool back = p.grad_output != nullptr;
    if (count == 0) return;  // fewer rows than parts
    const auto size = static_cast<size_t>(count);
    for (auto* pointers : {&space.x, &space.hidden, &space.cell_before}) pointers->resize(size);
    space.at.resize(size);
    space.sizes.clear();
    int64_t alive = static_cast<int64_t>(task.rows.rows.size()), m = 0;
    for (int64_t s = 0; m < count; ++s) {
        while (task.rows.rows[static_cast<size_t>(alive - 1)].length <= s) --alive;
        space.sizes.push_back(alive);
        for (int64_t r = 0; r < alive; ++r, ++m) {
            const Row& row = task.rows.rows[static_cast<size_t>(r)];
            const int64_t flat = (row.begin + s) * p.envs + row.env, before = block + flat - p.envs;
            const auto at = static_cast<size_t>(m);
            space.at[at] = flat;
            space.x[at] = p.x + (block + flat) * I;
            if (s > 0) {
                space.hidden[at] = p.output + before * H;
                space.cell_before[at] = p.cell + before * H;
            } else if (row.stored) {
                const int64_t stored = (task.member * p.envs + row.env) * p.state_stride;
                space.hidden[at] = p.state_hidden + stored;
                space.cell_before[at] = p.state_cell + stored;
            } else {
                space.hidden[at] = space.cell_before[at] = zeros;
            }
        }
    }
    const Rows rows{
        static_cast<int64_t>(space.sizes.size()), count, space.sizes.data(), space.at.data(), zeros,
        space.x.data(), space.hidden.data(), space.cell_before.data(),
        p.output + block * H, p.gates + block * 4 * H, p.cell + block * H,
        back ? p.grad_output + block * H : nullptr, p.grad_x != nullptr ? p.grad_x + block * I : nullptr,
        p.weight_ih + task.member * 4 * H * I, p.weight_hh + task.member * 4 * H * H,
        p.bias_ih + task.member * 4 * H, p.bias_hh + task.member * 4 * H};
    const int64_t widest = std::max(H, I) + WIDEST;
    if (!back) {
        kernel.forward(p, rows, space.aligned(4 * H + 16 + 4 * (H + WIDEST) * widest));
        return;
    }
    space.from.resize(static_cast<size_t>(std::max(4 * H, count)));
    space.to.resize(size);
    const int64_t carry = space.sizes[0] * H + 16;
    kernel.backward(p, rows, space.aligned(carry + 4 * H * widest), space.from.data(), space.to.data());
}

// What the weights of one member were multiplied with, by t * E + e: the inputs, then the hidden states before each step.
std::vector<const float*> factors(const Problem& p, int64_t member, const float* zeros) {
    const int64_t count = p.steps * p.envs, block = member * count;
    std::vector<const float*> found(static_cast<size_t>(2 * count));
    for (int64_t m = 0; m < count; ++m) {
        const float* hidden = zeros;
        if (!p.is_first[block + m])
            hidden = m < p.envs ? p.state_hidden + (member * p.envs + m) * p.state_stride : p.output + (block + m - p.envs) * p.hidden;
        found[static_cast<size_t>(m)] = p.x + (block + m) * p.inputs;
        found[static_cast<size_t>(count + m)] = hidden;
    }
    return found;
}

// The blocks of the weights' gradients of some members, and what they point to.
struct Blocks {
    std::vector<std::vector<const float*>> factor;
    std::vector<Block> blocks;
};

Blocks cut_gradients(const Problem& p, int64_t begin, int64_t end, int64_t threads, const float* zeros, const Kernel& kernel) {
    const int64_t count = p.steps * p.envs, H = p.hidden;
    // Of gates: few, since each packs the factors anew, but enough to share out.
    const int64_t panels = (p.inputs + kernel.wide - 1) / kernel.wide + (H + kernel.wide - 1) / kernel.wide;
    const int64_t ranges = threads > 1 ? std::min<int64_t>(4, 1 + (2 * threads - 1) / ((end - begin) * panels)) : 1;
    Blocks made;
    for (int64_t member = begin; member < end; ++member) {
        made.factor.push_back(factors(p, member, zeros));
        // Blocks of the same gates follow one another: their gradients are in the cache then.
        for (int64_t range = 0; range < ranges; ++range)
            for (int64_t matrix = 0; matrix < 2; ++matrix) {
                const int64_t columns = matrix ? H : p.inputs;
                float* const gradient = (matrix ? p.grad_weight_hh : p.grad_weight_ih) + member * 4 * H * columns;
                for (int64_t at = 0; at < columns; at += kernel.wide)
                    made.blocks.push_back({
                        made.factor.back().data() + matrix * count, p.gates + member * count * 4 * H, count, 4 * H, columns,
                        4 * H * range / ranges, 4 * H * (range + 1) / ranges, at, gradient,
                        matrix == 0 && at == 0 ? p.grad_bias + member * 4 * H : nullptr});
            }
    }
    return made;
}

void weight_gradient(const Block& block, const Kernel& kernel) {
    static thread_local Workspace space;
    space.from.resize(static_cast<size_t>(block.gates));
    space.to.resize(static_cast<size_t>(block.gates));
    kernel.weight_gradient(block, space.aligned(128 * WIDEST), space.from.data(), space.to.data());
}

int run(const Problem& problem) {
    const Kernel kernel = choose(problem.level);
    const std::vector<float> zeros(static_cast<size_t>(problem.hidden), 0.0f);
    std::vector<Task> tasks;
    for (int64_t member = 0; member < problem.members; ++member)
        for (Part& part : plan(problem, member)) tasks.push_back({member, std::move(part)});
    // The gradients of a member's weights follow its rows at once, while these are in the cache. Those of the last members are
    // shared out in small pieces behind, so that all threads end together.
    const bool back = problem.grad_output != nullptr;
    const int64_t behind = problem.parts > 1 ? problem.members : problem.threads > 1 ? problem.threads : 0;
    const int64_t at_once = back ? std::max<int64_t>(0, problem.members - behind) : 0;
    const bool done = share_out(tasks.size(), problem.threads, [&](size_t i) {
        static thread_local Workspace space;
        const int64_t member = tasks[i].member;
        run_rows(problem, tasks[i], zeros.data(), kernel, space);
        if (member >= at_once) return;
        const Blocks own = cut_gradients(problem, member, member + 1, 1, zeros.data(), kernel);
        for (const Block& block : own.blocks) weight_gradient(block, kernel);
    });
    if (!done || !back || at_once == problem.members) return done ? 0 : 1;
    const Blocks rest = cut_gradients(problem, at_once, problem.members, problem.threads, zeros.data(), kernel);
    return share_out(rest.blocks.size(), problem.threads, [&](size_t i) { weight_gradient(rest.blocks[i], kernel); }) ? 0 : 1;
}

#include "_recurrence_linear.h"

#include "_recurrence_act.h"

// One time step of environments begin .. end - 1 of one member, layer after layer.
void take_step(const Network& net, int64_t member, int64_t begin, int64_t end, const Kernel& kernel) {
    const int64_t S = net.state_size;
    const auto count = static_cast<size_t>(end - begin);
    const std::vector<float> zeros(static_cast<size_t>(S), 0.0f);
    std::vector<const float*> in(count), hidden(count), cell_before(count);
    std::vector<float*> out(count), cell(count);
    const LayerRows rows{in.data(), hidden.data(), cell_before.data(), out.data(), cell.data()};
    const float* const obs = net.mean == nullptr ? net.obs : net.normalized;
    if (net.mean != nullptr) normalize(net, member, begin, end);
    for (const Layer* layer = net.layer; layer != net.layer + net.layers; ++layer) {
        const Layer* source = layer->source < 0 ? nullptr : net.layer + layer->source;
        for (size_t r = 0; r < count; ++r) {
            const int64_t env = member * net.envs + begin + static_cast<int64_t>(r);
            if (source == nullptr)
                in[r] = obs + env * layer->inputs;
            else
                in[r] = source->kind == LSTM ? net.next_state + env * S + source->hidden_at : source->output + env * source->outputs;
            if (layer->kind == LSTM) {
                hidden[r] = net.is_first[env] ? zeros.data() : net.state + env * S + layer->hidden_at;
                cell_before[r] = net.is_first[env] ? zeros.data() : net.state + env * S + layer->cell_at;
                out[r] = net.next_state + env * S + layer->hidden_at;
                cell[r] = net.next_state + env * S + layer->cell_at;
            } else {
                out[r] = layer->output + env * layer->outputs;
            }
        }
        kernel.run_layer(*layer, member, rows, end - begin);
    }
    if (net.choices != nullptr) draw_choices(net, member, begin, end);
    if (net.actions != nullptr) draw_actions(net, member, begin, end);
}

int run(const Network& net) {
    const Kernel kernel = choose(net.level);
    if (net.packing) {
        const bool packed = share_out(static_cast<size_t>(net.members), net.threads, [&](size_t member) {
            for (const Layer* layer = net.layer; layer != net.layer + net.layers; ++layer)
                kernel.pack(*layer, static_cast<int64_t>(member));
        });
        return packed ? 0 : 1;
    }
    const bool done = share_out(static_cast<size_t>(net.members * net.parts), net.threads, [&](size_t i) {
        const int64_t member = static_cast<int64_t>(i) / net.parts, part = static_cast<int64_t>(i) % net.parts;
        take_step(net, member, net.envs * part / net.parts, net.envs * (part + 1) / net.parts, kernel);
    });
    return done ? 0 : 1;
}

int run(const Loss& loss) {
    const Kernel kernel = choose(loss.level);
    const bool done = share_out(static_cast<size_t>(loss.members), loss.threads, [&](size_t member) {
        static thread_local Workspace space;
        std::vector<double> of_log_std(static_cast<size_t>(loss.actions));
        float* const vectors = space.aligned(16 * std::max(loss.actions, loss.targets));
        kernel.loss_of(loss, static_cast<int64_t>(member), vectors, of_log_std.data());
    });
    return done ? 0 : 1;
}

}  // namespace

ENTRY(hardy_lstm, Problem, 3)          // values, or, where `grad_output` is given, gradients
ENTRY(hardy_linear, Linear, 2)         // the same
ENTRY(hardy_loss, Loss, 1)             // the loss and its gradients
ENTRY(hardy_policy_step, Network, 2)   // packs the weights or takes a step
