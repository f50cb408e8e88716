/* The core's ops for PyTorch: bound to a running libtorch without linking it. */
#ifndef LOBCQ_TORCH_H
#define LOBCQ_TORCH_H

#include "lobcq.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Registers lobcq::linear_prepacked, lobcq::grouped_linear_prepacked and their overloads .float_activation for CPU
 * tensors, through libtorch's stable C interface (torch 2.10 and later). libtorch: handle of libtorch_cpu from dlopen. Once a process, after the
 * ops' schemas were defined. LOBCQ_INVALID_ARGUMENT: this libtorch lacks a function, or refused. */
LOBCQ_API int32_t lobcq_register_torch_ops(void* libtorch);

#ifdef __cplusplus
}
#endif
#endif
