// SHA-256 by the SHA extensions of x86: two rounds an instruction. Compiled for them alone, called where the CPU has them.
#include "csrc/base/sha256_variants.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace edgerun::sha_ni {
namespace {

__attribute__((target("sha,sse4.1"))) void compress(uint32_t* state, const uint8_t* blocks, size_t count) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  auto* words_of_state = reinterpret_cast<__m128i*>(state);
  // The instructions want the state as (a b e f) and (c d g h), the first letter in the highest lane.
  const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(words_of_state), 0xb1);
  const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(words_of_state + 1), 0x1b);
  __m128i abef = _mm_alignr_epi8(cdab, efgh, 8);
  __m128i cdgh = _mm_blend_epi16(efgh, cdab, 0xf0);
  for (; count > 0; --count, blocks += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i words[4];
#pragma GCC unroll 16
    for (int group = 0; group < 16; ++group) {
      __m128i& four = words[group & 3];
      if (group < 4) {
        const auto* source = reinterpret_cast<const __m128i*>(blocks) + group;
        four = _mm_shuffle_epi8(_mm_loadu_si128(source), big_endian);
      } else {  // four is the group of 16 words ago
        const __m128i& next = words[(group + 1) & 3];
        const __m128i &before_last = words[(group + 2) & 3], &last = words[(group + 3) & 3];
        const __m128i middle = _mm_alignr_epi8(last, before_last, 4);
        four = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(four, next), middle), last);
      }
      const auto* round = reinterpret_cast<const __m128i*>(kSha256Round) + group;
      const __m128i keyed = _mm_add_epi32(four, _mm_load_si128(round));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, keyed);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(keyed, 0x0e));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  const __m128i feba = _mm_shuffle_epi32(abef, 0x1b);
  const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xb1);
  _mm_storeu_si128(words_of_state, _mm_blend_epi16(feba, dchg, 0xf0));
  _mm_storeu_si128(words_of_state + 1, _mm_alignr_epi8(dchg, feba, 8));
}

}  // namespace

extern const Sha256Variant kVariant;
const Sha256Variant kVariant = {"sha_ni", compress};

}  // namespace edgerun::sha_ni
#endif
