// What encoding and decoding take, whatever the operand is: its rows come in slabs.
#pragma once

#include "encode.h"
#include "isa.h"
#include "packed_row.h"

namespace lobcq {

constexpr int64_t kSlab = 1024;  // columns in work at a time: 4 KiB of floats, in L1 with the tables
constexpr int64_t kSlabArrays = kSlab / 16;

// A slab of one row on its way: floats, their block-array scales, then codes or entries.
struct Slab {
    alignas(64) float x[kSlab];
    alignas(64) uint8_t codes[kSlab];
    alignas(64) int8_t entries[kSlab];
    alignas(64) uint8_t selectors[kSlab / kBlock];
    uint8_t scales[kSlabArrays];
    uint32_t absmax[kSlabArrays];
    float divisors[kSlabArrays];

    // Columns [column, ...) of a row, zeros behind its end; each `rotation` of them rotated, where it is not 0. Returns how
    // many columns there are.
    int64_t load(const lobcq_matrix& m, int64_t row, int64_t column, int rotation = 0) {
        const int64_t n = m.columns - column < kSlab ? m.columns - column : kSlab;
        const int64_t place = (row * m.row_stride + column) * (m.dtype == LOBCQ_FP32 ? 4 : 2);
        isa().load(static_cast<const uint8_t*>(m.data) + place, m.dtype, n, x);
        for (int64_t i = n; i < round_up(n, kGroup); ++i) x[i] = 0.0f;
        if (rotation) isa().rotate(x, n / rotation, rotation);
        return n;
    }

    // Codes, selectors and scales of the same columns of a packed row, zeros behind its end. Returns how many columns there
    // are.
    int64_t load_packed(const lobcq_packed& packed, const PackedRow& bytes, int64_t row, int64_t column) {
        const int bits = selector_bits(packed.num_codebooks);
        const int64_t n = packed.columns - column < kSlab ? packed.columns - column : kSlab;
        const int64_t padded = round_up(n, packed.array_size);
        unpack_codes(packed.codes + row * bytes.codes + column / 2, padded, codes);
        unpack_selectors(packed.selectors + row * bytes.selectors + column / kBlock * bits / 8, padded / kBlock, bits,
                         selectors);
        std::memset(codes + padded, 0, static_cast<size_t>(kSlab - padded));
        std::memset(selectors + padded / kBlock, 0, static_cast<size_t>((kSlab - padded) / kBlock));
        std::memcpy(scales, packed.scales + row * bytes.scales + column / packed.array_size,
                    static_cast<size_t>(padded / packed.array_size));
        return n;
    }

    // Makes zeros of an array that is not to be divided by its scale.
    void clear(int64_t array, int array_size) {
        std::memset(x + array * array_size, 0, static_cast<size_t>(array_size) * sizeof(float));
    }
};

// Loads one row slab by slab, rotated or not, and hands each to sink(slab, column, columns).
template <class Sink>
void for_slabs(const lobcq_matrix& x, int64_t row, int rotation, Sink sink) {
    Slab slab;
    for (int64_t column = 0; column < x.columns; column += kSlab) {
        const int64_t n = slab.load(x, row, column, rotation);
        sink(slab, column, n);
    }
}

// The scales of a slab in a row of an activation.
inline void store_scales(const uint8_t* scales, const ActivationView& a, int64_t row, int64_t column, int64_t columns) {
    const int64_t first = column / a.array_size;
    for (int64_t g = 0; g < ceil_div(columns, a.array_size); ++g) a.scales_at(row)[first + g] = e4m3_value(scales[g]);
}

inline void clear_padding(const ActivationView& a, int64_t row) {
    std::memset(a.entries_at(row) + a.columns, 0, static_cast<size_t>(a.stride - a.columns));
    for (int64_t g = ceil_div(a.columns, a.array_size); g < a.arrays; ++g) a.scales_at(row)[g] = 0.0f;
}

}  // namespace lobcq
