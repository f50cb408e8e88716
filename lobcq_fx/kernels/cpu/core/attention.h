// Attention over encoded keys and values: how the work is cut, which exists once. attention_loops.h has the arithmetic.
#pragma once

#include "isa.h"

namespace lobcq {

constexpr int64_t kStateScaleBytes = 4; // of a token's tensor scale, which its row starts with
constexpr int64_t kMaxWidth = 1024;     // scalars of a head, padding included
constexpr int64_t kMaxQueryRows = 128;  // queries that share decoded keys and values
constexpr int64_t kRowScalars = 8192;   // of them together, padding included

// Tokens of all heads, one a row of bytes.
struct StateRows {
    const uint8_t* rows;  // of the first token
    int64_t row_bytes, head_bytes, code_bytes, selector_bytes, width, padded;
    int32_t array_size, bits;

    int64_t arrays() const { return padded / array_size; }
};

// Tokens of one head as floats, each `width` scalars, `stride` scalars after the one before it.
struct FloatStates {
    const uint8_t* data;  // of the first token
    int64_t stride, width, padded;
    int32_t dtype;

    const uint8_t* token(int64_t i) const { return data + i * stride * scalar_bytes(dtype); }
};

struct Attention {
    const Tables& tables;  // of encoded states
    const lobcq_attention& a;
    int64_t group;  // query heads of a head of keys and values
    int64_t rows;   // queries of all of those
    int64_t block_rows, blocks;

    Attention(const Tables& t, const lobcq_attention& attention);

    int64_t tasks() const { return a.batch * a.heads * blocks; }
    int64_t grain() const;  // how many tasks are worth a thread
    void run(int64_t begin, int64_t end) const;
    StateRows states(const lobcq_states& s, int64_t batch) const;
    FloatStates float_states(const lobcq_states& s, int64_t batch, int64_t head) const;

  private:
    int64_t padded(const lobcq_states& s) const;
};

// The queries of one task: rows [first, first + rows) of a head. The query heads that share it lie side by side, so that
// rows near each other look at the same tokens.
struct QueryBlock {
    const Attention& work;
    int64_t batch, head, first, rows;

    int64_t query_head(int64_t row) const { return head * work.group + (first + row) % work.group; }
    int64_t query(int64_t row) const { return (first + row) / work.group; }
    // Reads a row's query as fp32.
    void load_query(int64_t row, float* to) const {
        const lobcq_attention& a = work.a;
        const int64_t* s = a.query_strides;
        const int64_t place = batch * s[0] + query_head(row) * s[1] + query(row) * s[2];
        isa().load(static_cast<const uint8_t*>(a.query) + place * scalar_bytes(a.dtype), a.dtype, a.keys.width, to);
    }
    // Where a row's result goes.
    void* result(int64_t row) const {
        const lobcq_attention& a = work.a;
        const int64_t* s = a.out_strides;
        const int64_t place = batch * s[0] + query_head(row) * s[1] + query(row) * s[2];
        return static_cast<uint8_t*>(a.out) + place * scalar_bytes(a.dtype);
    }
};

// Bytes of one token's keys or values in all heads.
int64_t state_row_bytes(const lobcq_states& s, int64_t heads, int32_t num_codebooks);

}  // namespace lobcq
