// The custom ops' signatures and kernels.
#pragma once

#include <memory>

#include "ort_node.h"

namespace lobcq::ort {

constexpr ElementType kSame{};  // in a signature: the type of x

struct Port {
    const char* name;
    ElementType type;
    Characteristic characteristic = kRequired;
};

struct Kernel {
    virtual ~Kernel() = default;
    virtual void compute(KernelContext* context) const = 0;
};

// An op; where it has ports of x's type, one for each of the float types.
struct Signature {
    const char* name;
    std::vector<Port> inputs, outputs;
    std::unique_ptr<Kernel> (*create)(const Signature& op, const Api& api, const KernelInfo* info);

    Node node(const Api& api, const KernelInfo* info) const;
};

std::vector<Signature> signatures();

}  // namespace lobcq::ort
