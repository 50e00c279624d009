// One step of UPGD with VGS, clip and noise, float32, for the CPU: what the chain of transforms.py, vgs.py and upgd.py does, in
// as few passes over memory as its reductions allow. Per member:
//   1. norm of the gradient, where there is a clip, before which all tensors must have been summed up;
//   2. VGS's mean, utilities and moments: before factor and gate, which need sums and the largest utility of all tensors;
//   3. gate, descent and noise; noise in proportion to the norm of the update is kept, for want of that norm, and added by
//   4. tensor by tensor behind 3, while most of what 3 has written is still in a cache.
// Sums are taken block by block and added up in the blocks' order, so that results do not depend on the number of threads.
//
// And the members' sums of squares by themselves, which tell whose gradients are finite.
//
// Plain C interface, no Python or PyTorch headers. Called by hardy/optim/compiled.py, whose structures mirror those here.

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "../_entry.h"
#include "../_threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own headers leave registers undefined on purpose
#endif

namespace {

enum class Gating : int64_t { none, global, local };

// In the order of `NUMBERS` in compiled.py.
enum Number {
    LR, COUPLED_DECAY, DECOUPLED_DECAY, BETA_UTILITY, SIGMA, STEP_FACTOR, MAX_GRAD_NORM, BETA1, BETA2, EPS,
    VGS_ALPHA, VGS_MIN_SCALE, VGS_BETA, VGS_SIGNAL_FLOOR
};

struct Problem {
    int64_t members, tensors;
    int64_t columns;      // of the matrices [P, all tensors]
    int64_t numbers_width;  // 1, or one number for each tensor
    int64_t adam, raw_maximum, clips;
    int64_t estimator;    // of VGS: 0 none, 1 averages, 2 microbatches
    int64_t scopes, warmup;
    int64_t threads;
    int64_t level;        // newest instruction set allowed: 2 is AVX-512, 1 is AVX2, 0 is what every CPU of this kind has
    // By tensor of this step.
    const int64_t *sizes, *row_lengths;  // of one member's weights, of their last axis
    const int64_t* column;               // place in the matrices
    const int64_t *gating, *protecting, *adaptive_noise;
    const int64_t* noise;                // place among the tensors with noise, or -1
    float *const *weight, *const *gradient, *const *utility, *const *first, *const *second, *const *mean;  // [P, ...] each
    // By member.
    const unsigned char* active;
    const uint64_t* keys;
    const double* numbers;               // [number, P, numbers_width]
    const double* factor;                // [P, tensors] from outside, or null
    int64_t* step;                       // [P, columns]
    int64_t* vgs_steps;                  // [P, columns], as are the next four
    double *second_moment, *variance, *signal;
    const double* microbatch_squares;
    const int64_t* microbatches;         // [P]
    const int64_t* scope;                // [columns]
    double* metrics;                     // [P, 3 + 2 * scopes]
};

// What each member's rows of all tensors sum to when squared.
struct Squares {
    int64_t members, tensors, threads, level;
    const int64_t* sizes;        // of one member's rows
    const float* const* tensor;  // [P, ...] each
    double* sum;                 // [P]
};

// A piece of one member's tensor.
struct Block {
    int64_t begin, count;
    const float* gradient;
    float *weight, *utility, *first, *second, *mean;
    const float* scale;  // local gating: the row's scale, weight by weight
    float* noise;        // where noise is kept until its amount is known, or null
};

// Of one member's tensor.
struct Numbers {
    float shrink, mean, utility, first, second;  // factor of the clip, weights of the newest value in the averages
    float scale, eps, decay, keep, amount, noise_amount;
    bool protects;
    uint64_t key, tensor;
};

struct Sums {
    double gradient, mean, largest, smallest, direction, gate, noise;
};

using Pass = void (*)(const Block&, const Numbers&, Sums&);

struct Kernel {
    double (*squares)(const float*, int64_t);
    Pass (*advance_for)(bool adam, bool mean);
    Pass (*descend_for)(bool adam, Gating gating, bool noise);
    Pass shake;
};

constexpr int64_t BLOCK = 4096;
constexpr double LOG2_E = 1.4426950408889634;  // gates are powers of 2
#define INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HARDY_DISPATCH
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
#define LANES 16
#define ROOT(x) ((Vector)_mm512_sqrt_ps((__m512)(x)))
#define LARGER(x, y) ((Vector)_mm512_max_ps((__m512)(x), (__m512)(y)))
#define SMALLER(x, y) ((Vector)_mm512_min_ps((__m512)(x), (__m512)(y)))
namespace avx512 {
#include "_upgd_kernel.h"
}
#undef LANES
#undef ROOT
#undef LARGER
#undef SMALLER
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
#define ROOT(x) ((Vector)_mm256_sqrt_ps((__m256)(x)))
#define LARGER(x, y) ((Vector)_mm256_max_ps((__m256)(x), (__m256)(y)))
#define SMALLER(x, y) ((Vector)_mm256_min_ps((__m256)(x), (__m256)(y)))
namespace avx2 {
#include "_upgd_kernel.h"
}
#undef LANES
#undef ROOT
#undef LARGER
#undef SMALLER
#pragma GCC pop_options
#endif

// ROOT: square roots; LARGER and SMALLER of two, or the second where either is NaN.
#define LANES 4
#if defined(__x86_64__)
#define ROOT(x) ((Vector)_mm_sqrt_ps((__m128)(x)))
#define LARGER(x, y) ((Vector)_mm_max_ps((__m128)(x), (__m128)(y)))
#define SMALLER(x, y) ((Vector)_mm_min_ps((__m128)(x), (__m128)(y)))
#else
#define ROOT(x) root(x)
#define LARGER(x, y) ((x) > (y) ? (x) : (y))
#define SMALLER(x, y) ((x) < (y) ? (x) : (y))
typedef float Four __attribute__((vector_size(16)));
inline Four root(Four x) {
    for (int lane = 0; lane < 4; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
}
#endif
namespace plain {
#include "_upgd_kernel.h"
}

const Kernel& choose(int64_t level) {
#ifdef HARDY_DISPATCH
    if (level >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return avx512::kernel;
    if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernel;
#endif
    static_cast<void>(level);
    return plain::kernel;
}

#include "_upgd_member.h"

int run(const Problem& problem) {
    const Plan plan(problem);
    const Kernel& kernel = choose(problem.level);
    std::vector<int64_t> members;
    for (int64_t m = 0; m < problem.members; ++m)
        if (problem.active[m]) members.push_back(m);
    const auto count = static_cast<int64_t>(members.size());
    hardy::Helpers::Turn turn(static_cast<size_t>(problem.threads - 1));
    const auto threads = static_cast<int64_t>(turn.threads());
    // A member for each thread where there are enough of them, else all threads for one member after the other.
    const bool apart = count >= threads;
    const int64_t workers = apart ? threads : 1;
    const int64_t share = (apart ? plan.largest : plan.first.back()) * BLOCK;
    static thread_local std::vector<float> memory;  // kept: fresh memory is slow
    if (memory.size() < static_cast<size_t>(workers * share)) memory.resize(static_cast<size_t>(workers * share));
    std::vector<Member> workspaces;
    for (int64_t t = 0; t < workers; ++t) workspaces.emplace_back(problem, plan, kernel, memory.data() + t * share);
    Team team(apart ? 1 : threads);
    std::atomic<int64_t> arrived{0}, next{0};
    turn.run([&] {
        const int64_t rank = arrived++;
        if (apart) {
            Team alone(1);
            for (int64_t i = next++; i < count; i = next++)
                workspaces[static_cast<size_t>(rank)].run(members[static_cast<size_t>(i)], alone, 0);
        } else {
            for (const int64_t m : members) workspaces[0].run(m, team, rank);
        }
    });
    return 0;
}

int run(const Squares& given) {
    const Kernel& kernel = choose(given.level);
    const bool done = hardy::share_out(static_cast<size_t>(given.members), given.threads, [&](size_t member) {
        const auto m = static_cast<int64_t>(member);
        double sum = 0;
        for (int64_t k = 0; k < given.tensors; ++k)
            for (int64_t begin = 0; begin < given.sizes[k]; begin += BLOCK)
                sum += kernel.squares(given.tensor[k] + m * given.sizes[k] + begin, std::min(BLOCK, given.sizes[k] - begin));
        given.sum[m] = sum;
    });
    return done ? 0 : 1;
}

}  // namespace

ENTRY(hardy_upgd, Problem, 1)     // changes nothing if memory runs out
ENTRY(hardy_squares, Squares, 1)
