// The C interface between Python (ctypes), the entry points (api.cpp) and one translation unit per instruction set.
//
// Everything that a translation unit instantiates must have internal linkage: code compiled with -mavx512f that the
// linker could merge with the portable copy of the same inline function would crash older processors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "weight_formats.h"

enum : int32_t { kSparse24 = 0, kDense = 1 };

// libgomp's entry point, which LLVM's and Intel's runtimes have too: runs f(data) once on each thread of a team.
using Parallel = void (*)(void (*f)(void*), void* data, unsigned threads, unsigned flags);

// One product y = x W^T * scale + bias. Mirrored by ctypes in __init__.py.
struct Problem {
    const void* weight;   // packed bytes (sparse) or [n, k] row-major (dense)
    const void* x;        // [m, k], strides in elements
    const void* scale;    // fp32 [n] or null; for groups of columns [row blocks, groups, 16]
    const uint8_t* zero;  // zero points of codes [row blocks, groups, 16], or null: all are kZeroPoint
    const void* bias;     // [n] or null
    void* y;              // [m, n], contiguous, dtype of x
    int64_t m, n, k;
    int64_t x_row_stride, x_column_stride;
    int64_t weight_bytes, x_columns, scale_count, zero_count, bias_count;  // sizes of the buffers: bytes, and elements
    int32_t layout;                                                        // kSparse24 or kDense
    int32_t weight_format, x_dtype, scale_dtype, bias_dtype;               // codes of weight_formats.h
};

// Whether a product quantizes its activations, with one scale a token or (`Grouped`) one for each chunk of its columns:
// 2:4 weights of some formats do. Dense int8 weights may, otherwise (LanesI8 in formats.h).
template <bool Grouped>
static inline bool quantizes_inputs(const Problem& p) {
    const WeightFormat& format = kWeightFormats[p.weight_format];
    return p.layout == kSparse24 && format.quantizes_inputs && bool(format.input_group) == Grouped;
}

// A problem cut into tiles of tokens, with the activations converted and reordered for the inner loops.
struct Job {
    Problem p;
    int64_t blocks, chunks;  // row blocks, column chunks
    int64_t tiles;           // token tiles; tile i has tokens [tile_begin(i), tile_begin(i + 1))
    uint8_t* activations;    // tiles, back to back: [unit of columns][token of the tile][columns of the unit]
    float* token_scale;      // [m], int8 only
    int64_t token_bytes;     // bytes of one token's converted activations
    int64_t tile_begin(int64_t tile) const { return p.m * tile / tiles; }
};

constexpr int64_t kMaxTile = 12;
// Chunks that a stream of weights asks for ahead; of int8 about as many bytes.
constexpr int64_t kPrefetchChunks = 14, kPrefetchInt8 = 25;

// What one instruction set brings.
struct InstructionSet {
    const char* name;
    bool (*supported)();
    // Most tokens of a tile, and bytes of one token's converted activations.
    int64_t (*tile_tokens)(const Problem&);
    int64_t (*token_bytes)(const Problem&);
    // Converts the activations of tiles [begin, end).
    void (*convert)(const Job&, int64_t begin, int64_t end);
    // Computes the outputs of row blocks [block_begin, block_end) for tiles [tile_begin, tile_end).
    void (*multiply)(const Job&, int64_t block_begin, int64_t block_end, int64_t tile_begin, int64_t tile_end);
};

extern const InstructionSet kPortable;
#ifdef CREPE_HAVE_AVX2
extern const InstructionSet kAvx2;
#endif
#ifdef CREPE_HAVE_AVX512
extern const InstructionSet kAvx512;
#endif
#ifdef CREPE_HAVE_AVX512_VNNI
extern const InstructionSet kAvx512Vnni;
#endif
#ifdef CREPE_HAVE_AVX512_BF16
extern const InstructionSet kAvx512Bf16;
#endif
#ifdef CREPE_HAVE_NEON_DOTPROD
extern const InstructionSet kNeonDotprod;
#endif
#ifdef CREPE_HAVE_NEON
extern const InstructionSet kNeon;
#endif
