// CPU features from cpuid on x86 and from the kernel's hardware capabilities on arm64 Linux.
#include "csrc/base/cpu_features.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace edgerun {
namespace {

CpuFeatures detect() {
  CpuFeatures features;
#if defined(__x86_64__)
  __builtin_cpu_init();  // checks that the operating system saves the wide registers, too
  features.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  features.avx512 = features.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kHalfArithmetic = 1ul << 10;  // HWCAP_ASIMDHP; numbers, because older headers lack the names
  constexpr unsigned long kDotProduct = 1ul << 20;      // HWCAP_ASIMDDP
  constexpr unsigned long kInt8Matrix = 1ul << 13;      // HWCAP2_I8MM
  features.fp16 = (getauxval(AT_HWCAP) & kHalfArithmetic) != 0;
  features.dotprod = (getauxval(AT_HWCAP) & kDotProduct) != 0;
  features.i8mm = (getauxval(AT_HWCAP2) & kInt8Matrix) != 0;
#endif
  return features;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace edgerun
