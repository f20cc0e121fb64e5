// Plain C++: right on every processor; the other translation units are checked against it.
#include "formats.h"

namespace {

// A chunk of codes: of kept value v of group g of row r, its column in the group and the code itself.
struct CodeChunk {
    uint32_t words[3][kRowBlock];  // metadata, and the codes of groups 0 to 3 and 4 to 7

    explicit CodeChunk(const uint8_t* chunk) { std::memcpy(words, chunk, sizeof words); }
    int column(int64_t g, int v, int r) const { return words[0][r] >> (4 * g + 2 * v) & 3; }
    // The same in formats whose activations are quantized.
    int spread_column(int64_t g, int v, int r) const {
        return words[0][r] >> (8 * (2 * v + g % 4 / 2) + 2 * (2 * (g / 4) + g % 2)) & 3;
    }
    int code(int64_t g, int v, int r) const { return words[1 + g / 4][r] >> (16 * v + 4 * (g % 4)) & 15; }
};

// Where the sums of some columns begin: those of a group that has scales by themselves.
template <int T>
void start_portable(const Codes& w, float (&acc)[T][kRowBlock], const float* sums, bool first) {
    for (int t = 0; t < T; t++)
        for (int r = 0; r < kRowBlock; r++) acc[t][r] = first || w.scale ? 0 : sums[t * kRowBlock + r];
}

// What a group of columns adds to a token's sums: the sums of its codes times its scales, where it has any.
template <int T>
void store_portable(const Codes& w, const float (&acc)[T][kRowBlock], float* sums, bool first) {
    if (!w.scale) {
        std::memcpy(sums, acc, sizeof acc);
        return;
    }
    for (int r = 0; r < kRowBlock; r++) {
        const float scale = w.scale_dtype == kFp32   ? reinterpret_cast<const float*>(w.scale)[r]
                            : w.scale_dtype == kBf16 ? to_float(reinterpret_cast<const Bf16*>(w.scale)[r])
                                                     : to_float(reinterpret_cast<const Fp16*>(w.scale)[r]);
        for (int t = 0; t < T; t++) sums[t * kRowBlock + r] = (first ? 0 : sums[t * kRowBlock + r]) + acc[t][r] * scale;
    }
}

// With int8 activations (kGroupedI8): whole numbers in a chunk, times its factor.
template <int T>
void portable_grouped_i8(const Codes& w, const uint8_t* x, int64_t chunks, float* sums, bool first) {
    constexpr int64_t token = kColumnChunk * activation_bytes(kGroupedI8);
    float acc[T][kRowBlock];
    start_portable(w, acc, sums, first);
    for (int64_t c = 0; c < chunks; c++, x += T * token) {
        const CodeChunk chunk(w.weight + c * kCodeBytes);
        int32_t sum[T][kRowBlock] = {};
        for (int place = 0; place < 8; place++)
            for (int v = 0; v < 2; v++)
                for (int r = 0; r < kRowBlock; r++) {
                    const int64_t g = kOrderOfGroups[place], column = chunk.spread_column(g, v, r);
                    const int value = chunk.code(g, v, r) - w.zero[r];
                    for (int t = 0; t < T; t++) sum[t][r] += value * (x[t * token + 4 * place + column] - 128);
                }
        for (int t = 0; t < T; t++) {
            float factor;
            std::memcpy(&factor, x + t * token + factor_offset(kGroupedI8), sizeof factor);
            for (int r = 0; r < kRowBlock; r++) acc[t][r] += float(sum[t][r]) * factor;
        }
    }
    store_portable(w, acc, sums, first);
}

template <int T>
void portable_codes(const Codes& w, const float* x, int64_t chunks, float* sums, bool first) {
    float acc[T][kRowBlock];
    start_portable(w, acc, sums, first);
    for (int64_t c = 0; c < chunks; c++, x += T * kColumnChunk) {
        const CodeChunk chunk(w.weight + c * kCodeBytes);
        for (int g = 0; g < 8; g++)
            for (int v = 0; v < 2; v++)
                for (int r = 0; r < kRowBlock; r++) {
                    const int column = chunk.column(g, v, r);
                    const float value = float(chunk.code(g, v, r) - w.zero[r]);
                    for (int t = 0; t < T; t++) acc[t][r] += value * x[(g * T + t) * 4 + column];
                }
    }
    store_portable(w, acc, sums, first);
}

struct Isa : PlainIsa {
    static constexpr int dense_rows(int64_t, int64_t) { return 2; }

    template <class K, int R, int T>
    static void sparse(const uint8_t* w, int64_t, const uint8_t* x, int64_t chunks, typename K::Sum* sums, bool first) {
        static_assert(R == 1);
        typename K::Sum acc[T][kRowBlock];
        for (int t = 0; t < T; t++)
            for (int r = 0; r < kRowBlock; r++) acc[t][r] = first ? 0 : sums[t * kRowBlock + r];
        for (int64_t c = 0; c < chunks; c++, w += K::weight_bytes, x += T * kColumnChunk * K::activation_bytes) {
            uint32_t metadata[kRowBlock];
            std::memcpy(metadata, w, sizeof metadata);
            const uint8_t* values = w + kMetadataBytes;
            if constexpr (K::activations == kI8) {
                for (int pair = 0; pair < 4; pair++)
                    for (int r = 0; r < kRowBlock; r++)
                        for (int v = 0; v < 4; v++) {
                            int column = (metadata[r] >> (8 * v + 2 * pair) & 3) + (v & 2) * 2;
                            int value = int8_t(values[(pair * kRowBlock + r) * 4 + v]);
                            for (int t = 0; t < T; t++) acc[t][r] += value * int8_t(x[(pair * T + t) * 8 + column]);
                        }
            } else {
                const float* xf = reinterpret_cast<const float*>(x);
                for (int g = 0; g < 8; g++)
                    for (int v = 0; v < 2; v++)
                        for (int r = 0; r < kRowBlock; r++) {
                            int column = metadata[r] >> (4 * g + 2 * v) & 3;
                            float value = kept<K::format>(values, g, v, r);
                            for (int t = 0; t < T; t++) acc[t][r] += value * xf[(g * T + t) * 4 + column];
                        }
            }
        }
        std::memcpy(sums, acc, sizeof acc);
    }

    template <class K, int R, int T>
    static void codes(const Codes& w, const uint8_t* x, int64_t chunks, float* sums, bool first) {
        if constexpr (K::activations == kGroupedI8)
            portable_grouped_i8<T>(w, x, chunks, sums, first);
        else
            portable_codes<T>(w, reinterpret_cast<const float*>(x), chunks, sums, first);
    }

    template <int32_t Format>
    static float kept(const uint8_t* values, int g, int v, int r) {
        if constexpr (Format == kBf16) {
            Bf16 b;
            std::memcpy(&b, values + 2 * ((g * kRowBlock + r) * 2 + v), 2);
            return to_float(b);
        } else if constexpr (Format == kFp16) {
            Fp16 h;
            std::memcpy(&h, values + 2 * ((g * 2 + v) * kRowBlock + r), 2);
            return to_float(h);
        } else if constexpr (Format == kInt8WeightOnly) {
            return float(int8_t(values[(g * 2 + v) * kRowBlock + r]));
        } else {
            float f;
            std::memcpy(&f, values + 4 * ((g * 2 + v) * kRowBlock + r), 4);
            return f;
        }
    }

    template <class W, class X, int R, int T>
    static void dense(const W* w, const Columns& at, const X* x, float* sums, int64_t stride) {
        const int64_t k = at.k;
        float acc[T][R] = {};
        for (int64_t c = 0; c < k; c++)
            for (int r = 0; r < R; r++) {
                float value = to_float(w[r * k + c]);
                for (int t = 0; t < T; t++) acc[t][r] += value * to_float(x[(c / 32 * T + t) * 32 + c % 32]);
            }
        for (int t = 0; t < T; t++)
            for (int r = 0; r < R; r++) sums[t * stride + r] = acc[t][r];
    }
};

}  // namespace

#include "driver.h"

const InstructionSet kPortable = {"portable", [] { return true; }, tile_tokens, token_bytes, convert, multiply};
