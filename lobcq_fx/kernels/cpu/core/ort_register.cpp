// RegisterCustomOps: the ops' signatures as the structures that ONNX Runtime reads.
#include <map>
#include <mutex>

#include "ort_ops.h"

namespace lobcq::ort {
namespace {

struct Op : CustomOp {
    Signature signature;
    ElementType x_type;

    Op(Signature signature_, ElementType x_type_);

    ElementType type(const Port& port) const { return port.type == kSame ? x_type : port.type; }
};

struct Created {
    const Api& api;
    std::unique_ptr<Kernel> kernel;
};

const Op& as_op(const CustomOp* op) { return *static_cast<const Op*>(op); }

Status* create_kernel(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel) {
    return guarded(*api, [&] {
        const Signature& signature = as_op(op).signature;
        *kernel = new Created{*api, signature.create(signature, *api, info)};
    });
}

Status* compute(void* kernel, KernelContext* context) {
    const auto& created = *static_cast<Created*>(kernel);
    return guarded(created.api, [&] { created.kernel->compute(context); });
}

Op::Op(Signature signature_, ElementType x_type_) : CustomOp{}, signature(std::move(signature_)), x_type(x_type_) {
    GetName = [](const CustomOp* op) { return as_op(op).signature.name; };
    GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
    GetInputType = [](const CustomOp* op, size_t i) { return as_op(op).type(as_op(op).signature.inputs[i]); };
    GetInputTypeCount = [](const CustomOp* op) { return as_op(op).signature.inputs.size(); };
    GetOutputType = [](const CustomOp* op, size_t i) { return as_op(op).type(as_op(op).signature.outputs[i]); };
    GetOutputTypeCount = [](const CustomOp* op) { return as_op(op).signature.outputs.size(); };
    KernelDestroy = [](void* kernel) { delete static_cast<Created*>(kernel); };
    GetInputCharacteristic = [](const CustomOp* op, size_t i) { return as_op(op).signature.inputs[i].characteristic; };
    GetOutputCharacteristic = [](const CustomOp*, size_t) { return kRequired; };
    GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
    CreateKernelV2 = create_kernel;
    KernelComputeV2 = compute;
    GetStartVersion = [](const CustomOp*) { return 1; };
}

std::vector<Op> make_ops() {
    std::vector<Op> ops;
    for (const Signature& signature : signatures()) {
        ops.emplace_back(signature, kFloat);
        if (signature.inputs[0].type != kSame) continue;
        ops.emplace_back(signature, kBfloat16);
        ops.emplace_back(signature, kFloat16);
    }
    return ops;
}

void check(const Api& api, Status* status) {
    if (!status) return;
    const std::string message = std::string("lobcq: ") + api.GetErrorMessage(status);
    api.ReleaseStatus(status);
    throw std::runtime_error(message);
}

// The ops' domain. A process may hold several copies of ONNX Runtime, each of which makes its own. It is never freed:
// options and sessions refer to it.
Domain* domain_of(const Api& api) {
    static std::mutex& mutex = *new std::mutex;
    static auto& domains = *new std::map<const Api*, Domain*>;
    static const auto& ops = *new std::vector<Op>(make_ops());
    const std::lock_guard lock(mutex);
    Domain*& domain = domains[&api];
    if (domain) return domain;
    Domain* made = nullptr;
    check(api, api.CreateCustomOpDomain("lobcq", &made));
    for (const Op& op : ops) check(api, api.CustomOpDomain_Add(made, &op));
    return domain = made;
}

}  // namespace
}  // namespace lobcq::ort

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    using namespace lobcq::ort;
    const auto& runtime = *reinterpret_cast<const ApiBase*>(base);
    if (const Api* api = runtime.GetApi(kApiVersion))
        return guarded(*api, [&] {
            if (const int32_t status = lobcq_check_isa())
                throw std::invalid_argument(std::string("lobcq: ") + lobcq_status_text(status));
            check(*api, api->AddCustomOpDomain(options, domain_of(*api)));
        });
    const std::string message = std::string("lobcq: this is ONNX Runtime ") + runtime.GetVersionString() +
                                ", the op library needs 1." + std::to_string(kApiVersion) + " or later";
    return runtime.GetApi(1)->CreateStatus(kFail, message.c_str());  // a function that every version has
}
