#include "groups.h"

#include <algorithm>
#include <cstring>

namespace lobcq {

std::vector<int64_t> group_ends(const int32_t* given, int64_t groups, int64_t rows) {
    std::vector<int64_t> ends(static_cast<size_t>(groups));
    int64_t before = 0;
    for (int64_t i = 0; i < groups; ++i) {
        int32_t wanted = 0;
        if (given) std::memcpy(&wanted, given + i, sizeof wanted);  // which may lie anywhere
        const int64_t end = given ? int64_t{wanted} : before + rows / groups;
        before = ends[static_cast<size_t>(i)] = std::min(std::max(end, before), rows);
    }
    return ends;
}

RowRange range_of(const int64_t* wanted, int64_t count) {
    if (count == 0) return {0, -1};
    const auto [least, most] = std::minmax_element(wanted, wanted + count);
    return {*least, *most};
}

uint8_t* GroupProducts::row_at(int64_t row) const {
    return static_cast<uint8_t*>(out_.data) + row * out_.row_stride * (out_.dtype == LOBCQ_FP32 ? 4 : 2);
}

void GroupProducts::add(const lobcq_weight& weight, float scale, int64_t end) {
    const int64_t first = next_row_, rows = end - first;
    next_row_ = end;
    if (rows == 0) return;
    weights_.push_back(weight);
    results_.push_back({row_at(first), rows, out_.columns, out_.row_stride, out_.dtype});
    products_.push_back({tables_, &weights_.back(), scale, nullptr, &results_.back()});
    first_rows_.push_back(first);
}

int32_t GroupProducts::run(const lobcq_activation& activation, lobcq_parallel_for parallel) const {
    const auto left = static_cast<size_t>(row_at(out_.rows) - row_at(next_row_));
    if (left > 0) std::memset(row_at(next_row_), 0, left);  // a result of nothing has no memory
    return lobcq_grouped_linear(products_.data(), first_rows_.data(), static_cast<int64_t>(products_.size()),
                                &activation, parallel);
}

}  // namespace lobcq
