#include "ort_node.h"

#include "format.h"

namespace lobcq::ort {
namespace {

// More blocks than threads, so that a slow thread holds up none; not so many that handing them out costs.
constexpr int64_t kMaxBlocks = 256;

thread_local const Call* current = nullptr;  // what parallel_for, which has no argument for it, runs for

std::string name_of(const Api& api, const KernelInfo* info) {
    size_t size = 0;
    if (Status* status = api.KernelInfo_GetNodeName(info, nullptr, &size)) api.ReleaseStatus(status);
    std::string name(size, '\0');  // the terminating zero counted
    if (Status* status = api.KernelInfo_GetNodeName(info, name.data(), &size)) api.ReleaseStatus(status);
    return name.c_str();
}

}  // namespace

std::string to_string(const Shape& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

int64_t elements(const Shape& shape) {
    int64_t count = 1;
    for (const int64_t size : shape)
        if (__builtin_mul_overflow(count, size, &count))
            throw std::invalid_argument("lobcq: the shape " + to_string(shape) + " has too many elements");
    return count;
}

Node::Node(const Api& api, const KernelInfo* info, std::string op, std::vector<const char*> names)
    : api_(api), label_("lobcq." + op + " '" + name_of(api, info) + "': "), names_(std::move(names)),
      constants_(names_.size()) {
    size_t count = 0;
    check(api.KernelInfo_GetInputCount(info, &count));
    for (size_t i = 0; i < count && i < constants_.size(); ++i) {
        int32_t constant = 0;
        const Value* value = nullptr;
        check(api.KernelInfoGetConstantInput_tensor(info, i, &constant, &value));
        if (constant && value) constants_[i] = view(value);
    }
}

int64_t Node::attribute(const KernelInfo* info, const char* name) const {
    int64_t value = 0;
    if (Status* status = api_.KernelInfoGetAttribute_int64(info, name, &value)) {
        api_.ReleaseStatus(status);
        refuse(std::string("the integer attribute ") + name + " is missing");
    }
    return value;
}

int64_t Node::attribute(const KernelInfo* info, const char* name, int64_t fallback) const {
    int64_t value = fallback;
    if (Status* status = api_.KernelInfoGetAttribute_int64(info, name, &value)) {
        api_.ReleaseStatus(status);
        return fallback;
    }
    return value;
}

void Node::refuse(const std::string& what) const { throw std::invalid_argument(label_ + what); }

void Node::check(Status* status) const {
    if (!status) return;
    const std::string message = label_ + api_.GetErrorMessage(status);
    api_.ReleaseStatus(status);
    throw std::runtime_error(message);
}

void Node::check_core(int32_t status, const char* what) const {
    if (status) refuse(std::string(what) + ": " + lobcq_status_text(status));
}

void Node::check_shape(size_t index, const Tensor& tensor, const Shape& expected) const {
    if (tensor.shape == expected) return;
    refuse(std::string(names_[index]) + " has the shape " + to_string(tensor.shape) + ", not " + to_string(expected));
}

Tensor Node::view(const Value* value) const {
    Tensor tensor;
    TypeAndShape* info = nullptr;
    check(api_.GetTensorTypeAndShape(value, &info));
    size_t rank = 0;
    Status* status = api_.GetTensorElementType(info, &tensor.type);
    if (!status) status = api_.GetDimensionsCount(info, &rank);
    tensor.shape.resize(rank);
    if (!status) status = api_.GetDimensions(info, tensor.shape.data(), rank);
    api_.ReleaseTensorTypeAndShapeInfo(info);
    check(status);
    check(api_.GetTensorMutableData(const_cast<Value*>(value), &tensor.data));  // there is no getter for a constant one
    return tensor;
}

Call::Call(const Node& node, KernelContext* context) : node_(node), context_(context), outer_(current) {
    node.check(node.api().KernelContext_GetInputCount(context, &inputs_));
    current = this;
}

Call::~Call() { current = outer_; }

Tensor Call::input(size_t index) const {
    if (node_.is_constant(index)) return node_.constant(index);
    if (index >= inputs_) return Tensor();
    const Value* value = nullptr;
    node_.check(node_.api().KernelContext_GetInput(context_, index, &value));
    return value ? node_.view(value) : Tensor();
}

void* Call::output(size_t index, const Shape& shape) const {
    Value* value = nullptr;
    void* data = nullptr;
    node_.check(node_.api().KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
    node_.check(node_.api().GetTensorMutableData(value, &data));
    return data;
}

int32_t parallel_for(int64_t begin, int64_t end, int64_t grain, lobcq_task task, void* context) {
    struct Loop {
        int64_t begin, end, block;
        lobcq_task task;
        void* context;
    };
    if (begin >= end) return 0;
    const int64_t count = end - begin, least = ceil_div(count, kMaxBlocks);
    Loop loop{begin, end, grain > least ? grain : least, task, context};
    if (!current || loop.block >= count) {
        task(begin, end, context);
        return 0;
    }
    const auto body = [](void* data, size_t index) {
        const Loop& all = *static_cast<const Loop*>(data);
        const int64_t first = all.begin + static_cast<int64_t>(index) * all.block, left = all.end - first;
        all.task(first, first + (left < all.block ? left : all.block), all.context);
    };
    const Api& api = current->node_.api();
    Status* status = api.KernelContext_ParallelFor(current->context_, body,
                                                   static_cast<size_t>(ceil_div(count, loop.block)), 0, &loop);
    if (status) api.ReleaseStatus(status);
    return status ? 1 : 0;
}

}  // namespace lobcq::ort
