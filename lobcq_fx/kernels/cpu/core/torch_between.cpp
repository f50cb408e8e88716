#include "torch_between.h"

#include <algorithm>
#include <cmath>

#include "half.h"
#include "parallel.h"
#include "torch_operands.h"

namespace lobcq::torch {
namespace {

// torch's rule for two float dtypes.
int32_t promoted(int32_t one, int32_t other) { return one == other ? one : api.aoti_torch_dtype_float32(); }

// Rounds to a dtype and back.
void round_to(int32_t dtype, int64_t n, float* x) {
    if (dtype == LOBCQ_BF16)
        for (int64_t i = 0; i < n; ++i) x[i] = bf16_to_float(float_to_bf16(x[i]));
    else if (dtype == LOBCQ_FP16)
        for (int64_t i = 0; i < n; ++i) x[i] = fp16_to_float(float_to_fp16(x[i]));
}

// Runs body(begin, end) over n rows.
template <class Body>
void over_rows(int64_t n, int64_t columns, const Body& body) {
    check_core(run(n, row_grain(columns), api.torch_parallel_for, body));
}

// 1 / sqrt(mean of each row + eps), fp32 [R]: summed by torch's own operator, in its order. What follows the sum is exact
// or rounded once, whoever does it.
Tensor inverse_root(Tensor squares, int64_t columns, float eps) {
    void* list = nullptr;
    check(api.torch_new_list_reserve_size(1, &list), "new_list");
    check(api.torch_list_push_back(list, static_cast<Value>(int64_t{-1})), "list_push_back");
    Value stack[4] = {squares.release(), give_optional(reinterpret_cast<Value>(list)), 0, 0};
    check(api.torch_call_dispatcher("aten::sum", "dim_IntList", stack, kVersion), "aten::sum");
    Tensor sums(stack[0]);
    auto* inverse = sums.data<float>();
    for (int64_t i = 0, n = sums.numel(); i < n; ++i)
        inverse[i] = 1.0f / std::sqrt(inverse[i] / static_cast<float>(columns) + eps);
    return sums;
}

Tensor normalized(const Tensor& given, const Tensor& weight, float eps, int32_t inner) {
    require_activation(given);
    if (float_dtype(inner) < 0) refuse("normalized is " + dtype_name(inner) + ": pass float32, bfloat16 or float16");
    const std::vector<int64_t> sizes = given.sizes();
    const int64_t columns = sizes.back();
    require({"weight", float_dtypes(), {columns}}, weight);
    if (requires_grad(given) || requires_grad(weight)) refuse(kNoGradient);
    const Tensor x = realigned(contiguous(given.another()), 4);
    const int32_t dtype = promoted(inner, weight.dtype());
    Tensor out = Tensor::empty(sizes, dtype);
    const int64_t rows = columns > 0 ? x.numel() / columns : 0;
    if (rows == 0) return out;
    const int32_t x_dtype = float_dtype(x.dtype()), inner_dtype = float_dtype(inner), out_dtype = float_dtype(dtype);
    const auto* from = x.data<uint8_t>();
    const int64_t row_bytes = columns * scalar_bytes(x_dtype), out_bytes = columns * scalar_bytes(out_dtype);
    Tensor squares = Tensor::empty({rows, columns}, api.aoti_torch_dtype_float32());
    auto* square = squares.data<float>();
    over_rows(rows, columns, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            float* to = square + row * columns;
            load_row(from + row * row_bytes, x_dtype, columns, to);
            for (int64_t i = 0; i < columns; ++i) to[i] *= to[i];
        }
    });
    const Tensor inverse = inverse_root(std::move(squares), columns, eps);
    const auto* factors = inverse.data<float>();
    const Tensor whole = realigned(contiguous(weight.another()), 4);
    std::vector<float> weights(static_cast<size_t>(columns));
    load_row(whole.data<void>(), float_dtype(whole.dtype()), columns, weights.data());
    auto* to = out.data<uint8_t>();
    over_rows(rows, columns, [&](int64_t begin, int64_t end) {
        std::vector<float> buffer(static_cast<size_t>(columns));
        float* y = buffer.data();
        for (int64_t row = begin; row < end; ++row) {
            load_row(from + row * row_bytes, x_dtype, columns, y);
            for (int64_t i = 0; i < columns; ++i) y[i] *= factors[row];
            round_to(inner_dtype, columns, y);
            for (int64_t i = 0; i < columns; ++i) y[i] *= weights[static_cast<size_t>(i)];
            store_row(y, out_dtype, columns, to + row * out_bytes);
        }
    });
    return out;
}

// A factor of x [B, H, T, D], of which dimensions of size 1 are repeated.
struct Factor {
    Tensor tensor;
    int64_t strides[3];
    int32_t dtype;

    Factor(const char* name, const Tensor& given, const std::vector<int64_t>& x_sizes) {
        std::vector<int64_t> expected = x_sizes;
        const std::vector<int64_t> sizes = given.sizes();
        for (size_t i = 0; i < 3 && i < sizes.size(); ++i)
            if (sizes[i] == 1) expected[i] = 1;
        require({name, float_dtypes(), expected}, given);
        tensor = given.another();
        if (sizes.back() > 1 && tensor.strides().back() != 1) tensor = contiguous(std::move(tensor));
        tensor = realigned(std::move(tensor), 4);
        const std::vector<int64_t> own = tensor.strides();
        for (size_t i = 0; i < 3; ++i) strides[i] = sizes[i] == 1 ? 0 : own[i];
        dtype = float_dtype(tensor.dtype());
    }

    const uint8_t* row(int64_t b, int64_t h, int64_t t) const {
        return tensor.data<uint8_t>() + (b * strides[0] + h * strides[1] + t * strides[2]) * scalar_bytes(dtype);
    }
};

Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t half) {
    require({"x", float_dtypes(), {-1, -1, -1, -1}}, x);
    const std::vector<int64_t> sizes = x.sizes();
    const int64_t heads = sizes[1], tokens = sizes[2], width = sizes[3];
    if (half < 0 || half > width)
        refuse("half is " + std::to_string(half) + " of " + std::to_string(width) + " columns");
    if (requires_grad(x) || requires_grad(cos) || requires_grad(sin)) refuse(kNoGradient);
    const Factor from("x", x, sizes), cosines("cos", cos, sizes), sines("sin", sin, sizes);
    const int32_t first = promoted(x.dtype(), cos.dtype()), second = promoted(x.dtype(), sin.dtype());
    const int32_t dtype = promoted(first, second);
    // x's own order in memory, as torch's operators keep it.
    Value stack[6] = {x.another().release(), give_optional(static_cast<Value>(dtype)), 0, 0, 0, 0};
    check(api.torch_call_dispatcher("aten::empty_like", "", stack, kVersion), "aten::empty_like");
    Tensor out(stack[0]);
    const std::vector<int64_t> strides = out.strides();
    if (width > 1 && strides[3] != 1) refuse("x's columns are not side by side: pass it contiguous");
    auto* to = out.data<uint8_t>();
    const int32_t out_dtype = float_dtype(dtype), one = float_dtype(first), other = float_dtype(second);
    over_rows(sizes[0] * heads * tokens, width, [&](int64_t begin, int64_t end) {
        std::vector<float> buffers(static_cast<size_t>(4 * width));
        float *a = buffers.data(), *turned = a + width, *c = turned + width, *s = c + width;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / (heads * tokens), h = row / tokens % heads, t = row % tokens;
            load_row(from.row(b, h, t), from.dtype, width, a);
            load_row(cosines.row(b, h, t), cosines.dtype, width, c);
            load_row(sines.row(b, h, t), sines.dtype, width, s);
            for (int64_t i = half; i < width; ++i) turned[i - half] = -a[i];
            std::copy(a, a + half, turned + width - half);
            for (int64_t i = 0; i < width; ++i) a[i] *= c[i];
            for (int64_t i = 0; i < width; ++i) turned[i] *= s[i];
            round_to(one, width, a);
            round_to(other, width, turned);
            for (int64_t i = 0; i < width; ++i) a[i] += turned[i];
            const int64_t place = b * strides[0] + h * strides[1] + t * strides[2];
            store_row(a, out_dtype, width, to + place * scalar_bytes(out_dtype));
        }
    });
    return out;
}

}  // namespace

void rms_norm(Value* stack, uint64_t, uint64_t) {
    in_op("lobcq::rms_norm", [stack] {
        const Tensor x(stack[0]), weight(stack[1]);
        const auto eps = static_cast<float>(take_double(stack[2]));
        stack[0] = normalized(x, weight, eps, static_cast<int32_t>(stack[3])).release();
    });
}

void rotate_half(Value* stack, uint64_t, uint64_t) {
    in_op("lobcq::rotate_half", [stack] {
        const Tensor x(stack[0]), cos(stack[1]), sin(stack[2]);
        stack[0] = rotated(x, cos, sin, static_cast<int64_t>(stack[3])).release();
    });
}

}  // namespace lobcq::torch
