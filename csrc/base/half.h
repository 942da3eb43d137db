// IEEE half precision as bits, for CPUs and compilers with and without it. Rounds to nearest even.
// Internal linkage throughout: this header is compiled for several instruction sets, and the linker must not mix them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace edgerun {

static inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t shifted = magnitude << 13;
  float value;
  std::memcpy(&value, &shifted, sizeof value);
  value *= 0x1p112f;  // rebias the exponent; subnormals come out exact
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = magnitude >= 0x7c00u ? shifted | 0x7f800000u : bits;
  bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude >= 0x47800000u) {  // 65536 and above, infinity, NaN
    result = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the addition rounds to a multiple of the smallest subnormal
    float small;
    std::memcpy(&small, &magnitude, sizeof small);
    small += 0.5f;
    std::memcpy(&result, &small, sizeof result);
    result -= 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | result);
}

static inline void halves_to_floats(const uint16_t* source, float* target, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
#elif defined(__aarch64__)
  for (; i + 8 <= count; i += 8) {
    __fp16 values[8];
    std::memcpy(values, source + i, sizeof values);
    for (int lane = 0; lane < 8; ++lane) target[i + lane] = static_cast<float>(values[lane]);
  }
#endif
  for (; i < count; ++i) target[i] = half_to_float(source[i]);
}

}  // namespace edgerun
