// The float activation of a call, which it encodes itself.
#pragma once

#include "layout.h"
#include "torch_operands.h"

namespace lobcq::torch {

struct FloatActivation {
    Tensor x, tables, static_scale;
    int32_t kind = LOBCQ_FLOAT;  // what x is multiplied as
    int64_t array_size = 0;
    bool rotated = false;

    // Takes x, activation_tables and static_scale off the stack.
    void take(const Value* stack);
    void check_operands() const;

    // x as a matrix, copied where its strides are none of a matrix.
    lobcq_matrix rows();
    // Fills in the activation; its memory lives as long as the result.
    Tensor encoded(const lobcq_matrix& rows, lobcq_activation* activation) const;

    int32_t narrow_array_size() const { return static_cast<int32_t>(array_size); }  // once it is checked
    int64_t activation_bytes(int64_t rows, int64_t columns) const {
        return lobcq_activation_bytes(rows, columns, narrow_array_size(), kind);
    }
};

// Refuses a weight that says of itself that it was packed for something else.
void require_packed_for(const lobcq_weight& weight, int index);

}  // namespace lobcq::torch
