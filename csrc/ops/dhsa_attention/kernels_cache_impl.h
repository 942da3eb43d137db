// How the inner kernels read a cache that is narrower than float. Part of kernels_impl.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/base/half.h"
#include "csrc/base/vector.h"
#include "csrc/ops/dhsa_attention/dhsa_attention.h"

namespace edgerun::dhsa::EDGERUN_VARIANT {
namespace {

// 16 integers, each times its scale.
EDGERUN_INLINE void scale_integers(const int8_t* integers, const float* scales, float* target) {
  for (int64_t i = 0; i < kMicroBlock; ++i) target[i] = static_cast<float>(integers[i]) * scales[i];
}

EDGERUN_INLINE const uint16_t* key_scales(const int8_t* block, int64_t depth) {
  return reinterpret_cast<const uint16_t*>(block + kMicroBlock * depth);
}

void widen_keys(Dtype cache_dtype, const void* block, int64_t depth, float* target) {
  if (cache_dtype == Dtype::kHalf) {
    halves_to_floats(static_cast<const uint16_t*>(block), target, kMicroBlock * depth);
    return;
  }
  const int8_t* integers = static_cast<const int8_t*>(block);
  const uint16_t* halves = key_scales(integers, depth);
  for (int64_t first = 0; first < depth; first += kScaleChannels, halves += kMicroBlock) {
    float scales[kMicroBlock];
    halves_to_floats(halves, scales, kMicroBlock);
    const int64_t end = smaller(first + kScaleChannels, depth);
    for (int64_t d = first; d < end; ++d) scale_integers(integers + d * kMicroBlock, scales, target + d * kMicroBlock);
  }
}

void widen_values(Dtype cache_dtype, const void* block, int64_t depth, float* target) {
  if (cache_dtype == Dtype::kHalf) {
    halves_to_floats(static_cast<const uint16_t*>(block), target, kMicroBlock * depth);
    return;
  }
  const int8_t* integers = static_cast<const int8_t*>(block);
  float scales[kMicroBlock];
  halves_to_floats(key_scales(integers, depth), scales, kMicroBlock);
  for (int64_t j = 0; j < kMicroBlock; ++j) {
    for (int64_t d = 0; d < depth; ++d) target[j * depth + d] = static_cast<float>(integers[j * depth + d]) * scales[j];
  }
}

// One channel of a micro-block of keys.
EDGERUN_INLINE void load_channel(Dtype cache_dtype, const void* block, int64_t depth, int64_t channel, float* target) {
  const int64_t offset = channel * kMicroBlock;
  if (cache_dtype == Dtype::kFloat) {
    std::memcpy(target, static_cast<const float*>(block) + offset, kMicroBlock * sizeof(float));
  } else if (cache_dtype == Dtype::kHalf) {
    halves_to_floats(static_cast<const uint16_t*>(block) + offset, target, kMicroBlock);
  } else {
    const int8_t* integers = static_cast<const int8_t*>(block);
    float scales[kMicroBlock];
    halves_to_floats(key_scales(integers, depth) + channel / kScaleChannels * kMicroBlock, scales, kMicroBlock);
    scale_integers(integers + offset, scales, target);
  }
}

}  // namespace
}  // namespace edgerun::dhsa::EDGERUN_VARIANT
