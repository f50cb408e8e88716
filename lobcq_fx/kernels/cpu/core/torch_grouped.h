// lobcq::grouped_linear_prepacked and lobcq::grouped_linear_prepacked.float_activation for CPU tensors.
#pragma once

#include "torch_api.h"

namespace lobcq::torch {

void grouped_linear_prepacked(Value* stack, uint64_t inputs, uint64_t outputs);
void grouped_linear_prepacked_float_activation(Value* stack, uint64_t inputs, uint64_t outputs);

}  // namespace lobcq::torch
