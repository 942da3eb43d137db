// What a call leaves behind: the packed cache, the chunk boundaries and the summaries. Bit-identical for every
// partition of a text into calls: each value is computed once, from cached keys alone, in one fixed order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "csrc/base/half.h"
#include "csrc/ops/dhsa_attention/state.h"

namespace edgerun::dhsa {
namespace {

constexpr float kLargestHalf = 65504.0f;
constexpr uint16_t kHalfNan = 0x7e00;

// Keys are scattered into [D][16], values copied into [16][D]; both are zero from the last token to the end of its
// micro-block: kernels read whole micro-blocks, and 0 * NaN would be NaN.
template <typename Source, typename Element>
void store_tokens(const Source* key, const Source* value, int64_t depth, int64_t lane, int64_t count, void* key_block,
                  void* value_block) {
  Element* keys = static_cast<Element*>(key_block);
  Element* values = static_cast<Element*>(value_block) + lane * depth;
  for (int64_t d = 0; d < depth; ++d) {
    Element* row = keys + d * kMicroBlock;
    for (int64_t i = 0; i < count; ++i) from_float(to_float(key[i * depth + d]), row + lane + i);
    for (int64_t i = lane + count; i < kMicroBlock; ++i) row[i] = Element{};
  }
  if constexpr (std::is_same_v<Source, Element>) {
    std::memcpy(values, value, count * depth * sizeof(Element));
  } else {
    for (int64_t i = 0; i < count * depth; ++i) from_float(to_float(value[i]), values + i);
  }
  std::memset(values + count * depth, 0, (kMicroBlock - lane - count) * depth * sizeof(Element));
}

// `count` values into integers `stride` apart; returns their scale as a half.
template <typename Source>
uint16_t quantize(const Source* source, int64_t count, int8_t* integers, int64_t stride) {
  float largest = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(to_float(source[i]));
    finite &= magnitude <= std::numeric_limits<float>::max();
    largest = magnitude > largest ? magnitude : largest;
  }
  const uint16_t half = finite ? float_to_half(std::min(largest / 127.0f, kLargestHalf)) : kHalfNan;
  const float scale = half_to_float(half);
  for (int64_t i = 0; i < count; ++i) {
    float x = finite && scale > 0.0f ? to_float(source[i]) / scale : 0.0f;
    x = std::min(std::max(x, -127.0f), 127.0f);
    integers[i * stride] = static_cast<int8_t>(std::nearbyint(x));
  }
  return half;
}

template <typename Source>
void quantize_tokens(const Source* key, const Source* value, int64_t depth, int64_t lane, int64_t count,
                     void* key_block, void* value_block) {
  int8_t* keys = static_cast<int8_t*>(key_block);
  int8_t* values = static_cast<int8_t*>(value_block);
  uint16_t* key_scales = reinterpret_cast<uint16_t*>(keys + kMicroBlock * depth);
  uint16_t* value_scales = reinterpret_cast<uint16_t*>(values + kMicroBlock * depth);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < depth; d += kScaleChannels) {
      key_scales[d / kScaleChannels * kMicroBlock + lane + i] = quantize(
          key + i * depth + d, std::min(kScaleChannels, depth - d), keys + d * kMicroBlock + lane + i, kMicroBlock);
    }
    value_scales[lane + i] = quantize(value + i * depth, depth, values + (lane + i) * depth, 1);
  }
  const int64_t left = kMicroBlock - lane - count;
  for (int64_t d = 0; d < depth; ++d) std::memset(keys + d * kMicroBlock + lane + count, 0, left);
  for (int64_t d = 0; d < depth; d += kScaleChannels) {
    std::memset(key_scales + d / kScaleChannels * kMicroBlock + lane + count, 0, left * sizeof(uint16_t));
  }
  std::memset(values + (lane + count) * depth, 0, left * depth);
  std::memset(value_scales + lane + count, 0, left * sizeof(uint16_t));
}

template <typename Source>
void append_head_of(const Params& params, const Tensors& tensors, int64_t head) {
  const int64_t depth = params.head_dim;
  const int64_t key_bytes = key_block_bytes(params.cache_dtype, depth);
  const int64_t value_bytes = value_block_bytes(params.cache_dtype, depth);
  const Source* key = static_cast<const Source*>(tensors.key) + head * params.tokens * depth;
  const Source* value = static_cast<const Source*>(tensors.value) + head * params.tokens * depth;
  char* key_blocks = static_cast<char*>(tensors.key_cache) + head * params.capacity_blocks * key_bytes;
  char* value_blocks = static_cast<char*>(tensors.value_cache) + head * params.capacity_blocks * value_bytes;
  const auto store = params.cache_dtype == Dtype::kFloat  ? store_tokens<Source, float>
                     : params.cache_dtype == Dtype::kHalf ? store_tokens<Source, uint16_t>
                                                          : quantize_tokens<Source>;
  const int64_t end = params.input_pos + params.tokens;
  for (int64_t position = params.input_pos; position < end;) {
    const int64_t lane = position % kMicroBlock;
    const int64_t count = std::min(kMicroBlock - lane, end - position);
    store(key, value, depth, lane, count, key_blocks + position / kMicroBlock * key_bytes,
          value_blocks + position / kMicroBlock * value_bytes);
    key += count * depth;
    value += count * depth;
    position += count;
  }
}

// One channel of a micro-block of keys, as floats. Head-major caches: block = head M + micro-block.
void read_channel(const Params& params, const Tensors& tensors, int64_t block, int64_t channel, float* target) {
  const char* keys =
      static_cast<const char*>(tensors.key_cache) + block * key_block_bytes(params.cache_dtype, params.head_dim);
  const int64_t offset = channel * kMicroBlock;
  if (params.cache_dtype == Dtype::kFloat) {
    std::memcpy(target, reinterpret_cast<const float*>(keys) + offset, kMicroBlock * sizeof(float));
  } else if (params.cache_dtype == Dtype::kHalf) {
    halves_to_floats(reinterpret_cast<const uint16_t*>(keys) + offset, target, kMicroBlock);
  } else {
    const int8_t* integers = reinterpret_cast<const int8_t*>(keys);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(integers + kMicroBlock * params.head_dim) +
                             channel / kScaleChannels * kMicroBlock;
    halves_to_floats(scales, target, kMicroBlock);
    for (int64_t i = 0; i < kMicroBlock; ++i) target[i] *= static_cast<float>(integers[offset + i]);
  }
}

// Largest 1 - cosine over the gaps [e - 8, e + 8]. Sums stand for means: their cosine is the same.
double best_gap_score(const Params& params, const Tensors& tensors, int64_t edge) {
  constexpr int64_t kSpan = 2 * kBoundaryReach;          // tokens
  constexpr int64_t kGaps = 2 * kBoundarySpan + 1;       // candidate gaps
  constexpr int64_t kWindows = kGaps + kBoundaryWindow;  // windows of 4 tokens that start in the span
  static_assert(kWindows + kBoundaryWindow - 1 == kSpan);
  const int64_t depth = params.head_dim;
  double dots[kGaps] = {};
  double squares[kWindows] = {};
  for (int64_t head = 0; head < params.kv_heads; ++head) {
    const int64_t after = head * params.capacity_blocks + edge / kMicroBlock;
    for (int64_t d = 0; d < depth; ++d) {
      float keys[2 * kMicroBlock];  // of the micro-blocks before and after the edge
      double x[kSpan];
      read_channel(params, tensors, after - 1, d, keys);
      read_channel(params, tensors, after, d, keys + kMicroBlock);
      for (int64_t i = 0; i < kSpan; ++i) x[i] = keys[kMicroBlock - kBoundaryReach + i];
      double window[kWindows];
      for (int64_t i = 0; i < kWindows; ++i) window[i] = (x[i] + x[i + 1]) + (x[i + 2] + x[i + 3]);
      for (int64_t i = 0; i < kWindows; ++i) squares[i] += window[i] * window[i];
      for (int64_t i = 0; i < kGaps; ++i) dots[i] += window[i] * window[i + kBoundaryWindow];
    }
  }
  double best = 0.0;
  for (int64_t i = 0; i < kGaps; ++i) {
    const double norm = std::sqrt(squares[i]) * std::sqrt(squares[i + kBoundaryWindow]);
    const double score = 1.0 - (norm > 0.0 ? dots[i] / norm : 0.0);
    if (i == 0 || score > best) best = score;
  }
  return best;
}

void store_summary(float value, float* target) { *target = value; }
// Halves end at 65504, which an 8-bit cache's keys may exceed: a summary stays finite. NaN stays NaN.
void store_summary(float value, uint16_t* target) {
  *target = float_to_half(value > kLargestHalf ? kLargestHalf : value < -kLargestHalf ? -kLargestHalf : value);
}

template <typename Element>
void summarize_head_of(const Params& params, const Tensors& tensors, int64_t head) {
  const int64_t depth = params.head_dim;
  const int64_t vectors = summary_vectors(params.pooling);
  const int64_t end = (params.input_pos + params.tokens) / kMicroBlock;
  for (int64_t block = params.input_pos / kMicroBlock; block < end; ++block) {
    const int64_t index = head * params.capacity_blocks + block;
    Element* summary = static_cast<Element*>(tensors.summaries) + index * vectors * depth;
    for (int64_t d = 0; d < depth; ++d) {
      float keys[kMicroBlock];
      read_channel(params, tensors, index, d, keys);
      if (params.pooling == Pooling::kMinMax) {
        float low = keys[0];
        float high = low;
        for (int64_t i = 1; i < kMicroBlock; ++i) {
          low = keys[i] < low ? keys[i] : low;
          high = keys[i] > high ? keys[i] : high;
        }
        store_summary(low, summary + d);
        store_summary(high, summary + depth + d);
      } else {
        float sum = 0.0f;
        for (int64_t i = 0; i < kMicroBlock; ++i) sum += keys[i];
        const float mean = sum * (1.0f / kMicroBlock);
        store_summary(mean, summary + d);
        if (params.pooling == Pooling::kMoments) {
          float squares = 0.0f;
          for (int64_t i = 0; i < kMicroBlock; ++i) squares += (keys[i] - mean) * (keys[i] - mean);
          const float variance = squares * (1.0f / kMicroBlock);
          store_summary(variance, summary + depth + d);
        }
      }
    }
  }
}

}  // namespace

bool keeps_summaries(const Params& params, const Tensors& tensors) {
  return params.budget > 0 && params.selector == Selector::kChunk && tensors.summaries != nullptr;
}

void append_head(const Params& params, const Tensors& tensors, int64_t head) {
  params.dtype == Dtype::kHalf ? append_head_of<uint16_t>(params, tensors, head)
                               : append_head_of<float>(params, tensors, head);
}

void summarize_head(const Params& params, const Tensors& tensors, int64_t head) {
  params.cache_dtype == Dtype::kFloat ? summarize_head_of<float>(params, tensors, head)
                                      : summarize_head_of<uint16_t>(params, tensors, head);
}

void append(const Params& params, const Tensors& tensors) {
  for (int64_t head = 0; head < params.kv_heads; ++head) append_head(params, tensors, head);
}

void summarize(const Params& params, const Tensors& tensors) {
  if (!keeps_summaries(params, tensors)) return;
  for (int64_t head = 0; head < params.kv_heads; ++head) summarize_head(params, tensors, head);
}

void find_boundaries(const Params& params, const Tensors& tensors) {
  if (!params.finds_boundaries) return;
  const int64_t before = params.input_pos;
  const int64_t after = before + params.tokens;
  // Edges with e + 12 <= n were decided when n tokens were there, and stay decided by the same keys.
  const auto first_undecided = [](int64_t tokens) {
    return tokens < kBoundaryReach ? int64_t{0} : (tokens - kBoundaryReach) / kMicroBlock + 1;
  };
  const int64_t first = std::max<int64_t>(first_undecided(before), 1);
  const int64_t end = first_undecided(after);
  std::memset(tensors.boundaries + first, 0, params.capacity_blocks + 1 - first);
  tensors.boundaries[0] = 1;
  for (int64_t block = first; block < end; ++block) {
    const int64_t edge = block * kMicroBlock;
    bool cut = edge % kMaxChunk == 0;
    if (!cut && params.chunking == Chunking::kCosine) {
      cut = best_gap_score(params, tensors, edge) > static_cast<double>(params.boundary_threshold);
    }
    tensors.boundaries[block] = cut ? 1 : 0;
  }
}

}  // namespace edgerun::dhsa
