// Pages of memory, where the system can be told what they are for.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace lobcq {

// Addresses of the first of the pages that lie wholly in a buffer, and behind the last.
struct WholePages {
    uintptr_t first, last, size;

    WholePages(const void* data, int64_t bytes) : size(static_cast<uintptr_t>(sysconf(_SC_PAGESIZE))) {
        const auto begin = reinterpret_cast<uintptr_t>(data);
        first = (begin + size - 1) / size * size;
        last = (begin + static_cast<uintptr_t>(bytes)) / size * size;
    }

    bool none() const { return first >= last; }
    void advise(int advice) const { madvise(reinterpret_cast<void*>(first), last - first, advice); }
};

}  // namespace lobcq
#endif
