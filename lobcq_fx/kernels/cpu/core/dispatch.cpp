// Chooses the instruction set, once per process.
#include <cstdlib>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
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

bool runs_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
           runs_f16c();
}

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

bool runs_neon_i8mm() {
#if defined(__linux__)
    constexpr unsigned long i8mm = 1 << 13;  // HWCAP2_I8MM, which C libraries before 2020 do not name
    return runs_neon() && (getauxval(AT_HWCAP2) & i8mm);
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
#endif
}
#endif

// What this CPU runs, the best first.
std::vector<const Isa*> runnable() {
#if defined(__x86_64__)
    if (runs_avx512()) return {&kAvx512, &kAvx2, &kPortable};
    if (runs_avx2()) return {&kAvx2, &kPortable};
#elif defined(__aarch64__)
    if (runs_neon_i8mm()) return {&kNeonI8mm, &kNeon, &kPortable};
    if (runs_neon()) return {&kNeon, &kPortable};
#endif
    return {&kPortable};
}

struct Choice {
    const Isa* isa;
    std::string error;  // empty where the environment's wish is met
};

Choice choose() {
    const std::vector<const Isa*> usable = runnable();
    const char* wanted = std::getenv("LOBCQ_CPU_ISA");
    if (!wanted) return {usable[0], ""};
    std::string names;
    for (const Isa* candidate : usable) {
        if (std::strcmp(wanted, candidate->name) == 0) return {candidate, ""};
        names += (names.empty() ? "" : ", ") + std::string(candidate->name);
    }
    return {usable[0], "LOBCQ_CPU_ISA is '" + std::string(wanted) + "', this CPU runs: " + names};
}

// Never destroyed: threads may still compute while the process ends.
const Choice& choice() {
    static const Choice& chosen = *new Choice(choose());
    return chosen;
}

}  // namespace

const Isa& isa() {
    static const Isa& chosen = *choice().isa;
    return chosen;
}

const char* isa_error() { return choice().error.c_str(); }

}  // namespace lobcq
