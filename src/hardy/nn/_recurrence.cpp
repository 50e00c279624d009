// The LSTM over whole sequences with exact resets, float32, for the CPU: values and gradients of one layer of all members.
//
// Sequences [T, E] are cut at their episode starts into rows whose initial state is known: the stored one or zero. Rows, longest
// first, run side by side one time step after another, so that every product takes several rows. Memory in the order of the
// steps ("packed": step by step of a part's rows) is used inside only; inputs and outputs stay where they are, at t * E + e.
//
// Plain C interface, no Python or PyTorch headers. Called by hardy/nn/compiled.py, whose `Problem` mirrors the one here.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace {

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
    float *gates, *cell;                                         // [P, T * E, 4 H] activated, [P, T * E, H], both packed
    const float* grad_output;                                    // [P, T, E, H]
    float* grad_gates;                                           // [P, T * E, 4 H], packed
    float* grad_x;                                               // [P, T, E, I], or null
    float *grad_weight_ih, *grad_weight_hh, *grad_bias;          // [P, parts, ...]
};

// What one task works on: the rows of one part of one member. `m` counts its packed steps.
struct Rows {
    int64_t steps;                                     // of the longest row
    int64_t count;                                     // packed steps
    const int64_t* sizes;                              // rows alive in each step
    const float* zeros;                                // [H]
    const float *const *x, *const *hidden, *const *cell_before;  // by m: input, state before the step
    float* const* output;                              // by m
    const float* const* grad_output;                   // by m
    float* const* grad_x;                              // by m
    float *gates, *cell, *grad_gates;                  // packed, from this part's first step on
    const float *weight_ih, *weight_hh, *bias_ih, *bias_hh;
    float *grad_weight_ih, *grad_weight_hh, *grad_bias;
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HARDY_DISPATCH
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
#define LANES 16
#define ROWS 6
namespace avx512 {
#include "_recurrence_kernel.h"
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
}

// A number no smaller than any width of a panel, for the size of the workspace.
constexpr int64_t WIDEST = 64;

struct Kernel {
    void (*forward)(const Problem&, const Rows&, float*);
    void (*backward)(const Problem&, const Rows&, float*, const float**, float**);
};

Kernel choose(int64_t level) {
#ifdef HARDY_DISPATCH
    if (level >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return {avx512::forward, avx512::backward};
    if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {avx2::forward, avx2::backward};
#endif
    static_cast<void>(level);
    return {plain::forward, plain::backward};
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
    int64_t member, part, begin;  // begin: its first packed step within the member
    Part rows;
};

float* aligned(std::vector<float>& memory, int64_t size) {
    if (memory.size() < static_cast<size_t>(size + 16)) memory.resize(static_cast<size_t>(size + 16));
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64 / sizeof(float);
}

void run_task(const Problem& p, const Task& task, const Kernel& kernel, std::vector<float>& memory) {
    const int64_t count = task.rows.count, H = p.hidden, I = p.inputs, block = task.member * p.steps * p.envs;
    const bool back = p.grad_output != nullptr;
    const int64_t share = task.member * p.parts + task.part;
    float* const grad_weight_ih = back ? p.grad_weight_ih + share * 4 * H * I : nullptr;
    float* const grad_weight_hh = back ? p.grad_weight_hh + share * 4 * H * H : nullptr;
    float* const grad_bias = back ? p.grad_bias + share * 4 * H : nullptr;
    if (count == 0) {  // fewer rows than parts
        if (back) {
            std::fill_n(grad_weight_ih, 4 * H * I, 0.0f);
            std::fill_n(grad_weight_hh, 4 * H * H, 0.0f);
            std::fill_n(grad_bias, 4 * H, 0.0f);
        }
        return;
    }
    std::vector<int64_t> sizes;
    const std::vector<float> zeros(static_cast<size_t>(H), 0.0f);
    const auto size = static_cast<size_t>(count);
    std::vector<const float*> x(size), hidden(size), cell_before(size), grad_output(size);
    std::vector<float*> output(size), grad_x(size);
    const int64_t packed = block + task.begin;
    int64_t alive = static_cast<int64_t>(task.rows.rows.size()), m = 0;
    for (int64_t s = 0; m < count; ++s) {
        while (task.rows.rows[static_cast<size_t>(alive - 1)].length <= s) --alive;
        sizes.push_back(alive);
        for (int64_t r = 0; r < alive; ++r, ++m) {
            const Row& row = task.rows.rows[static_cast<size_t>(r)];
            const int64_t flat = block + (row.begin + s) * p.envs + row.env;
            const auto at = static_cast<size_t>(m);
            x[at] = p.x + flat * I;
            output[at] = p.output + flat * H;
            if (s > 0) {
                hidden[at] = p.output + (flat - p.envs) * H;
                // One step earlier in the packed order, the same row stands as many places back as rows were alive then.
                cell_before[at] = p.cell + (packed + m - sizes[static_cast<size_t>(s - 1)]) * H;
            } else if (row.stored) {
                const int64_t stored = (task.member * p.envs + row.env) * p.state_stride;
                hidden[at] = p.state_hidden + stored;
                cell_before[at] = p.state_cell + stored;
            } else {
                hidden[at] = cell_before[at] = zeros.data();
            }
            if (back) {
                grad_output[at] = p.grad_output + flat * H;
                if (p.grad_x != nullptr) grad_x[at] = p.grad_x + flat * I;
            }
        }
    }
    const Rows rows{
        static_cast<int64_t>(sizes.size()), count, sizes.data(), zeros.data(), x.data(), hidden.data(), cell_before.data(),
        output.data(), grad_output.data(), grad_x.data(),
        p.gates + packed * 4 * H, p.cell + packed * H, back ? p.grad_gates + packed * 4 * H : nullptr,
        p.weight_ih + task.member * 4 * H * I, p.weight_hh + task.member * 4 * H * H,
        p.bias_ih + task.member * 4 * H, p.bias_hh + task.member * 4 * H,
        grad_weight_ih, grad_weight_hh, grad_bias};
    const int64_t widest = std::max(H, I) + WIDEST;
    if (!back) {
        kernel.forward(p, rows, aligned(memory, 4 * H + 16 + 4 * (H + WIDEST) * widest));
        return;
    }
    std::vector<const float*> from(static_cast<size_t>(std::max(4 * H, count)));
    std::vector<float*> to(static_cast<size_t>(4 * H));
    const int64_t carry = sizes[0] * H + 16;
    kernel.backward(p, rows, aligned(memory, carry + (4 * H + 128) * widest), from.data(), to.data());
}

int run(const Problem& problem) {
    std::vector<Task> tasks;
    for (int64_t member = 0; member < problem.members; ++member) {
        int64_t begin = 0, number = 0;
        for (Part& part : plan(problem, member)) {
            const int64_t count = part.count;
            tasks.push_back({member, number++, begin, std::move(part)});
            begin += count;
        }
    }
    const Kernel kernel = choose(problem.level);
    std::atomic<size_t> next{0};
    std::atomic<bool> failed{false};
    const auto work = [&] {
        try {
            static thread_local std::vector<float> memory;
            for (size_t i = next++; i < tasks.size(); i = next++) run_task(problem, tasks[i], kernel, memory);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    };
    std::vector<std::thread> others;
    const auto wanted = std::min(static_cast<size_t>(problem.threads), tasks.size());
    others.reserve(wanted);
    try {
        while (others.size() + 1 < wanted) others.emplace_back(work);
    } catch (const std::system_error&) {
        // No more threads to be had: those there are do all of it.
    }
    work();
    for (std::thread& other : others) other.join();
    return failed ? 1 : 0;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Changes with `Problem`, so that a library built from other sources is not used.
EXPORTED int64_t hardy_lstm_version() { return 1; }

// Values, or, where `grad_output` is given, gradients. Returns 0, or 1 if memory ran out.
EXPORTED int hardy_lstm(const Problem* problem) {
    try {
        return run(*problem);
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
