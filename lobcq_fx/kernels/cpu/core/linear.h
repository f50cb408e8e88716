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
    int64_t task_cost() const;  // about that of multiplying so many rows, planes counted, with a panel
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

// Products of rows of their own of one activation. Some have one row and some have hundreds, so that what threads share
// is counted in costs, not in tasks: a thread runs the tasks that start in its range of the whole.
struct GroupedLinears {
    const lobcq_product* products;
    const int64_t* first_rows;
    int64_t count;
    ActivationView a;

    int64_t cost() const;
    int64_t grain() const;  // how much of the cost is worth a thread
    void run(int64_t begin, int64_t end) const;

  private:
    Linear linear(int64_t i) const { return Linear(products[i], a.part(first_rows[i], products[i].out->rows)); }
};

}  // namespace lobcq
