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
#ifdef CREPE_HAVE_NEON_DOTPROD
    &kNeonDotprod,
#endif
#ifdef CREPE_HAVE_NEON
    &kNeon,
#endif
    &kPortable,
};
constexpr int32_t kSetCount = sizeof kSets / sizeof *kSets;

// A product and its share of the tiles and tasks of all that are done together.
struct Part {
    Job job;
    int64_t tile_end, task_end;  // of this part; it begins where the one before it ends
    int64_t row_tasks, tile_tasks;
    int64_t unit;  // row blocks that stay in one task

    // Where the row blocks of a task begin.
    int64_t row_begin(int64_t task) const {
        const int64_t begin = (job.blocks + unit - 1) / unit * task / row_tasks * unit;
        return begin < job.blocks ? begin : job.blocks;
    }
};

struct Work {
    const Part* parts;
    int64_t count;
    const InstructionSet* set;
    std::atomic<int64_t> next;
};

void convert_tiles(void* data) {
    Work& work = *static_cast<Work*>(data);
    const Part* part = work.parts;
    for (int64_t tile;
         (tile = work.next.fetch_add(1, std::memory_order_relaxed)) < work.parts[work.count - 1].tile_end;) {
        while (tile >= part->tile_end) part++;
        const int64_t own = tile - (part->tile_end - part->job.tiles);
        work.set->convert(part->job, own, own + 1);
    }
}

void multiply_tasks(void* data) {
    Work& work = *static_cast<Work*>(data);
    const Part* part = work.parts;
    for (int64_t task;
         (task = work.next.fetch_add(1, std::memory_order_relaxed)) < work.parts[work.count - 1].task_end;) {
        while (task >= part->task_end) part++;
        const Job& job = part->job;
        const int64_t own = task - (part->task_end - part->row_tasks * part->tile_tasks);
        const int64_t row = own / part->tile_tasks, tile = own % part->tile_tasks;
        work.set->multiply(job, part->row_begin(row), part->row_begin(row + 1), job.tiles * tile / part->tile_tasks,
                           job.tiles * (tile + 1) / part->tile_tasks);
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

// Whether no size that is computed from the product's can overflow.
bool in_range(const Problem& p) {
    constexpr int64_t most = int64_t(1) << 30;
    return p.m >= 0 && p.n >= 0 && p.k >= 0 && p.m <= most && p.n <= most && p.k <= most;
}

// Whether the buffers have the sizes that the product reads and writes.
bool fits(const Problem& p) {
    if (!in_range(p)) return false;
    if (p.layout != kSparse24 && p.layout != kDense) return false;
    if (p.weight_format < 0 || p.weight_format >= kFormatCount || !is_float(p.x_dtype)) return false;
    if (p.x_columns != p.k || p.x_row_stride < 0 || p.x_column_stride < 0) return false;
    if (!scales_fit(p)) return false;
    if (p.bias && (p.bias_count != p.n || !is_float(p.bias_dtype))) return false;
    const WeightFormat& format = kWeightFormats[p.weight_format];
    int64_t bytes = p.n * p.k * (format.bits / 8);
    if (p.layout == kSparse24) {
        // A sum of K / 2 products of at most 127 * 128 has to stay below 2^31.
        if (p.k % 4 || (quantizes_inputs<false>(p) && p.k > kMostInt8Columns)) return false;
        bytes = ceil_div(p.n, kRowBlock) * ceil_div(p.k, kColumnChunk) * chunk_bytes(p.weight_format);
    } else if (!is_float(p.weight_format) && p.weight_format != kInt8 && p.weight_format != kInt8WeightOnly) {
        return false;
    }
    return p.weight_bytes == bytes && (!p.m || !p.n || (p.k && p.weight && p.x && p.y));
}

// Bytes of a part's converted activations, and of their scales after them; both whole cache lines.
int64_t activation_memory(const Job& job) { return ceil_div(job.p.m * job.token_bytes + 64, 64) * 64; }
int64_t scale_memory(const Job& job) { return quantizes_inputs<false>(job.p) ? ceil_div(job.p.m * 4, 64) * 64 : 0; }

Part part_of(const Problem& problem, const InstructionSet& set) {
    Part part{};
    Job& job = part.job;
    job.p = problem;
    job.blocks = ceil_div(problem.n, kRowBlock);
    job.chunks = ceil_div(problem.k, kColumnChunk);
    job.tiles = ceil_div(problem.m, set.tile_tokens(problem));
    job.token_bytes = set.token_bytes(problem);
    return part;
}

// Computes the parts, of which there is at least one and none is empty. False: there is no memory.
bool run_parts(Part* parts, int64_t count, const InstructionSet& set, Parallel parallel, int32_t threads) {
    if (threads < 1) threads = 1;
    int64_t bytes = 0, tiles = 0, tasks = 0, inputs = 0, products = 0;
    for (int64_t i = 0; i < count; i++) {
        const Job& job = parts[i].job;
        bytes += activation_memory(job) + scale_memory(job);
        inputs += job.p.m * job.p.k;
        products += job.p.n * job.chunks * (1 + job.p.m / 4);
    }
    uint8_t* memory = static_cast<uint8_t*>(std::aligned_alloc(64, size_t(bytes)));
    if (!memory) return false;
    uint8_t* place = memory;
    for (int64_t i = 0; i < count; i++) {
        Part& part = parts[i];
        Job& job = part.job;
        job.activations = place;
        place += activation_memory(job);
        job.token_scale = scale_memory(job) ? reinterpret_cast<float*>(place) : nullptr;
        place += scale_memory(job);
        // Tasks of 16 row blocks (their weights fit the second-level cache) and at most 512 tokens; smaller where that
        // would leave threads idle.
        part.tile_tasks = ceil_div(job.p.m, 512);
        const int64_t wanted = ceil_div(4 * threads, part.tile_tasks * count);
        const int64_t by_cache = ceil_div(job.blocks, 16);
        part.row_tasks = by_cache > wanted ? by_cache : wanted < job.blocks ? wanted : job.blocks;
        // Kernels do two row blocks together: one alone would take them as long.
        part.unit = job.blocks >= 2 * part.row_tasks ? 2 : 1;
        part.tile_end = tiles += job.tiles;
        part.task_end = tasks += part.row_tasks * part.tile_tasks;
    }
    auto run = [&](void (*f)(void*), bool worth) {
        Work work{parts, count, &set, {0}};
        if (parallel && threads > 1 && worth)
            parallel(f, &work, unsigned(threads), 0);
        else
            f(&work);
    };
    // Below about 10 us of work on one thread, waking the team costs more than it saves.
    run(convert_tiles, inputs > 65536);
    run(multiply_tasks, products > 4096);
    std::free(memory);
    return true;
}

// The problem of one expert: its tokens are rows [begin, end) of x and y, its weight and scales one of `experts`.
Problem expert_problem(const Problem& all, int64_t experts, int64_t expert, int64_t begin, int64_t end) {
    const int64_t width = kWeightFormats[all.x_dtype].bits / 8;
    Problem one = all;
    one.weight_bytes /= experts;
    one.scale_count /= experts;
    one.m = end - begin;
    one.weight = static_cast<const uint8_t*>(all.weight) + expert * one.weight_bytes;
    one.x = static_cast<const uint8_t*>(all.x) + begin * all.x_row_stride * width;
    one.y = static_cast<uint8_t*>(all.y) + begin * all.n * width;
    if (all.scale) one.scale = static_cast<const float*>(all.scale) + expert * one.scale_count;
    return one;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Name of instruction set `index`, best first; null past the last.
EXPORT const char* crepe_instruction_set(int32_t index) {
    return index >= 0 && index < kSetCount ? kSets[index]->name : nullptr;
}

// Whether this processor (and its operating system) can run instruction set `index`.
EXPORT int32_t crepe_supported(int32_t index) { return index >= 0 && index < kSetCount && kSets[index]->supported(); }

// The size of a problem: a library built from other source than the Python that calls it is found out by it.
EXPORT int64_t crepe_problem_bytes() { return sizeof(Problem); }

// Computes `problem` with instruction set `index` on `threads` threads of the team that `parallel` starts (null: on
// the calling thread). Returns 0, 1 when there is no memory for the converted activations, or 2 when the processor
// cannot run it or sizes do not belong together; nothing was read then.
EXPORT int32_t crepe_multiply(const Problem* problem, int32_t index, Parallel parallel, int32_t threads) {
    if (!crepe_supported(index) || !fits(*problem)) return 2;
    if (problem->m == 0 || problem->n == 0) return 0;
    Part part = part_of(*problem, *kSets[index]);
    return run_parts(&part, 1, *kSets[index], parallel, threads) ? 0 : 1;
}

// The products of `experts` weights of one shape, each with its own tokens, as crepe_multiply computes one. `all` has
// the weights and scales one after the other, and the tokens in the order of the experts: those of expert e end before
// row ends[e] of x. There is no bias.
EXPORT int32_t crepe_multiply_experts(const Problem* all, const int64_t* ends, int64_t experts, int32_t index,
                                      Parallel parallel, int32_t threads) {
    if (!crepe_supported(index) || experts < 1 || !ends || all->bias || !in_range(*all)) return 2;
    if (!is_float(all->x_dtype) || all->layout != kSparse24 || all->zero) return 2;
    if (all->scale && all->scale_dtype != kFp32) return 2;
    if (all->weight_bytes % experts || all->scale_count % experts) return 2;
    int64_t count = 0;
    for (int64_t e = 0, begin = 0; e < experts; begin = ends[e++]) {
        if (ends[e] < begin || ends[e] > all->m || !fits(expert_problem(*all, experts, e, begin, ends[e]))) return 2;
        count += ends[e] > begin;
    }
    if (ends[experts - 1] != all->m) return 2;
    if (!count || all->n == 0) return 0;
    Part* parts = static_cast<Part*>(std::malloc(size_t(count) * sizeof(Part)));
    if (!parts) return 1;
    int64_t filled = 0;
    for (int64_t e = 0, begin = 0; e < experts; begin = ends[e++])
        if (ends[e] > begin) parts[filled++] = part_of(expert_problem(*all, experts, e, begin, ends[e]), *kSets[index]);
    const bool done = run_parts(parts, count, *kSets[index], parallel, threads);
    std::free(parts);
    return done ? 0 : 1;
}
