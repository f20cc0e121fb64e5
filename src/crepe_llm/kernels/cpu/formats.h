// Number formats and their conversions; all of it internal to each translation unit (see kernels.h).
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

// Accumulators are arrays indexed by loops and passed by reference to the steps of a kernel; they live in registers
// only when every such loop is unrolled and every such step inlined.
#define INLINE __attribute__((always_inline)) inline
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

// Bytes that are asked for go to the second-level cache: what comes to the first one early is gone again where
// activations fill it.
constexpr int kPrefetchTo = 2;
// Of dense rows, one token leaves room for them there, which is a little faster.
template <int T>
constexpr int kAheadTo = T == 1 ? 0 : kPrefetchTo;

// Asks for the next bytes of a row block while a chunk is worked on: the streams of several blocks and the activations
// together defeat the hardware's own prefetching.
// `left` chunks are left of the row block, `skip` bytes lie between it and the next one of this stream.
template <int64_t Bytes, int64_t Ahead = Bytes == chunk_bytes(kInt8WeightOnly) ? kPrefetchInt8 : kPrefetchChunks>
inline void prefetch(const uint8_t* chunk, int64_t left, int64_t skip) {
    chunk += Ahead * Bytes + (left <= Ahead ? skip : 0);
    for (int64_t line = 0; line < Bytes; line += 64) __builtin_prefetch(chunk + line, 0, kPrefetchTo);
}

// Columns [from, to) of dense rows of k. Before the last ones, sums stay in `partial`, 16 lanes for each row and token.
struct Columns {
    int64_t k, from, to;
    float* partial;
};

// The same for dense rows, which lie one after the other: R of them, done together, ask for the next ones that begin 8
// KiB ahead or more. The lines are asked for in the order in which they lie, as one stream, whatever R is; those of a
// piece of the columns row beside row. `To` is __builtin_prefetch's locality.
template <int R, class W, int To>
class RowsAhead {
   public:
    INLINE RowsAhead(const W* w, const Columns& at) {
        const int64_t row = at.k * int64_t(sizeof(W)), piece = (at.to - at.from) * int64_t(sizeof(W));
        const bool whole = piece == row;
        next_ = reinterpret_cast<const char*>(w + at.from) + (8191 / (R * piece) + 1) * R * row;
        apart_ = whole ? 64 : row, step_ = whole ? 64 * R : 64;
    }
    // To be called for every register of columns.
    INLINE void ask(int64_t column) {
        if (column * int64_t(sizeof(W)) % 64) return;
        UNROLL
        for (int r = 0; r < R; r++) __builtin_prefetch(next_ + r * apart_, 0, To);
        next_ += step_;
    }

   private:
    const char* next_;
    int64_t apart_, step_;
};

inline float to_float(float v) { return v; }
inline float to_float(int8_t v) { return float(v); }
inline float to_float(Bf16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline float to_float(Fp16 v) {
    uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff, bits;
    if (rest >= 0x7c00) {
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + 0x38000000);
    } else {
        float f = float(rest) * 0x1p-24f;  // subnormal: exact in fp32
        std::memcpy(&bits, &f, 4);
        bits |= sign;
    }
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void from_float(float f, float& out) { out = f; }
inline void from_float(float f, Bf16& out) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}
inline void from_float(float f, Fp16& out) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        out.bits = uint16_t(sign | 0x7e00);
    } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
        out.bits = uint16_t(sign | 0x7c00);
    } else if (magnitude >= 0x38800000) {
        uint32_t rebased = magnitude - 0x38000000;
        out.bits = uint16_t(sign | (rebased + 0xfff + ((rebased >> 13) & 1)) >> 13);
    } else {  // subnormal result: adding 0.5 leaves the value's multiple of 2^-24, rounded, in the low bits
        float value;
        std::memcpy(&value, &magnitude, 4);
        value += 0.5f;
        std::memcpy(&magnitude, &value, 4);
        out.bits = uint16_t(sign | (magnitude - 0x3f000000));
    }
}

// What activations are converted to: fp32, bf16 (for products of pairs), int8, int8 times a number that the 32 columns
// of a chunk share, int16 times a power of two that they share, or, for dense weights, int16 times a number that all
// columns of a token share, the upper halves of a chunk before the lower ones, or int8 times a number that the columns
// of a lane share (LanesI8).
enum Activations { kF32, kPairsBf16, kI8, kGroupedI8, kI16, kHalvesI16, kLanesI8 };

// Bytes of a converted activation, but of kLanesI8. Where the columns of a chunk share a factor, it follows them
// (fp32), and the bytes are filled up.
constexpr int64_t activation_bytes(Activations a) { return a == kF32 ? 4 : a == kI8 ? 1 : a == kI16 ? 3 : 2; }
constexpr int64_t factor_offset(Activations a) { return a == kI16 ? 64 : 32; }
// One of the two halves of an int16, value = 256 * upper + lower.
struct HalfI16 {
    int8_t value;
};
constexpr int64_t kHalvesBytes = kColumnChunk * activation_bytes(kHalvesI16);  // of a token in a chunk
constexpr int32_t kMostHalves = 127 * 256 + 127;

// Activations of dense int8 weights as int8, as reference.quantize_per_lane. A register has 64 columns, four to a lane
// of int32. The 16 columns of a unit that meet in a lane share a scale, so that their sum needs it once, at the end. A
// token's unit has what the lanes' sums of (weight + 128) times an activation start from, the lanes' scales, and the
// columns.
constexpr int64_t kLanes = 16, kLaneUnit = 256;
struct LanesI8 {
    int32_t start[kLanes];
    float scale[kLanes];
    int8_t column[kLaneUnit];
};
// The order in which the groups of a chunk lie then: an instruction takes the first and the second four of 8 bytes.
constexpr int64_t kOrderOfGroups[8] = {0, 2, 1, 3, 4, 6, 5, 7};

// The row blocks of int4 codes that an inner kernel does together, from some chunk on.
struct Codes {
    const uint8_t* weight;  // of the first block; the next begins block_stride bytes on
    int64_t block_stride;
    const uint8_t* zero;  // 16 zero points; those of the next block lie zero_stride on
    int64_t zero_stride;
    int64_t left;  // chunks up to the end of the row block
    // Of groups of columns: 16 scales of scale_dtype, those of the next block scale_stride bytes on. Where they are
    // there, the sums of these chunks start from zero and are added to `sums` times the scales. Else null.
    const uint8_t* scale;
    int64_t scale_stride;
    int32_t scale_dtype;
};

constexpr int64_t kCodeBytes = chunk_bytes(kInt4);
constexpr int64_t kPrefetchCodes = 42;  // chunks, about as many bytes as kPrefetchChunks of bf16

// What a weight format and converted activations mean to the inner kernels.
template <int32_t Format, Activations A>
struct Kind {
    static constexpr int32_t format = Format;
    static constexpr Activations activations = A;
    static constexpr int64_t weight_bytes = chunk_bytes(Format);
    static constexpr int64_t activation_bytes = ::activation_bytes(A);
    static constexpr bool prepared = false;
    using Sum = std::conditional_t<A == kI8, int32_t, float>;
};

// The same with the weights as `Isa::prepare` writes them: a chunk has, for each group, the pairs of bf16 of 16 rows
// and the control bytes that pick their activations.
template <class K>
struct Prepared : K {
    static constexpr int64_t weight_bytes = 8 * 2 * 64;
    static constexpr bool prepared = true;
};

// The members of `Isa` (see driver.h) of an instruction set that has nothing of its own for them.
struct PlainIsa {
    static constexpr bool kBf16Activations = false, kOffsetInt8 = false;
    static constexpr bool kEvenOdd = false, kCodes16 = false, kHalves16 = false, kLanes8 = false;
    static constexpr int64_t kBlocks = 1, kCodeBlocks = 1, kChunkBlock = 16, kDenseTile = 4, kDenseCache = 0;
    static constexpr bool one_block(Activations, int64_t, int64_t) { return false; }
    static constexpr int64_t kPreparedChunks = 1;
    static constexpr int64_t prepared_tiles(int64_t) { return 1; }
    static constexpr int64_t tile(Activations) { return 4; }
    static void nearest_int8(const float* value, float factor, uint8_t offset, uint8_t* out) {
        for (int j = 0; j < 16; j++) {
            float v = std::nearbyint(value[j] * factor);
            v = v > -127.0f ? v < 127.0f ? v : 127.0f : -127.0f;
            out[j] = uint8_t(int8_t(v)) ^ offset;
        }
    }
};

}  // namespace
