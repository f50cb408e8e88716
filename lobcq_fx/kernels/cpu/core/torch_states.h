// lobcq::quantize_states and lobcq::attention, of encoded and of float states, for CPU tensors, as torch's dispatcher calls them.
#pragma once

#include "torch_api.h"

namespace lobcq::torch {

void quantize_states(Value* stack, uint64_t, uint64_t);
void attention(Value* stack, uint64_t, uint64_t);
void attention_float_states(Value* stack, uint64_t, uint64_t);

}  // namespace lobcq::torch
