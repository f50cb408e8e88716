#include <algorithm>

#include "slab.h"

namespace lobcq {
namespace {

void encode(Slab& slab, int64_t columns, int array_size, float tensor_scale) {
    const int64_t arrays = ceil_div(columns, array_size);
    isa().absmax(slab.x, arrays, array_size, slab.absmax);
    isa().int8_scales(slab.absmax, arrays, tensor_scale, slab.scales, slab.divisors);
    for (int64_t g = 0; g < arrays; ++g)
        if (slab.scales[g] == kScaleNaN) slab.clear(g, array_size);
    isa().int8_entries(slab.x, slab.divisors, arrays, array_size, slab.entries);
}

// Sums of entries, once a row is complete.
void correct(const ActivationView& a, int64_t row) {
    isa().correct_wide(a.entries_at(row), a.arrays, a.array_size, a.corrections_at(row));
}

}  // namespace

void encode_int8(const lobcq_matrix& x, int32_t scale_rule, const lobcq_int8& out, int64_t begin, int64_t end) {
    const int64_t padded = round_up(x.columns, out.array_size), arrays = padded / out.array_size;
    for (int64_t row = begin; row < end; ++row) {
        const float scale = row_scale(x, scale_rule, out.tensor_scale, row, 0, kInt8Max);
        if (scale_rule != LOBCQ_SHARED_SCALE) out.tensor_scale[row] = scale;
        for_slabs(x, row, 0, [&](Slab& slab, int64_t column, int64_t columns) {
            encode(slab, columns, out.array_size, scale);
            const int64_t n = round_up(columns, out.array_size);
            std::memcpy(out.entries + row * padded + column, slab.entries, static_cast<size_t>(n));
            std::memcpy(out.scales + row * arrays + column / out.array_size, slab.scales,
                        static_cast<size_t>(n / out.array_size));
        });
    }
}

void encode_int8_activation(const lobcq_matrix& x, int32_t scale_rule, const float* tensor_scale,
                            bool rotated, const ActivationView& a, int64_t begin, int64_t end) {
    const int rotation = rotated ? a.array_size : 0;
    for (int64_t row = begin; row < end; ++row) {
        clear_padding(a, row);
        a.row_scales[row] = row_scale(x, scale_rule, tensor_scale, row, rotation, kInt8Max);
        for_slabs(x, row, rotation, [&](Slab& slab, int64_t column, int64_t columns) {
            encode(slab, columns, a.array_size, a.row_scales[row]);
            std::memcpy(a.entries_at(row) + column, slab.entries, static_cast<size_t>(columns));
            store_scales(slab.scales, a, row, column, columns);
        });
        correct(a, row);
    }
}

void load_int8_activation(const lobcq_int8& operand, const ActivationView& a, int64_t begin, int64_t end) {
    const int64_t padded = round_up(operand.columns, operand.array_size), arrays = padded / operand.array_size;
    for (int64_t row = begin; row < end; ++row) {
        clear_padding(a, row);
        a.row_scales[row] = operand.tensor_scale[operand.num_tensor_scales == 1 ? 0 : row];
        const int8_t* from = operand.entries + row * padded;
        int8_t* to = a.entries_at(row);
        for (int64_t i = 0; i < operand.columns; ++i) to[i] = std::max(from[i], static_cast<int8_t>(-kInt8Max));
        store_scales(operand.scales + row * arrays, a, row, 0, operand.columns);
        correct(a, row);
    }
}

}  // namespace lobcq
