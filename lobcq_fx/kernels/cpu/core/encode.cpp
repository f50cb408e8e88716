#include "encode.h"

#include <cmath>

#include "packed_row.h"
#include "slab.h"

namespace lobcq {
namespace {

// The block arrays of a slab, and a divisor for each 16 of their scalars.
struct Arrays {
    int64_t number;
    int size;
    alignas(64) float spread[kSlabArrays];

    int64_t groups() const { return number * size / kGroup; }
};

// Codes and selectors under the scales that the slab has.
void assign(const Tables& t, Slab& slab, Arrays& arrays) {
    bool wide = false;
    for (int64_t g = 0; g < arrays.number; ++g) {
        if (slab.scales[g] == kScaleNaN) slab.clear(g, arrays.size);
        else wide |= !(as_float(slab.absmax[g]) <= kNarrow * slab.divisors[g]);
        const int parts = arrays.size / 16;
        for (int i = 0; i < parts; ++i) arrays.spread[g * parts + i] = slab.divisors[g];
    }
    (wide ? kPortable : isa()).encode(t, slab.x, arrays.spread, arrays.groups(), slab.codes, slab.selectors);
}

// Of each array, in squares of the tensor scale's sixteenth: 31 bits times 8, so that doubles are exact.
void costs(const Tables& t, Slab& slab, const Arrays& arrays, double* costs) {
    int32_t errors[kSlabArrays];
    isa().entries(t, slab.codes, slab.selectors, arrays.groups(), slab.entries);
    isa().errors(slab.x, arrays.spread, slab.entries, arrays.number, arrays.size, errors);
    for (int64_t g = 0; g < arrays.number; ++g) {
        const auto scale = static_cast<double>(e4m3_value(slab.scales[g]));
        costs[g] = static_cast<double>(errors[g]) * (scale * scale);
    }
}

void copy_array(const Slab& from, Slab& to, int64_t array, int array_size) {
    const int64_t first = array * array_size;
    to.scales[array] = from.scales[array];
    std::memcpy(to.codes + first, from.codes + first, static_cast<size_t>(array_size));
    std::memcpy(to.selectors + first / kBlock, from.selectors + first / kBlock,
                static_cast<size_t>(array_size / kBlock));
}

// Gives each array the cheapest of its scale and that one's neighbours. Finite values only.
void search_scales(const Tables& t, Slab& slab, Arrays& arrays, float tensor_scale) {
    double least[kSlabArrays], cost[kSlabArrays];
    costs(t, slab, arrays, least);
    uint8_t first[kSlabArrays];
    std::memcpy(first, slab.scales, sizeof first);
    Slab tried = slab;
    for (const int step : kScaleSteps) {
        for (int64_t g = 0; g < arrays.number; ++g) {
            tried.scales[g] = neighbour(first[g], step);
            const float divisor = e4m3_value(tried.scales[g]) * tensor_scale;
            tried.divisors[g] = divisor > 0.0f ? divisor : HUGE_VALF;
        }
        assign(t, tried, arrays);
        costs(t, tried, arrays, cost);
        for (int64_t g = 0; g < arrays.number; ++g)
            if (cost[g] < least[g]) least[g] = cost[g], copy_array(tried, slab, g, arrays.size);
    }
}

// Every array under its absmax scale; `search`: or under the neighbour of it that costs least.
void encode(const Tables& t, Slab& slab, int64_t columns, int array_size, float tensor_scale, bool search) {
    Arrays arrays{ceil_div(columns, kGroup) * (kGroup / array_size), array_size, {}};
    isa().absmax(slab.x, arrays.number, array_size, slab.absmax);
    isa().array_scales(slab.absmax, arrays.number, tensor_scale, slab.scales, slab.divisors);
    assign(t, slab, arrays);
    if (search) search_scales(t, slab, arrays, tensor_scale);
}

uint32_t absmax_of_row(const lobcq_matrix& m, int64_t row, int rotation = 0) {
    Slab slab;
    uint32_t most = 0;
    for (int64_t column = 0; column < m.columns; column += kSlab) {
        const int64_t n = slab.load(m, row, column, rotation), arrays = ceil_div(n, kGroup);
        isa().absmax(slab.x, arrays, kGroup, slab.absmax);
        for (int64_t i = 0; i < arrays; ++i) most = slab.absmax[i] > most ? slab.absmax[i] : most;
    }
    return most;
}

// Codes and scales of a slab into an activation's row; positions from `columns` on hold zeros already.
void store_entries(const Tables& t, Slab& slab, const ActivationView& a, int64_t row, int64_t column,
                   int64_t columns) {
    isa().entries(t, slab.codes, slab.selectors, ceil_div(columns, kGroup), slab.entries);
    std::memcpy(a.entries_at(row) + column, slab.entries, static_cast<size_t>(columns));
    store_scales(slab.scales, a, row, column, columns);
}

}  // namespace

float tensor_scale_of(uint32_t absmax_bits, int entry_max) {
    if (absmax_bits == 0) return 1.0f;
    return absmax_bits < kInfBits ? as_float(absmax_bits) / (static_cast<float>(entry_max) * kScaleMax) : NAN;
}

float row_scale(const lobcq_matrix& x, int32_t rule, const float* given, int64_t row, int rotation, int entry_max) {
    if (rule == LOBCQ_SHARED_SCALE) return given[0];
    const uint32_t absmax = absmax_of_row(x, row, rotation);
    if (rule == LOBCQ_ABSMAX_SCALES || absmax >= kInfBits) return tensor_scale_of(absmax, entry_max);
    return given[row];
}

uint32_t absmax_of_rows(const lobcq_matrix& x, int64_t begin, int64_t end) {
    uint32_t most = 0;
    for (int64_t row = begin; row < end; ++row) {
        const uint32_t bits = absmax_of_row(x, row);
        most = bits > most ? bits : most;
    }
    return most;
}

void encode_packed(const Tables& t, const lobcq_matrix& x, int32_t scale_rule, bool search, const lobcq_packed& out,
                   int64_t begin, int64_t end) {
    const PackedRow bytes(x.columns, t.num_codebooks, out.array_size);
    const int bits = selector_bits(t.num_codebooks);
    for (int64_t row = begin; row < end; ++row) {
        const float scale = row_scale(x, scale_rule, out.tensor_scale, row, 0, kEntryMax);
        if (scale_rule != LOBCQ_SHARED_SCALE) out.tensor_scale[row] = scale;
        for_slabs(x, row, 0, [&](Slab& slab, int64_t column, int64_t columns) {
            encode(t, slab, columns, out.array_size, scale, search);
            const int64_t padded = round_up(columns, out.array_size);
            pack_codes(slab.codes, padded, out.codes + row * bytes.codes + column / 2);
            pack_selectors(slab.selectors, padded / kBlock, bits,
                           out.selectors + row * bytes.selectors + column / kBlock * bits / 8);
            std::memcpy(out.scales + row * bytes.scales + column / out.array_size, slab.scales,
                        static_cast<size_t>(padded / out.array_size));
        });
    }
}

namespace {

// One token's keys or values as one row, in which each head is filled up to whole block arrays: slabs of it hold whole
// heads, or a part of a wide one.
class TokenRow {
  public:
    TokenRow(const Tables& t, const lobcq_new_states& states)
        : tables_(t), s_(states), padded_(round_up(s_.width, s_.array_size)),
          bytes_(s_.width, t.num_codebooks, s_.array_size), bits_(selector_bits(t.num_codebooks)),
          heads_(padded_ > 0 && padded_ < kSlab ? kSlab / padded_ : 1) {}

    void encode(int64_t token) {
        uint8_t* row = s_.rows + token * s_.row_bytes;
        uint32_t most = 0;
        for_parts([&](int64_t head, int64_t heads, int64_t column, int64_t columns) {
            load(token, head, heads, column, columns);
            const int64_t groups = ceil_div(heads * columns, kGroup);
            isa().absmax(slab_.x, groups, kGroup, slab_.absmax);
            for (int64_t i = 0; i < groups; ++i) most = slab_.absmax[i] > most ? slab_.absmax[i] : most;
        });
        const float scale = tensor_scale_of(most, kEntryMax);
        std::memcpy(row, &scale, sizeof scale);
        const bool single = s_.heads <= heads_ && padded_ <= kSlab;  // which is still there
        for_parts([&](int64_t head, int64_t heads, int64_t column, int64_t columns) {
            if (!single) load(token, head, heads, column, columns);
            lobcq::encode(tables_, slab_, heads * columns, s_.array_size, scale, false);
            for (int64_t i = 0; i < heads; ++i) store(row, head + i, i * columns, column, columns);
        });
    }

  private:
    template <class Part>
    void for_parts(Part part) const {
        for (int64_t head = 0; head < s_.heads; head += heads_) {
            const int64_t left = s_.heads - head;
            for (int64_t column = 0; column < padded_; column += kSlab)
                part(head, left < heads_ ? left : heads_, column, padded_ - column < kSlab ? padded_ - column : kSlab);
        }
    }

    void load(int64_t token, int64_t head, int64_t heads, int64_t column, int64_t columns) {
        const int64_t* strides = s_.strides;
        const int64_t first = token / s_.tokens * strides[0] + token % s_.tokens * strides[2] + column;
        const int64_t filled = s_.width - column < columns ? s_.width - column : columns;
        for (int64_t i = 0; i < heads; ++i) {
            const int64_t place = (first + (head + i) * strides[1]) * scalar_bytes(s_.dtype);
            isa().load(static_cast<const uint8_t*>(s_.x) + place, s_.dtype, filled, slab_.x + i * columns);
            for (int64_t d = filled; d < columns; ++d) slab_.x[i * columns + d] = 0.0f;
        }
        for (int64_t i = heads * columns; i < round_up(heads * columns, kGroup); ++i) slab_.x[i] = 0.0f;
    }

    void store(uint8_t* row, int64_t head, int64_t from, int64_t column, int64_t columns) const {
        uint8_t* to = row + sizeof(float) + head * (bytes_.codes + bytes_.selectors + bytes_.scales);
        pack_codes(slab_.codes + from, columns, to + column / 2);
        pack_selectors(slab_.selectors + from / kBlock, columns / kBlock, bits_,
                       to + bytes_.codes + column / kBlock * bits_ / 8);
        std::memcpy(to + bytes_.codes + bytes_.selectors + column / s_.array_size, slab_.scales + from / s_.array_size,
                    static_cast<size_t>(columns / s_.array_size));
    }

    const Tables& tables_;
    const lobcq_new_states& s_;
    const int64_t padded_;
    const PackedRow bytes_;
    const int bits_;
    const int64_t heads_;  // in one slab
    Slab slab_;
};

}  // namespace

void encode_states(const Tables& t, const lobcq_new_states& states, int64_t begin, int64_t end) {
    TokenRow row(t, states);
    for (int64_t token = begin; token < end; ++token) row.encode(token);
}

void encode_activation(const Tables& t, const lobcq_matrix& x, int32_t scale_rule, const float* tensor_scale,
                       bool rotated, const ActivationView& a, int64_t begin, int64_t end) {
    const int rotation = rotated ? a.array_size : 0;
    for (int64_t row = begin; row < end; ++row) {
        clear_padding(a, row);
        a.row_scales[row] = row_scale(x, scale_rule, tensor_scale, row, rotation, kEntryMax);
        for_slabs(x, row, rotation, [&](Slab& slab, int64_t column, int64_t columns) {
            encode(t, slab, columns, a.array_size, a.row_scales[row], false);
            store_entries(t, slab, a, row, column, columns);
        });
        isa().correct(a.entries_at(row), a.arrays, a.array_size, a.corrections_at(row));
    }
}

void load_activation(const Tables& t, const lobcq_packed& packed, const ActivationView& a, int64_t begin,
                     int64_t end) {
    const PackedRow bytes(packed.columns, packed.num_codebooks, packed.array_size);
    Slab slab;
    for (int64_t row = begin; row < end; ++row) {
        clear_padding(a, row);
        a.row_scales[row] = tensor_scale_at(packed, row);
        for (int64_t column = 0; column < packed.columns; column += kSlab) {
            const int64_t n = slab.load_packed(packed, bytes, row, column);
            store_entries(t, slab, a, row, column, n);
        }
        isa().correct(a.entries_at(row), a.arrays, a.array_size, a.corrections_at(row));
    }
}

void gather_activation(const ActivationView& from, const int64_t* rows, const ActivationView& to, int64_t begin,
                       int64_t end) {
    const int64_t planes = to.planes, numbers = planes * to.arrays;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t own = i * planes, other = rows[i] * planes;
        std::memcpy(to.entries_at(own), from.entries_at(other), static_cast<size_t>(planes * to.stride));
        std::memcpy(to.scales_at(own), from.scales_at(other), static_cast<size_t>(numbers) * sizeof(float));
        std::memcpy(to.corrections_at(own), from.corrections_at(other),
                    static_cast<size_t>(numbers * to.parts) * sizeof(int32_t));
        to.row_scales[i] = from.row_scales[rows[i]];
    }
}

void split_activation(const lobcq_matrix& x, const ActivationView& a, int64_t begin, int64_t end) {
    Slab slab;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first_plane = row * a.planes;
        for (int p = 0; p < a.planes; ++p) clear_padding(a, first_plane + p);
        const uint32_t absmax = absmax_of_row(x, row);
        // A power of two near the row's largest magnitude, so that no scale over- or underflows.
        const uint32_t exponent = absmax >> 23;
        const float scale = as_float((exponent < 1 ? 1 : exponent > 252 ? 252 : exponent) << 23);
        const bool finite = absmax < kInfBits;
        a.row_scales[row] = finite ? scale : NAN;
        for (int64_t column = 0; column < x.columns; column += kSlab) {
            const int64_t n = slab.load(x, row, column), arrays = ceil_div(n, a.array_size);
            if (!finite) std::memset(slab.x, 0, sizeof slab.x);
            isa().absmax(slab.x, arrays, a.array_size, slab.absmax);
            isa().split(slab.x, slab.absmax, arrays, a.array_size, scale, a.entries_at(first_plane) + column, a.stride,
                        a.scales_at(first_plane) + column / a.array_size, a.arrays);
        }
        for (int p = 0; p < a.planes; ++p)
            isa().correct(a.entries_at(first_plane + p), a.arrays, a.array_size, a.corrections_at(first_plane + p));
    }
}

void rotate_rows(const lobcq_matrix& x, int array_size, const lobcq_matrix& out, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
        for_slabs(x, row, array_size, [&](Slab& slab, int64_t column, int64_t columns) {
            float* to = static_cast<float*>(out.data) + row * out.row_stride + column;
            std::memcpy(to, slab.x, static_cast<size_t>(columns) * sizeof(float));
        });
}

}  // namespace lobcq
