// A weight's packed bytes into kernel layout and back.
#pragma once

#include "layout.h"

namespace lobcq {

// Before anything is written: large pages are made ready in less time, and a product's one pass over the weight misses
// fewer translations of addresses.
void ask_for_large_pages(const WeightView& w);

// Panels [begin, end). Packing returns false where it meets bytes that no encoder writes.
bool pack_weight(const lobcq_packed& packed, const WeightView& w, int64_t begin, int64_t end);
void unpack_weight(const WeightView& w, const lobcq_packed& packed, int64_t begin, int64_t end);

}  // namespace lobcq
