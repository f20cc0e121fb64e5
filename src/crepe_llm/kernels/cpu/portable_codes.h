// The products of int4 codes in plain C++, for processors without kernels of their own for them.
#pragma once

#include "formats.h"

namespace {

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
    for (int t = 0; t < T; t++)
        for (int r = 0; r < kRowBlock; r++) acc[t][r] = first || w.scale ? 0 : sums[t * kRowBlock + r];
    const uint8_t* chunk = w.weight;
    for (int64_t c = 0; c < chunks; c++, chunk += kCodeBytes, x += T * token) {
        uint32_t words[3][kRowBlock];  // metadata, and the codes of groups 0 to 3 and 4 to 7
        std::memcpy(words, chunk, sizeof words);
        int32_t sum[T][kRowBlock] = {};
        for (int place = 0; place < 8; place++)
            for (int v = 0; v < 2; v++)
                for (int r = 0; r < kRowBlock; r++) {
                    const int g = int(kOrderOfGroups[place]), column = words[0][r] >> (4 * g + 2 * v) & 3;
                    const int code = words[1 + g / 4][r] >> (16 * v + 4 * (g % 4)) & 15;
                    for (int t = 0; t < T; t++) sum[t][r] += (code - w.zero[r]) * (x[t * token + 4 * place + column] - 128);
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
    for (int t = 0; t < T; t++)
        for (int r = 0; r < kRowBlock; r++) acc[t][r] = first || w.scale ? 0 : sums[t * kRowBlock + r];
    const uint8_t* chunk = w.weight;
    for (int64_t c = 0; c < chunks; c++, chunk += kCodeBytes, x += T * kColumnChunk) {
        uint32_t words[3][kRowBlock];  // metadata, and the codes of groups 0 to 3 and 4 to 7
        std::memcpy(words, chunk, sizeof words);
        for (int g = 0; g < 8; g++)
            for (int v = 0; v < 2; v++)
                for (int r = 0; r < kRowBlock; r++) {
                    const int column = words[0][r] >> (4 * g + 2 * v) & 3;
                    const int code = words[1 + g / 4][r] >> (16 * v + 4 * (g % 4)) & 15;
                    const float value = float(code - w.zero[r]);
                    for (int t = 0; t < T; t++) acc[t][r] += value * x[(g * T + t) * 4 + column];
                }
    }
    store_portable(w, acc, sums, first);
}

}  // namespace
