// The products of one activation and several weights, cut into tasks.
#pragma once

#include "isa.h"

namespace lobcq {

// One product. Tasks are independent and cover the output; each element is computed by one task, in an order that
// depends on nothing but K.
struct Linear {
    const Tables& tables;
    WeightView w;
    ActivationView a;
    float weight_scale;
    const float* bias;  // may be null
    lobcq_matrix out;

    Linear(const lobcq_product& p, const ActivationView& activation)
        : tables(*static_cast<const Tables*>(p.tables)), w(*p.weight), a(activation), weight_scale(p.weight_scale),
          bias(p.bias), out(*p.out) {}

    int64_t tasks() const;
    void run(int64_t begin, int64_t end) const;

  private:
    int64_t rows() const { return a.rows * a.planes; }
    bool fused() const { return a.planes <= isa().fused_rows && rows() <= isa().fused_limit; }
    int64_t row_blocks() const;
    int64_t rows_per_block() const;
    void run_panel(int64_t panel) const;
    void run_tile(int64_t first_panel, int64_t first_row, int64_t rows) const;
    void finish(const float* sums, int64_t width, int64_t first_row, int64_t rows, int64_t first_column) const;
};

// Products of one activation: their tasks in a row, so that all threads share all of them.
struct LinearGroup {
    const lobcq_product* products;
    int64_t count;
    ActivationView a;

    int64_t tasks() const;
    int64_t grain() const;  // how many tasks are worth a thread
    void run(int64_t begin, int64_t end) const;
};

}  // namespace lobcq
