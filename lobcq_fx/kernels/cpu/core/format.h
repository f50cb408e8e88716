// The number format's constants, its look-up tables and the packed selectors. docs/format.md is the specification.
#pragma once

#include <cstdint>
#include <cstring>

#include "lobcq.h"

namespace lobcq {

constexpr int kBlock = 8;          // scalars that share a selector
constexpr int kCodebookSize = 16;  // entries of a codebook
constexpr int kMaxCodebooks = 16;
constexpr int kEntryMax = 31;      // entries are integers in [-31, 31]
constexpr int kGrid = 16;          // grid steps per unit
constexpr int kGridMax = 2047;     // normalised scalars are clamped to +-2047 grid steps
constexpr int kInt8Max = 127;      // entries of an activation in int8 are integers in [-127, 127]
constexpr float kScaleMax = 448.0f;  // largest finite value of E4M3
constexpr uint8_t kScaleNaN = 0x7f;  // E4M3 NaN; 0x7e is the largest finite value, 448
constexpr uint32_t kInfBits = 0x7f800000;  // |x|'s bits from here on are infinity and NaN

// A scalar at grid value q is nearest to the same entry for all q of the bucket (8(m-1), 8m]. Buckets are numbered from
// kFirstBucket; entries lie within +-496, so outside +-512 the outermost buckets serve.
constexpr int kBuckets = 128;
constexpr int kFirstBucket = -64;

// Entries are stored with this added: 1..63, which is the same number as signed and as unsigned byte. The integer dot
// product instructions multiply unsigned by signed bytes; what the bias adds is subtracted per block array.
constexpr int kBias = 32;

struct alignas(64) Tables {
    uint8_t nearest[kMaxCodebooks][kBuckets];      // code of the nearest entry
    uint8_t biased[kMaxCodebooks * kCodebookSize]; // [selector << 4 | code]: entry + kBias, repeated to 16 codebooks
    uint8_t pairs[kMaxCodebooks * kMaxCodebooks][2][kCodebookSize]; // [a + N_c * b]: biased codebooks a and b
    float nearest_steps[kBuckets][kMaxCodebooks];  // nearest entry in grid steps; unused codebooks: far away
    int32_t num_codebooks;
    int32_t magic;
};

constexpr int32_t kTablesMagic = 0x4c4f4251;

inline bool valid_num_codebooks(int32_t n) { return n == 1 || n == 2 || n == 4 || n == 8 || n == 16; }
inline bool valid_array_size(int32_t n) { return n == 16 || n == 32 || n == 64 || n == 128; }
inline int selector_bits(int32_t num_codebooks) { return __builtin_ctz(static_cast<unsigned>(num_codebooks)); }

// What a rotation's sums are multiplied with: 2^-floor(log2(array_size) / 2).
constexpr float rotation_scale(int array_size) { return array_size < 64 ? 0.25f : 0.125f; }

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// Value of a non-negative E4M3 byte.
inline float e4m3_value(uint8_t byte) {
    if (byte >= kScaleNaN) return as_float(0x7fc00000);
    if (byte < 8) return static_cast<float>(byte) * 0x1p-9f;  // subnormal
    return as_float((static_cast<uint32_t>(byte) << 20) + (120u << 23));
}

// Neighbours of the scale that an array's largest magnitude asks for, tried after it where scales are searched.
constexpr int kScaleSteps[] = {-1, 1};
constexpr uint8_t kLargestScale = 0x7e;

// A scale some steps further; 0 and NaN have no neighbours.
inline uint8_t neighbour(uint8_t scale, int step) {
    const int byte = scale + step;
    if (scale == 0 || scale >= kScaleNaN) return scale;
    return static_cast<uint8_t>(byte < 1 ? 1 : byte > kLargestScale ? kLargestScale : byte);
}

// Of one scalar of enum lobcq_dtype.
inline int64_t scalar_bytes(int32_t dtype) { return dtype == LOBCQ_FP32 ? 4 : 2; }

// Bytes of one row of a packed operand.
struct PackedRow {
    int64_t blocks, codes, selectors, scales;

    PackedRow(int64_t columns, int32_t num_codebooks, int32_t array_size) {
        const int64_t padded = round_up(columns, array_size);
        blocks = padded / kBlock;
        codes = padded / 2;
        selectors = ceil_div(blocks * selector_bits(num_codebooks), 8);
        scales = padded / array_size;
    }
};

// Eight selectors of `bits` bits, little-endian, in the low bits of the result; `bytes` of them are there to be read.
inline uint64_t load_bytes(const uint8_t* from, int64_t bytes) {
    uint64_t word = 0;
    std::memcpy(&word, from, static_cast<size_t>(bytes));
    return word;
}

// Fills in everything; codebooks are valid.
void make_tables(const int8_t* codebooks, int32_t num_codebooks, Tables* tables);

}  // namespace lobcq
