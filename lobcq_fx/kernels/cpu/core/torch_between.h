// lobcq::rms_norm and lobcq::rotate_half for CPU tensors: what a decoder computes between its linears, where a step's
// time is that of torch's calls and not of their numbers.
#pragma once

#include "torch_api.h"

namespace lobcq::torch {

void rms_norm(Value* stack, uint64_t, uint64_t);
void rotate_half(Value* stack, uint64_t, uint64_t);

}  // namespace lobcq::torch
