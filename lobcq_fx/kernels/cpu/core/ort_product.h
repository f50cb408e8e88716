// What the kernels of all linears have in common: attributes, and activations in kernel layout.
#pragma once

#include "ort_weight.h"

namespace lobcq::ort {

int32_t array_size_of(const Node& node, const KernelInfo* info);
// L_A of the activation, in which the product is computed; that of the weight, a multiple of it, where it is not given.
int32_t kernel_array_size_of(const Node& node, const KernelInfo* info);
int64_t in_features_of(const Node& node, const KernelInfo* info);
int32_t dtype_of(ElementType type);

// Of a tensor [..., columns].
Shape leading_of(const Node& node, size_t index, const Tensor& tensor);
Shape with(Shape leading, int64_t last);

// An activation [..., K] in kernel layout, for one call.
struct Activation {
    Shape leading;
    Buffer data;
    lobcq_activation view;

    Activation(const Node& node, Shape leading, int64_t columns, int32_t array_size, int32_t kind);
};

// From a node's first inputs: codes, selectors, scales and tensor_scale; entries, scales and tensor_scale; x.
Activation encoded_activation(const Node& node, const Call& call, const Tables& tables, int64_t columns,
                              int32_t array_size);
Activation int8_activation(const Node& node, const Call& call, int64_t columns, int32_t array_size);
Activation float_activation(const Node& node, const Call& call, int32_t array_size);

// Refuses a weight whose rows are not of as many scalars as those of an activation.
void check_columns(const Node& node, const Weight& weight, int64_t columns, int32_t array_size,
                   int32_t weight_array_size);

}  // namespace lobcq::ort
