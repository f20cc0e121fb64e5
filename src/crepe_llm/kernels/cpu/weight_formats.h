// The formats of packed weights, as kernels/formats.py has them (a test compares the two): a format's code is its place
// in the table. Activations, biases and dense weights have the codes of bf16, fp16 and fp32.
#pragma once

#include <cstdint>

enum : int32_t { kBf16, kFp16, kFp32, kInt8, kFormatCount };

namespace {

struct WeightFormat {
    const char* name;
    int32_t bits;           // of a kept value
    bool quantizes_inputs;  // to int8, one scale a token, for int32 sums
};

constexpr WeightFormat kWeightFormats[kFormatCount] = {
    {"bf16", 16, false},
    {"fp16", 16, false},
    {"fp32", 32, false},
    {"int8", 8, true},
};

constexpr int64_t kRowBlock = 16;     // rows of a block
constexpr int64_t kColumnChunk = 32;  // columns of a chunk
constexpr int64_t kMostInt8Columns = 262144;  // for int32 sums
constexpr int64_t kMetadataBytes = 4 * kRowBlock;

constexpr int64_t chunk_bytes(int32_t format) { return kMetadataBytes + kRowBlock * kColumnChunk / 2 * kWeightFormats[format].bits / 8; }

}  // namespace
