// AVX-512, compiled three times: F+BW+VL+DQ, with VNNI (int8), and with VNNI and BF16. 16 rows a register; one
// broadcast of a group's activations serves them through an in-lane shuffle.
#include <immintrin.h>

#include "formats.h"

#if defined(CREPE_HAVE_AVX512_BF16)
#define CREPE_BF16 1
#define CREPE_VNNI 1
#elif defined(CREPE_HAVE_AVX512_VNNI)
#define CREPE_BF16 0
#define CREPE_VNNI 1
#else
#define CREPE_BF16 0
#define CREPE_VNNI 0
#endif

namespace {

__m512i load512(const void* p) { return _mm512_loadu_si512(p); }

struct Isa : PlainIsa {
    static constexpr bool kBf16Activations = CREPE_BF16, kOffsetInt8 = CREPE_VNNI;
    static constexpr bool kHalves16 = CREPE_VNNI && !CREPE_BF16, kLanes8 = CREPE_VNNI;
    static constexpr int64_t kBlocks = 2, kCodeBlocks = CREPE_BF16 ? 4 : 2, kChunkBlock = 32, kDenseTile = 8,
                             kDenseCache = 16384;
    // Few tokens wait for memory, which one stream reads fastest; many are worth two for each load of activations. (A
    // single chain of fp32 additions would wait for itself. The few bytes of narrow formats arrive before the additions
    // of one row block are done.) Decoded codes and the sums of several tokens fill the registers with one.
    static constexpr bool one_block(Activations activations, int64_t bits, int64_t tokens) {
        return activations == kGroupedI8 ? true : activations == kPairsBf16 && bits > 8 && tokens <= 4;
    }
    static constexpr int64_t kPreparedChunks = 16;
    // The more there is to decode, the sooner it is worth the stores.
    static constexpr int64_t prepared_tiles(int64_t bits) { return bits == 4 ? 5 : bits == 8 ? 8 : 24; }
    // Bytes come faster than the chains of additions of one or two rows can take their columns.
    static constexpr int dense_rows(int64_t tokens, int64_t bytes) { return bytes == 1 && tokens <= 2 ? 4 : 2; }
    static constexpr int64_t tile(Activations activations) {
        return activations == kPairsBf16                          ? 12
               : activations == kF32 || activations == kGroupedI8 ? 12
               : CREPE_VNNI                                       ? 10
                                                                  : 6;
    }

    static INLINE void nearest_int8(const float* value, float factor, uint8_t offset, uint8_t* out) {
        const __m512 most = _mm512_set1_ps(127), least = _mm512_set1_ps(-127);
        const __m512 held =
            _mm512_max_ps(_mm512_min_ps(_mm512_mul_ps(_mm512_loadu_ps(value), _mm512_set1_ps(factor)), most), least);
        const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(held));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_xor_si128(bytes, _mm_set1_epi8(char(offset))));
    }

    // Kept value V of 16 rows of a group.
    template <int32_t Format, int V>
    static INLINE __m512 kept(const uint8_t* group) {
        if constexpr (Format == kBf16) {
            __m512i pairs = load512(group);
            return _mm512_castsi512_ps(V ? _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000)))
                                         : _mm512_slli_epi32(pairs, 16));
        } else if constexpr (Format == kFp16) {
            return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 32 * V)));
        } else if constexpr (Format == kInt8WeightOnly) {
            return _mm512_cvtepi32_ps(
                _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group + 16 * V))));
        } else {
            return _mm512_loadu_ps(group + 64 * V);
        }
    }

    // As assembly, because compilers else keep the T broadcasts of a group for its second value, and spill the sums.
    static INLINE __m512 broadcast(const float* group) {
        __m512 out;
        asm volatile("vbroadcastf32x4 %1, %0" : "=v"(out) : "m"(*reinterpret_cast<const float (*)[4]>(group)));
        return out;
    }

    template <class K, int V, int R, int T>
    static INLINE void value(const uint8_t* const (&group)[R], const __m512i (&columns)[R], const float* x,
                             __m512 (&acc)[R][T]) {
        __m512 w[R];
        UNROLL
        for (int r = 0; r < R; r++) w[r] = kept<K::format, V>(group[r]);
        UNROLL
        for (int t = 0; t < T; t++) {
            __m512 activations = broadcast(x + 4 * t);
            UNROLL
            for (int r = 0; r < R; r++)
                acc[r][t] = _mm512_fmadd_ps(w[r], _mm512_permutevar_ps(activations, columns[r]), acc[r][t]);
        }
    }

    template <class K, int R, int T>
    static void sparse_f32(const uint8_t* w, int64_t block_stride, const float* x, int64_t chunks, float* sums,
                           bool first) {
        __m512 acc[R][T];
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++)
            acc[r][t] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (t * R + r) * kRowBlock);
        for (int64_t c = 0; c < chunks; c++, w += K::weight_bytes) {
            __m512i metadata[R];
            const uint8_t* group[R];
            UNROLL
            for (int r = 0; r < R; r++)
                metadata[r] = load512(w + r * block_stride),
                prefetch<K::weight_bytes>(w + r * block_stride, chunks - c, (R - 1) * block_stride),
                group[r] = w + r * block_stride + kMetadataBytes;
            for (int g = 0; g < 8; g++, x += 4 * T) {
                value<K, 0>(group, metadata, x, acc);
                UNROLL
                for (int r = 0; r < R; r++) metadata[r] = _mm512_srli_epi32(metadata[r], 2);
                value<K, 1>(group, metadata, x, acc);
                UNROLL
                for (int r = 0; r < R; r++)
                    metadata[r] = _mm512_srli_epi32(metadata[r], 2), group[r] += (K::weight_bytes - kMetadataBytes) / 8;
            }
        }
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++) _mm512_storeu_ps(sums + (t * R + r) * kRowBlock, acc[r][t]);
    }

    // The code of kept value V of the group at hand, as the words' lowest bits have it, less the zero point.
    template <int V>
    static INLINE __m512 code(__m512i words, __m512 zero) {
        const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_sub_ps(_mm512_permutexvar_ps(V ? _mm512_srli_epi32(words, 16) : words, table), zero);
    }

    template <int V, int R, int T>
    static INLINE void code_value(const __m512i (&words)[R], const __m512 (&zero)[R], const __m512i (&columns)[R],
                                  const float* x, __m512 (&acc)[R][T]) {
        __m512 w[R];
        UNROLL
        for (int r = 0; r < R; r++) w[r] = code<V>(words[r], zero[r]);
        UNROLL
        for (int t = 0; t < T; t++) {
            __m512 activations = broadcast(x + 4 * t);
            UNROLL
            for (int r = 0; r < R; r++)
                acc[r][t] = _mm512_fmadd_ps(w[r], _mm512_permutevar_ps(activations, columns[r]), acc[r][t]);
        }
    }

    template <int R, int T>
    static INLINE void store_codes(const Codes& w, const __m512 (&acc)[R][T], float* sums, bool first) {
        UNROLL
        for (int r = 0; r < R; r++) {
            const uint8_t* at = w.scale + r * w.scale_stride;
            __m512 scale = _mm512_setzero_ps();
            if (w.scale)
                scale = w.scale_dtype == kFp32   ? load(reinterpret_cast<const float*>(at), 0xffff)
                        : w.scale_dtype == kBf16 ? load(reinterpret_cast<const Bf16*>(at), 0xffff)
                                                 : load(reinterpret_cast<const Fp16*>(at), 0xffff);
            UNROLL
            for (int t = 0; t < T; t++) {
                float* to = sums + (t * R + r) * kRowBlock;
                _mm512_storeu_ps(
                    to, w.scale ? _mm512_fmadd_ps(acc[r][t], scale, first ? _mm512_setzero_ps() : _mm512_loadu_ps(to))
                                : acc[r][t]);
            }
        }
    }

    template <int R, int T>
    static INLINE void codes_f32(const Codes& w, const float* x, int64_t chunks, float* sums, bool first) {
        __m512 acc[R][T], zero[R];
        UNROLL
        for (int r = 0; r < R; r++) {
            zero[r] = _mm512_cvtepi32_ps(
                _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zero + r * w.zero_stride))));
            UNROLL
            for (int t = 0; t < T; t++)
                acc[r][t] = first || w.scale ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (t * R + r) * kRowBlock);
        }
        for (int64_t c = 0; c < chunks; c++) {
            const uint8_t* chunk = w.weight + c * kCodeBytes;
            __m512i metadata[R], words[R];
            UNROLL
            for (int r = 0; r < R; r++)
                metadata[r] = load512(chunk + r * w.block_stride),
                prefetch<kCodeBytes, kPrefetchCodes>(chunk + r * w.block_stride, w.left - c, (R - 1) * w.block_stride);
            for (int half = 0; half < 2; half++) {
                UNROLL
                for (int r = 0; r < R; r++) words[r] = load512(chunk + r * w.block_stride + kMetadataBytes + 64 * half);
                for (int g = 0; g < 4; g++, x += 4 * T) {
                    code_value<0>(words, zero, metadata, x, acc);
                    UNROLL
                    for (int r = 0; r < R; r++) metadata[r] = _mm512_srli_epi32(metadata[r], 2);
                    code_value<1>(words, zero, metadata, x, acc);
                    UNROLL
                    for (int r = 0; r < R; r++)
                        metadata[r] = _mm512_srli_epi32(metadata[r], 2), words[r] = _mm512_srli_epi32(words[r], 4);
                }
            }
        }
        store_codes(w, acc, sums, first);
    }

    // What 16 rows of a chunk have for the product with int8 activations: the codes less their zero points, a byte
    // each, and the control bytes of vpshufb that pick their activations; of groups 0 and 2, 1 and 3, 4 and 6, 5 and 7.
    // `excess` is -128 times the sum of each row's values, for activations that come as x + 128 (without VNNI of 16
    // bits, halved).
    struct Sixteen {
        __m512i value[4], control[4], excess;
    };

    static INLINE Sixteen sixteen_rows(const uint8_t* chunk, __m512i zero) {
        const __m512i low = _mm512_set1_epi8(15), metadata = load512(chunk);
        Sixteen out;
        UNROLL
        for (int half = 0; half < 2; half++) {
            const __m512i words = load512(chunk + 64 * (1 + half));
            out.value[2 * half] = _mm512_sub_epi8(_mm512_and_si512(words, low), zero);
            out.value[2 * half + 1] = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(words, 4), low), zero);
        }
        // The metadata's bytes are those of the values; 4 is added for the groups whose activations come second.
        UNROLL
        for (int i = 0; i < 4; i++)
            out.control[i] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(metadata, 2 * i), _mm512_set1_epi8(3),
                                                       _mm512_set1_epi32(0x04000400), 0xea);  // (bits & 3) | second
        const __m512i all =
            _mm512_add_epi8(_mm512_add_epi8(out.value[0], out.value[1]), _mm512_add_epi8(out.value[2], out.value[3]));
        const __m512i offset = _mm512_set1_epi8(char(0x80));
#if CREPE_VNNI
        out.excess = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, all));
#else
        out.excess = _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_maddubs_epi16(offset, all));
#endif
        return out;
    }

    // The sums of 16 rows and a token over a chunk: at most 16 * 15 * 127, and of 16 bits, half of that.
    static INLINE __m512i product_i8(const Sixteen& rows, const uint8_t* x) {
        __m512i sum = rows.excess;
        UNROLL
        for (int i = 0; i < 4; i++) {
            int64_t activations;
            std::memcpy(&activations, x + 8 * i, 8);
            const __m512i chosen = _mm512_shuffle_epi8(_mm512_set1_epi64(activations), rows.control[i]);
#if CREPE_VNNI
            sum = _mm512_dpbusd_epi32(sum, chosen, rows.value[i]);
        }
        return sum;
#else
            sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(chosen, rows.value[i]));
        }
        return _mm512_madd_epi16(sum, _mm512_set1_epi16(1));
#endif
    }

    // int4 codes times int8 activations: the sums of a chunk are whole numbers, exact in fp32, and then multiplied by
    // the chunk's factor.
    template <int R, int T>
    static INLINE void codes_i8(const Codes& w, const uint8_t* x, int64_t chunks, float* sums, bool first) {
        __m512i zero[R];
        __m512 acc[R][T];
        UNROLL
        for (int r = 0; r < R; r++) {
            const __m512i rows =
                _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zero + r * w.zero_stride)));
            zero[r] = _mm512_shuffle_epi8(rows, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
            UNROLL
            for (int t = 0; t < T; t++)
                acc[r][t] = first || w.scale ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (t * R + r) * kRowBlock);
        }
        constexpr int64_t token = kColumnChunk * activation_bytes(kGroupedI8);
        for (int64_t c = 0; c < chunks; c++, x += T * token) UNROLL
        for (int r = 0; r < R; r++) {
            const uint8_t* chunk = w.weight + r * w.block_stride + c * kCodeBytes;
            prefetch<kCodeBytes, kPrefetchCodes>(chunk, w.left - c, (R - 1) * w.block_stride);
            const Sixteen rows = sixteen_rows(chunk, zero[r]);
            UNROLL
            for (int t = 0; t < T; t++) {
                float factor;
                std::memcpy(&factor, x + t * token + factor_offset(kGroupedI8), sizeof factor);
                acc[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product_i8(rows, x + t * token)), _mm512_set1_ps(factor),
                                            acc[r][t]);
            }
        }
        store_codes(w, acc, sums, first);
    }

#if CREPE_BF16
    // Control bytes by which vpshufb picks a pair of bf16 activations, for the 16 pairs of columns.
    struct Controls {
        uint32_t of[16];
        constexpr Controls() : of() {
            for (uint32_t i = 0; i < 16; i++) {
                uint32_t a = 2 * (i & 3), b = 2 * (i >> 2);
                of[i] = a | (a + 1) << 8 | b << 16 | (b + 1) << 24;
            }
        }
    };

    // The bf16 of a code less its zero point: by the lowest five bits of the difference or, with `Usual`, for the zero
    // point that codes have unless told otherwise, by those of the code, of which the fifth is another code's.
    template <bool Usual>
    struct Differences {
        uint16_t of[32];
        constexpr Differences() : of() {
            for (int i = 0; i < 32; i++) {
                const int difference = Usual ? i % 16 - kZeroPoint : i < 16 ? i : i - 32;
                const int magnitude = difference < 0 ? -difference : difference;
                if (!magnitude) continue;
                int exponent = 4;
                while (!(magnitude >> exponent)) exponent--;
                of[i] = uint16_t((difference > 0 ? 0 : 0x8000) | (127 + exponent) << 7 |
                                 ((magnitude << (7 - exponent)) & 0x7f));
            }
        }
    };

    // What decodes codes to pairs of bf16, of one row block.
    template <bool Usual>
    struct CodePairs {
        __m512i zero, table, even, odd;

        CodePairs() {}
        explicit CodePairs(const uint8_t* zero_points) {
            alignas(64) static constexpr Differences<Usual> differences;
            table = load512(differences.of);
            if constexpr (!Usual) {
                const __m512i rows =
                    _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero_points)));
                zero = _mm512_mullo_epi32(rows, _mm512_set1_epi32(0x01010101));
            }
        }

        // Of group g of a chunk; the groups of a chunk in ascending order.
        INLINE __m512i of(const uint8_t* chunk, int g) {
            if (g % 4 == 0) even = load512(chunk + kMetadataBytes + 16 * g);
            if constexpr (Usual)
                return _mm512_permutexvar_epi16(g % 4 ? _mm512_srli_epi16(even, 4 * (g % 4)) : even, table);
            if (g % 4 == 0) {
                const __m512i low = _mm512_set1_epi8(15);
                odd = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(even, 4), low), zero);
                even = _mm512_sub_epi8(_mm512_and_si512(even, low), zero);
            }
            const __m512i codes = g % 2 ? odd : even;
            return _mm512_permutexvar_epi16(g % 4 < 2 ? codes : _mm512_srli_epi16(codes, 8), table);
        }
    };

    template <int32_t Format>
    static void prepare(const uint8_t* w, const uint8_t* zero, int64_t chunks, uint8_t* out) {
        alignas(64) static constexpr Controls controls;
        const __m512i table = load512(controls.of);
        CodePairs<false> codes(zero);
        for (int64_t c = 0; c < chunks; c++, w += chunk_bytes(Format)) {
            prefetch<chunk_bytes(Format)>(w, chunks, 0);
            __m512i metadata = load512(w);
            UNROLL
            for (int g = 0; g < 8; g++, out += 128, metadata = _mm512_srli_epi32(metadata, 4)) {
                __m512i value;
                if constexpr (is_codes(Format))
                    value = codes.of(w, g);
                else
                    value = pairs<Format>(w + kMetadataBytes + (chunk_bytes(Format) - kMetadataBytes) / 8 * g);
                _mm512_store_si512(out, value);
                _mm512_store_si512(out + 64, _mm512_permutexvar_epi32(metadata, table));
            }
        }
    }

    // Adds the products of a group: T tokens' 4 activations, and the kept values of R blocks of 16 rows.
    template <int R, int T>
    static INLINE void add_group(const uint8_t* x, const __m512i (&value)[R], const __m512i (&control)[R],
                                 __m512 (&acc)[R][T]) {
        UNROLL
        for (int t = 0; t < T; t++) {
            int64_t four;
            std::memcpy(&four, x + 8 * t, 8);
            const __m512i activations = _mm512_set1_epi64(four);
            UNROLL
            for (int r = 0; r < R; r++)
                acc[r][t] = _mm512_dpbf16_ps(acc[r][t], (__m512bh)value[r],
                                             (__m512bh)_mm512_shuffle_epi8(activations, control[r]));
        }
    }

    // Adds the products of prepared chunks.
    template <int R, int T>
    static INLINE void add_prepared(const uint8_t* w, int64_t block_stride, const uint8_t* x, int64_t chunks,
                                    __m512 (&acc)[R][T]) {
        for (int64_t group = 0; group < 8 * chunks; group++, w += 128, x += 8 * T) {
            __m512i control[R], value[R];
            UNROLL
            for (int r = 0; r < R; r++)
                value[r] = load512(w + r * block_stride), control[r] = load512(w + r * block_stride + 64);
            add_group(x, value, control, acc);
        }
    }

    template <int R, int T>
    static INLINE void sparse_prepared(const uint8_t* w, int64_t block_stride, const uint8_t* x, int64_t chunks,
                                       float* sums, bool first) {
        __m512 acc[R][T];
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++)
            acc[r][t] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (t * R + r) * kRowBlock);
        add_prepared(w, block_stride, x, chunks, acc);
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++) _mm512_storeu_ps(sums + (t * R + r) * kRowBlock, acc[r][t]);
    }

    template <int R, int T>
    static INLINE void codes_prepared(const Codes& w, const uint8_t* x, int64_t chunks, float* sums, bool first) {
        __m512 acc[R][T];
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++)
            acc[r][t] = first || w.scale ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (t * R + r) * kRowBlock);
        add_prepared(w.weight, w.block_stride, x, chunks, acc);
        store_codes(w, acc, sums, first);
    }

    // As sparse_bf16; the pair of values comes from a table. Zero points other than the usual are taken from bytes,
    // four codes at once.
    template <bool Usual, int R, int T>
    static INLINE void codes_bf16(const Codes& w, const uint8_t* x, int64_t chunks, float* sums, bool first) {
        alignas(64) static constexpr Controls controls;
        const __m512i column_table = load512(controls.of);
        CodePairs<Usual> pairs[R];
        UNROLL
        for (int r = 0; r < R; r++) pairs[r] = CodePairs<Usual>(w.zero + r * w.zero_stride);
        __m512 acc[R][T];
        UNROLL
        for (int r = 0; r < R; r++) {
            UNROLL
            for (int t = 0; t < T; t++)
                acc[r][t] = first || w.scale ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (t * R + r) * kRowBlock);
        }
        for (int64_t c = 0; c < chunks; c++) {
            const uint8_t* chunk = w.weight + c * kCodeBytes;
            __m512i metadata[R];
            UNROLL
            for (int r = 0; r < R; r++)
                metadata[r] = load512(chunk + r * w.block_stride),
                prefetch<kCodeBytes, kPrefetchCodes>(chunk + r * w.block_stride, w.left - c, (R - 1) * w.block_stride);
            UNROLL
            for (int g = 0; g < 8; g++, x += 8 * T) {
                __m512i control[R], value[R];
                UNROLL
                for (int r = 0; r < R; r++) {
                    value[r] = pairs[r].of(chunk + r * w.block_stride, g);
                    control[r] = _mm512_permutexvar_epi32(metadata[r], column_table);
                    metadata[r] = _mm512_srli_epi32(metadata[r], 4);
                }
                add_group(x, value, control, acc);
            }
        }
        store_codes(w, acc, sums, first);
    }

    // The pairs of kept values of 16 rows of a group, as bf16. The fp32 of an int8 has zeros where bf16 has no digits.
    template <int32_t Format>
    static INLINE __m512i pairs(const uint8_t* group) {
        if constexpr (Format == kBf16) return load512(group);
        const __m512i first = _mm512_castps_si512(kept<Format, 0>(group)),
                      second = _mm512_castps_si512(kept<Format, 1>(group));
        return _mm512_or_si512(_mm512_srli_epi32(first, 16), second);
    }

    // The two kept values of a group are a pair of bf16 in a row's lane; vpshufb picks the activations' pair and one
    // vdpbf16ps multiplies and adds both. The shuffle's control bytes come from a table of the 16 column pairs.
    template <int32_t Format, int R, int T>
    static void sparse_bf16(const uint8_t* w, int64_t block_stride, const uint8_t* x, int64_t chunks, float* sums,
                            bool first) {
        alignas(64) static constexpr Controls controls;
        const __m512i table = load512(controls.of);
        __m512 acc[R][T];
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++)
            acc[r][t] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (t * R + r) * kRowBlock);
        constexpr int64_t bytes = chunk_bytes(Format), group_bytes = (bytes - kMetadataBytes) / 8;
        for (int64_t c = 0; c < chunks; c++, w += bytes) {
            __m512i metadata[R];
            UNROLL
            for (int r = 0; r < R; r++)
                metadata[r] = load512(w + r * block_stride),
                prefetch<bytes>(w + r * block_stride, chunks - c, (R - 1) * block_stride);
            UNROLL
            for (int g = 0; g < 8; g++, x += 8 * T) {
                __m512i control[R], value[R];
                UNROLL
                for (int r = 0; r < R; r++) {
                    control[r] = _mm512_permutexvar_epi32(metadata[r], table);
                    metadata[r] = _mm512_srli_epi32(metadata[r], 4);
                    value[r] = pairs<Format>(w + r * block_stride + kMetadataBytes + group_bytes * g);
                }
                add_group(x, value, control, acc);
            }
        }
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++) _mm512_storeu_ps(sums + (t * R + r) * kRowBlock, acc[r][t]);
    }
#endif

    template <int R, int T>
    static void sparse_int8(const uint8_t* w, int64_t block_stride, const uint8_t* x, int64_t chunks, int32_t* sums,
                            bool first) {
        const __m512i low = _mm512_set1_epi32(0x03030303), second = _mm512_set1_epi32(0x04040000);
#if CREPE_VNNI
        // vpdpbusd wants one unsigned factor: activations come as x + 128, and 128 * sum(w) is taken off at the end.
        const __m512i offset = _mm512_set1_epi8(char(0x80));
        __m512i excess[R];
        UNROLL
        for (int r = 0; r < R; r++) excess[r] = _mm512_setzero_si512();
#else
        const __m512i ones = _mm512_set1_epi16(1);
#endif
        __m512i acc[R][T];
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++)
            acc[r][t] = first ? _mm512_setzero_si512() : load512(sums + (t * R + r) * kRowBlock);
        for (int64_t c = 0; c < chunks; c++, w += chunk_bytes(kInt8)) {
            __m512i metadata[R];
            UNROLL
            for (int r = 0; r < R; r++)
                metadata[r] = load512(w + r * block_stride),
                prefetch<chunk_bytes(kInt8)>(w + r * block_stride, chunks - c, (R - 1) * block_stride);
            for (int pair = 0; pair < 4; pair++, x += 8 * T) {
                __m512i columns[R], value[R];
                UNROLL
                for (int r = 0; r < R; r++) {
                    columns[r] =
                        _mm512_ternarylogic_epi32(metadata[r], low, second, 0xea);  // (metadata & low) | second
                    metadata[r] = _mm512_srli_epi32(metadata[r], 2);
                    value[r] = load512(w + r * block_stride + kMetadataBytes + 64 * pair);
                }
#if CREPE_VNNI
                UNROLL
                for (int r = 0; r < R; r++) excess[r] = _mm512_dpbusd_epi32(excess[r], offset, value[r]);
#else
                // |w| * (x with w's sign): vpmaddubsw takes one unsigned factor, and |w| <= 128, |x| <= 127 cannot
                // saturate its sums.
                __mmask64 negative[R];
                UNROLL
                for (int r = 0; r < R; r++)
                    negative[r] = _mm512_movepi8_mask(value[r]), value[r] = _mm512_abs_epi8(value[r]);
#endif
                UNROLL
                for (int t = 0; t < T; t++) {
                    int64_t eight;
                    std::memcpy(&eight, x + 8 * t, 8);
                    __m512i activations = _mm512_set1_epi64(eight);
                    UNROLL
                    for (int r = 0; r < R; r++) {
                        __m512i chosen = _mm512_shuffle_epi8(activations, columns[r]);
#if CREPE_VNNI
                        acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], chosen, value[r]);
#else
                        chosen = _mm512_mask_sub_epi8(chosen, negative[r], _mm512_setzero_si512(), chosen);
                        acc[r][t] = _mm512_add_epi32(acc[r][t],
                                                     _mm512_madd_epi16(_mm512_maddubs_epi16(value[r], chosen), ones));
#endif
                    }
                }
            }
        }
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++) {
#if CREPE_VNNI
            acc[r][t] = _mm512_sub_epi32(acc[r][t], excess[r]);
#endif
            _mm512_storeu_si512(sums + (t * R + r) * kRowBlock, acc[r][t]);
        }
    }

    template <class K, int R, int T>
    static void sparse(const uint8_t* w, int64_t block_stride, const uint8_t* x, int64_t chunks, typename K::Sum* sums,
                       bool first) {
        if constexpr (K::activations == kI8)
            sparse_int8<R, T>(w, block_stride, x, chunks, sums, first);
        else if constexpr (K::activations == kF32)
            sparse_f32<K, R, T>(w, block_stride, reinterpret_cast<const float*>(x), chunks, sums, first);
#if CREPE_BF16
        else if constexpr (K::prepared)
            sparse_prepared<R, T>(w, block_stride, x, chunks, sums, first);
        else
            sparse_bf16<K::format, R, T>(w, block_stride, x, chunks, sums, first);
#endif
    }

    template <class K, int R, int T>
    static INLINE void codes(const Codes& w, const uint8_t* x, int64_t chunks, float* sums, bool first) {
#if CREPE_BF16
        if constexpr (K::prepared) return codes_prepared<R, T>(w, x, chunks, sums, first);
        if constexpr (K::activations == kPairsBf16) {
            // Decoding is most of the work for one token only.
            if (T == 1 && !w.zero_stride) return codes_bf16<T == 1, R, T>(w, x, chunks, sums, first);
            return codes_bf16<false, R, T>(w, x, chunks, sums, first);
        }
#endif
        if constexpr (K::activations == kGroupedI8) codes_i8<R, T>(w, x, chunks, sums, first);
        if constexpr (K::activations == kF32)
            codes_f32<R, T>(w, reinterpret_cast<const float*>(x), chunks, sums, first);
    }

    static INLINE __m512 load(const float* p, __mmask16 valid) { return _mm512_maskz_loadu_ps(valid, p); }
    static INLINE __m512 load(const Bf16* p, __mmask16 valid) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, p)), 16));
    }
    static INLINE __m512 load(const Fp16* p, __mmask16 valid) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, p));
    }
    static INLINE __m512 load(const int8_t* p, __mmask16 valid) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(valid, p)));
    }

    // R rows times T tokens on one register of columns, of which `valid` are there.
    template <int R, int T, class W>
    static INLINE void dense_step(const W* w, int64_t k, int64_t valid, const float* x, __m512 (&acc)[R][T]) {
        const __mmask16 mask = valid >= 16 ? 0xffff : __mmask16((1u << valid) - 1);
        __m512 activations[T];
        UNROLL
        for (int t = 0; t < T; t++) activations[t] = _mm512_loadu_ps(x + 32 * t);
        UNROLL
        for (int r = 0; r < R; r++) {
            __m512 value = load(w + r * k, mask);
            UNROLL
            for (int t = 0; t < T; t++) acc[r][t] = _mm512_fmadd_ps(value, activations[t], acc[r][t]);
        }
    }
#if CREPE_BF16
    static INLINE __m512i load_pairs(const Bf16* p, __mmask32 valid) { return _mm512_maskz_loadu_epi16(valid, p); }
    // Exact: bf16 holds every int8.
    static INLINE __m512i load_pairs(const int8_t* p, __mmask32 valid) {
        return (__m512i)_mm512_cvtne2ps_pbh(load(p + 16, __mmask16(valid >> 16)), load(p, __mmask16(valid)));
    }

    template <int R, int T, class W>
    static INLINE void dense_step(const W* w, int64_t k, int64_t valid, const Bf16* x, __m512 (&acc)[R][T]) {
        const __mmask32 mask = valid >= 32 ? 0xffffffff : __mmask32((1u << valid) - 1);
        __m512i activations[T];
        UNROLL
        for (int t = 0; t < T; t++) activations[t] = load512(x + 32 * t);
        UNROLL
        for (int r = 0; r < R; r++) {
            __m512i value = load_pairs(w + r * k, mask);
            UNROLL
            for (int t = 0; t < T; t++)
                acc[r][t] = _mm512_dpbf16_ps(acc[r][t], (__m512bh)value, (__m512bh)activations[t]);
        }
    }
#endif

#if CREPE_VNNI && !CREPE_BF16
    // R rows of int8 times T tokens' int16: a register has the upper halves of 32 activations and then the lower ones,
    // and meets 32 weights twice. vpdpbusd wants one unsigned factor: weights become w + 128, and sums start from -128
    // times the sum of the activations.
    template <int R, int T>
    static void dense_halves(const int8_t* w, const Columns& at, const HalfI16* x, float* sums, int64_t stride) {
        const int64_t k = at.k;
        constexpr int64_t step = kColumnChunk, token = kHalvesBytes;
        const HalfI16* end = x + (k + step - 1) / step * token * T;
        const __m512i offset = _mm512_set1_epi8(char(0x80));
        __m512i acc[R][T];
        UNROLL
        for (int t = 0; t < T; t++) UNROLL
        for (int r = 0; r < R; r++)
            acc[r][t] = at.from ? load512(at.partial + (r * T + t) * 16) : load512(end + token * t);
        x += at.from / step * token * T;
        const auto add = [&](const __m256i(&rows)[R]) __attribute__((always_inline)) {
            __m512i value[R];
            UNROLL
            for (int r = 0; r < R; r++) value[r] = _mm512_xor_si512(_mm512_broadcast_i64x4(rows[r]), offset);
            UNROLL
            for (int t = 0; t < T; t++, x += token) {
                const __m512i activations = load512(x);
                UNROLL
                for (int r = 0; r < R; r++) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], value[r], activations);
            }
        };
        __m256i rows[R];
        int64_t c = at.from;
        RowsAhead<R, int8_t, kAheadTo<T>> ahead(w, at);
        for (; c + step <= at.to; c += step) {
            ahead.ask(c);
            UNROLL
            for (int r = 0; r < R; r++) rows[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + r * k + c));
            add(rows);
        }
        if (at.to < k) {
            UNROLL
            for (int r = 0; r < R; r++) UNROLL
            for (int t = 0; t < T; t++) _mm512_storeu_si512(at.partial + (r * T + t) * 16, acc[r][t]);
            return;
        }
        if (c < k) {
            const __mmask32 valid = __mmask32((1u << (k - c)) - 1);
            UNROLL
            for (int r = 0; r < R; r++) rows[r] = _mm256_maskz_loadu_epi8(valid, w + r * k + c);
            add(rows);
        }
        UNROLL
        for (int t = 0; t < T; t++) {
            const __m512 factor = _mm512_loadu_ps(end + token * (T + t));
            UNROLL
            for (int r = 0; r < R; r++)
                sums[t * stride + r] = _mm512_reduce_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][t]), factor));
        }
    }
#endif

#if CREPE_VNNI
    // As assembly, because compilers else load a token's activations once for each row, and copy the sums.
    static INLINE void add_products(__m512i& sum, __m512i offset_values, __m512i values) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(offset_values), "v"(values));
    }

    // R rows of int8, as w + 128, times T tokens' LanesI8. In between units, sums wait in `partial`.
    template <int R, int T>
    static void dense_lanes(const int8_t* w, const Columns& at, const LanesI8* x, float* sums, int64_t stride) {
        x += at.from / kLaneUnit * T;
        RowsAhead<R, int8_t, kPrefetchTo> ahead(w, at);
        for (int64_t begin = at.from; begin < at.to; begin += kLaneUnit, x += T) {
            __m512i acc[R][T];
            UNROLL
            for (int t = 0; t < T; t++) UNROLL
            for (int r = 0; r < R; r++) acc[r][t] = load512(x[t].start);
            const int64_t end = at.to - begin < kLaneUnit ? at.to : begin + kLaneUnit;
            const int8_t* column = x->column;
            for (int64_t c = begin; c < end; c += 64, column += 64) {
                ahead.ask(c);
                const __mmask64 valid = end - c < 64 ? (uint64_t(1) << (end - c)) - 1 : ~uint64_t(0);
                __m512i value[R];
                UNROLL
                for (int r = 0; r < R; r++)
                    value[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(valid, w + r * at.k + c),
                                                _mm512_set1_epi8(char(0x80)));
                UNROLL
                for (int t = 0; t < T; t++) {
                    const __m512i activations = load512(column + t * int64_t(sizeof(LanesI8)));
                    UNROLL
                    for (int r = 0; r < R; r++) add_products(acc[r][t], value[r], activations);
                }
            }
            UNROLL
            for (int t = 0; t < T; t++) UNROLL
            for (int r = 0; r < R; r++) {
                float* const partial = at.partial + (r * T + t) * kLanes;
                const __m512 before = begin ? _mm512_loadu_ps(partial) : _mm512_setzero_ps();
                const __m512 total =
                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][t]), _mm512_loadu_ps(x[t].scale), before);
                if (end < at.k)
                    _mm512_storeu_ps(partial, total);
                else
                    sums[t * stride + r] = _mm512_reduce_add_ps(total);
            }
        }
    }
#endif

    template <class W, class X, int R, int T>
    static INLINE void dense_floats(const W* w, const Columns& at, const X* x, float* sums, int64_t stride) {
        constexpr int64_t step = sizeof(X) == 2 ? 32 : 16;
        const int64_t k = at.k;
        __m512 acc[R][T];
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++)
            acc[r][t] = at.from ? _mm512_loadu_ps(at.partial + (r * T + t) * 16) : _mm512_setzero_ps();
        int64_t c = at.from;
        RowsAhead<R, W, kAheadTo<T>> ahead(w, at);
        for (; c + step <= at.to; c += step) {
            ahead.ask(c);
            dense_step<R, T>(w + c, k, step, x + c / 32 * 32 * T + c % 32, acc);
        }
        if (at.to < k) {
            UNROLL
            for (int r = 0; r < R; r++) UNROLL
            for (int t = 0; t < T; t++) _mm512_storeu_ps(at.partial + (r * T + t) * 16, acc[r][t]);
            return;
        }
        if (c < k) dense_step<R, T>(w + c, k, k - c, x + c / 32 * 32 * T + c % 32, acc);
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++) sums[t * stride + r] = _mm512_reduce_add_ps(acc[r][t]);
    }

    template <class W, class X, int R, int T>
    static void dense(const W* w, const Columns& at, const X* x, float* sums, int64_t stride) {
#if CREPE_VNNI
        if constexpr (std::is_same_v<X, LanesI8>) return dense_lanes<R, T>(w, at, x, sums, stride);
#endif
#if CREPE_VNNI && !CREPE_BF16
        if constexpr (std::is_same_v<X, HalfI16>) return dense_halves<R, T>(w, at, x, sums, stride);
#endif
        if constexpr (!std::is_same_v<X, LanesI8> && !std::is_same_v<X, HalfI16>)
            dense_floats<W, X, R, T>(w, at, x, sums, stride);
    }
};

bool has_avx512() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace

#include "driver.h"

#if CREPE_BF16
const InstructionSet kAvx512Bf16 = {
    "avx512_bf16",
    [] { return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"); },
    tile_tokens,
    token_bytes,
    convert,
    multiply};
#elif CREPE_VNNI
const InstructionSet kAvx512Vnni = {"avx512_vnni", [] { return has_avx512() && __builtin_cpu_supports("avx512vnni"); },
                                    tile_tokens,   token_bytes,
                                    convert,       multiply};
#else
const InstructionSet kAvx512 = {"avx512", has_avx512, tile_tokens, token_bytes, convert, multiply};
#endif
