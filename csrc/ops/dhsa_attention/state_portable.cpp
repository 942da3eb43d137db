// What a call leaves behind: the packed cache, the chunk boundaries and the summaries. Bit-identical for every
// partition of a text into calls: each value is computed once, from cached keys alone, in one fixed order.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "csrc/base/half.h"
#include "csrc/ops/dhsa_attention/state.h"

namespace edgerun::dhsa {
namespace {

// Keys are scattered into [D][16], values copied into [16][D]; both are zero from the last token to the end of its
// micro-block: kernels read whole micro-blocks, and 0 * NaN would be NaN.
template <typename Element>
void append_head_of(const Params& params, const Tensors& tensors, int64_t head) {
  const int64_t depth = params.head_dim;
  const int64_t block_elements = kMicroBlock * depth;
  const Element* key = static_cast<const Element*>(tensors.key) + head * params.tokens * depth;
  const Element* value = static_cast<const Element*>(tensors.value) + head * params.tokens * depth;
  Element* key_blocks = static_cast<Element*>(tensors.key_cache) + head * params.capacity_blocks * block_elements;
  Element* value_blocks = static_cast<Element*>(tensors.value_cache) + head * params.capacity_blocks * block_elements;
  const int64_t end = params.input_pos + params.tokens;
  for (int64_t position = params.input_pos; position < end;) {
    const int64_t lane = position % kMicroBlock;
    const int64_t count = std::min(kMicroBlock - lane, end - position);
    Element* key_block = key_blocks + position / kMicroBlock * block_elements;
    Element* value_block = value_blocks + position / kMicroBlock * block_elements;
    for (int64_t d = 0; d < depth; ++d) {
      Element* row = key_block + d * kMicroBlock;
      for (int64_t i = 0; i < count; ++i) row[lane + i] = key[i * depth + d];
      for (int64_t i = lane + count; i < kMicroBlock; ++i) row[i] = Element{};
    }
    std::memcpy(value_block + lane * depth, value, count * depth * sizeof(Element));
    std::memset(value_block + (lane + count) * depth, 0, (kMicroBlock - lane - count) * depth * sizeof(Element));
    key += count * depth;
    value += count * depth;
    position += count;
  }
}

// [e - 12, e + 12) of one channel, as doubles: the last 12 lanes of one micro-block and the first 12 of the next.
template <typename Element>
void load_span(const Element* before, const Element* after, double* x) {
  for (int64_t i = 0; i < kBoundaryReach; ++i) {
    x[i] = to_float(before[kMicroBlock - kBoundaryReach + i]);
    x[kBoundaryReach + i] = to_float(after[i]);
  }
}

// Largest 1 - cosine over the gaps [e - 8, e + 8]. Sums stand for means: their cosine is the same.
template <typename Element>
double best_gap_score(const Params& params, const Tensors& tensors, int64_t edge) {
  constexpr int64_t kSpan = 2 * kBoundaryReach;          // tokens
  constexpr int64_t kGaps = 2 * kBoundarySpan + 1;       // candidate gaps
  constexpr int64_t kWindows = kGaps + kBoundaryWindow;  // windows of 4 tokens that start in the span
  static_assert(kWindows + kBoundaryWindow - 1 == kSpan);
  const int64_t depth = params.head_dim;
  const int64_t block_elements = kMicroBlock * depth;
  double dots[kGaps] = {};
  double squares[kWindows] = {};
  for (int64_t head = 0; head < params.kv_heads; ++head) {
    const Element* after = static_cast<const Element*>(tensors.key_cache) +
                           (head * params.capacity_blocks + edge / kMicroBlock) * block_elements;
    const Element* before = after - block_elements;
    for (int64_t d = 0; d < depth; ++d) {
      double x[kSpan];
      double window[kWindows];
      load_span(before + d * kMicroBlock, after + d * kMicroBlock, x);
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

constexpr float kLargestHalf = 65504.0f;

template <typename Element>
void summarize_head_of(const Params& params, const Tensors& tensors, int64_t head) {
  const int64_t depth = params.head_dim;
  const int64_t vectors = summary_vectors(params.pooling);
  const int64_t end = (params.input_pos + params.tokens) / kMicroBlock;
  for (int64_t block = params.input_pos / kMicroBlock; block < end; ++block) {
    const int64_t index = head * params.capacity_blocks + block;
    const Element* keys = static_cast<const Element*>(tensors.key_cache) + index * kMicroBlock * depth;
    Element* summary = static_cast<Element*>(tensors.summaries) + index * vectors * depth;
    for (int64_t d = 0; d < depth; ++d, keys += kMicroBlock) {
      if (params.pooling == Pooling::kMinMax) {
        float low = to_float(keys[0]);
        float high = low;
        for (int64_t i = 1; i < kMicroBlock; ++i) {
          const float x = to_float(keys[i]);
          low = x < low ? x : low;
          high = x > high ? x : high;
        }
        from_float(low, summary + d);
        from_float(high, summary + depth + d);
      } else {
        float sum = 0.0f;
        for (int64_t i = 0; i < kMicroBlock; ++i) sum += to_float(keys[i]);
        const float mean = sum * (1.0f / kMicroBlock);
        from_float(mean, summary + d);
        if (params.pooling == Pooling::kMoments) {
          float squares = 0.0f;
          for (int64_t i = 0; i < kMicroBlock; ++i) {
            const float deviation = to_float(keys[i]) - mean;
            squares += deviation * deviation;
          }
          const float variance = squares * (1.0f / kMicroBlock);
          from_float(params.dtype == Dtype::kHalf ? std::min(variance, kLargestHalf) : variance, summary + depth + d);
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
  params.dtype == Dtype::kHalf ? summarize_head_of<uint16_t>(params, tensors, head)
                               : summarize_head_of<float>(params, tensors, head);
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
      const double score = params.dtype == Dtype::kHalf ? best_gap_score<uint16_t>(params, tensors, edge)
                                                        : best_gap_score<float>(params, tensors, edge);
      cut = score > static_cast<double>(params.boundary_threshold);
    }
    tensors.boundaries[block] = cut ? 1 : 0;
  }
}

}  // namespace edgerun::dhsa
