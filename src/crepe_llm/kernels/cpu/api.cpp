// Entry points: which instruction sets there are, and a product spread over the OpenMP team that Python's process
// already has.
#include <atomic>
#include <cstdlib>

#include "kernels.h"

namespace {

const InstructionSet* const kSets[] = {
#ifdef CREPE_HAVE_AVX512_BF16
    &kAvx512Bf16,
#endif
#ifdef CREPE_HAVE_AVX512_VNNI
    &kAvx512Vnni,
#endif
#ifdef CREPE_HAVE_AVX512
    &kAvx512,
#endif
#ifdef CREPE_HAVE_AVX2
    &kAvx2,
#endif
#ifdef CREPE_HAVE_NEON
    &kNeon,
#endif
    &kPortable,
};
constexpr int32_t kSetCount = sizeof kSets / sizeof *kSets;

// libgomp's entry point, which LLVM's and Intel's runtimes have too: runs f(data) once on each thread of a team.
using Parallel = void (*)(void (*f)(void*), void* data, unsigned threads, unsigned flags);

struct Work {
    const Job* job;
    const InstructionSet* set;
    std::atomic<int64_t> next;
    int64_t row_tasks, tile_tasks;
};

void convert_tiles(void* data) {
    Work& work = *static_cast<Work*>(data);
    for (int64_t tile; (tile = work.next.fetch_add(1, std::memory_order_relaxed)) < work.job->tiles;)
        work.set->convert(*work.job, tile, tile + 1);
}

void multiply_tasks(void* data) {
    Work& work = *static_cast<Work*>(data);
    const Job& job = *work.job;
    for (int64_t task; (task = work.next.fetch_add(1, std::memory_order_relaxed)) < work.row_tasks * work.tile_tasks;) {
        const int64_t row = task / work.tile_tasks, tile = task % work.tile_tasks;
        work.set->multiply(job, job.blocks * row / work.row_tasks, job.blocks * (row + 1) / work.row_tasks,
                           job.tiles * tile / work.tile_tasks, job.tiles * (tile + 1) / work.tile_tasks);
    }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_float(int32_t code) { return code == kBf16 || code == kFp16 || code == kFp32; }

// Whether scales and zero points have the sizes of the weight's format, whose code is checked.
bool scales_fit(const Problem& p) {
    const int64_t group = p.layout == kSparse24 ? kWeightFormats[p.weight_format].scale_group : 0;
    const int64_t in_blocks = ceil_div(p.n, kRowBlock) * (group ? ceil_div(p.k, group) : 1) * kRowBlock;
    if (p.zero && (p.layout != kSparse24 || !is_codes(p.weight_format) || p.zero_count != in_blocks)) return false;
    if (group) return p.scale && is_float(p.scale_dtype) && p.scale_count == in_blocks;
    return !p.scale || (p.scale_dtype == kFp32 && p.scale_count == p.n);
}

// Whether the buffers have the sizes that the product reads and writes.
bool fits(const Problem& p) {
    constexpr int64_t most = int64_t(1) << 30;  // no size below can overflow
    if (p.m < 0 || p.n < 0 || p.k < 0 || p.m > most || p.n > most || p.k > most) return false;
    if (p.layout != kSparse24 && p.layout != kDense) return false;
    if (p.weight_format < 0 || p.weight_format >= kFormatCount || !is_float(p.x_dtype)) return false;
    if (p.x_columns != p.k || p.x_row_stride < 0 || p.x_column_stride < 0) return false;
    if (!scales_fit(p)) return false;
    if (p.bias && (p.bias_count != p.n || !is_float(p.bias_dtype))) return false;
    const WeightFormat& format = kWeightFormats[p.weight_format];
    int64_t bytes = p.n * p.k * (format.bits / 8);
    if (p.layout == kSparse24) {
        // A sum of K / 2 products of at most 127 * 128 has to stay below 2^31.
        if (p.k % 4 || (format.quantizes_inputs && p.k > kMostInt8Columns)) return false;
        bytes = ceil_div(p.n, kRowBlock) * ceil_div(p.k, kColumnChunk) * chunk_bytes(p.weight_format);
    } else if (!is_float(p.weight_format) && p.weight_format != kInt8) {
        return false;
    }
    return p.weight_bytes == bytes && (!p.m || !p.n || (p.k && p.weight && p.x && p.y));
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Name of instruction set `index`, best first; null past the last.
EXPORT const char* crepe_instruction_set(int32_t index) { return index >= 0 && index < kSetCount ? kSets[index]->name : nullptr; }

// Whether this processor (and its operating system) can run instruction set `index`.
EXPORT int32_t crepe_supported(int32_t index) { return index >= 0 && index < kSetCount && kSets[index]->supported(); }

// The size of a problem: a library built from other source than the Python that calls it is found out by it.
EXPORT int64_t crepe_problem_bytes() { return sizeof(Problem); }

// Computes `problem` with instruction set `index` on `threads` threads of the team that `parallel` starts (null: on
// the calling thread). Returns 0, 1 when there is no memory for the converted activations, or 2 when the processor cannot
// run it or sizes do not belong together; nothing was read then.
EXPORT int32_t crepe_multiply(const Problem* problem, int32_t index, Parallel parallel, int32_t threads) {
    if (!crepe_supported(index) || !fits(*problem)) return 2;
    if (threads < 1) threads = 1;
    if (problem->m == 0 || problem->n == 0) return 0;
    const InstructionSet& set = *kSets[index];
    Job job{};
    job.p = *problem;
    job.blocks = ceil_div(problem->n, kRowBlock);
    job.chunks = ceil_div(problem->k, kColumnChunk);
    job.tiles = ceil_div(problem->m, set.tile_tokens(*problem));
    job.token_bytes = job.chunks * kColumnChunk * set.activation_bytes(*problem);
    const int64_t scales = quantizes_inputs(*problem) ? ceil_div(problem->m * 4, 64) * 64 : 0;
    uint8_t* memory = static_cast<uint8_t*>(std::aligned_alloc(64, size_t(ceil_div(problem->m * job.token_bytes + 64, 64) * 64 + scales)));
    if (!memory) return 1;
    job.token_scale = scales ? reinterpret_cast<float*>(memory) : nullptr;
    job.activations = memory + scales;

    auto run = [&](void (*f)(void*), Work& work, bool worth) {
        if (parallel && threads > 1 && worth)
            parallel(f, &work, unsigned(threads), 0);
        else
            f(&work);
    };
    // Below about 10 us of work on one thread, waking the team costs more than it saves.
    Work converting{&job, &set, {0}, 0, 0};
    run(convert_tiles, converting, problem->m * problem->k > 65536);
    Work multiplying{&job, &set, {0}, 0, 0};
    // Tasks of 16 row blocks (their weights fit the second-level cache) and at most 512 tokens; smaller where that would
    // leave threads idle.
    multiplying.tile_tasks = ceil_div(problem->m, 512);
    const int64_t wanted = ceil_div(4 * threads, multiplying.tile_tasks);
    const int64_t by_cache = ceil_div(job.blocks, 16);
    multiplying.row_tasks = by_cache > wanted ? by_cache : wanted < job.blocks ? wanted : job.blocks;
    run(multiply_tasks, multiplying, problem->n * job.chunks * (1 + problem->m / 4) > 4096);
    std::free(memory);
    return 0;
}
