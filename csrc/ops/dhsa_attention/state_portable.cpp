// What a call leaves behind: the packed cache, the chunk boundaries and the summaries. Bit-identical for every
// partition of a text into calls: each value is computed once, from cached keys alone, in one fixed order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#define EDGERUN_LANES 4
#include "csrc/base/half.h"
#include "csrc/base/vector.h"
#include "csrc/ops/dhsa_attention/kernels.h"
#include "csrc/ops/dhsa_attention/state.h"

namespace edgerun::dhsa {
namespace {

constexpr float kLargestHalf = 65504.0f;
constexpr uint16_t kHalfNan = 0x7e00;

// Channels or tokens that are moved side by side.
constexpr int64_t kSide = kLanes;
static_assert(kSide == 4);

// Rows [kSide, columns] into columns [columns, kSide], both with a stride; `columns` is a multiple of kSide.
void transpose(const float* source, int64_t source_stride, float* target, int64_t target_stride, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kSide) {
    Vector rows[kSide];
    for (int64_t r = 0; r < kSide; ++r) rows[r] = load(source + r * source_stride + c);
    const Vector low01 = EDGERUN_SHUFFLE(rows[0], rows[1], 0, 4, 1, 5);
    const Vector high01 = EDGERUN_SHUFFLE(rows[0], rows[1], 2, 6, 3, 7);
    const Vector low23 = EDGERUN_SHUFFLE(rows[2], rows[3], 0, 4, 1, 5);
    const Vector high23 = EDGERUN_SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
    const Vector columns4[kSide] = {
        EDGERUN_SHUFFLE(low01, low23, 0, 1, 4, 5), EDGERUN_SHUFFLE(low01, low23, 2, 3, 6, 7),
        EDGERUN_SHUFFLE(high01, high23, 0, 1, 4, 5), EDGERUN_SHUFFLE(high01, high23, 2, 3, 6, 7)};
    for (int64_t i = 0; i < kSide; ++i) store(target + (c + i) * target_stride, columns4[i]);
  }
}

// Keys are scattered into [D][16], values copied into [16][D]; both are zero from the last token to the end of its
// micro-block: kernels read whole micro-blocks, and 0 * NaN would be NaN.
template <typename Source, typename Element>
void store_tokens(const Source* key, const Source* value, int64_t depth, int64_t lane, int64_t count, void* key_block,
                  void* value_block) {
  Element* keys = static_cast<Element*>(key_block);
  Element* values = static_cast<Element*>(value_block) + lane * depth;
  int64_t scattered = depth;
  if constexpr (std::is_same_v<Source, float> && std::is_same_v<Element, float>) {
    if (count == kMicroBlock) {  // whole micro-blocks by tiles
      for (int64_t i = 0; i < kMicroBlock; i += kSide)
        transpose(key + i * depth, depth, keys + i, kMicroBlock, depth / kSide * kSide);
      scattered = depth % kSide;
    }
  }
  for (int64_t d = depth - scattered; d < depth; ++d) {
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
void append_blocks_of(const Params& params, const Tensors& tensors, int64_t head, BlockRange blocks) {
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
  for (int64_t block = blocks.first; block < blocks.end; ++block) {
    const int64_t position = std::max(block * kMicroBlock, params.input_pos);
    const int64_t count = std::min((block + 1) * kMicroBlock, end) - position;
    const int64_t offset = (position - params.input_pos) * depth;
    store(key + offset, value + offset, depth, position % kMicroBlock, count, key_blocks + block * key_bytes,
          value_blocks + block * value_bytes);
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
  constexpr int64_t kGaps = 2 * kBoundarySpan + 1;
  static_assert(kGaps + kBoundaryWindow <= kGapSums && kBoundaryReach <= kMicroBlock);
  const int64_t block_bytes = key_block_bytes(params.cache_dtype, params.head_dim);
  const auto gap_sums = kernels().gap_sums;
  double dots[kGapSums] = {};
  double squares[kGapSums] = {};
  for (int64_t head = 0; head < params.kv_heads; ++head) {
    const char* after = static_cast<const char*>(tensors.key_cache) +
                        (head * params.capacity_blocks + edge / kMicroBlock) * block_bytes;
    gap_sums(after - block_bytes, after, params.head_dim, params.cache_dtype, dots, squares);
  }
  double best = 0.0;
  for (int64_t i = 0; i < kGaps; ++i) {
    const double norm = std::sqrt(squares[i]) * std::sqrt(squares[i + kBoundaryWindow]);
    const double score = 1.0 - (norm > 0.0 ? dots[i] / norm : 0.0);
    if (i == 0 || score > best) best = score;
  }
  return best;
}

// Halves end at 65504, which keys of another cache may exceed: a summary stays finite. NaN stays NaN.
uint16_t summary_half(float value) {
  return float_to_half(value > kLargestHalf ? kLargestHalf : value < -kLargestHalf ? -kLargestHalf : value);
}

// What a micro-block's summary says of kSide channels, from their keys [16, kSide]: its one or two vectors.
void summarize_channels(Pooling pooling, const float* keys, float* first, float* second) {
  Vector one = load(keys);
  Vector two = one;
  if (pooling == Pooling::kMinMax) {
    for (int64_t i = 1; i < kMicroBlock; ++i) {
      const Vector key = load(keys + i * kSide);
      one = key < one ? key : one;
      two = key > two ? key : two;
    }
  } else {
    for (int64_t i = 1; i < kMicroBlock; ++i) one += load(keys + i * kSide);
    one *= 1.0f / kMicroBlock;
    two = Vector{};
    for (int64_t i = 0; i < kMicroBlock; ++i) {
      const Vector difference = load(keys + i * kSide) - one;
      two += difference * difference;
    }
    two *= 1.0f / kMicroBlock;
  }
  store(first, one);
  store(second, two);
}

}  // namespace

bool keeps_summaries(const Params& params, const Tensors& tensors) {
  return params.budget > 0 && params.selector == Selector::kChunk && tensors.summaries != nullptr;
}

BlockRange touched_blocks(const Params& params) {
  return BlockRange{params.input_pos / kMicroBlock, (params.input_pos + params.tokens - 1) / kMicroBlock + 1};
}

void append_blocks(const Params& params, const Tensors& tensors, int64_t head, BlockRange blocks) {
  (params.dtype == Dtype::kHalf ? append_blocks_of<uint16_t> : append_blocks_of<float>)(params, tensors, head, blocks);
}

void summarize_blocks(const Params& params, const Tensors& tensors, int64_t head, BlockRange blocks) {
  const int64_t depth = params.head_dim;
  const int64_t vectors = summary_vectors(params.pooling);
  const int64_t end = std::min(blocks.end, (params.input_pos + params.tokens) / kMicroBlock);
  for (int64_t block = blocks.first; block < end; ++block) {
    const int64_t index = head * params.capacity_blocks + block;
    uint16_t* summary = static_cast<uint16_t*>(tensors.summaries) + index * vectors * depth;
    for (int64_t d = 0; d < depth; d += kSide) {
      const int64_t channels = std::min(kSide, depth - d);
      float narrow[kSide * kMicroBlock] = {};
      const float* rows = narrow;  // [kSide, 16]
      if (params.cache_dtype == Dtype::kFloat && channels == kSide) {
        rows = static_cast<const float*>(tensors.key_cache) + (index * depth + d) * kMicroBlock;
      } else {
        for (int64_t c = 0; c < channels; ++c) read_channel(params, tensors, index, d + c, narrow + c * kMicroBlock);
      }
      float keys[kMicroBlock * kSide];
      transpose(rows, kMicroBlock, keys, kSide, kMicroBlock);
      float first[kSide];
      float second[kSide];
      summarize_channels(params.pooling, keys, first, second);
      for (int64_t c = 0; c < channels; ++c) {
        summary[d + c] = summary_half(first[c]);
        if (vectors == 2) summary[depth + d + c] = summary_half(second[c]);
      }
    }
  }
}

BlockRange decided_edges(const Params& params) {
  // Edges with e + 12 <= n were decided when n tokens were there, and stay decided by the same keys.
  const auto first_undecided = [](int64_t tokens) {
    return tokens < kBoundaryReach ? int64_t{0} : (tokens - kBoundaryReach) / kMicroBlock + 1;
  };
  return BlockRange{std::max<int64_t>(first_undecided(params.input_pos), 1),
                    first_undecided(params.input_pos + params.tokens)};
}

void clear_edges(const Params& params, const Tensors& tensors) {
  const int64_t first = decided_edges(params).first;
  std::memset(tensors.boundaries + first, 0, params.capacity_blocks + 1 - first);
  tensors.boundaries[0] = 1;
}

void decide_edges(const Params& params, const Tensors& tensors, BlockRange edges) {
  for (int64_t block = edges.first; block < edges.end; ++block) {
    const int64_t edge = block * kMicroBlock;
    bool cut = edge % kMaxChunk == 0;
    if (!cut && params.chunking == Chunking::kCosine) {
      cut = best_gap_score(params, tensors, edge) > static_cast<double>(params.boundary_threshold);
    }
    tensors.boundaries[block] = cut ? 1 : 0;
  }
}

}  // namespace edgerun::dhsa
