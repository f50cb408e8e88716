// The product of an activation and a weight, cut into tasks.
#pragma once

#include "isa.h"

namespace lobcq {

struct Linear {
    const Tables& tables;
    WeightView w;
    ActivationView a;
    float weight_scale;
    const float* bias;  // may be null
    lobcq_matrix out;

    // Tasks are independent and cover the output; each element is computed by one task, in an order that depends on
    // nothing but K. `grain` is how many of them are worth a thread.
    int64_t tasks() const;
    int64_t grain() const;
    void run(int64_t begin, int64_t end) const;

  private:
    int64_t rows() const { return a.rows * a.planes; }
    bool fused() const { return rows() <= isa().fused_rows; }
    int64_t row_blocks() const;
    int64_t rows_per_block() const;
    void run_panel(int64_t panel) const;
    void run_tile(int64_t first_panel, int64_t first_row, int64_t rows) const;
    void finish(const float* sums, int64_t width, int64_t first_row, int64_t rows, int64_t first_column) const;
};

}  // namespace lobcq
