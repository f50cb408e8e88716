// The floating-point environment that the format's rules assume: round to nearest even, subnormals kept. A process may
// have changed it (libraries linked with -ffast-math flush subnormals in every thread started later).
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <cstdint>
#endif

namespace lobcq {

class [[maybe_unused]] IeeeMode {  // unused where the CPU has no mode to set
#if defined(__SSE__)
  public:
    IeeeMode() : saved_(_mm_getcsr()) { _mm_setcsr(kDefault); }
    ~IeeeMode() { _mm_setcsr(saved_); }
    IeeeMode(const IeeeMode&) = delete;
    IeeeMode& operator=(const IeeeMode&) = delete;

  private:
    static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked
    unsigned saved_;
#elif defined(__aarch64__)
  public:
    IeeeMode() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_) : : "memory");
        asm volatile("msr fpcr, %0" : : "r"(kDefault) : "memory");
    }
    ~IeeeMode() { asm volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }
    IeeeMode(const IeeeMode&) = delete;
    IeeeMode& operator=(const IeeeMode&) = delete;

  private:
    static constexpr uint64_t kDefault = 0;  // no exception trapped, IEEE half precision
    uint64_t saved_;
#endif
};

}  // namespace lobcq
