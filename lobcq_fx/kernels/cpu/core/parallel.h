// Loops over the caller's threads.
#pragma once

#include "fp_mode.h"
#include "layout.h"

namespace lobcq {

// Runs body(begin, end) over [0, n).
template <class Body>
int32_t run(int64_t n, int64_t grain, lobcq_parallel_for parallel, const Body& body) {
    const auto task = [](int64_t begin, int64_t end, void* context) {
        const IeeeMode mode;
        (*static_cast<const Body*>(context))(begin, end);
    };
    void* context = const_cast<Body*>(&body);
    if (parallel && n > grain) return parallel(0, n, grain, task, context) == 0 ? LOBCQ_OK : LOBCQ_PARALLEL_FAILED;
    if (n > 0) task(0, n, context);
    return LOBCQ_OK;
}

// Rows of this many columns that are worth a thread.
inline int64_t row_grain(int64_t columns) { return ceil_div(1 << 14, columns + 1); }

}  // namespace lobcq
