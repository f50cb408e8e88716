#include "decode.h"

#include "slab.h"

namespace lobcq {
namespace {

// Columns [column, ...) of a packed row as floats. Returns how many there are.
int64_t decode(const Tables& t, const lobcq_packed& packed, const PackedRow& bytes, int64_t row, int64_t column,
               Slab& slab, float* values) {
    const int64_t n = slab.load_packed(packed, bytes, row, column);
    isa().entries(t, slab.codes, slab.selectors, ceil_div(n, kGroup), slab.entries);
    float scales[kSlabArrays];
    for (int64_t part = 0; part < ceil_div(n, 16); ++part)
        scales[part] = e4m3_value(slab.scales[part * 16 / packed.array_size]);
    isa().values(slab.entries, scales, tensor_scale_at(packed, row), round_up(n, 16), values);
    return n;
}

}  // namespace

void decode_packed(const Tables& t, const lobcq_packed& packed, const lobcq_matrix& out, int64_t begin, int64_t end) {
    const PackedRow bytes(packed.columns, packed.num_codebooks, packed.array_size);
    Slab slab;
    for (int64_t row = begin; row < end; ++row)
        for (int64_t column = 0; column < packed.columns; column += kSlab) {
            const int64_t n = decode(t, packed, bytes, row, column, slab, slab.x);
            float* to = static_cast<float*>(out.data) + row * out.row_stride + column;
            std::memcpy(to, slab.x, static_cast<size_t>(n) * sizeof(float));
        }
}

void add_up_squares(const Tables& t, const lobcq_matrix& x, const lobcq_packed& packed, double* squares, int64_t begin,
                    int64_t end) {
    const PackedRow bytes(packed.columns, packed.num_codebooks, packed.array_size);
    alignas(64) float values[kSlab];
    for (int64_t row = begin; row < end; ++row) {
        RowSquares sums{};
        for_slabs(x, row, 0, [&](Slab& slab, int64_t column, int64_t columns) {
            decode(t, packed, bytes, row, column, slab, values);
            const int64_t padded = round_up(columns, 16);
            for (int64_t i = columns; i < padded; ++i) values[i] = 0.0f;  // as x is there
            isa().squares(slab.x, values, padded, &sums);
        });
        double scalars = 0, errors = 0;
        for (int i = 0; i < 16; ++i) scalars += sums.scalars[i], errors += sums.errors[i];
        squares[2 * row] = scalars, squares[2 * row + 1] = errors;
    }
}

}  // namespace lobcq
