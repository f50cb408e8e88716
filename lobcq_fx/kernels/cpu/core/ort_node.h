// A node of an ONNX graph as its kernel sees it: attributes and constants when the kernel is created, inputs, outputs
// and threads when it is called. What goes wrong is thrown; `guarded` makes a status of it.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_api.h"

namespace lobcq::ort {

using Shape = std::vector<int64_t>;

std::string to_string(const Shape& shape);
int64_t elements(const Shape& shape);

// A contiguous tensor; no data and no type where an optional input is absent.
struct Tensor {
    void* data = nullptr;
    Shape shape;
    ElementType type{};

    explicit operator bool() const { return type != ElementType{}; }

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

class Node {
  public:
    // names: of all inputs the op may have.
    Node(const Api& api, const KernelInfo* info, std::string op, std::vector<const char*> names);

    int64_t attribute(const KernelInfo* info, const char* name) const;
    int64_t attribute(const KernelInfo* info, const char* name, int64_t fallback) const;

    // Whether an input is a constant initializer. `constant` is valid as long as the session.
    bool is_constant(size_t index) const { return static_cast<bool>(constants_[index]); }
    const Tensor& constant(size_t index) const { return constants_[index]; }

    const Api& api() const { return api_; }
    const char* name(size_t index) const { return names_[index]; }

    [[noreturn]] void refuse(const std::string& what) const;
    void check(Status* status) const;
    void check_core(int32_t status, const char* what) const;
    void check_shape(size_t index, const Tensor& tensor, const Shape& expected) const;

    Tensor view(const Value* value) const;

  private:
    const Api& api_;
    std::string label_;
    std::vector<const char*> names_;
    std::vector<Tensor> constants_;
};

// One call of a node's kernel. While it exists, `parallel_for` on this thread runs on its session's threads.
class Call {
  public:
    Call(const Node& node, KernelContext* context);
    ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    Tensor input(size_t index) const;
    void* output(size_t index, const Shape& shape) const;

  private:
    const Node& node_;
    KernelContext* context_;
    size_t inputs_ = 0;
    const Call* outer_;

    friend int32_t parallel_for(int64_t, int64_t, int64_t, lobcq_task, void*);
};

// A lobcq_parallel_for. Outside of any call everything runs on this thread.
int32_t parallel_for(int64_t begin, int64_t end, int64_t grain, lobcq_task task, void* context);

template <class Body>
Status* guarded(const Api& api, const Body& body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const std::invalid_argument& error) {
        return api.CreateStatus(kInvalidArgument, error.what());
    } catch (const std::exception& error) {
        return api.CreateStatus(kFail, error.what());
    }
}

}  // namespace lobcq::ort
