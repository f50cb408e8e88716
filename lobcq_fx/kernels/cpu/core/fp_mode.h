// The floating-point environment that the format's rules assume: round to nearest even, subnormals kept. A process may
// have changed it (libraries linked with -ffast-math flush subnormals in every thread started later).
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace lobcq {

class IeeeMode {
#if defined(__SSE__)
  public:
    IeeeMode() : saved_(_mm_getcsr()) { _mm_setcsr(kDefault); }
    ~IeeeMode() { _mm_setcsr(saved_); }
    IeeeMode(const IeeeMode&) = delete;
    IeeeMode& operator=(const IeeeMode&) = delete;

  private:
    static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked
    unsigned saved_;
#endif
};

}  // namespace lobcq
