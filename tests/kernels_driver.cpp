// Runs every instruction set in this build on random shapes, with random metadata (also such as no packer writes), in
// buffers of exactly the promised size, and compares with the portable one. Built by test_kernels_native.py, under
// AddressSanitizer and for other processors.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

extern "C" {
const char* crepe_instruction_set(int32_t index);
int32_t crepe_supported(int32_t index);
int32_t crepe_multiply(const Problem* problem, int32_t index, void* parallel, int32_t threads);
int32_t crepe_multiply_experts(const Problem* all, const int64_t* ends, int64_t experts, int32_t index, void* parallel,
                               int32_t threads);
}

static std::mt19937 rng(1);
static int64_t pick(int64_t low, int64_t high) { return low + int64_t(rng() % uint32_t(high - low + 1)); }

// Codes come as whole bytes of two.
static int64_t bytes_of(int32_t dtype) { return dtype == kFp32 ? 4 : dtype >= kInt8 ? 1 : 2; }

// A small multiple of 1/8 in any of the float formats: exact products, so that sums differ only in rounding.
static void put(uint8_t* to, int32_t dtype) {
    float value = float(pick(-16, 16)) / 8;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == kFp32) std::memcpy(to, &bits, 4);
    uint16_t half = uint16_t(bits >> 16);
    if (dtype == kFp16)
        half = value == 0 ? 0 : uint16_t((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13);
    if (dtype == kFp16 || dtype == kBf16) std::memcpy(to, &half, 2);
    if (bytes_of(dtype) == 1) *to = uint8_t(rng());
}

// A number in one of the float formats.
static float number(const uint8_t* from, int32_t dtype) {
    uint32_t bits = 0;
    std::memcpy(&bits, from, size_t(bytes_of(dtype)));
    if (dtype == kFp16) {
        const int exponent = int(bits >> 10 & 31);
        const float size = std::ldexp(float(bits & 1023) / 1024 + (exponent ? 1 : 0), (exponent ? exponent : 1) - 15);
        return bits >> 15 ? -size : size;
    }
    if (dtype == kBf16) bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// A problem whose sizes do not belong together is refused before anything is read.
static int refuses_wrong_sizes(const Problem& right, int portable) {
    if (crepe_multiply(&right, 99, nullptr, 1) != 2 || crepe_multiply(&right, -1, nullptr, 1) != 2) return 1;
    void (*const damages[])(Problem&) = {
        [](Problem& p) { p.weight_bytes--; },
        [](Problem& p) { p.x_columns--; },
        [](Problem& p) { p.scale_count = 1; },
        [](Problem& p) { p.bias_count--; },
        [](Problem& p) { p.n += 16; },
        [](Problem& p) { p.k += 32; },
        [](Problem& p) { p.n = -p.n; },
        [](Problem& p) { p.n = p.k = int64_t(1) << 40; },
        [](Problem& p) { p.layout = 2; },
        [](Problem& p) { p.weight_format = kFormatCount; },
        [](Problem& p) { p.x_dtype = kInt8; },
        [](Problem& p) { p.bias_dtype = -1; },
        [](Problem& p) { p.x_row_stride = -1; },
        [](Problem& p) { p.weight = nullptr; },
        [](Problem& p) { p.zero_count++, p.zero = p.zero ? p.zero : static_cast<const uint8_t*>(p.weight); },
        [](Problem& p) { p.scale_dtype = kInt8; },
    };
    for (auto damage : damages) {
        Problem wrong = right;
        damage(wrong);
        if (crepe_multiply(&wrong, portable, nullptr, 1) != 2) return 1;
    }
    return 0;
}

// The rows of a product shared among three experts of the same weight are those of the product.
static int experts_agree(const Problem& one, const std::vector<uint8_t>& weight, const std::vector<uint8_t>& scale,
                         const std::vector<uint8_t>& expected, int index) {
    std::vector<uint8_t> weights, scales, y(expected.size());
    for (int e = 0; e < 3; e++) {
        weights.insert(weights.end(), weight.begin(), weight.end());
        scales.insert(scales.end(), scale.begin(), scale.end());
    }
    Problem all = one;
    all.weight = weights.data();
    all.weight_bytes = int64_t(weights.size());
    all.scale = one.scale ? scales.data() : nullptr;
    all.scale_count = int64_t(scales.size()) / bytes_of(one.scale_dtype);
    all.y = y.data();
    const int64_t first = pick(0, one.m), second = pick(first, one.m);
    const std::vector<int64_t> ends = {first, second, one.m};
    if (crepe_multiply_experts(&all, ends.data(), 3, index, nullptr, 1) || y != expected) return 1;
    const std::vector<int64_t> wrong[] = {
        {first, second, one.m + 1}, {first, second, one.m - 1}, {-1, second, one.m}, {one.m, 0, one.m}};
    for (const std::vector<int64_t>& bad : wrong)
        if (crepe_multiply_experts(&all, bad.data(), 3, index, nullptr, 1) != 2) return 1;
    void (*const damages[])(Problem&) = {
        [](Problem& p) { p.weight_bytes -= 3; },
        [](Problem& p) { p.bias = p.y, p.bias_count = p.n; },
        [](Problem& p) { p.scale = static_cast<const float*>(p.y), p.scale_count = p.n + 1; },
        [](Problem& p) { p.layout = kDense; },
        [](Problem& p) { p.m = int64_t(1) << 40; },
        [](Problem& p) { p.x_dtype = kInt8; },
    };
    for (auto damage : damages) {
        Problem bad = all;
        damage(bad);
        if (crepe_multiply_experts(&bad, ends.data(), 3, index, nullptr, 1) != 2) return 1;
    }
    if (crepe_multiply_experts(&all, ends.data(), 0, index, nullptr, 1) != 2) return 1;
    return crepe_multiply_experts(&all, nullptr, 3, index, nullptr, 1) != 2;
}

int main() {
    int portable = 0, checked = 0;
    while (std::strcmp(crepe_instruction_set(portable), "portable")) portable++;
    for (int round = 0; round < 400; round++) {
        Problem p{};
        p.layout = rng() % 3 ? kSparse24 : kDense;
        p.weight_format = int32_t(rng() % (p.layout == kSparse24 ? kFormatCount : 5));
        p.x_dtype = int32_t(rng() % 3);
        p.m = round % 10 ? pick(1, 30) : pick(60, 300);
        p.n = pick(1, 70);
        p.k = round % 10 ? pick(1, 40) * 4 : pick(260, 300) * 4;
        if (p.layout == kDense) p.k += pick(0, 3);
        p.x_row_stride = p.k + pick(0, 3);
        p.x_column_stride = 1;
        const int64_t chunks = (p.k + 31) / 32, values = chunk_bytes(p.weight_format) - kMetadataBytes;
        std::vector<uint8_t> weight;
        if (p.layout == kSparse24) {
            weight.resize(size_t((p.n + 15) / 16 * chunks * (kMetadataBytes + values)));
            for (size_t at = 0; at < weight.size();) {
                for (int i = 0; i < kMetadataBytes; i++) weight[at++] = uint8_t(rng());
                for (int64_t i = 0; i < values; i += bytes_of(p.weight_format), at += size_t(bytes_of(p.weight_format)))
                    put(&weight[at], p.weight_format);
            }
        } else {
            weight.resize(size_t(p.n * p.k * bytes_of(p.weight_format)));
            for (size_t at = 0; at < weight.size(); at += size_t(bytes_of(p.weight_format)))
                put(&weight[at], p.weight_format);
        }
        const int64_t xb = bytes_of(p.x_dtype);
        std::vector<uint8_t> x(size_t(((p.m - 1) * p.x_row_stride + p.k) * xb));
        for (size_t at = 0; at < x.size(); at += size_t(xb)) put(&x[at], p.x_dtype);
        // Scales and zero points of groups lie in whole row blocks; a scale of any float format.
        const int64_t group = p.layout == kSparse24 ? kWeightFormats[p.weight_format].scale_group : 0;
        const int64_t in_blocks = (p.n + 15) / 16 * (group ? (p.k + group - 1) / group : 1) * kRowBlock;
        p.scale_dtype = group ? int32_t(rng() % 3) : int32_t(kFp32);
        p.scale_count = group ? in_blocks : p.n;
        std::vector<uint8_t> scale(size_t(p.scale_count * bytes_of(p.scale_dtype))), zero;
        for (size_t at = 0; at < scale.size(); at += size_t(bytes_of(p.scale_dtype))) put(&scale[at], p.scale_dtype);
        if (p.layout == kSparse24 && is_codes(p.weight_format) && rng() % 2)
            for (p.zero_count = 0; p.zero_count < in_blocks; p.zero_count++) zero.push_back(uint8_t(rng() % 16));
        std::vector<float> bias;
        for (int64_t i = 0; i < p.n; i++) bias.push_back(float(pick(-8, 8)));
        p.weight = weight.data();
        p.weight_bytes = int64_t(weight.size());
        p.x_columns = p.k;
        p.bias_count = p.n;
        p.zero = zero.empty() ? nullptr : zero.data();
        p.x = x.data();
        p.scale = group || rng() % 2 ? scale.data() : nullptr;
        p.bias = rng() % 2 ? bias.data() : nullptr;
        p.bias_dtype = kFp32;
        std::vector<uint8_t> expected(size_t(p.m * p.n * xb)), y(expected.size());
        p.y = expected.data();
        Problem full = p;
        full.scale = scale.data(), full.bias = bias.data();
        if (p.n > 1 && refuses_wrong_sizes(full, portable)) return 3;
        if (crepe_multiply(&p, portable, nullptr, 1)) return 2;
        if (p.layout == kSparse24 && !p.bias && !is_codes(p.weight_format))
            for (int index = 0; crepe_instruction_set(index); index++) {
                if (!crepe_supported(index)) continue;
                p.y = y.data();
                if (crepe_multiply(&p, index, nullptr, 1) || experts_agree(p, weight, scale, y, index)) return 4;
            }
        p.y = y.data();
        for (int index = 0; crepe_instruction_set(index); index++) {
            if (!crepe_supported(index)) continue;
            std::fill(y.begin(), y.end(), 0xee);
            if (crepe_multiply(&p, index, nullptr, 1)) return 2;
            // Exact sums: every result is a multiple of 2^-8 below 2^15, so that all must agree to the bit; int8 goes
            // through more digits, or one division and three products, which may be fused differently.
            bool same = y == expected;
            const bool factors = kWeightFormats[p.weight_format].quantizes_inputs || p.weight_format == kInt8WeightOnly;
            if (p.layout == kSparse24 && factors && !same) {
                same = true;
                for (int64_t i = 0; i < p.m * p.n && same; i++) {
                    const uint8_t *at = &y[size_t(i * xb)], *of = &expected[size_t(i * xb)];
                    const float a = number(at, p.x_dtype), b = number(of, p.x_dtype);
                    same = std::fabs(a - b) <= 1e-5f * (std::fabs(b) + 10);
                    if (!same && p.x_dtype != kFp32) {
                        uint16_t bits_a, bits_b;
                        std::memcpy(&bits_a, at, 2), std::memcpy(&bits_b, of, 2);
                        same = std::abs(int(bits_a) - int(bits_b)) <= 1;
                    }
                }
            }
            // One instruction set may round activations, of at most 2, to 127ths of the largest.
            if (p.layout == kDense && p.weight_format == kInt8 && !same) {
                same = true;
                for (int64_t i = 0; i < p.m * p.n && same; i++) {
                    const float a = number(&y[size_t(i * xb)], p.x_dtype),
                                b = number(&expected[size_t(i * xb)], p.x_dtype);
                    same = std::fabs(a - b) <= float(p.k) * 128 * 2 / 127 + std::fabs(b) / 100;
                }
            }
            if (!same) {
                std::printf("%s differs: layout %d, dtypes %d x %d, %ld tokens, %ld x %ld\n",
                            crepe_instruction_set(index), p.layout, p.weight_format, p.x_dtype, long(p.m), long(p.n),
                            long(p.k));
                return 1;
            }
            checked++;
        }
    }
    for (int index = 0; crepe_instruction_set(index); index++)
        if (crepe_supported(index)) std::printf("%s ", crepe_instruction_set(index));
    std::printf("%d products\n", checked);
}
