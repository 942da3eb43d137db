// SHA-256 by arm64's cryptography extension: four rounds an instruction pair. Compiled for it alone, called where the
// CPU has it.
#include "csrc/base/sha256_variants.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#if defined(__ARM_FEATURE_SHA2) || defined(__ARM_FEATURE_CRYPTO)
#define EDGERUN_SHA2  // the baseline has it, as on every Apple CPU
#elif defined(__clang__)
#define EDGERUN_SHA2 __attribute__((target("sha2")))
#else
#define EDGERUN_SHA2 __attribute__((target("+crypto")))
#endif

namespace edgerun::armv8_sha2 {
namespace {

EDGERUN_SHA2 void compress(uint32_t* state, const uint8_t* blocks, size_t count) {
  uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
  for (; count > 0; --count, blocks += 64) {
    const uint32x4_t abcd_before = abcd, efgh_before = efgh;
    uint32x4_t words[4];
#pragma GCC unroll 16
    for (int group = 0; group < 16; ++group) {
      uint32x4_t& four = words[group & 3];
      if (group < 4) {
        four = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(blocks + 16 * group)));
      } else {  // four is the group of 16 words ago
        const uint32x4_t early = vsha256su0q_u32(four, words[(group + 1) & 3]);
        four = vsha256su1q_u32(early, words[(group + 2) & 3], words[(group + 3) & 3]);
      }
      const uint32x4_t keyed = vaddq_u32(four, vld1q_u32(kSha256Round + 4 * group));
      const uint32x4_t abcd_then = abcd;
      abcd = vsha256hq_u32(abcd, efgh, keyed);
      efgh = vsha256h2q_u32(efgh, abcd_then, keyed);
    }
    abcd = vaddq_u32(abcd, abcd_before);
    efgh = vaddq_u32(efgh, efgh_before);
  }
  vst1q_u32(state, abcd);
  vst1q_u32(state + 4, efgh);
}

}  // namespace

extern const Sha256Variant kVariant;
const Sha256Variant kVariant = {"armv8_sha2", compress};

}  // namespace edgerun::armv8_sha2
#endif
