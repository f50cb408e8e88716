// Encoding of whole rows: from floats to packed bytes or to an activation.
#pragma once

#include "layout.h"

namespace lobcq {

// Tensor scale of a largest magnitude, where entries reach entry_max: NaN where it is not finite, 1 where it is 0.
float tensor_scale_of(uint32_t absmax_bits, int entry_max);

// Tensor scale of a row, by a rule of enum lobcq_scale_rule; `rotation` as for Slab::load.
float row_scale(const lobcq_matrix& x, int32_t rule, const float* given, int64_t row, int rotation, int entry_max);

// max|x| over rows [begin, end), as bits; infinity's or more where x is not finite.
uint32_t absmax_of_rows(const lobcq_matrix& x, int64_t begin, int64_t end);

// Rows [begin, end) of an operand into packed bytes; `search`: each array under the cheapest of some scales.
void encode_packed(const Tables& t, const lobcq_matrix& x, int32_t scale_rule, bool search, const lobcq_packed& out,
                   int64_t begin, int64_t end);

// Rows [begin, end) into an activation: encoded, from packed bytes, split into digits, or of another activation.
void encode_activation(const Tables& t, const lobcq_matrix& x, int32_t scale_rule, const float* tensor_scale,
                       bool rotated, const ActivationView& a, int64_t begin, int64_t end);
void load_activation(const Tables& t, const lobcq_packed& packed, const ActivationView& a, int64_t begin, int64_t end);
void gather_activation(const ActivationView& from, const int64_t* rows, const ActivationView& to, int64_t begin,
                       int64_t end);
void split_activation(const lobcq_matrix& x, const ActivationView& a, int64_t begin, int64_t end);

// Tokens [begin, end) of all sequences, counted through, into rows of a cache.
void encode_states(const Tables& t, const lobcq_new_states& states, int64_t begin, int64_t end);

// The same in int8.
void encode_int8(const lobcq_matrix& x, int32_t scale_rule, const lobcq_int8& out, int64_t begin, int64_t end);
void encode_int8_activation(const lobcq_matrix& x, int32_t scale_rule, const float* tensor_scale,
                            bool rotated, const ActivationView& a, int64_t begin, int64_t end);
void load_int8_activation(const lobcq_int8& operand, const ActivationView& a, int64_t begin, int64_t end);

// Rows [begin, end) with each block array rotated, in fp32.
void rotate_rows(const lobcq_matrix& x, int array_size, const lobcq_matrix& out, int64_t begin, int64_t end);

}  // namespace lobcq
