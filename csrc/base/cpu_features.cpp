// CPU features from cpuid on x86, from the kernel's hardware capabilities on arm64 Linux, from sysctl on Apple's arm64.
#include "csrc/base/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace edgerun {
namespace {

#if defined(__aarch64__) && defined(__APPLE__)
bool has(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

CpuFeatures detect() {
  CpuFeatures features;
#if defined(__x86_64__)
  __builtin_cpu_init();  // checks that the operating system saves the wide registers, too
  features.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  features.avx512 = features.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // asked directly: not every compiler has a name for it
  constexpr unsigned kSha = 1u << 29;
  features.sha = __builtin_cpu_supports("sse4.1") && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & kSha);
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kHalfArithmetic = 1ul << 10;  // HWCAP_ASIMDHP; numbers, because older headers lack the names
  constexpr unsigned long kDotProduct = 1ul << 20;      // HWCAP_ASIMDDP
  constexpr unsigned long kSha2 = 1ul << 6;             // HWCAP_SHA2
  constexpr unsigned long kInt8Matrix = 1ul << 13;      // HWCAP2_I8MM
  features.fp16 = (getauxval(AT_HWCAP) & kHalfArithmetic) != 0;
  features.dotprod = (getauxval(AT_HWCAP) & kDotProduct) != 0;
  features.i8mm = (getauxval(AT_HWCAP2) & kInt8Matrix) != 0;
  features.sha = (getauxval(AT_HWCAP) & kSha2) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
  features.fp16 = has("hw.optional.arm.FEAT_FP16");
  features.dotprod = has("hw.optional.arm.FEAT_DotProd");
  features.i8mm = has("hw.optional.arm.FEAT_I8MM");
  features.sha = has("hw.optional.arm.FEAT_SHA256");
#endif
  return features;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace edgerun
