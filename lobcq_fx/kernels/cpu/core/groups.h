// Groups of an activation's rows and the matrices of a stack that they meet, gathered for lobcq_grouped_linear.
#pragma once

#include <deque>
#include <vector>

#include "lobcq.h"

namespace lobcq {

// Where each of `groups` groups of `rows` rows ends, from what a caller says (null: all are of one size): never before
// the one ahead, and never behind the rows, whatever the numbers are.
std::vector<int64_t> group_ends(const int32_t* given, int64_t groups, int64_t rows);

// The least and the largest of some numbers of rows; 0 and -1 of none.
struct RowRange {
    int64_t least, most;

    bool exist(int64_t rows) const { return least >= 0 && most < rows; }
};
RowRange range_of(const int64_t* wanted, int64_t count);

class GroupProducts {
  public:
    // out: [rows, outputs], contiguous, in a dtype of enum lobcq_dtype.
    GroupProducts(const void* tables, const lobcq_matrix& out) : tables_(tables), out_(out) {}

    // The next group's matrix, its scale, and where its rows end.
    void add(const lobcq_weight& weight, float scale, int64_t end);

    // All products, and zeros in the rows of no group.
    int32_t run(const lobcq_activation& activation, lobcq_parallel_for parallel) const;

  private:
    uint8_t* row_at(int64_t row) const;

    const void* tables_;
    lobcq_matrix out_;
    int64_t next_row_ = 0;
    std::deque<lobcq_weight> weights_;  // whose elements stay where they are
    std::deque<lobcq_matrix> results_;
    std::vector<lobcq_product> products_;
    std::vector<int64_t> first_rows_;
};

}  // namespace lobcq
