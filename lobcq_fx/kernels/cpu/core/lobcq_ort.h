/* The core as a library of custom ops for ONNX Runtime, 1.17 and later: bound to a running one without linking it.
 *
 * Python: session_options.register_custom_ops_library(path of this library). C: RegisterCustomOpsLibrary_V2.
 *
 * Domain "lobcq", opset 1; docs/format.md has the bytes. T is float, bfloat16 or float16. Kp is K rounded up to a
 * multiple of array_size. "..." are the same leading dimensions, any number of them. Every attribute must be given.
 *
 * QuantizeActivation: attribute array_size.
 *   in   x T [..., K]; codebooks int8 [N_c, 16]; static_scale float [], optional: positive and finite
 *   out  codes uint8 [..., Kp/2]; selectors uint8 [..., ceil(Kp/8 * log2(N_c) / 8)]; scales float8e4m3fn
 *        [..., Kp/array_size]; tensor_scale float [..., 1]
 *   Encodes each row by its largest magnitude, or by static_scale. A row with NaN or infinity gets NaN scales.
 *
 * QuantizeActivationInt8: attribute array_size.
 *   in   x, static_scale: as above
 *   out  entries int8 [..., Kp]; scales float8e4m3fn [..., Kp/array_size]; tensor_scale float [..., 1]
 *
 * Rotate: attribute array_size.
 *   in   x T [..., K], K a multiple of array_size
 *   out  y float [..., K]: each block array rotated
 *
 * Linear: attributes in_features (K), array_size.
 *   in   codes, selectors, scales, tensor_scale: an encoded activation; codebooks int8 [N_a, 16]: the activation's;
 *        w_codes uint8 [N, Kp/2]; w_selectors uint8 [N, ...]; w_scales float8e4m3fn [N, Kp/array_size];
 *        w_tensor_scale float []; w_codebooks int8 [N_c, 16]; bias float [N], optional
 *   out  y float [..., N]: decoded activation @ decoded weight^T + bias
 *
 * LinearInt8Activation: as Linear, of entries, scales, tensor_scale in place of its first five inputs.
 *
 * LinearFloatActivation: attribute array_size.
 *   in   x T [..., K]; w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, bias: as above
 *   out  y T [..., N]: x @ decoded weight^T + bias, accumulated in fp32 and rounded once
 *
 * A weight whose parts are constant initializers is repacked once, when the session is created, any other on every
 * call. ONNX Runtime keeps the initializers. Where they are in a file of external data, which it maps into memory, their
 * pages are given back to the system (on Linux): a weight is then resident once, and twice otherwise. */
#ifndef LOBCQ_ORT_H
#define LOBCQ_ORT_H

#include "lobcq.h"

#ifdef __cplusplus
extern "C" {
#endif

struct OrtStatus;
struct OrtSessionOptions;
struct OrtApiBase;

/* Adds the ops to a session's options. Returns null, or a status whose message says what is wrong. */
LOBCQ_API struct OrtStatus* RegisterCustomOps(struct OrtSessionOptions* options, const struct OrtApiBase* base);

#ifdef __cplusplus
}
#endif
#endif
