// Runs the core's C functions for a test that cannot load it: on an emulated CPU, say. Requests come on stdin, replies
// go to stdout, until stdin ends; emulated_core.py is the other side.
//
// A request is a Request, then `inputs` arrays, each an int64 size in bytes and the bytes, then the int64 sizes of
// `outputs` arrays. A reply is the status, an int64, then the outputs as the inputs came. Every array ends where an
// inaccessible page begins, and outputs are full of 0xff (NaN) before the call: reading or writing behind an array's
// end is a crash, and what was not written shows.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "lobcq.h"

namespace {

enum Operation {
    kIsa,
    kTables,
    kTensorScale,
    kEncode,
    kEncodeInt8,
    kRotate,
    kEncodeSearched,
    kCompensate,
    kDecode,
    kSquares,
    kPackWeight,
    kUnpackWeight,
    kEncodeActivation,
    kLoadActivation,
    kLoadInt8Activation,
    kSplitActivation,
    kLinear,
    kFloatingPointMode
};

struct Request {
    int64_t operation, inputs, outputs;
    int64_t rows, columns, row_stride, dtype;  // of the matrix that goes in or comes out
    // Of the packed operand, the weight (operand_rows are its N) and the activation (its M is the matrix's).
    int64_t operand_rows, operand_columns, num_tensor_scales, num_codebooks, array_size;
    int64_t scale_rule, kind, rotated;
};

class Array {
  public:
    explicit Array(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
        const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t inside = (bytes_ + page - 1) / page * page;
        mapped_ = inside + page;
        void* map = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED) std::abort();
        map_ = static_cast<uint8_t*>(map);
        data_ = map_ + inside - bytes_;
        if (mprotect(map_ + inside, page, PROT_NONE) != 0) std::abort();
        std::memset(data_, 0xff, bytes_);
    }
    ~Array() {
        if (map_) munmap(map_, mapped_);
    }
    Array(Array&& other) noexcept { *this = std::move(other); }
    Array& operator=(Array&& other) noexcept {
        std::swap(map_, other.map_);
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        std::swap(mapped_, other.mapped_);
        return *this;
    }

    size_t bytes() const { return bytes_; }
    template <class T = uint8_t>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }
    template <class T = uint8_t>
    T* or_null() const {
        return bytes_ ? as<T>() : nullptr;
    }

  private:
    uint8_t *map_ = nullptr, *data_ = nullptr;
    size_t bytes_ = 0, mapped_ = 0;
};

int32_t narrow(int64_t value) { return static_cast<int32_t>(value); }

struct Call {
    Request r;
    std::vector<Array> in, out;

    lobcq_matrix matrix(const Array& data) const {
        return {data.as(), r.rows, r.columns, r.row_stride, narrow(r.dtype)};
    }

    // From four arrays: codes, selectors, scales, tensor scales.
    lobcq_packed packed(const Array* parts) const {
        return {parts[0].as(), parts[1].or_null(), parts[2].as(), parts[3].as<float>(), r.num_tensor_scales,
                r.operand_rows, r.operand_columns, narrow(r.num_codebooks), narrow(r.array_size)};
    }

    // From three arrays: entries, scales, tensor scales.
    lobcq_int8 int8(const Array* parts) const {
        return {parts[0].as<int8_t>(), parts[1].as(), parts[2].as<float>(), r.num_tensor_scales,
                r.operand_rows, r.operand_columns, narrow(r.array_size)};
    }

    lobcq_weight weight(const Array& data) const {
        return {data.as(), r.operand_rows, r.operand_columns, narrow(r.num_codebooks), narrow(r.array_size)};
    }

    lobcq_activation activation(const Array& data) const {
        return {data.as(), r.rows, r.operand_columns, narrow(r.array_size), narrow(r.kind)};
    }

    int32_t run();

  private:
    int32_t isa();
    int32_t tables();
    int32_t encode();
    int32_t encode_int8();
    int32_t rotate();
    int32_t encode_searched();
    int32_t compensate();
    int32_t decode();
    int32_t squares();
    int32_t pack_weight();
    int32_t unpack_weight();
    int32_t fill_activation();
    int32_t linear();
    int32_t floating_point_mode();
};

int32_t Call::isa() {
    const char* name = lobcq_isa();
    out[0] = Array(static_cast<int64_t>(std::strlen(name)));
    std::memcpy(out[0].as(), name, out[0].bytes());
    return LOBCQ_OK;
}

int32_t Call::tables() {
    out[0] = Array(lobcq_tables_bytes());
    return lobcq_tables_init(in[0].as<int8_t>(), narrow(r.num_codebooks), out[0].as());
}

int32_t Call::encode() {
    const lobcq_matrix x = matrix(in[1]);
    if (r.scale_rule != LOBCQ_ABSMAX_SCALES) std::memcpy(out[3].as(), in[2].as(), out[3].bytes());
    lobcq_packed packed_out = packed(out.data());
    return lobcq_encode(in[0].as(), &x, narrow(r.scale_rule), &packed_out, nullptr);
}

int32_t Call::encode_int8() {
    const lobcq_matrix x = matrix(in[0]);
    if (r.scale_rule != LOBCQ_ABSMAX_SCALES) std::memcpy(out[2].as(), in[1].as(), out[2].bytes());
    lobcq_int8 operand = int8(out.data());
    return lobcq_encode_int8(&x, narrow(r.scale_rule), &operand, nullptr);
}

int32_t Call::rotate() {
    const lobcq_matrix x = matrix(in[0]);
    lobcq_matrix rotated = {out[0].as(), r.rows, r.columns, r.columns, LOBCQ_FP32};
    return lobcq_rotate(&x, narrow(r.array_size), &rotated, nullptr);
}

int32_t Call::encode_searched() {
    const lobcq_matrix x = matrix(in[1]);
    std::memcpy(out[3].as(), in[2].as(), out[3].bytes());
    lobcq_packed packed_out = packed(out.data());
    return lobcq_encode_searched(in[0].as(), &x, &packed_out, nullptr);
}

int32_t Call::compensate() {
    const lobcq_feedback feedback = {in[1].as<float>(), in[2].as<float>(), in[3].as<float>(), in[4].as<float>(),
                                     out[0].as(), out[1].as(), out[2].as(), out[3].as<float>(), out[4].as<double>(),
                                     r.rows, r.columns, narrow(r.array_size), *in[5].as<float>()};
    return lobcq_compensate(in[0].as(), &feedback, nullptr);
}

int32_t Call::decode() {
    const lobcq_packed operand = packed(in.data() + 1);
    lobcq_matrix values = matrix(out[0]);
    return lobcq_decode(in[0].as(), &operand, &values, nullptr);
}

int32_t Call::squares() {
    const lobcq_matrix x = matrix(in[1]);
    const lobcq_packed operand = packed(in.data() + 2);
    return lobcq_squares(in[0].as(), &x, &operand, out[0].as<double>(), nullptr);
}

int32_t Call::pack_weight() {
    const lobcq_packed operand = packed(in.data());
    out[0] =
        Array(lobcq_weight_bytes(r.operand_rows, r.operand_columns, narrow(r.num_codebooks), narrow(r.array_size)));
    lobcq_weight w = weight(out[0]);
    return lobcq_weight_pack(&operand, &w, nullptr);
}

int32_t Call::unpack_weight() {
    const lobcq_weight w = weight(in[0]);
    lobcq_packed operand = packed(out.data());
    return lobcq_weight_unpack(&w, &operand, nullptr);
}

int32_t Call::fill_activation() {
    out[0] = Array(lobcq_activation_bytes(r.rows, r.operand_columns, narrow(r.array_size), narrow(r.kind)));
    lobcq_activation a = activation(out[0]);
    if (r.operation == kLoadActivation) {
        const lobcq_packed operand = packed(in.data() + 1);
        return lobcq_activation_load(in[0].as(), &operand, &a, nullptr);
    }
    if (r.operation == kLoadInt8Activation) {
        const lobcq_int8 operand = int8(in.data());
        return lobcq_activation_load_int8(&operand, &a, nullptr);
    }
    const lobcq_matrix x = matrix(in[1]);
    if (r.operation == kSplitActivation) return lobcq_activation_split(&x, &a, nullptr);
    return lobcq_activation_encode(in[0].or_null(), &x, narrow(r.scale_rule), in[2].or_null<float>(), narrow(r.rotated),
                                   &a, nullptr);
}

int32_t Call::linear() {
    const lobcq_weight w = weight(in[1]);
    const lobcq_activation a = activation(in[3]);
    const lobcq_matrix values = matrix(out[0]);
    const lobcq_product product = {in[0].as(), &w, *in[2].as<float>(), in[4].or_null<float>(), &values};
    return lobcq_linear(&product, 1, &a, nullptr);
}

// Sets this thread's floating-point control register where there is an input; gives what it held.
int32_t Call::floating_point_mode() {
#if defined(__aarch64__)
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    std::memcpy(out[0].as(), &mode, sizeof mode);
    if (in.empty()) return LOBCQ_OK;
    std::memcpy(&mode, in[0].as(), sizeof mode);
    asm volatile("msr fpcr, %0" : : "r"(mode));
    return LOBCQ_OK;
#else
    return LOBCQ_INVALID_ARGUMENT;
#endif
}

int32_t Call::run() {
    switch (r.operation) {
        case kIsa: return isa();
        case kTables: return tables();
        case kTensorScale: {
            const lobcq_matrix x = matrix(in[0]);
            return lobcq_tensor_scale(&x, out[0].as<float>(), out[1].as<int64_t>());
        }
        case kEncode: return encode();
        case kEncodeInt8: return encode_int8();
        case kRotate: return rotate();
        case kEncodeSearched: return encode_searched();
        case kCompensate: return compensate();
        case kDecode: return decode();
        case kSquares: return squares();
        case kPackWeight: return pack_weight();
        case kUnpackWeight: return unpack_weight();
        case kEncodeActivation:
        case kLoadActivation:
        case kLoadInt8Activation:
        case kSplitActivation: return fill_activation();
        case kLinear: return linear();
        case kFloatingPointMode: return floating_point_mode();
        default: std::abort();
    }
}

bool read_all(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

int64_t read_size() {
    int64_t size = 0;
    if (!read_all(&size, sizeof size)) std::abort();
    return size;
}

void write_number(int64_t number) { std::fwrite(&number, sizeof number, 1, stdout); }

}  // namespace

int main() {
    for (Request r; read_all(&r, sizeof r);) {
        Call call{r, {}, {}};
        for (int64_t i = 0; i < r.inputs; ++i) {
            call.in.emplace_back(read_size());
            if (!read_all(call.in.back().as(), call.in.back().bytes())) std::abort();
        }
        for (int64_t i = 0; i < r.outputs; ++i) call.out.emplace_back(read_size());
        write_number(call.run());
        for (const Array& array : call.out) {
            write_number(static_cast<int64_t>(array.bytes()));
            std::fwrite(array.as(), 1, array.bytes(), stdout);
        }
        std::fflush(stdout);
    }
}
