// Attention over encoded keys and values: how the work is cut, which exists once. attention_loops.h has the arithmetic.
#pragma once

#include "isa.h"

namespace lobcq {

constexpr int64_t kMaxWidth = 512;  // scalars of a head, padding included

// One block of queries against a tile of tokens.
struct alignas(64) AttentionTile {
    float keys[kMaxWidth][kTileTokens];    // transposed; what is behind the last token is zero
    float values[kTileTokens][kMaxWidth];
    float scores[kQueryRows][kTileTokens]; // what is added to them at first, then the weights
    float sums[kQueryRows][kMaxWidth];     // of weighted values
    float most[kQueryRows], weights[kQueryRows];
    const float* queries[kQueryRows];
};

// Tokens of one head, decoded: entry (code, selector) times scale, times tensor scale.
struct StateRows {
    const uint8_t* rows;  // of the first token
    int64_t row_bytes, head_bytes, code_bytes, selector_bytes, width, padded;
    int32_t array_size, bits;
};

struct Attention {
    const Tables& tables;
    const lobcq_attention& a;
    int64_t rows, blocks;  // queries of a head of keys and values: those of all its query heads; and blocks of them

    Attention(const Tables& t, const lobcq_attention& attention);

    int64_t tasks() const { return a.batch * a.heads * blocks; }
    int64_t grain() const;  // how many tasks are worth a thread
    void run(int64_t begin, int64_t end) const;

  private:
    void run_block(int64_t batch, int64_t head, int64_t first) const;
    bool load_mask(int64_t batch, int64_t head, int64_t first, int64_t n, int64_t token, int64_t tokens,
                   AttentionTile* tile) const;
    int64_t query_head(int64_t head, int64_t row) const { return head * (a.query_heads / a.heads) + row / a.queries; }
};

// Bytes of one token's keys or values in all heads.
int64_t state_row_bytes(const lobcq_states& s, int64_t heads, int32_t num_codebooks);

}  // namespace lobcq
