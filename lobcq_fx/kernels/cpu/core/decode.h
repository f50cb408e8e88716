// Packed bytes back to floats, row by row.
#pragma once

#include "layout.h"

namespace lobcq {

// Rows [begin, end) of packed bytes to floats.
void decode_packed(const Tables& t, const lobcq_packed& packed, const lobcq_matrix& out, int64_t begin, int64_t end);

// Rows [begin, end) of lobcq_squares.
void add_up_squares(const Tables& t, const lobcq_matrix& x, const lobcq_packed& packed, double* squares, int64_t begin,
                    int64_t end);

}  // namespace lobcq
