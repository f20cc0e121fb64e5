// The formats of packed weights, as kernels/formats.py has them (a test compares the two): a format's code is its place
// in the table. Activations, biases and dense weights have the codes of bf16, fp16 and fp32.
#pragma once

#include <cstdint>

// clang-format off
enum : int32_t {
    kBf16, kFp16, kFp32, kInt8, kInt8WeightOnly,
    kInt4, kInt4G32, kInt4G64, kInt4G128, kInt4A8, kInt4G32A8, kInt4G64A8, kInt4G128A8,
    kFormatCount
};
// clang-format on

namespace {

struct WeightFormat {
    const char* name;
    int32_t bits;           // of a kept value
    bool quantizes_inputs;  // to int8, for int32 sums
    int64_t scale_group;    // columns of a row that share a scale; 0: all
    int64_t input_group;    // columns of a token whose int8 share a scale; 0: all
};

constexpr WeightFormat kWeightFormats[kFormatCount] = {
    {"bf16", 16, false, 0, 0},
    {"fp16", 16, false, 0, 0},
    {"fp32", 32, false, 0, 0},
    {"int8", 8, true, 0, 0},
    {"int8_weight_only", 8, false, 0, 0},
    {"int4", 4, false, 0, 0},
    {"int4_g32", 4, false, 32, 0},
    {"int4_g64", 4, false, 64, 0},
    {"int4_g128", 4, false, 128, 0},
    {"int4_a8", 4, true, 0, 32},
    {"int4_g32_a8", 4, true, 32, 32},
    {"int4_g64_a8", 4, true, 64, 32},
    {"int4_g128_a8", 4, true, 128, 32},
};

constexpr int64_t kRowBlock = 16;             // rows of a block
constexpr int64_t kColumnChunk = 32;          // columns of a chunk
constexpr int64_t kMostInt8Columns = 262144;  // for int32 sums
constexpr int64_t kMetadataBytes = 4 * kRowBlock;
constexpr uint8_t kZeroPoint = 8;  // of int4's codes, where the weight brings none

// The formats of codes differ in their scales and activations only: one inner kernel for each kind of activations
// serves them.
constexpr bool is_codes(int32_t format) { return format >= kInt4 && format <= kInt4G128A8; }

constexpr int64_t chunk_bytes(int32_t format) {
    return kMetadataBytes + kRowBlock * kColumnChunk / 2 * kWeightFormats[format].bits / 8;
}

}  // namespace
