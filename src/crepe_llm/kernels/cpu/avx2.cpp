// AVX2 with FMA and F16C: 8 rows a register, one 128-bit broadcast of a group's activations serves them through
// vpermilps.
#include <immintrin.h>

#include "formats.h"

namespace {

struct Isa : PlainIsa {
    static constexpr bool kEvenOdd = true, kCodes16 = true;
    static constexpr int64_t kBlocks = 2, kCodeBlocks = 2, kDenseTile = 6;
    static constexpr int dense_rows(int64_t tokens, int64_t) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }
    static constexpr int64_t tile(Activations activations) {
        return activations == kI8 ? 4 : activations == kGroupedI8 ? 8 : 12;
    }

    static INLINE void nearest_int8(const float* value, float factor, uint8_t offset, uint8_t* out) {
        const __m256 most = _mm256_set1_ps(127), least = _mm256_set1_ps(-127);
        __m256i whole[2];
        UNROLL
        for (int i = 0; i < 2; i++) {
            const __m256 product = _mm256_mul_ps(_mm256_loadu_ps(value + 8 * i), _mm256_set1_ps(factor));
            whole[i] = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(product, most), least));
        }
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole[0], whole[1]), 0xd8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_xor_si128(bytes, _mm_set1_epi8(char(offset))));
    }

    // Kept value V of 8 rows from row 8 h of a group's values.
    template <int32_t Format, int V>
    static INLINE __m256 kept(const uint8_t* group, int h) {
        if constexpr (Format == kBf16) {
            __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 32 * h));
            return _mm256_castsi256_ps(V ? _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000)))
                                         : _mm256_slli_epi32(pairs, 16));
        } else if constexpr (Format == kFp16) {
            return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group + 32 * V + 16 * h)));
        } else if constexpr (Format == kInt8WeightOnly) {
            return _mm256_cvtepi32_ps(
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(group + 16 * V + 8 * h))));
        } else {
            return _mm256_loadu_ps(reinterpret_cast<const float*>(group + 64 * V + 32 * h));
        }
    }

    // As assembly, because compilers else keep the T broadcasts of a group for its second value, and spill the sums.
    static INLINE __m256 broadcast(const float* group) {
        __m256 out;
        asm volatile("vbroadcastf128 %1, %0" : "=x"(out) : "m"(*reinterpret_cast<const float (*)[4]>(group)));
        return out;
    }

    // U units of 8 rows (from unit First; two a row block) times T tokens, then the units after them.
    template <class K, int R, int U, int First, int T>
    static void sparse_f32(const uint8_t* w, int64_t block_stride, const float* const tile, int64_t chunks, float* sums,
                           bool first) {
        const float* x = tile;
        const uint8_t* block[U];
        int half[U];
        __m256 acc[U][T];
        UNROLL
        for (int u = 0; u < U; u++) {
            block[u] = w + (First + u) / 2 * block_stride, half[u] = (First + u) % 2;
            UNROLL
            for (int t = 0; t < T; t++)
                acc[u][t] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + t * R * kRowBlock + 8 * (First + u));
        }
        for (int64_t c = 0; c < chunks; c++) {
            __m256i metadata[U];
            const uint8_t* group[U];
            UNROLL
            for (int u = 0; u < U; u++) {
                if (half[u] == 0) prefetch<K::weight_bytes>(block[u], chunks - c, (U - 1) / 2 * block_stride);
                metadata[u] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block[u] + 32 * half[u]));
                group[u] = block[u] + kMetadataBytes;
                block[u] += K::weight_bytes;
            }
            for (int g = 0; g < 8; g++, x += 4 * T) {
                value<K, 0>(group, half, metadata, x, acc);
                UNROLL
                for (int u = 0; u < U; u++) metadata[u] = _mm256_srli_epi32(metadata[u], 2);
                value<K, 1>(group, half, metadata, x, acc);
                UNROLL
                for (int u = 0; u < U; u++) {
                    metadata[u] = _mm256_srli_epi32(metadata[u], 2);
                    group[u] += (K::weight_bytes - kMetadataBytes) / 8;
                }
            }
        }
        UNROLL
        for (int u = 0; u < U; u++) UNROLL
        for (int t = 0; t < T; t++) _mm256_storeu_ps(sums + t * R * kRowBlock + 8 * (First + u), acc[u][t]);
        if constexpr (First + U < 2 * R) sparse_f32<K, R, U, First + U, T>(w, block_stride, tile, chunks, sums, first);
    }

    template <class K, int V, int U, int T>
    static INLINE void value(const uint8_t* const (&group)[U], const int (&half)[U], const __m256i (&columns)[U],
                             const float* x, __m256 (&acc)[U][T]) {
        __m256 w[U];
        UNROLL
        for (int u = 0; u < U; u++) w[u] = kept<K::format, V>(group[u], half[u]);
        multiply_add(w, columns, x, acc);
    }

    template <int U, int T>
    static INLINE void multiply_add(const __m256 (&w)[U], const __m256i (&columns)[U], const float* x,
                                    __m256 (&acc)[U][T]) {
        UNROLL
        for (int t = 0; t < T; t++) {
            __m256 activations = broadcast(x + 4 * t);
            UNROLL
            for (int u = 0; u < U; u++)
                acc[u][t] = _mm256_fmadd_ps(w[u], _mm256_permutevar_ps(activations, columns[u]), acc[u][t]);
        }
    }

    // Scales of 8 rows from row 8 h.
    static INLINE __m256 scales(const uint8_t* of_block, int h, int32_t dtype) {
        if (dtype == kFp32) return _mm256_loadu_ps(reinterpret_cast<const float*>(of_block + 32 * h));
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(of_block + 16 * h));
        return dtype == kFp16 ? _mm256_cvtph_ps(halves)
                              : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }

    // The same as sparse_f32 for int4 codes less their zero points.
    template <int R, int U, int First, int T>
    static INLINE void codes_f32(const Codes& codes, const float* const tile, int64_t chunks, float* sums, bool first) {
        const float* x = tile;
        const __m256i low = _mm256_set1_epi32(15);
        const uint8_t* block[U];
        __m256i zero[U];
        __m256 acc[U][T];
        UNROLL
        for (int u = 0; u < U; u++) {
            const int r = (First + u) / 2, half = (First + u) % 2;
            block[u] = codes.weight + r * codes.block_stride + 32 * half;
            zero[u] = _mm256_cvtepu8_epi32(
                _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes.zero + r * codes.zero_stride + 8 * half)));
            UNROLL
            for (int t = 0; t < T; t++)
                acc[u][t] = first || codes.scale ? _mm256_setzero_ps()
                                                 : _mm256_loadu_ps(sums + t * R * kRowBlock + 8 * (First + u));
        }
        for (int64_t c = 0; c < chunks; c++) {
            __m256i metadata[U];
            UNROLL
            for (int u = 0; u < U; u++) {
                if ((First + u) % 2 == 0)
                    prefetch<kCodeBytes, kPrefetchCodes>(block[u], codes.left - c, (U - 1) / 2 * codes.block_stride);
                metadata[u] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block[u]));
            }
            for (int word = 1; word < 3; word++) {
                __m256i words[U];
                UNROLL
                for (int u = 0; u < U; u++)
                    words[u] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block[u] + 64 * word));
                for (int g = 0; g < 4; g++, x += 4 * T) {
                    UNROLL
                    for (int v = 0; v < 2; v++) {
                        __m256 w[U];
                        UNROLL
                        for (int u = 0; u < U; u++)
                            w[u] = _mm256_cvtepi32_ps(_mm256_sub_epi32(
                                _mm256_and_si256(v ? _mm256_srli_epi32(words[u], 16) : words[u], low), zero[u]));
                        multiply_add(w, metadata, x, acc);
                        UNROLL
                        for (int u = 0; u < U; u++) metadata[u] = _mm256_srli_epi32(metadata[u], 2);
                    }
                    UNROLL
                    for (int u = 0; u < U; u++) words[u] = _mm256_srli_epi32(words[u], 4);
                }
            }
            UNROLL
            for (int u = 0; u < U; u++) block[u] += kCodeBytes;
        }
        UNROLL
        for (int u = 0; u < U; u++) store_codes<R>(codes, acc[u], First + u, sums, first);
        if constexpr (First + U < 2 * R) codes_f32<R, U, First + U, T>(codes, tile, chunks, sums, first);
    }

    // What 8 rows of a chunk have for the product with int8 or int16 activations: the codes less their zero points, a
    // byte each, and the control bytes of vpshufb that pick their activations; of groups 0 and 2, 1 and 3, 4 and 6, 5
    // and 7.
    struct Eight {
        __m256i value[4], control[4];
    };

    template <Activations A>
    static INLINE Eight eight_rows(const uint8_t* rows, __m256i zero) {
        const __m256i low = _mm256_set1_epi8(15);
        const __m256i metadata = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows));
        Eight out;
        UNROLL
        for (int half = 0; half < 2; half++) {
            const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + 64 * (1 + half)));
            out.value[2 * half] = _mm256_sub_epi8(_mm256_and_si256(words, low), zero);
            out.value[2 * half + 1] = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(words, 4), low), zero);
            if (A == kI16) ordered_controls(metadata, half, out.control + 2 * half);
        }
        // With int8 activations the metadata's bytes are those of the values; 4 is added for the groups whose
        // activations come second.
        if (A == kGroupedI8) {
            const __m256i second = _mm256_set1_epi32(0x04000400);
            UNROLL
            for (int i = 0; i < 4; i++) {
                const __m256i column = _mm256_and_si256(_mm256_srli_epi32(metadata, 2 * i), _mm256_set1_epi8(3));
                out.control[i] = _mm256_or_si256(column, second);
            }
        }
        return out;
    }

    // The controls of four groups of metadata in the order of the groups.
    static INLINE void ordered_controls(__m256i metadata, int half, __m256i* control) {
        // Twice the two bytes of four groups. First values in the lower half, shifted by 2 to where second ones are in
        // the upper half; 4 is added for the groups whose activations come second.
        const int first = 0x01000100 + 0x02020202 * half, row = 0x04040404;
        const __m256i bytes = _mm256_setr_epi32(first, first + row, first + 2 * row, first + 3 * row, first,
                                                first + row, first + 2 * row, first + 3 * row);
        __m256i columns = _mm256_mullo_epi16(_mm256_shuffle_epi8(metadata, bytes), _mm256_set1_epi32(0x00010004));
        columns =
            _mm256_or_si256(_mm256_and_si256(columns, _mm256_set1_epi8(char(0xcc))), _mm256_set1_epi32(0x11001100));
        control[0] = _mm256_srli_epi32(columns, 2);
        control[1] = _mm256_srli_epi32(columns, 6);
    }

    // The sums of 8 rows and a token over a chunk. `excess` is -32768 times the sum of each row's values: activations
    // come as int16 + 32768. vpmaddubsw's sums of two are at most 2 * 255 * 15, so that those of four of it fit 16
    // bits.
    static INLINE __m256i product_i16(const Eight& rows, const uint8_t* x, __m256i excess) {
        __m256i sum[2];
        UNROLL
        for (int part = 0; part < 2; part++) UNROLL
        for (int i = 0; i < 4; i++) {
            int64_t activations;
            std::memcpy(&activations, x + 16 * i + 8 * part, 8);
            const __m256i chosen = _mm256_shuffle_epi8(_mm256_set1_epi64x(activations), rows.control[i]);
            const __m256i products = _mm256_maddubs_epi16(chosen, rows.value[i]);
            sum[part] = i ? _mm256_add_epi16(sum[part], products) : products;
        }
        const __m256i upper = _mm256_madd_epi16(sum[0], _mm256_set1_epi16(256)),
                      lower = _mm256_madd_epi16(sum[1], _mm256_set1_epi16(1));
        return _mm256_add_epi32(_mm256_add_epi32(upper, lower), excess);
    }

    // The same for int8 activations, which come as x + 128: `excess` is -128 times the sum of each row's values,
    // halved, and what is left of the sums of four fits 16 bits.
    static INLINE __m256i product_i8(const Eight& rows, const uint8_t* x, __m256i excess) {
        __m256i sum = excess;
        UNROLL
        for (int i = 0; i < 4; i++) {
            int64_t activations;
            std::memcpy(&activations, x + 8 * i, 8);
            const __m256i chosen = _mm256_shuffle_epi8(_mm256_set1_epi64x(activations), rows.control[i]);
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(chosen, rows.value[i]));
        }
        return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
    }

    // int4 codes times int8 or int16 activations: the sums of a chunk are whole numbers below 2^24, exact in fp32;
    // times the chunk's factor they are exact where that is a power of two, as with int16.
    template <Activations A, int R, int T>
    static INLINE void codes_integer(const Codes& codes, const uint8_t* x, int64_t chunks, float* sums, bool first) {
        constexpr int units = 2 * R;  // of 8 rows
        __m256i zero[units];
        __m256 acc[units][T];
        UNROLL
        for (int u = 0; u < units; u++) {
            const __m256i rows = _mm256_cvtepu8_epi32(_mm_loadl_epi64(
                reinterpret_cast<const __m128i*>(codes.zero + u / 2 * codes.zero_stride + 8 * (u % 2))));
            zero[u] = _mm256_shuffle_epi8(
                rows, _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c));
            UNROLL
            for (int t = 0; t < T; t++)
                acc[u][t] =
                    first || codes.scale ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + t * R * kRowBlock + 8 * u);
        }
        constexpr int64_t token = kColumnChunk * activation_bytes(A);
        for (int64_t c = 0; c < chunks; c++, x += T * token) UNROLL
        for (int u = 0; u < units; u++) {
            const uint8_t* block = codes.weight + u / 2 * codes.block_stride + c * kCodeBytes;
            if (u % 2 == 0) prefetch<kCodeBytes, kPrefetchCodes>(block, codes.left - c, (R - 1) * codes.block_stride);
            const Eight rows = eight_rows<A>(block + 32 * (u % 2), zero[u]);
            const __m256i all = _mm256_add_epi8(_mm256_add_epi8(rows.value[0], rows.value[1]),
                                                _mm256_add_epi8(rows.value[2], rows.value[3]));
            const __m256i excess =
                A == kI16
                    ? _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), all), _mm256_set1_epi16(-32768))
                    : _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_maddubs_epi16(_mm256_set1_epi8(char(0x80)), all));
            for (int t = 0; t < T; t++) {
                float factor;
                std::memcpy(&factor, x + t * token + factor_offset(A), sizeof factor);
                const __m256 sum = _mm256_cvtepi32_ps(A == kI16 ? product_i16(rows, x + t * token, excess)
                                                                : product_i8(rows, x + t * token, excess));
                acc[u][t] = _mm256_fmadd_ps(sum, _mm256_set1_ps(factor), acc[u][t]);
            }
        }
        UNROLL
        for (int u = 0; u < units; u++) store_codes<R>(codes, acc[u], u, sums, first);
    }

    // Adds the sums of the 8 rows of unit u, times their scales where there are any.
    template <int R, int T>
    static INLINE void store_codes(const Codes& codes, const __m256 (&acc)[T], int u, float* sums, bool first) {
        __m256 scale = _mm256_setzero_ps();
        if (codes.scale) scale = scales(codes.scale + u / 2 * codes.scale_stride, u % 2, codes.scale_dtype);
        UNROLL
        for (int t = 0; t < T; t++) {
            float* to = sums + t * R * kRowBlock + 8 * u;
            _mm256_storeu_ps(to, codes.scale
                                     ? _mm256_fmadd_ps(acc[t], scale, first ? _mm256_setzero_ps() : _mm256_loadu_ps(to))
                                     : acc[t]);
        }
    }

    template <class K, int R, int T>
    static INLINE void codes(const Codes& w, const uint8_t* x, int64_t chunks, float* sums, bool first) {
        if constexpr (K::activations == kI16 || K::activations == kGroupedI8)
            return codes_integer<K::activations, R, T>(w, x, chunks, sums, first);
        constexpr int units = T == 1 ? 2 * R : T <= 5 ? 2 : 1;  // as in sparse
        codes_f32<R, units, 0, T>(w, reinterpret_cast<const float*>(x), chunks, sums, first);
    }

    // |w| * (x with w's sign): vpmaddubsw takes one unsigned factor, and |w| <= 128, |x| <= 127 cannot saturate its
    // sums.
    template <int R, int H, int T>
    static void int8_half(const uint8_t* w, const uint8_t* x, int64_t chunks, int32_t* sums, bool first) {
        const __m256i low = _mm256_set1_epi32(0x03030303), second = _mm256_set1_epi32(0x04040000),
                      ones = _mm256_set1_epi16(1);
        __m256i acc[T];
        UNROLL
        for (int t = 0; t < T; t++)
            acc[t] = first ? _mm256_setzero_si256()
                           : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + t * R * kRowBlock + 8 * H));
        for (int64_t c = 0; c < chunks; c++, w += chunk_bytes(kInt8)) {
            if (H == 0) prefetch<chunk_bytes(kInt8)>(w, chunks - c, 0);
            __m256i metadata = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * H));
            for (int pair = 0; pair < 4; pair++, x += 8 * T, metadata = _mm256_srli_epi32(metadata, 2)) {
                __m256i columns = _mm256_or_si256(_mm256_and_si256(metadata, low), second);
                __m256i value =
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + kMetadataBytes + 64 * pair + 32 * H));
                __m256i magnitude = _mm256_abs_epi8(value);
                UNROLL
                for (int t = 0; t < T; t++) {
                    int64_t eight;
                    std::memcpy(&eight, x + 8 * t, 8);
                    __m256i chosen = _mm256_sign_epi8(_mm256_shuffle_epi8(_mm256_set1_epi64x(eight), columns), value);
                    acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, chosen), ones));
                }
            }
        }
        UNROLL
        for (int t = 0; t < T; t++)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + t * R * kRowBlock + 8 * H), acc[t]);
    }

    template <class K, int R, int T>
    static void sparse(const uint8_t* w, int64_t block_stride, const uint8_t* x, int64_t chunks, typename K::Sum* sums,
                       bool first) {
        if constexpr (K::activations == kI8) {
            UNROLL
            for (int r = 0; r < R; r++) {
                int8_half<R, 0, T>(w + r * block_stride, x, chunks, sums + r * kRowBlock, first);
                int8_half<R, 1, T>(w + r * block_stride, x, chunks, sums + r * kRowBlock, first);
            }
        } else {
            // A chain of additions an output and token: few tokens need several units to hide the latency of an FMA,
            // many tokens leave registers for one.
            constexpr int units = T == 1 ? 2 * R : T <= 5 ? 2 : 1;
            sparse_f32<K, R, units, 0, T>(w, block_stride, reinterpret_cast<const float*>(x), chunks, sums, first);
        }
    }

    // 16 columns as two registers: the even and the odd columns of bf16, which a shift and a mask give; else the first
    // and the last eight.
    static INLINE void sixteen(const Bf16* w, __m256 (&out)[2]) {
        __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
        out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        out[1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
    }
    static INLINE void sixteen(const Fp16* w, __m256 (&out)[2]) {
        UNROLL
        for (int i = 0; i < 2; i++)
            out[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 8 * i)));
    }
    static INLINE void sixteen(const int8_t* w, __m256 (&out)[2]) {
        UNROLL
        for (int i = 0; i < 2; i++)
            out[i] =
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + 8 * i))));
    }
    static INLINE void sixteen(const float* w, __m256 (&out)[2]) {
        UNROLL
        for (int i = 0; i < 2; i++) out[i] = _mm256_loadu_ps(w + 8 * i);
    }

    template <class W, int R, int T>
    static INLINE void dense_step(const W* w, int64_t row_stride, const float* x, __m256 (&acc)[R][2][T]) {
        UNROLL
        for (int r = 0; r < R; r++) {
            __m256 value[2];
            sixteen(w + r * row_stride, value);
            UNROLL
            for (int i = 0; i < 2; i++) UNROLL
            for (int t = 0; t < T; t++)
                acc[r][i][t] = _mm256_fmadd_ps(value[i], _mm256_loadu_ps(x + 32 * t + 8 * i), acc[r][i][t]);
        }
    }

    template <class W, class X, int R, int T>
    static void dense(const W* w, const Columns& at, const X* x, float* sums, int64_t stride) {
        const int64_t k = at.k;
        __m256 acc[R][2][T];
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++) acc[r][0][t] = acc[r][1][t] = _mm256_setzero_ps();
        int64_t c = 0;
        RowsAhead<R, W, kAheadTo<T>> ahead(w, at);
        for (; c + 16 <= k; c += 16) {
            ahead.ask(c);
            dense_step<W, R, T>(w + c, k, x + c / 32 * 32 * T + c % 32, acc);
        }
        if (c < k) {
            W tail[R][16] = {};
            UNROLL
            for (int r = 0; r < R; r++) std::memcpy(tail[r], w + r * k + c, size_t(k - c) * sizeof(W));
            dense_step<W, R, T>(tail[0], 16, x + c / 32 * 32 * T + c % 32, acc);
        }
        UNROLL
        for (int r = 0; r < R; r++) UNROLL
        for (int t = 0; t < T; t++) {
            __m256 sum = _mm256_add_ps(acc[r][0][t], acc[r][1][t]);
            __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
            four = _mm_add_ps(four, _mm_movehl_ps(four, four));
            sums[t * stride + r] = _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
        }
    }
};

}  // namespace

#include "driver.h"

const InstructionSet kAvx2 = {
    "avx2",
    [] {
        return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"));
    },
    tile_tokens,
    token_bytes,
    convert,
    multiply};
