// A weight of an ONNX graph in kernel layout, and the look-up tables that the kernels of a process share.
#pragma once

#include <functional>
#include <memory>

#include "format.h"
#include "ort_node.h"

namespace lobcq::ort {

// Bytes that start where the core's opaque buffers must.
class Buffer {
  public:
    explicit Buffer(int64_t bytes)
        : data_(static_cast<uint8_t*>(::operator new(static_cast<size_t>(bytes), kAlignment))) {}

    uint8_t* data() const { return data_.get(); }

  private:
    static constexpr std::align_val_t kAlignment{64};
    struct Delete {
        void operator()(uint8_t* data) const { ::operator delete(data, kAlignment); }
    };
    std::unique_ptr<uint8_t, Delete> data_;
};

using SharedTables = std::shared_ptr<const Tables>;

// Tables of the codebooks int8 [N_c, 16] that a node's input `index` holds.
SharedTables tables_of(const Node& node, size_t index, const Tensor& codebooks);

// Where a node has the parts of its weight: w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, bias in a row.
struct WeightInputs {
    size_t codes;

    size_t selectors() const { return codes + 1; }
    size_t scales() const { return codes + 2; }
    size_t tensor_scale() const { return codes + 3; }
    size_t codebooks() const { return codes + 4; }
    size_t bias() const { return codes + 5; }
    size_t ends() const { return codes + 5; }  // of the groups of a stack, which have no bias
    size_t rows() const { return codes + 6; }

    bool all_constant(const Node& node) const;
};

// In kernel layout. A node does not say how many columns its weight has before it is filled up to Kp; the layout is
// that of Kp columns, which is the same.
struct Weight {
    SharedTables tables;
    Buffer data;
    int64_t outputs, padded_columns;
};

// Repacks the parts that `input(index)` gives; refuses any that no encoder writes. Scales are repeated where kernels
// multiply in shorter arrays than those of the weight.
Weight repack(const Node& node, const WeightInputs& at, int32_t array_size, int32_t kernel_array_size,
              const std::function<Tensor(size_t)>& input);

// The same of each matrix of a stack, whose parts have E as their first dimension.
std::vector<Weight> repack_stack(const Node& node, const WeightInputs& at, int32_t array_size, int32_t kernel_array_size,
                                 const std::function<Tensor(size_t)>& input);

// Gives the pages of a weight's constant parts back to the system where they are a file's: ONNX Runtime maps external
// data into memory and keeps it so, though nothing reads it again. Whatever does gets the same bytes.
void release_constants(const Node& node, const WeightInputs& at);

}  // namespace lobcq::ort
