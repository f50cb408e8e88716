// The kernel layouts: how a repacked weight and an encoded activation lie in memory. One layout serves every
// instruction set.
//
// Weight. 16 rows (outputs) make a panel, 64 columns of it a chunk; N and K are padded. A chunk's codes are 4 block
// pairs of 128 bytes: two halves of 8 rows, for each row 8 bytes whose low nibbles are the first block of the pair and
// whose high nibbles are the second. So 8 bytes that are decoded together share a codebook, which is what byte shuffles
// want, and vshufps of the two halves gives 4 columns of 16 rows in order, which is what dot product instructions want;
// Arm's matrix products want 8 columns of two rows, as they are.
// Its selectors are in 8 groups, each the rows (a, a + 4) that a 256-bit register holds at the same place of its two
// 128-bit lanes: for each of 8 blocks the row a's bits, then the row a+4's, so that both together index a table of
// codebook pairs. The bytes of codes, selectors and scales are three streams, each in the order it is read in.
//
// Activation. Rows of int8 entries, columns padded to the chunk with zeros (a padded position contributes 0 whatever
// the weight holds there); fp32 block-array scales; corrections for the weight's bias; a scale for each row.
#pragma once

#include "format.h"
#include "lobcq.h"

namespace lobcq {

constexpr int kPanel = 16;
constexpr int kChunk = 64;
constexpr int kPairColumns = 2 * kBlock;
constexpr int kPairBytes = kPanel * kBlock;
constexpr int kChunkCodes = kPanel * kChunk / 2;
constexpr int kMaxPlanes = 4;
constexpr int64_t kAlign = 64;
constexpr int64_t kSlack = 64;  // bytes readable behind a buffer's last stream: kernels load whole vectors

// What a weight's slack holds: what it was packed for. The layout's version is part of the magic number. The columns are
// rounded up to whole block arrays: more is not known of a weight that comes from stored bytes.
struct WeightStamp {
    uint64_t magic = 0x31304c2d51434f4c;
    int64_t rows, columns;
    int32_t num_codebooks, array_size;

    bool operator==(const WeightStamp&) const = default;
};
static_assert(sizeof(WeightStamp) <= kSlack);

inline WeightStamp stamp_of(const lobcq_weight& w) {
    return {.rows = w.rows, .columns = round_up(w.columns, w.array_size), .num_codebooks = w.num_codebooks,
            .array_size = w.array_size};
}

// Row within the panel of half h (0, 1), place i (0..7) of a block pair.
constexpr int row_at(int half, int place) { return 4 * (place >> 1) + 2 * half + (place & 1); }

// Selector group of a place, and whether the place comes second in it.
constexpr int selector_group(int half, int place) { return half * 4 + (place >> 2) * 2 + (place & 1); }
constexpr int selector_second(int place) { return (place >> 1) & 1; }

// Columns as the kernels see them: a multiple of both the chunk and the array size.
inline int64_t kernel_columns(int64_t columns, int32_t array_size) {
    return round_up(columns, array_size > kChunk ? array_size : kChunk);
}

// data + offset; null for a view made only to learn its size.
template <class T>
T* part_of(void* data, int64_t offset) {
    return data ? reinterpret_cast<T*>(static_cast<uint8_t*>(data) + offset) : nullptr;
}

// Nothing here may be loaded as if it were aligned: weights compiled into a program start where that puts them.
struct WeightView {
    uint8_t *codes, *selectors, *scales;
    int64_t rows, panels, chunks, arrays;
    int32_t array_size, bits;
    int64_t bytes;

    WeightView(void* data, int64_t n, int64_t k, int32_t num_codebooks, int32_t l_a)
        : rows(n), panels(ceil_div(n, kPanel)), chunks(kernel_columns(k, l_a) / kChunk),
          arrays(kernel_columns(k, l_a) / l_a), array_size(l_a), bits(selector_bits(num_codebooks)) {
        const int64_t selector_start = panels * chunks * kChunkCodes;
        const int64_t scale_start = selector_start + round_up(panels * chunks * chunk_selectors(), kAlign);
        bytes = round_up(scale_start + panels * arrays * kPanel, kAlign) + kSlack;
        codes = part_of<uint8_t>(data, 0);
        selectors = part_of<uint8_t>(data, selector_start);
        scales = part_of<uint8_t>(data, scale_start);
    }
    explicit WeightView(const lobcq_weight& w)
        : WeightView(w.data, w.rows, w.columns, w.num_codebooks, w.array_size) {}

    WeightStamp stamp() const {
        WeightStamp stamp;
        std::memcpy(&stamp, codes + bytes - kSlack, sizeof stamp);
        return stamp;
    }
    void set_stamp(const WeightStamp& stamp) const {
        std::memset(codes + bytes - kSlack, 0, kSlack);
        std::memcpy(codes + bytes - kSlack, &stamp, sizeof stamp);
    }

    int64_t chunk_selectors() const { return 2 * kBlock * bits; }  // bytes
    uint8_t* codes_at(int64_t panel, int64_t chunk) const { return codes + (panel * chunks + chunk) * kChunkCodes; }
    uint8_t* selectors_at(int64_t panel, int64_t chunk) const {
        return selectors + (panel * chunks + chunk) * chunk_selectors();
    }
    uint8_t* scales_at(int64_t panel, int64_t array) const { return scales + (panel * arrays + array) * kPanel; }
};

// `planes` rows of entries for each row of the activation: 1 where it is encoded; more where its float values are
// split into digits, each a plane of entries with scales of its own.
struct ActivationView {
    int8_t* entries;       // [rows * planes][stride]
    float* scales;         // [rows * planes][arrays]
    int32_t* corrections;  // [rows * planes][arrays * parts]: what the instruction set's kernels want
    float* row_scales;     // [rows]
    int64_t rows, columns, stride, arrays;
    int32_t planes, array_size, parts;
    bool wide;  // entries reach +-127, not +-32: products of a block array do not add up in 16 bits
    int64_t bytes;

    ActivationView(void* data, int64_t m, int64_t k, int32_t l_a, int32_t planes_, bool wide_)
        : rows(m), columns(k), arrays(kernel_columns(k, l_a) / l_a), planes(planes_), array_size(l_a),
          parts(l_a > kChunk ? l_a / kChunk : 1), wide(wide_) {
        // An odd number of cache lines between rows: a power of two would put one column of all rows in one cache set.
        stride = (kernel_columns(k, l_a) / kChunk | 1) * kChunk;
        const int64_t n = rows * planes;
        const int64_t scale_start = n * stride;
        const int64_t correction_start = scale_start + round_up(n * arrays * 4, kAlign);
        const int64_t row_start = correction_start + round_up(n * arrays * parts * 4, kAlign);
        bytes = row_start + round_up(rows * 4, kAlign) + kSlack;
        entries = part_of<int8_t>(data, 0);
        scales = part_of<float>(data, scale_start);
        corrections = part_of<int32_t>(data, correction_start);
        row_scales = part_of<float>(data, row_start);
    }

    // Rows [first, first + count).
    ActivationView part(int64_t first, int64_t count) const {
        ActivationView view = *this;
        view.entries = entries_at(first * planes);
        view.scales = scales_at(first * planes);
        view.corrections = corrections_at(first * planes);
        view.row_scales += first;
        view.rows = count;
        return view;
    }

    int8_t* entries_at(int64_t row) const { return entries + row * stride; }
    float* scales_at(int64_t row) const { return scales + row * arrays; }
    int32_t* corrections_at(int64_t row) const { return corrections + row * arrays * parts; }
};

}  // namespace lobcq
