// NEON (AArch64): 4 rows a register; a byte table lookup picks the activations of a group for 4 rows.
#include <arm_neon.h>

#include "portable_codes.h"

namespace {

struct Isa {
    static constexpr bool kBf16Activations = false, kOffsetInt8 = false;
    static constexpr bool kEvenOdd = false, kCodes16 = false, kHalves16 = false, kLanes8 = false;
    static constexpr int64_t kBlocks = 1, kCodeBlocks = 1, kChunkBlock = 16, kDenseTile = 4, kDenseCache = 0;
    static constexpr bool one_block(Activations, int64_t, int64_t) { return false; }
    static constexpr int64_t kPreparedChunks = 1;
    static constexpr int64_t prepared_tiles(int64_t) { return 1; }
    static constexpr int dense_rows(int64_t, int64_t) { return 4; }
    static void nearest_int8(const float* value, float factor, uint8_t offset, uint8_t* out) {
        nearest_int8_plain(value, factor, offset, out);
    }
    static constexpr int64_t tile(Activations) { return 4; }

    // Kept value V of 4 rows from row 4 Q of a group's values.
    template <int32_t Format, int V>
    static INLINE float32x4_t kept(const uint8_t* group, int q) {
        if constexpr (Format == kBf16) {
            uint32x4_t pairs = vreinterpretq_u32_u8(vld1q_u8(group + 16 * q));
            return vreinterpretq_f32_u32(V ? vandq_u32(pairs, vdupq_n_u32(0xffff0000)) : vshlq_n_u32(pairs, 16));
        } else if constexpr (Format == kFp16) {
            return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(group + 32 * V + 8 * q)));
        } else if constexpr (Format == kInt8WeightOnly) {
            return load(reinterpret_cast<const int8_t*>(group + 16 * V + 4 * q));
        } else {
            return vreinterpretq_f32_u8(vld1q_u8(group + 64 * V + 16 * q));
        }
    }

    template <class K, int V, int T>
    static INLINE void value(const uint8_t* group, int q, uint32x4_t columns, const float* x, float32x4_t (&acc)[T]) {
        // Column c is bytes 4 c to 4 c + 3 of the group's activations.
        uint32x4_t control = vmlaq_n_u32(vdupq_n_u32(0x03020100), vandq_u32(columns, vdupq_n_u32(3)), 0x04040404);
        float32x4_t w = kept<K::format, V>(group, q);
        UNROLL
        for (int t = 0; t < T; t++) {
            uint8x16_t chosen = vqtbl1q_u8(vreinterpretq_u8_f32(vld1q_f32(x + 4 * t)), vreinterpretq_u8_u32(control));
            acc[t] = vfmaq_f32(acc[t], w, vreinterpretq_f32_u8(chosen));
        }
    }

    template <class K, int T>
    static void sparse_f32(const uint8_t* w, const float* x, int64_t chunks, float* sums, bool first) {
        for (int q = 0; q < 4; q++) {
            const uint8_t* chunk = w;
            const float* activations = x;
            float32x4_t acc[T];
            UNROLL
            for (int t = 0; t < T; t++) acc[t] = first ? vdupq_n_f32(0) : vld1q_f32(sums + t * kRowBlock + 4 * q);
            for (int64_t c = 0; c < chunks; c++, chunk += K::weight_bytes) {
                uint32x4_t metadata = vreinterpretq_u32_u8(vld1q_u8(chunk + 16 * q));
                const uint8_t* group = chunk + kMetadataBytes;
                for (int g = 0; g < 8; g++, activations += 4 * T, group += (K::weight_bytes - kMetadataBytes) / 8) {
                    value<K, 0>(group, q, metadata, activations, acc);
                    value<K, 1>(group, q, vshrq_n_u32(metadata, 2), activations, acc);
                    metadata = vshrq_n_u32(metadata, 4);
                }
            }
            UNROLL
            for (int t = 0; t < T; t++) vst1q_f32(sums + t * kRowBlock + 4 * q, acc[t]);
        }
    }

    template <int T>
    static void sparse_int8(const uint8_t* w, const uint8_t* x, int64_t chunks, int32_t* sums, bool first) {
        for (int q = 0; q < 4; q++) {
            const uint8_t *chunk = w, *activations = x;
            int32x4_t acc[T];
            UNROLL
            for (int t = 0; t < T; t++) acc[t] = first ? vdupq_n_s32(0) : vld1q_s32(sums + t * kRowBlock + 4 * q);
            for (int64_t c = 0; c < chunks; c++, chunk += chunk_bytes(kInt8)) {
                uint32x4_t metadata = vreinterpretq_u32_u8(vld1q_u8(chunk + 16 * q));
                for (int pair = 0; pair < 4; pair++, activations += 8 * T, metadata = vshrq_n_u32(metadata, 2)) {
                    uint32x4_t columns =
                        vorrq_u32(vandq_u32(metadata, vdupq_n_u32(0x03030303)), vdupq_n_u32(0x04040000));
                    int8x16_t value = vreinterpretq_s8_u8(vld1q_u8(chunk + kMetadataBytes + 64 * pair + 16 * q));
                    UNROLL
                    for (int t = 0; t < T; t++) {
                        uint8x8_t eight = vld1_u8(activations + 8 * t);
                        int8x16_t chosen =
                            vreinterpretq_s8_u8(vqtbl1q_u8(vcombine_u8(eight, eight), vreinterpretq_u8_u32(columns)));
                        // Products are at most 127 * 128: the sum of two fits 16 bits.
                        int16x8_t low = vmull_s8(vget_low_s8(value), vget_low_s8(chosen));
                        int16x8_t high = vmull_s8(vget_high_s8(value), vget_high_s8(chosen));
                        acc[t] = vpadalq_s16(acc[t], vpaddq_s16(low, high));
                    }
                }
            }
            UNROLL
            for (int t = 0; t < T; t++) vst1q_s32(sums + t * kRowBlock + 4 * q, acc[t]);
        }
    }

    template <class K, int R, int T>
    static void sparse(const uint8_t* w, int64_t, const uint8_t* x, int64_t chunks, typename K::Sum* sums, bool first) {
        static_assert(R == 1);
        if constexpr (K::activations == kI8)
            sparse_int8<T>(w, x, chunks, sums, first);
        else
            sparse_f32<K, T>(w, reinterpret_cast<const float*>(x), chunks, sums, first);
    }

    template <class K, int R, int T>
    static void codes(const Codes& w, const uint8_t* x, int64_t chunks, float* sums, bool first) {
        if constexpr (K::activations == kGroupedI8)
            portable_grouped_i8<T>(w, x, chunks, sums, first);
        else
            portable_codes<T>(w, reinterpret_cast<const float*>(x), chunks, sums, first);
    }

    static INLINE float32x4_t load(const float* p) { return vld1q_f32(p); }
    static INLINE float32x4_t load(const Bf16* p) {
        return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
    }
    static INLINE float32x4_t load(const int8_t* p) {
        int32_t four;
        std::memcpy(&four, p, sizeof four);
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
    }
    static INLINE float32x4_t load(const Fp16* p) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
    }

    template <class W, int R, int T>
    static INLINE void dense_four(const W* w, int64_t row_stride, const float* x, float32x4_t (&acc)[R][T]) {
        UNROLL
        for (int r = 0; r < R; r++) {
            float32x4_t value = load(w + r * row_stride);
            UNROLL
            for (int t = 0; t < T; t++) acc[r][t] = vfmaq_f32(acc[r][t], value, vld1q_f32(x + 32 * t));
        }
    }

    template <class W, class X, int R, int T>
    static void dense(const W* w, const Columns& at, const X* x, float* sums, int64_t stride) {
        const int64_t k = at.k;
        float32x4_t acc[R][T];
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++) acc[r][t] = vdupq_n_f32(0);
        int64_t c = 0;
        for (; c + 4 <= k; c += 4) dense_four<W, R, T>(w + c, k, x + c / 32 * 32 * T + c % 32, acc);
        if (c < k) {
            W tail[R][4] = {};
            for (int r = 0; r < R; r++) std::memcpy(tail[r], w + r * k + c, size_t(k - c) * sizeof(W));
            dense_four<W, R, T>(tail[0], 4, x + c / 32 * 32 * T + c % 32, acc);
        }
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++) sums[t * stride + r] = vaddvq_f32(acc[r][t]);
    }
};

}  // namespace

#include "driver.h"

const InstructionSet kNeon = {"neon", [] { return true; }, tile_tokens, token_bytes, convert, multiply};
