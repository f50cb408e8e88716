// What the binding uses of ONNX Runtime's C interface (onnxruntime_c_api.h), declared here by position, which releases
// never change: the core needs none of its headers and links no ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lobcq_ort.h"

namespace lobcq::ort {

constexpr uint32_t kApiVersion = 17;  // the first with a parallel loop for custom ops

using Status = ::OrtStatus;  // null: success
using SessionOptions = ::OrtSessionOptions;
struct Domain;
struct Value;
struct TypeAndShape;
struct KernelInfo;     // a node, while its kernel is created
struct KernelContext;  // a call of a kernel
struct CustomOp;

enum ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int32_t { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16, kFloat8E4M3FN = 17 };
enum Characteristic : int32_t { kRequired = 0, kOptional = 1 };

// Numbers are positions in OrtApi; what lies between is not used.
struct Api {
    Status* (*CreateStatus)(ErrorCode code, const char* message);  // 0
    const void* slot_1;
    const char* (*GetErrorMessage)(const Status* status);  // 2
    const void* slots_3_25[23];
    Status* (*CreateCustomOpDomain)(const char* name, Domain** domain);       // 26
    Status* (*CustomOpDomain_Add)(Domain* domain, const CustomOp* op);        // 27
    Status* (*AddCustomOpDomain)(SessionOptions* options, Domain* domain);    // 28
    const void* slots_29_50[22];
    Status* (*GetTensorMutableData)(Value* value, void** data);  // 51
    const void* slots_52_59[8];
    Status* (*GetTensorElementType)(const TypeAndShape* info, ElementType* type);             // 60
    Status* (*GetDimensionsCount)(const TypeAndShape* info, size_t* count);                   // 61
    Status* (*GetDimensions)(const TypeAndShape* info, int64_t* dimensions, size_t count);    // 62
    const void* slots_63_64[2];
    Status* (*GetTensorTypeAndShape)(const Value* value, TypeAndShape** info);  // 65
    const void* slots_66_85[20];
    Status* (*KernelInfoGetAttribute_int64)(const KernelInfo* info, const char* name, int64_t* out);  // 86
    const void* slot_87;
    Status* (*KernelContext_GetInputCount)(const KernelContext* context, size_t* count);  // 88
    const void* slot_89;
    Status* (*KernelContext_GetInput)(const KernelContext* context, size_t index, const Value** value);  // 90
    Status* (*KernelContext_GetOutput)(KernelContext* context, size_t index, const int64_t* dimensions, size_t count,
                                       Value** value);  // 91
    const void* slot_92;
    void (*ReleaseStatus)(Status* status);  // 93
    const void* slots_94_98[5];
    void (*ReleaseTensorTypeAndShapeInfo)(TypeAndShape* info);  // 99
    const void* slots_100_229[130];
    Status* (*KernelInfo_GetInputCount)(const KernelInfo* info, size_t* count);  // 230
    const void* slots_231_243[13];
    Status* (*KernelInfo_GetNodeName)(const KernelInfo* info, char* name, size_t* size);  // 244
    const void* slots_245_248[4];
    Status* (*KernelInfoGetConstantInput_tensor)(const KernelInfo* info, size_t index, int32_t* is_constant,
                                                 const Value** value);  // 249
    const void* slots_250_273[24];
    Status* (*KernelContext_ParallelFor)(const KernelContext* context, void (*body)(void* data, size_t index),
                                         size_t total, size_t batches, void* data);  // 274
};

#define LOBCQ_SLOT(name, position) static_assert(offsetof(Api, name) == (position) * sizeof(void*))
LOBCQ_SLOT(GetErrorMessage, 2);
LOBCQ_SLOT(CreateCustomOpDomain, 26);
LOBCQ_SLOT(AddCustomOpDomain, 28);
LOBCQ_SLOT(GetTensorMutableData, 51);
LOBCQ_SLOT(GetTensorElementType, 60);
LOBCQ_SLOT(GetTensorTypeAndShape, 65);
LOBCQ_SLOT(KernelInfoGetAttribute_int64, 86);
LOBCQ_SLOT(KernelContext_GetInputCount, 88);
LOBCQ_SLOT(KernelContext_GetOutput, 91);
LOBCQ_SLOT(ReleaseStatus, 93);
LOBCQ_SLOT(ReleaseTensorTypeAndShapeInfo, 99);
LOBCQ_SLOT(KernelInfo_GetInputCount, 230);
LOBCQ_SLOT(KernelInfo_GetNodeName, 244);
LOBCQ_SLOT(KernelInfoGetConstantInput_tensor, 249);
LOBCQ_SLOT(KernelContext_ParallelFor, 274);
#undef LOBCQ_SLOT

struct ApiBase {
    const Api* (*GetApi)(uint32_t version);  // null where this ONNX Runtime is older
    const char* (*GetVersionString)();
};

// One op for one set of types. Ops of the same name are variants of each other. ONNX Runtime never looks at members
// that are newer than `version`.
struct CustomOp {
    uint32_t version = kApiVersion;
    const void* unused_create_kernel = nullptr;  // replaced by CreateKernelV2, which can fail
    const char* (*GetName)(const CustomOp* op);
    const char* (*GetExecutionProviderType)(const CustomOp* op);
    ElementType (*GetInputType)(const CustomOp* op, size_t index);
    size_t (*GetInputTypeCount)(const CustomOp* op);
    ElementType (*GetOutputType)(const CustomOp* op, size_t index);
    size_t (*GetOutputTypeCount)(const CustomOp* op);
    const void* unused_kernel_compute = nullptr;  // replaced by KernelComputeV2, which can fail
    void (*KernelDestroy)(void* kernel);
    Characteristic (*GetInputCharacteristic)(const CustomOp* op, size_t index);
    Characteristic (*GetOutputCharacteristic)(const CustomOp* op, size_t index);
    int32_t (*GetInputMemoryType)(const CustomOp* op, size_t index);
    const void* unused_variadic[4] = {};  // asked for only where an input or output is variadic
    Status* (*CreateKernelV2)(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel);
    Status* (*KernelComputeV2)(void* kernel, KernelContext* context);
    const void* unused_infer_shapes = nullptr;
    int32_t (*GetStartVersion)(const CustomOp* op);
    const void* unused_end_version = nullptr;
};

}  // namespace lobcq::ort
