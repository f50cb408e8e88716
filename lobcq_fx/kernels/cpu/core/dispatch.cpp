// Chooses the instruction set, once per process.
#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "isa.h"

namespace lobcq {
namespace {

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows this one.
bool runs_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && runs_f16c(); }

bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
bool runs_neon() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
    return true;  // every Mac with an Arm CPU
#else
    return false;  // no way to ask
#endif
}
#endif

const Isa* choose() {
    const char* wanted = std::getenv("LOBCQ_CPU_ISA");
#if defined(__x86_64__)
    const Isa* usable[] = {runs_avx512() ? &kAvx512 : nullptr, runs_avx2() ? &kAvx2 : nullptr, &kPortable};
#elif defined(__aarch64__)
    const Isa* usable[] = {runs_neon() ? &kNeon : nullptr, &kPortable};
#else
    const Isa* usable[] = {&kPortable};
#endif
    const Isa* best = nullptr;
    for (const Isa* candidate : usable) {
        if (!candidate) continue;
        if (wanted && std::strcmp(wanted, candidate->name) == 0) return candidate;
        if (!best) best = candidate;
    }
    return best;
}

}  // namespace

const Isa& isa() {
    // Two threads that come first together choose the same.
    static std::atomic<const Isa*> chosen{nullptr};
    const Isa* known = chosen.load(std::memory_order_relaxed);
    if (!known) chosen.store(known = choose(), std::memory_order_relaxed);
    return *known;
}

}  // namespace lobcq
