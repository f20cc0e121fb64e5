// NEON (AArch64): 4 rows a register; a byte table lookup picks the activations of a group for 4 rows.
//
// Compiled twice: as every AArch64 processor has it, and with the dot product of int8 that most have since Arm v8.2.
#include <arm_neon.h>
#if defined(CREPE_HAVE_NEON_DOTPROD) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "formats.h"

namespace {

struct Isa : PlainIsa {
    static constexpr int dense_rows(int64_t, int64_t) { return 4; }

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

    // Columns are the lowest two bits of 32.
    template <int T>
    static INLINE void multiply_add(float32x4_t w, uint32x4_t columns, const float* x, float32x4_t (&acc)[T]) {
        // Column c is bytes 4 c to 4 c + 3 of the group's activations.
        uint32x4_t control = vmlaq_n_u32(vdupq_n_u32(0x03020100), vandq_u32(columns, vdupq_n_u32(3)), 0x04040404);
        UNROLL
        for (int t = 0; t < T; t++) {
            uint8x16_t chosen = vqtbl1q_u8(vreinterpretq_u8_f32(vld1q_f32(x + 4 * t)), vreinterpretq_u8_u32(control));
            acc[t] = vfmaq_f32(acc[t], w, vreinterpretq_f32_u8(chosen));
        }
    }

    // What four rows add to the sums of a token: 16 bytes of values times those of its activations.
    template <int N>
    static INLINE int32x4_t dot(const int8x16_t (&value)[N], const int8x16_t (&chosen)[N], int32x4_t acc) {
#ifdef CREPE_HAVE_NEON_DOTPROD
        UNROLL
        for (int i = 0; i < N; i++) acc = vdotq_s32(acc, value[i], chosen[i]);
        return acc;
#else
        int16x8_t low = vmull_s8(vget_low_s8(value[0]), vget_low_s8(chosen[0])),
                  high = vmull_s8(vget_high_s8(value[0]), vget_high_s8(chosen[0]));
        UNROLL
        for (int i = 1; i < N; i++) {
            low = vmlal_s8(low, vget_low_s8(value[i]), vget_low_s8(chosen[i]));
            high = vmlal_s8(high, vget_high_s8(value[i]), vget_high_s8(chosen[i]));
        }
        return vpadalq_s16(acc, vpaddq_s16(low, high));
#endif
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
                    multiply_add(kept<K::format, 0>(group, q), metadata, activations, acc);
                    multiply_add(kept<K::format, 1>(group, q), vshrq_n_u32(metadata, 2), activations, acc);
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
                    const int8x16_t value[1] = {
                        vreinterpretq_s8_u8(vld1q_u8(chunk + kMetadataBytes + 64 * pair + 16 * q))};
                    UNROLL
                    for (int t = 0; t < T; t++) {
                        uint8x8_t eight = vld1_u8(activations + 8 * t);
                        const int8x16_t chosen[1] = {
                            vreinterpretq_s8_u8(vqtbl1q_u8(vcombine_u8(eight, eight), vreinterpretq_u8_u32(columns)))};
                        // Products are at most 127 * 128: the sum of two fits 16 bits.
                        acc[t] = dot(value, chosen, acc[t]);
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

    // Sums of 4 rows from row 4 q: where they begin, and what they come to after some chunks, times scales where there
    // are any.
    template <int T>
    static INLINE void start_codes(const Codes& w, int q, const float* sums, bool first, float32x4_t (&acc)[T]) {
        UNROLL
        for (int t = 0; t < T; t++)
            acc[t] = first || w.scale ? vdupq_n_f32(0) : vld1q_f32(sums + t * kRowBlock + 4 * q);
    }
    template <int T>
    static INLINE void store_codes(const Codes& w, int q, const float32x4_t (&acc)[T], float* sums, bool first) {
        float32x4_t scale = vdupq_n_f32(0);
        if (w.scale)
            scale = w.scale_dtype == kFp32   ? load(reinterpret_cast<const float*>(w.scale) + 4 * q)
                    : w.scale_dtype == kBf16 ? load(reinterpret_cast<const Bf16*>(w.scale) + 4 * q)
                                             : load(reinterpret_cast<const Fp16*>(w.scale) + 4 * q);
        UNROLL
        for (int t = 0; t < T; t++) {
            float* to = sums + t * kRowBlock + 4 * q;
            vst1q_f32(to, w.scale ? vfmaq_f32(first ? vdupq_n_f32(0) : vld1q_f32(to), acc[t], scale) : acc[t]);
        }
    }

    // The same as sparse_f32 for int4 codes less their zero points.
    template <int T>
    static void codes_f32(const Codes& w, const float* x, int64_t chunks, float* sums, bool first) {
        uint32_t zeros[kRowBlock];
        for (int r = 0; r < kRowBlock; r++) zeros[r] = w.zero[r];
        for (int q = 0; q < 4; q++) {
            const uint8_t* chunk = w.weight;
            const float* activations = x;
            const uint32x4_t zero = vld1q_u32(zeros + 4 * q);
            float32x4_t acc[T];
            start_codes(w, q, sums, first, acc);
            for (int64_t c = 0; c < chunks; c++, chunk += kCodeBytes) {
                uint32x4_t metadata = vreinterpretq_u32_u8(vld1q_u8(chunk + 16 * q));
                for (int word = 1; word < 3; word++) {
                    uint32x4_t words = vreinterpretq_u32_u8(vld1q_u8(chunk + 64 * word + 16 * q));
                    for (int g = 0; g < 4; g++, activations += 4 * T, words = vshrq_n_u32(words, 4)) UNROLL
                    for (int v = 0; v < 2; v++, metadata = vshrq_n_u32(metadata, 2)) {
                        const uint32x4_t code = vandq_u32(v ? vshrq_n_u32(words, 16) : words, vdupq_n_u32(15));
                        multiply_add(vcvtq_f32_s32(vreinterpretq_s32_u32(vsubq_u32(code, zero))), metadata, activations,
                                     acc);
                    }
                }
            }
            store_codes(w, q, acc, sums, first);
        }
    }

    // int4 codes times int8 activations: the sums of a chunk are whole numbers below 2^24, exact in fp32. Of four rows
    // the codes less their zero points make four registers, of groups 0 and 2, 1 and 3, 4 and 6, 5 and 7, the order in
    // which activations come; the sums of four products fit 16 bits.
    template <int T>
    static void codes_i8(const Codes& w, const uint8_t* x, int64_t chunks, float* sums, bool first) {
        constexpr int64_t token = kColumnChunk * activation_bytes(kGroupedI8);
        const uint8x16_t low = vdupq_n_u8(15), row = vreinterpretq_u8_u32(vmulq_n_u32(four_numbers(), 0x01010101));
        // Of the 16 activations of a register, a value's group has the first, the second, the third or the last four.
        const uint8x16_t begin[2] = {vreinterpretq_u8_u32(vdupq_n_u32(0x04000400)),
                                     vreinterpretq_u8_u32(vdupq_n_u32(0x0c080c08))};
        int8x16_t zero[4];
        float32x4_t acc[4][T];
        UNROLL
        for (int q = 0; q < 4; q++) {
            const uint8x16_t place = vaddq_u8(row, vdupq_n_u8(uint8_t(4 * q)));
            zero[q] = vreinterpretq_s8_u8(vqtbl1q_u8(vld1q_u8(w.zero), place));
            start_codes(w, q, sums, first, acc[q]);
        }
        const uint8_t* chunk = w.weight;
        for (int64_t c = 0; c < chunks; c++, chunk += kCodeBytes, x += T * token) UNROLL
        for (int q = 0; q < 4; q++) {
            uint8x16_t columns = vld1q_u8(chunk + 16 * q), control[4];
            int8x16_t value[4];
            UNROLL
            for (int half = 0; half < 2; half++) {
                const uint8x16_t codes = vld1q_u8(chunk + 64 * (1 + half) + 16 * q);
                value[2 * half] = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(codes, low)), zero[q]);
                value[2 * half + 1] = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(codes, 4)), zero[q]);
            }
            UNROLL
            for (int i = 0; i < 4; i++, columns = vshrq_n_u8(columns, 2))
                control[i] = vorrq_u8(vandq_u8(columns, vdupq_n_u8(3)), begin[i % 2]);
            UNROLL
            for (int t = 0; t < T; t++) {
                const uint8_t* of_token = x + t * token;
                int8x16_t chosen[4];
                UNROLL
                for (int half = 0; half < 2; half++) {
                    const uint8x16_t activations = veorq_u8(vld1q_u8(of_token + 16 * half), vdupq_n_u8(0x80));
                    UNROLL
                    for (int i = 2 * half; i < 2 * half + 2; i++)
                        chosen[i] = vreinterpretq_s8_u8(vqtbl1q_u8(activations, control[i]));
                }
                float factor;
                std::memcpy(&factor, of_token + factor_offset(kGroupedI8), sizeof factor);
                acc[q][t] = vfmaq_n_f32(acc[q][t], vcvtq_f32_s32(dot(value, chosen, vdupq_n_s32(0))), factor);
            }
        }
        UNROLL
        for (int q = 0; q < 4; q++) store_codes(w, q, acc[q], sums, first);
    }
    static INLINE uint32x4_t four_numbers() {
        const uint32_t numbers[4] = {0, 1, 2, 3};
        return vld1q_u32(numbers);
    }

    template <class K, int R, int T>
    static void codes(const Codes& w, const uint8_t* x, int64_t chunks, float* sums, bool first) {
        if constexpr (K::activations == kGroupedI8)
            codes_i8<T>(w, x, chunks, sums, first);
        else
            codes_f32<T>(w, reinterpret_cast<const float*>(x), chunks, sums, first);
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

#ifdef CREPE_HAVE_NEON_DOTPROD
const InstructionSet kNeonDotprod = {"neon_dotprod",
                                     [] {
#ifdef __linux__
                                         constexpr unsigned long dotprod = 1 << 20;  // HWCAP_ASIMDDP
                                         return bool(getauxval(AT_HWCAP) & dotprod);
#else
                                         return true;  // Apple's processors all have it
#endif
                                     },
                                     tile_tokens,
                                     token_bytes,
                                     convert,
                                     multiply};
#else
const InstructionSet kNeon = {"neon", [] { return true; }, tile_tokens, token_bytes, convert, multiply};
#endif
