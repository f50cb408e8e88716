// The operators of linears: by what their activation is, and by what they multiply it with, one weight or a stack.
#pragma once

#include <functional>
#include <optional>
#include <type_traits>
#include <vector>

#include "ort_product.h"

namespace lobcq::ort {

// Weights: `Weight`, or a vector of them for a stack. Constant ones are repacked once.
template <class Weights>
class StoredProduct : public Kernel {
  protected:
    StoredProduct(const Signature& op, const Api& api, const KernelInfo* info, size_t first_weight_input)
        : node_(op.node(api, info)), array_size_(kernel_array_size_of(node_, info)),
          weight_array_size_(array_size_of(node_, info)), at_{first_weight_input} {
        if (!at_.all_constant(node_)) return;
        constant_ = repacked([&](size_t index) { return node_.constant(index); });
        release_constants(node_, at_);
    }

    // The constant ones, or the call's, which `of_call` then holds.
    const Weights& weights(const Call& call, std::optional<Weights>* of_call) const {
        if (constant_) return *constant_;
        return of_call->emplace(repacked([&](size_t index) { return call.input(index); }));
    }

    Node node_;
    int32_t array_size_;  // that the product is computed in
    int32_t weight_array_size_;
    WeightInputs at_;

  private:
    Weights repacked(const std::function<Tensor(size_t)>& input) const {
        if constexpr (std::is_same_v<Weights, Weight>)
            return repack(node_, at_, weight_array_size_, array_size_, input);
        else
            return repack_stack(node_, at_, weight_array_size_, array_size_, input);
    }

    std::optional<Weights> constant_;
};

// Product: a StoredProduct with `multiply(call, activation, type of the result)`.
template <class Product>
class Linear : public Product {
  public:
    Linear(const Signature& op, const Api& api, const KernelInfo* info)
        : Product(op, api, info, kWeight), in_features_(in_features_of(this->node_, info)) {
        if (this->node_.is_constant(kCodebooks)) tables_ = tables(this->node_.constant(kCodebooks));
    }

    void compute(KernelContext* context) const override {
        const Call call(this->node_, context);
        const SharedTables used = tables_ ? tables_ : tables(call.input(kCodebooks));
        const Activation a = encoded_activation(this->node_, call, *used, in_features_, this->array_size_);
        this->multiply(call, a, kFloat);
    }

  private:
    enum { kCodebooks = 4, kWeight };  // behind codes, selectors, scales and tensor_scale

    SharedTables tables(const Tensor& codebooks) const { return tables_of(this->node_, kCodebooks, codebooks); }

    int64_t in_features_;
    SharedTables tables_;  // of the activation; null where its codebooks are not constant
};

template <class Product>
class LinearInt8Activation : public Product {
  public:
    LinearInt8Activation(const Signature& op, const Api& api, const KernelInfo* info)
        : Product(op, api, info, kWeight), in_features_(in_features_of(this->node_, info)) {}

    void compute(KernelContext* context) const override {
        const Call call(this->node_, context);
        this->multiply(call, int8_activation(this->node_, call, in_features_, this->array_size_), kFloat);
    }

  private:
    enum { kWeight = 3 };  // behind entries, scales and tensor_scale

    int64_t in_features_;
};

template <class Product>
class LinearFloatActivation : public Product {
  public:
    LinearFloatActivation(const Signature& op, const Api& api, const KernelInfo* info)
        : Product(op, api, info, kWeight) {}

    void compute(KernelContext* context) const override {
        const Call call(this->node_, context);
        this->multiply(call, float_activation(this->node_, call, this->array_size_), call.input(kX).type);
    }

  private:
    enum { kX, kWeight };
};

}  // namespace lobcq::ort
