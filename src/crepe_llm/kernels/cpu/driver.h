// The loops around the inner kernels, the same for every instruction set. A translation unit defines its `Isa` and
// includes this file; nothing here leaves the translation unit (see kernels.h).
//
// `Isa` is a struct, of which PlainIsa (formats.h) has what is plain, with
//   kBf16Activations        whether bf16 weights meet bf16 activations (else fp32)
//   kCodes16                whether int4 codes meet bf16 activations as int16 (else as kBf16Activations says)
//   kHalves16               whether dense int8 weights meet bf16 activations as int16 (else as kBf16Activations says)
//   kLanes8                 whether dense int8 weights meet LanesI8 where activations may be quantized
//   kOffsetInt8             whether int8 activations are stored as x + 128, unsigned
//   kEvenOdd                whether activations of dense bf16 weights come in the order that splits a register of them
//   kBlocks, tile(Activations)  row blocks that an inner kernel does together, and its most tokens
//   kCodeBlocks             the same of codes for one token; at least kBlocks
//   one_block(Activations, bits, T)  whether T tokens of weights of so many bits go better one row block at a time
//   kChunkBlock             chunks of columns that stay in cache when there are several tiles
//   prepared_tiles(bits)    the tiles from which on weights of so many bits are decoded once for all (kPairsBf16)
//   kPreparedChunks         as kChunkBlock, for weights that are decoded once
//   prepare<Format>(weight, zero points, chunks, out)  decodes a row block
//   kDenseTile, dense_rows(T, bytes)  most tokens of the dense kernel, and the rows of weights of so many bytes each
//                           that it does together for T of them
//   sparse<Kind, R, T>(weight, bytes from row block to row block, activations, chunks, sums, first)
//                           adds to (or, if first, sets) sums [T][16 R]
//   codes<Kind, R, T>(Codes, activations, chunks, sums, first)
//                           the same for int4 codes less their zero points, times scales where they are there
//   nearest_int8(16 floats, factor, offset, out)
//                           writes the int8 nearest to each times factor, ties to even, at most 127 in magnitude, its
//                           bits exclusive-or offset; what is no number becomes any
//   dense<W, X, R, T>(weight, Columns, activations, sums, stride)
//                           sets sums [T][R], `stride` apart from token to token, with the last columns
//   kDenseCache             bytes of a tile's activations that a block of dense rows meets at a time; 0: all
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>

#include "formats.h"

namespace {

Activations activations_of(const Problem& p) {
    if (quantizes_inputs<false>(p)) return kI8;
    if (quantizes_inputs<true>(p)) return kGroupedI8;
    if (Isa::kLanes8 && p.layout == kDense && p.weight_format == kInt8) return kLanesI8;
    if (Isa::kHalves16 && p.layout == kDense && p.weight_format >= kInt8 && p.x_dtype == kBf16 &&
        p.k <= kMostInt8Columns)
        return kHalvesI16;
    if (Isa::kCodes16 && is_codes(p.weight_format) && p.x_dtype == kBf16) return kI16;
    // bf16 holds every int8 value, and every int4 code.
    const bool bf16 = p.weight_format == kBf16 || p.weight_format >= kInt8;
    return Isa::kBf16Activations && bf16 && p.x_dtype == kBf16 ? kPairsBf16 : kF32;
}
int64_t token_bytes(const Problem& p) {
    const int64_t chunks = (p.k + kColumnChunk - 1) / kColumnChunk;
    const Activations activations = activations_of(p);
    if (activations == kLanesI8) return (p.k + kLaneUnit - 1) / kLaneUnit * int64_t(sizeof(LanesI8));
    return chunks * kColumnChunk * activation_bytes(activations) + (activations == kHalvesI16 ? 2 * kHalvesBytes : 0);
}
int64_t tile_tokens(const Problem& p) { return p.layout == kDense ? Isa::kDenseTile : Isa::tile(activations_of(p)); }

// ---- activations ----

// Columns that are converted of all tokens of a tile before the next ones: what is written then stays in the first
// cache.
constexpr int64_t kConvertedColumns = 512;

// Writes token `t` of a tile of `tokens`, columns [begin, end): units of `Unit` columns, the tile's tokens side by side
// in a unit. From column k on there are zeros. With `even_odd`, of every 16 columns the 8 even ones come first, then
// the odd ones.
template <int64_t Unit, class X, class Out>
void scatter_token(const X* x, int64_t stride, int64_t k, int64_t begin, int64_t end, bool even_odd, int64_t tokens,
                   int64_t t, Out* out) {
    for (int64_t c = begin; c < end; c += Unit) {
        Out* to = out + c * tokens + t * Unit;
        if (stride == 1 && c + Unit <= k && !even_odd) {
            if constexpr (std::is_same_v<Out, X>) {
                std::memcpy(to, x + c, Unit * sizeof(X));
            } else {
                UNROLL
                for (int64_t j = 0; j < Unit; j++) from_float(to_float(x[c + j]), to[j]);
            }
            continue;
        }
        for (int64_t j = 0; j < Unit; j++) {
            Out& place = to[even_odd ? (j & ~15) + 8 * (j & 1) + (j & 15) / 2 : j];
            if (c + j >= k)
                place = Out{};
            else if constexpr (std::is_same_v<Out, X>)
                place = x[(c + j) * stride];
            else
                from_float(to_float(x[(c + j) * stride]), place);
        }
    }
}

// The largest magnitude of k numbers; not finite where one of them is not. Stride 0: theirs is `stride`.
template <int64_t Stride, class X>
float largest_magnitude(const X* x, int64_t stride, int64_t k) {
    uint32_t largest = 0;  // magnitudes are ordered as their bits are
    for (int64_t c = 0; c < k; c++) {
        const float v = to_float(x[c * (Stride ? Stride : stride)]);
        uint32_t bits;
        std::memcpy(&bits, &v, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float magnitude;
    std::memcpy(&magnitude, &largest, 4);
    return magnitude;
}

// Of symmetric whole numbers of at most `most` (127: int8) of which the largest stands for `largest`, as
// reference.quantize_per_token: sets their scale and returns what activations are multiplied by before they are
// rounded; 0 where they all become zeros (also where it would be beyond fp32).
INLINE float quantizing_factor(float largest, float most, float* scale) {
    const bool finite = largest <= std::numeric_limits<float>::max();
    *scale = finite ? largest / most : std::numeric_limits<float>::quiet_NaN();
    const float factor = most / largest;
    return finite && factor <= std::numeric_limits<float>::max() ? factor : 0.0f;
}
template <int64_t Stride, class X>
float quantizing_factor(const X* x, int64_t stride, int64_t k, float most, float* scale) {
    return quantizing_factor(largest_magnitude<Stride>(x, stride, k), most, scale);
}

// Eight numbers as fp32, as one vector: what were stored one by one could not be loaded together without a wait.
INLINE void eight_floats(const float* x, float* out) { std::memcpy(out, x, 32); }
INLINE void eight_floats(const Fp16* x, float* out) {
    for (int64_t j = 0; j < 8; j++) out[j] = to_float(x[j]);
}
INLINE void eight_floats(const Bf16* x, float* out) {
    uint16_t __attribute__((vector_size(16))) halves;
    std::memcpy(&halves, x, sizeof halves);
    const auto bits = __builtin_convertvector(halves, uint32_t __attribute__((vector_size(32)))) << 16;
    std::memcpy(out, &bits, sizeof bits);
}

// Columns c to c + 16 of a token as fp32, zeros from column k on.
template <class X>
INLINE void sixteen_columns(const X* x, int64_t stride, int64_t k, int64_t c, float* value) {
    if (stride == 1 && c + 16 <= k) {
        eight_floats(x + c, value), eight_floats(x + c + 8, value + 8);
    } else {
        for (int64_t j = 0; j < 16; j++) value[j] = c + j < k ? to_float(x[(c + j) * stride]) : 0.0f;
    }
}

// Writes token `t`, columns [begin, end), as int8 in units of 8 columns: x * factor, rounded.
template <class X>
void quantize_token(const X* x, int64_t stride, int64_t k, int64_t begin, int64_t end, float factor, int64_t tokens,
                    int64_t t, uint8_t* out) {
    constexpr uint8_t offset = Isa::kOffsetInt8 ? 0x80 : 0;
    for (int64_t c = begin; c < end; c += 16) {
        float value[16];
        uint8_t quantized[16];
        sixteen_columns(x, stride, k, c, value);
        Isa::nearest_int8(value, factor, offset, quantized);
        uint8_t* to = out + c * tokens + t * 8;
        std::memcpy(to, quantized, 8), std::memcpy(to + 8 * tokens, quantized + 8, 8);
    }
}

// The 32 activations of a chunk as int16 times 2^(e - 14), e the exponent of the largest: those of bf16 that are at
// least 2^-7 of it are exact, smaller ones are off by at most 2^-15 of it. The int16 come as (value + 32768), the upper
// and the lower bytes apart, 8 columns each: groups 0 and 2, 3 and 1, 4 and 6, 7 and 5.
template <class X>
void convert_chunk_i16(const X* x, int64_t stride, int64_t valid, uint8_t* out) {
    float value[kColumnChunk] = {};
    for (int64_t j = 0; j < valid; j++) value[j] = to_float(x[j * stride]);
    uint32_t largest = 0;
    for (float v : value) {
        uint32_t bits;
        std::memcpy(&bits, &v, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    // The factor stays a normal number; what is not finite itself gets the factor NaN.
    const uint32_t exponent = largest >> 23 < 15 ? 15 : largest >> 23;
    const uint32_t factor_bits = (exponent - 14) << 23, inverse_bits = (254 + 14 - exponent) << 23;
    float factor, inverse;
    std::memcpy(&factor, &factor_bits, 4), std::memcpy(&inverse, &inverse_bits, 4);
    if (exponent == 255) factor = std::numeric_limits<float>::quiet_NaN(), inverse = 0;
    for (int64_t j = 0; j < kColumnChunk; j++) {
        const float scaled = exponent == 255 ? 0 : std::nearbyint(value[j] * inverse);
        const uint32_t biased = uint32_t(int32_t(scaled < 32767 ? scaled : 32767) + 32768);
        const int64_t group = j / 4, second = group % 4 == 1 || group % 4 == 2;
        uint8_t* to = out + 32 * (group / 4) + 16 * (group % 2) + 4 * second + j % 4;
        to[0] = uint8_t(biased >> 8), to[8] = uint8_t(biased);
    }
    std::memcpy(out + factor_offset(kI16), &factor, sizeof factor);
}

// The 32 activations of a chunk as int8 times (their largest magnitude / 127), as reference.quantize_per_chunk; stored
// as x + 128, in the order of kOrderOfGroups.
template <class X>
void convert_chunk_i8(const X* x, int64_t stride, int64_t valid, uint8_t* out) {
    float value[kColumnChunk], factor;
    UNROLL
    for (int j = 0; j < 32; j += 16) sixteen_columns(x, stride, valid, j, value + j);
    const float inverse = quantizing_factor<1>(value, 1, kColumnChunk, 127, &factor);
    uint8_t quantized[kColumnChunk];
    UNROLL
    for (int j = 0; j < 32; j += 16) Isa::nearest_int8(value + j, inverse, 0x80, quantized + j);
    UNROLL
    for (int64_t place = 0; place < 8; place++) std::memcpy(out + 4 * place, quantized + 4 * kOrderOfGroups[place], 4);
    std::memcpy(out + factor_offset(kGroupedI8), &factor, sizeof factor);
}

// Writes columns [from, to) of token `t` of a tile, x, as the job's activations say; the tile begins at `out`.
template <class X>
void convert_token(const Job& job, const X* x, int64_t from, int64_t to, float factor, int64_t tokens, int64_t t,
                   uint8_t* out) {
    const Problem& p = job.p;
    const int64_t stride = p.x_column_stride;
    const Activations activations = activations_of(p);
    auto scatter = [&](auto* converted) {
        constexpr bool even_odd = Isa::kEvenOdd;
        if (p.layout == kDense)
            scatter_token<kColumnChunk>(x, stride, p.k, from, to, even_odd && p.weight_format == kBf16, tokens, t,
                                        converted);
        else
            scatter_token<4>(x, stride, p.k, from, to, false, tokens, t, converted);
    };
    if (activations == kF32) {
        scatter(reinterpret_cast<float*>(out));
    } else if (activations == kPairsBf16) {
        scatter(reinterpret_cast<Bf16*>(out));
    } else if (activations == kI8) {
        quantize_token(x, stride, p.k, from, to, factor, tokens, t, out);
    } else {
        for (int64_t c = from; c < to; c += kColumnChunk) {
            const int64_t valid = p.k - c < kColumnChunk ? p.k - c : kColumnChunk;
            uint8_t* chunk = out + (c * tokens + t * kColumnChunk) * activation_bytes(activations);
            activations == kI16 ? convert_chunk_i16(x + c * stride, stride, valid, chunk)
                                : convert_chunk_i8(x + c * stride, stride, valid, chunk);
        }
    }
}

// Writes all columns of token `t` of a tile as int16 times (their largest magnitude / kMostHalves). After the chunks of
// the tile's tokens come, 64 bytes a token each, what its sums of (weight + 128) times a half start from, as the lanes
// of a register of int32 have them, and what they are multiplied by at the end.
template <int64_t Stride, class X>
void convert_token_halves(const X* x, int64_t stride, int64_t k, int64_t tokens, int64_t t, uint8_t* out) {
    constexpr int64_t lanes = kHalvesBytes / 4;
    float value[kColumnChunk];
    int32_t start[lanes] = {};
    float factor[lanes];
    constexpr float most = float(kMostHalves);
    float scale;
    const float inverse = quantizing_factor<Stride>(x, stride, k, most, &scale);
    for (int64_t lane = 0; lane < lanes; lane++) factor[lane] = lane < lanes / 2 ? 256 * scale : scale;
    uint8_t* to = out + t * kHalvesBytes;
    for (int64_t c = 0; c < k; c += kColumnChunk, to += tokens * kHalvesBytes) {
        int8_t half[kHalvesBytes];
        UNROLL
        for (int j = 0; j < 32; j += 16) sixteen_columns(x, stride, k, c + j, value + j);
        for (int64_t j = 0; j < kColumnChunk; j++) {
            float v = inverse > 0 ? std::nearbyint(value[j] * inverse) : 0.0f;
            v = v < -most ? -most : v > most ? most : v;
            const int32_t whole = int32_t(v), upper = (whole + 128) >> 8;
            half[j] = int8_t(upper), half[j + kColumnChunk] = int8_t(whole - 256 * upper);
        }
        for (int64_t lane = 0; lane < lanes; lane++)
            start[lane] -= 128 * (half[4 * lane] + half[4 * lane + 1] + half[4 * lane + 2] + half[4 * lane + 3]);
        std::memcpy(to, half, sizeof half);
    }
    std::memcpy(to, start, sizeof start);
    std::memcpy(to + tokens * kHalvesBytes, factor, sizeof factor);
}

// Writes columns [c, c + kLaneUnit) of a token.
template <class X>
void convert_lanes(const X* x, int64_t stride, int64_t k, int64_t c, LanesI8& out) {
    constexpr int64_t width = 4 * kLanes;
    float value[kLaneUnit], factor[width];
    uint32_t largest[width] = {};  // magnitudes, as largest_magnitude has them
    for (int64_t at = 0; at < kLaneUnit; at += kLanes) sixteen_columns(x, stride, k, c + at, value + at);
    for (int64_t at = 0; at < kLaneUnit; at += width)
        for (int64_t j = 0; j < width; j++) {
            uint32_t bits;
            std::memcpy(&bits, &value[at + j], 4);
            bits &= 0x7fffffff;
            largest[j] = bits > largest[j] ? bits : largest[j];
        }
    for (int64_t lane = 0; lane < kLanes; lane++) {
        uint32_t bits = 0;
        for (int64_t j = 4 * lane; j < 4 * lane + 4; j++) bits = largest[j] > bits ? largest[j] : bits;
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        const float one = quantizing_factor(magnitude, 127, &out.scale[lane]);
        for (int64_t j = 4 * lane; j < 4 * lane + 4; j++) factor[j] = one;
    }
    for (int64_t at = 0; at < kLaneUnit; at++) value[at] *= factor[at % width];
    for (int64_t at = 0; at < kLaneUnit; at += kLanes)
        Isa::nearest_int8(value + at, 1, 0, reinterpret_cast<uint8_t*>(out.column + at));
    for (int64_t lane = 0; lane < kLanes; lane++) {
        int32_t sum = 0;
        for (int64_t at = 4 * lane; at < kLaneUnit; at += width)
            sum += out.column[at] + out.column[at + 1] + out.column[at + 2] + out.column[at + 3];
        out.start[lane] = -128 * sum;
    }
}

template <class X>
void convert_tile(const Job& job, int64_t tile) {
    const Problem& p = job.p;
    const int64_t begin = job.tile_begin(tile), tokens = job.tile_begin(tile + 1) - begin,
                  padded = job.chunks * kColumnChunk;
    const X* x = static_cast<const X*>(p.x) + begin * p.x_row_stride;
    uint8_t* out = job.activations + begin * job.token_bytes;
    if (Isa::kLanes8 && activations_of(p) == kLanesI8) {
        LanesI8* unit = reinterpret_cast<LanesI8*>(out);
        for (int64_t c = 0; c < p.k; c += kLaneUnit)
            for (int64_t t = 0; t < tokens; t++)
                convert_lanes(x + t * p.x_row_stride, p.x_column_stride, p.k, c, *unit++);
        return;
    }
    if (Isa::kHalves16 && activations_of(p) == kHalvesI16) {
        for (int64_t t = 0; t < tokens; t++, x += p.x_row_stride)
            p.x_column_stride == 1 ? convert_token_halves<1>(x, 1, p.k, tokens, t, out)
                                   : convert_token_halves<0>(x, p.x_column_stride, p.k, tokens, t, out);
        return;
    }
    float factor[kMaxTile] = {};
    if (activations_of(p) == kI8)
        for (int64_t t = 0; t < tokens; t++) {
            float* scale = job.token_scale + begin + t;
            factor[t] = p.x_column_stride == 1
                            ? quantizing_factor<1>(x + t * p.x_row_stride, 1, p.k, 127, scale)
                            : quantizing_factor<0>(x + t * p.x_row_stride, p.x_column_stride, p.k, 127, scale);
        }
    for (int64_t from = 0; from < padded; from += kConvertedColumns) {
        const int64_t to = padded - from < kConvertedColumns ? padded : from + kConvertedColumns;
        for (int64_t t = 0; t < tokens; t++)
            convert_token(job, x + t * p.x_row_stride, from, to, factor[t], tokens, t, out);
    }
}

void convert(const Job& job, int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++) switch (job.p.x_dtype) {
            case kBf16: convert_tile<Bf16>(job, tile); break;
            case kFp16: convert_tile<Fp16>(job, tile); break;
            default: convert_tile<float>(job, tile);
        }
}

// ---- outputs ----

// What outputs are made of beside their sums: y = sum * token scale * row scale + bias.
struct Ending {
    const float* row_scale;  // or null: scales of groups of columns are in the sums already
    const void* bias;
    int32_t bias_dtype;
};

// The numbers of a row block as one vector, which every compiler that knows this attribute cuts into its registers.
using Floats = float __attribute__((vector_size(4 * kRowBlock)));
using Words = uint32_t __attribute__((vector_size(4 * kRowBlock)));
using Integers = int32_t __attribute__((vector_size(4 * kRowBlock)));
using Halves = uint16_t __attribute__((vector_size(2 * kRowBlock)));

template <class V>
INLINE V load_vector(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
INLINE Floats load_floats(const float* from) { return load_vector<Floats>(from); }
INLINE Floats load_floats(const int32_t* from) { return __builtin_convertvector(load_vector<Integers>(from), Floats); }
INLINE Floats load_floats(const Bf16* from) {
    return (Floats)(__builtin_convertvector(load_vector<Halves>(from), Words) << 16);
}
INLINE Floats load_floats(const Fp16* from) {
    float value[kRowBlock];
    for (int64_t r = 0; r < kRowBlock; r++) value[r] = to_float(from[r]);
    return load_vector<Floats>(value);
}

// As from_float, number by number.
INLINE void store_floats(Floats value, float* to) { std::memcpy(to, &value, sizeof value); }
INLINE void store_floats(Floats value, Bf16* to) {
    const Words bits = (Words)value, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words nan = (Words)((bits & 0x7fffffff) > 0x7f800000);
    const Halves out = __builtin_convertvector((nan & ((bits >> 16) | 0x40)) | (~nan & rounded), Halves);
    std::memcpy(to, &out, sizeof out);
}
INLINE void store_floats(Floats value, Fp16* to) {
    for (int64_t r = 0; r < kRowBlock; r++) from_float(value[r], to[r]);
}

// Stores a token's sums of a row block.
template <class Y, class Sum>
INLINE void store_block(const Ending& ending, int64_t row, const float* token_scale, const Sum* sums, Y* y) {
    Floats value = load_floats(sums);
    if (token_scale) value *= *token_scale;
    if (ending.row_scale) value *= load_floats(ending.row_scale + row);
    if (ending.bias) switch (ending.bias_dtype) {
            case kFp32: value += load_floats(static_cast<const float*>(ending.bias) + row); break;
            case kBf16: value += load_floats(static_cast<const Bf16*>(ending.bias) + row); break;
            default: value += load_floats(static_cast<const Fp16*>(ending.bias) + row);
        }
    store_floats(value, y + row);
}

// The same for the `rows` rows that are left of the last one.
template <class Y, class Sum>
void store_rest(const Ending& ending, int64_t row, int64_t rows, const float* token_scale, const Sum* sums, Y* y) {
    for (int64_t r = 0; r < rows; r++) {
        float value = float(sums[r]);
        if (token_scale) value *= *token_scale;
        if (ending.row_scale) value *= ending.row_scale[row + r];
        if (ending.bias) switch (ending.bias_dtype) {
                case kFp32: value += static_cast<const float*>(ending.bias)[row + r]; break;
                case kBf16: value += to_float(static_cast<const Bf16*>(ending.bias)[row + r]); break;
                default: value += to_float(static_cast<const Fp16*>(ending.bias)[row + r]);
            }
        from_float(value, y[row + r]);
    }
}

// Stores sums [tokens][rows] of rows row.., a row block at a time.
template <class Y, class Sum>
void store_as(const Job& job, int64_t row, int64_t rows, int64_t token, int64_t tokens, const Sum* sums) {
    const Problem& p = job.p;
    const Ending ending{kWeightFormats[p.weight_format].scale_group ? nullptr : static_cast<const float*>(p.scale),
                        p.bias, p.bias_dtype};
    const int64_t end = p.n - row < rows ? p.n : row + rows;
    for (int64_t t = 0; t < tokens; t++) {
        const float* token_scale = job.token_scale ? job.token_scale + token + t : nullptr;
        Y* y = static_cast<Y*>(p.y) + (token + t) * p.n;
        for (int64_t at = row; at < end; at += kRowBlock) {
            const Sum* from = sums + t * rows + at - row;
            if (end - at >= kRowBlock)
                store_block(ending, at, token_scale, from, y);
            else
                store_rest(ending, at, end - at, token_scale, from, y);
        }
    }
}

template <class Sum>
void store(const Job& job, int64_t row, int64_t rows, int64_t token, int64_t tokens, const Sum* sums) {
    switch (job.p.x_dtype) {
        case kBf16: store_as<Bf16>(job, row, rows, token, tokens, sums); break;
        case kFp16: store_as<Fp16>(job, row, rows, token, tokens, sums); break;
        default: store_as<float>(job, row, rows, token, tokens, sums);
    }
}

// ---- 2:4 weights ----

// The chunks [begin, begin + count) of `rows` row blocks from `block` on, for the tokens of a tile. Their weights begin
// at `weight`, and those of the next row block `stride` bytes on.
struct Piece {
    int64_t block, begin, count;
    const uint8_t* weight;
    int64_t stride;
};

// The zero points of the row block at hand and of the group of columns that begins with a chunk, 16 bytes.
const uint8_t* zero_points(const Problem& p, int64_t rows) {
    static constexpr struct ZeroPoints {
        uint8_t of[kRowBlock];
        constexpr ZeroPoints() : of() {
            for (uint8_t& zero : of) zero = kZeroPoint;
        }
    } all;
    return p.zero ? p.zero + rows : all.of;
}

// Sums of int4 codes, one group of columns that share a scale after the other.
template <class K, int R, int T>
void multiply_codes(const Job& job, const Piece& piece, const uint8_t* x, float* sums) {
    const Problem& p = job.p;
    const uint8_t* w = piece.weight;
    const int64_t group = kWeightFormats[p.weight_format].scale_group / kColumnChunk, step = group ? group : job.chunks;
    const int64_t groups = (job.chunks + step - 1) / step, scale_bytes = p.scale_dtype == kFp32 ? 4 : 2;
    int64_t rows = (piece.block * groups + piece.begin / step) * kRowBlock;  // in scales and zero points
    for (int64_t chunk = piece.begin, end = chunk + piece.count; chunk < end; chunk += step, rows += kRowBlock) {
        const Codes codes{w,
                          piece.stride,
                          zero_points(p, rows),
                          p.zero ? groups * kRowBlock : 0,
                          job.chunks - chunk,
                          group ? static_cast<const uint8_t*>(p.scale) + rows * scale_bytes : nullptr,
                          groups * kRowBlock * scale_bytes,
                          p.scale_dtype};
        const int64_t count = end - chunk < step ? end - chunk : step;
        Isa::template codes<K, R, T>(codes, x, count, sums, chunk == 0);
        w += count * K::weight_bytes, x += count * kColumnChunk * T * K::activation_bytes;
    }
}

// Multiplies a piece of R row blocks by `tokens` tokens, with `tokens` as a template argument.
template <class K, int R, int T>
inline void multiply_piece(const Job& job, const Piece& piece, int64_t tokens, const uint8_t* x,
                           typename K::Sum* sums) {
    if constexpr (T > 0) {
        if (tokens != T) return multiply_piece<K, R, T - 1>(job, piece, tokens, x, sums);
        if constexpr (is_codes(K::format))
            multiply_codes<K, R, T>(job, piece, x, sums);
        else
            Isa::template sparse<K, R, T>(piece.weight, piece.stride, x, piece.count, sums, piece.begin == 0);
    }
}

// The same for one token and kCodeBlocks row blocks of codes.
template <class K>
inline void multiply_wide(const Job& job, const Piece& piece, const uint8_t* x, typename K::Sum* sums) {
    if constexpr (is_codes(K::format)) multiply_codes<K, Isa::kCodeBlocks, 1>(job, piece, x, sums);
}

// The chunks [begin, begin + count) of row blocks from `block` on, as the weight has them.
template <class K>
Piece packed_piece(const Job& job, int64_t block, int64_t begin, int64_t count) {
    const int64_t stride = job.chunks * K::weight_bytes;
    return {block, begin, count, static_cast<const uint8_t*>(job.p.weight) + block * stride + begin * K::weight_bytes,
            stride};
}

// Outputs of one or kBlocks row blocks and one tile, over the chunks of a piece; stored after the last.
template <class K>
int64_t multiply_blocks(const Job& job, const Piece& piece, int64_t block_end, int64_t tile, typename K::Sum* sums) {
    const int64_t begin = job.tile_begin(tile), tokens = job.tile_begin(tile + 1) - begin, block = piece.block;
    const uint8_t* x =
        job.activations + begin * job.token_bytes + piece.begin * kColumnChunk * tokens * K::activation_bytes;
    const bool alone = Isa::one_block(K::activations, kWeightFormats[K::format].bits, tokens);
    const int64_t left = block_end - block;
    // Of codes, one token's kCodeBlocks wait for each other less.
    int64_t together = Isa::kBlocks <= left && !alone ? Isa::kBlocks : 1;
    if constexpr (is_codes(K::format) && !K::prepared && Isa::kCodeBlocks > Isa::kBlocks)
        if (!alone && tokens == 1 && left >= Isa::kCodeBlocks) together = Isa::kCodeBlocks;
    if (together > Isa::kBlocks)
        multiply_wide<K>(job, piece, x, sums);
    else if (together == Isa::kBlocks)
        multiply_piece<K, Isa::kBlocks, Isa::tile(K::activations)>(job, piece, tokens, x, sums);
    else
        multiply_piece<K, 1, Isa::tile(K::activations)>(job, piece, tokens, x, sums);
    if (piece.begin + piece.count == job.chunks)
        store(job, block * kRowBlock, together * kRowBlock, begin, tokens, sums);
    return together;
}

// Decodes the piece of each row block up to block_end to where `out` says. (`Set` is Isa, which has no `prepare` where
// nothing meets pairs of bf16.)
template <class K, class Set = Isa>
void prepare(const Job& job, Piece piece, int64_t block_end, const Piece& out) {
    const int64_t group = kWeightFormats[job.p.weight_format].scale_group / kColumnChunk,
                  step = group ? group : job.chunks;
    const int64_t groups = (job.chunks + step - 1) / step, end = piece.begin + piece.count;
    uint8_t* to = const_cast<uint8_t*>(out.weight);
    for (; piece.block < block_end; piece.block++, piece.weight += piece.stride, to += out.stride)
        for (int64_t chunk = piece.begin; chunk < end; chunk += step) {
            const int64_t skipped = chunk - piece.begin;
            Set::template prepare<K::format>(piece.weight + skipped * K::weight_bytes,
                                             zero_points(job.p, (piece.block * groups + chunk / step) * kRowBlock),
                                             end - chunk < step ? end - chunk : step,
                                             to + skipped * Prepared<K>::weight_bytes);
        }
}

// The sums of all tiles of a task over the chunks of a piece, in the order that they are kept in between pieces.
template <class K>
void multiply_tiles(const Job& job, const Piece& piece, int64_t block_end, int64_t tile_begin, int64_t tile_end,
                    typename K::Sum* sums) {
    for (int64_t tile = tile_begin; tile < tile_end; tile++)
        for (Piece at = piece; at.block < block_end;) {
            const int64_t done = multiply_blocks<K>(job, at, block_end, tile, sums);
            at.block += done, at.weight += done * at.stride;
            sums += done * kRowBlock * (job.tile_begin(tile + 1) - job.tile_begin(tile));
        }
}

// The same with weights that are decoded to `decoded` first, kBlocks row blocks at a time: they stay in the first-level
// cache while all tiles' activations for the piece, which the second level holds, come by.
template <class K>
void multiply_prepared(const Job& job, Piece piece, int64_t block_end, int64_t tile_begin, int64_t tile_end,
                       const Piece& decoded, float* sums) {
    while (piece.block < block_end) {
        const int64_t blocks = piece.block + Isa::kBlocks <= block_end ? Isa::kBlocks : 1;
        Piece at = decoded;
        at.block = piece.block, at.begin = piece.begin, at.count = piece.count;
        prepare<K>(job, piece, piece.block + blocks, at);
        multiply_tiles<Prepared<K>>(job, at, piece.block + blocks, tile_begin, tile_end, sums);
        sums += blocks * kRowBlock * (job.tile_begin(tile_end) - job.tile_begin(tile_begin));
        piece.block += blocks, piece.weight += blocks * piece.stride;
    }
}

template <class K>
void multiply_sparse(const Job& job, int64_t block_begin, int64_t block_end, int64_t tile_begin, int64_t tile_end) {
    using Sum = typename K::Sum;
    const int64_t tokens = job.tile_begin(tile_end) - job.tile_begin(tile_begin),
                  rows = (block_end - block_begin) * kRowBlock;
    // Many tiles are worth decoded weights, of which some chunks fit the first-level cache.
    const int64_t most = Isa::kPreparedChunks < job.chunks ? Isa::kPreparedChunks : job.chunks,
                  stride = most * Prepared<K>::weight_bytes;
    uint8_t* prepared = nullptr;
    if (K::activations == kPairsBf16 && tile_end - tile_begin >= Isa::prepared_tiles(kWeightFormats[K::format].bits))
        prepared = static_cast<uint8_t*>(std::aligned_alloc(64, size_t(Isa::kBlocks * stride)));
    // With several tiles, columns are cut so that a tile's activations stay in the first-level cache while they meet
    // every row of the task, and the task's weights in the second-level one.
    Sum* partial = nullptr;
    if (tile_end - tile_begin > 1 && (prepared || job.chunks > Isa::kChunkBlock))
        partial = static_cast<Sum*>(std::aligned_alloc(64, size_t(rows * tokens) * sizeof(Sum)));
    if (partial) {
        const int64_t step = prepared ? most : Isa::kChunkBlock;
        for (int64_t chunk = 0; chunk < job.chunks; chunk += step) {
            const Piece piece =
                packed_piece<K>(job, block_begin, chunk, job.chunks - chunk < step ? job.chunks - chunk : step);
            if constexpr (K::activations == kPairsBf16)
                if (prepared) {
                    const Piece decoded{block_begin, chunk, piece.count, prepared, stride};
                    multiply_prepared<K>(job, piece, block_end, tile_begin, tile_end, decoded, partial);
                    continue;
                }
            multiply_tiles<K>(job, piece, block_end, tile_begin, tile_end, partial);
        }
    }
    const bool done_in_pieces = partial;
    std::free(prepared);
    std::free(partial);
    if (done_in_pieces) return;
    // With one, weights are used once: row blocks are streamed whole. (Also where there is no memory for partial sums:
    // slower, and as right.)
    alignas(64) Sum sums[kMaxTile * kRowBlock * Isa::kBlocks];
    for (int64_t block = block_begin, done = 1; block < block_end; block += done)
        for (int64_t tile = tile_begin; tile < tile_end; tile++)
            done = multiply_blocks<K>(job, packed_piece<K>(job, block, 0, job.chunks), block_end, tile, sums);
}

// ---- dense weights ----

// Calls dense<R, tokens> with `tokens` as a template argument, R = dense_rows(tokens) or, where there are fewer, 1.
// Returns R.
template <class W, class X, int T>
inline int64_t dense_tokens(int64_t tokens, int64_t rows, const W* w, const Columns& at, const X* x, float* sums,
                            int64_t stride) {
    if constexpr (T > 0) {
        constexpr int R = Isa::dense_rows(T, sizeof(W));
        if (tokens != T) return dense_tokens<W, X, T - 1>(tokens, rows, w, at, x, sums, stride);
        if (rows >= R) return Isa::template dense<W, X, R, T>(w, at, x, sums, stride), R;
        Isa::template dense<W, X, 1, T>(w, at, x, sums, stride);
    }
    return 1;
}

// The columns of a tile's activations that stay in the first-level cache while a block of rows meets them; all of them
// where they do anyway.
template <class X>
int64_t dense_piece(int64_t k, int64_t tokens) {
    constexpr bool lanes = std::is_same_v<X, LanesI8>;
    constexpr int64_t unit = lanes ? kLaneUnit : 64;
    const int64_t bytes = tokens * int64_t(lanes ? 1 : sizeof(X));
    return Isa::kDenseCache && k * bytes > Isa::kDenseCache * 3 / 2 ? Isa::kDenseCache / bytes / unit * unit : k;
}

template <class W, class X>
void multiply_dense(const Job& job, int64_t block_begin, int64_t block_end, int64_t tile_begin, int64_t tile_end) {
    const Problem& p = job.p;
    alignas(64) float partial[kRowBlock * Isa::kDenseTile * 16],
        sums[kMaxTile * kRowBlock];  // [row][token][lane], [tokens][rows]
    // All tiles meet a block of rows before the next one is read.
    for (int64_t block = block_begin; block < block_end; block++) {
        const int64_t row = block * kRowBlock, rows = p.n - row < kRowBlock ? p.n - row : kRowBlock;
        const W* w = static_cast<const W*>(p.weight) + row * p.k;
        for (int64_t tile = tile_begin; tile < tile_end; tile++) {
            const int64_t begin = job.tile_begin(tile), count = job.tile_begin(tile + 1) - begin,
                          piece = dense_piece<X>(p.k, count);
            const X* x = reinterpret_cast<const X*>(job.activations + begin * job.token_bytes);
            for (int64_t from = 0; from < p.k; from += piece)
                for (int64_t r = 0; r < rows;) {
                    const Columns at{p.k, from, p.k - from < piece ? p.k : from + piece, partial + r * count * 16};
                    r += dense_tokens<W, X, Isa::kDenseTile>(count, rows - r, w + r * p.k, at, x, sums + r, rows);
                }
            store(job, row, rows, begin, count, sums);
        }
    }
}

// Calls run with the Kind of a 2:4 weight's format, which is `Format` or one after it in the table; codes are kInt4's.
template <int32_t Format, class Run>
void with_kind(const Job& job, const Run& run) {
    if constexpr (Format <= kInt4) {
        if (job.p.weight_format != Format && Format != kInt4) return with_kind<Format + 1>(job, run);
        if constexpr (kWeightFormats[Format].quantizes_inputs) {
            run(Kind<Format, kI8>{});
        } else {
            if constexpr (Format == kInt4)
                if (activations_of(job.p) == kGroupedI8) return run(Kind<Format, kGroupedI8>{});
            if constexpr (Format == kInt4 && Isa::kCodes16)
                if (activations_of(job.p) == kI16) return run(Kind<Format, kI16>{});
            if constexpr ((Format == kBf16 || Format > kInt8) && Isa::kBf16Activations)
                if (activations_of(job.p) == kPairsBf16) return run(Kind<Format, kPairsBf16>{});
            run(Kind<Format, kF32>{});
        }
    }
}

void multiply(const Job& job, int64_t block_begin, int64_t block_end, int64_t tile_begin, int64_t tile_end) {
    auto dense = [&](auto function) { function(job, block_begin, block_end, tile_begin, tile_end); };
    if (job.p.layout == kSparse24)
        return with_kind<0>(job, [&](auto kind) {
            multiply_sparse<decltype(kind)>(job, block_begin, block_end, tile_begin, tile_end);
        });
    if (job.p.weight_format == kBf16) {
        if constexpr (Isa::kBf16Activations)
            if (activations_of(job.p) == kPairsBf16) return dense(multiply_dense<Bf16, Bf16>);
        return dense(multiply_dense<Bf16, float>);
    }
    if (job.p.weight_format == kInt8 || job.p.weight_format == kInt8WeightOnly) {
        if constexpr (Isa::kLanes8)
            if (activations_of(job.p) == kLanesI8) return dense(multiply_dense<int8_t, LanesI8>);
        if constexpr (Isa::kHalves16)
            if (activations_of(job.p) == kHalvesI16) return dense(multiply_dense<int8_t, HalfI16>);
        if constexpr (Isa::kBf16Activations)
            if (activations_of(job.p) == kPairsBf16) return dense(multiply_dense<int8_t, Bf16>);
        return dense(multiply_dense<int8_t, float>);
    }
    if (job.p.weight_format == kFp16) return dense(multiply_dense<Fp16, float>);
    dense(multiply_dense<float, float>);
}

}  // namespace
