// The kernels of grouped linears: groups of rows, each times a matrix of its own.
#pragma once

#include "ort_ops.h"

namespace lobcq::ort {

std::unique_ptr<Kernel> create_grouped_linear(const Signature& op, const Api& api, const KernelInfo* info);
std::unique_ptr<Kernel> create_grouped_linear_int8_activation(const Signature& op, const Api& api,
                                                              const KernelInfo* info);
std::unique_ptr<Kernel> create_grouped_linear_float_activation(const Signature& op, const Api& api,
                                                               const KernelInfo* info);

}  // namespace lobcq::ort
