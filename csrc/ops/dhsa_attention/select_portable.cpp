// Which micro-blocks a group of queries attends: a window, everything, or the best chunks within the budget.
#include <algorithm>
#include <cmath>

#include "csrc/ops/dhsa_attention/kernels.h"
#include "csrc/ops/dhsa_attention/state.h"

namespace edgerun::dhsa {
namespace {

int64_t blocks_for(int64_t tokens) { return (tokens + kMicroBlock - 1) / kMicroBlock; }

bool attends_densely(const Params& params, const Group& group) {
  return params.budget == 0 || group.end <= params.budget || (params.tokens >= 2 && params.tokens <= params.dense_tail);
}

int64_t group_size(const Params& params) { return params.query_heads / params.kv_heads; }

// Most vectors that a group's queries are pooled into.
int64_t most_pooled(const Params& params) {
  if (params.query_pooling == QueryPooling::kQueryMean) return 1;
  const int64_t rows = std::min(params.tile, params.tokens);
  return group_size(params) * (blocks_for(rows) + 1);  // rows that begin inside a segment touch one more
}

// Adds `rows` query rows to sum, in order.
void add_rows(const Params& params, const Tensors& tensors, int64_t query_head, int64_t first_row, int64_t rows,
              float* sum) {
  const int64_t depth = params.head_dim;
  const int64_t offset = (query_head * params.tokens + first_row) * depth;
  for (int64_t row = 0; row < rows; ++row) {
    if (params.dtype == Dtype::kHalf) {
      const uint16_t* query = static_cast<const uint16_t*>(tensors.query) + offset + row * depth;
      for (int64_t d = 0; d < depth; ++d) sum[d] += half_to_float(query[d]);
    } else {
      const float* query = static_cast<const float*>(tensors.query) + offset + row * depth;
      for (int64_t d = 0; d < depth; ++d) sum[d] += query[d];
    }
  }
}

void divide(float* sum, int64_t depth, int64_t count) {
  for (int64_t d = 0; d < depth; ++d) sum[d] /= static_cast<float>(count);
}

// Floats of a pooled query: as it meets a summary's vectors one after the other, or once when they are two bounds.
int64_t pooled_width(const Params& params) {
  return params.pooling == Pooling::kMoments ? 2 * params.head_dim : params.head_dim;
}

// q -> [scale q, 1/2 scale^2 q^2]: its product with [mean, variance] is t(b). Rows move from the last to the first, in
// place.
void expand_for_moments(const Params& params, int64_t count, float* pooled) {
  const int64_t depth = params.head_dim;
  for (int64_t q = count - 1; q >= 0; --q) {
    const float* source = pooled + q * depth;
    float* target = pooled + q * 2 * depth;
    for (int64_t d = depth - 1; d >= 0; --d) {
      const float x = params.scale * source[d];
      target[depth + d] = 0.5f * x * x;
    }
    for (int64_t d = depth - 1; d >= 0; --d) target[d] = params.scale * source[d];
  }
}

// Pools the group's queries into [count, D]; returns count.
int64_t pool_queries(const Params& params, const Tensors& tensors, int64_t head, const Group& group, float* pooled) {
  const int64_t depth = params.head_dim;
  const int64_t size = group_size(params);
  if (params.query_pooling == QueryPooling::kQueryMean) {
    std::fill_n(pooled, depth, 0.0f);
    for (int64_t h = 0; h < size; ++h) add_rows(params, tensors, head * size + h, group.first_row, group.rows, pooled);
    divide(pooled, depth, group.rows * size);
    return 1;
  }
  int64_t count = 0;
  for (int64_t h = 0; h < size; ++h) {
    for (int64_t position = group.start; position < group.end;) {
      const int64_t rows = std::min(kMicroBlock - position % kMicroBlock, group.end - position);
      float* mean = pooled + count * depth;
      std::fill_n(mean, depth, 0.0f);
      add_rows(params, tensors, head * size + h, group.first_row + position - group.start, rows, mean);
      divide(mean, depth, rows);
      position += rows;
      ++count;
    }
  }
  return count;
}

// Reads the summaries of one KV head, as floats, and scores pooled queries against them.
class Scorer {
 public:
  Scorer(const Params& params, const Tensors& tensors, int64_t head, const float* queries, int64_t count,
         float* scratch)
      : params_(params), kernels_(kernels()), queries_(queries), count_(count), widened_(scratch) {
    const int64_t offset = head * params.capacity_blocks * summary_vectors(params.pooling) * params.head_dim;
    summaries_ = static_cast<const char*>(tensors.summaries) + offset * element_bytes();
  }

  // scores[q] of one micro-block.
  void operator()(int64_t block, float* scores) const {
    const int64_t elements = summary_vectors(params_.pooling) * params_.head_dim;
    const char* summary = summaries_ + block * elements * element_bytes();
    const float* low = reinterpret_cast<const float*>(summary);
    if (params_.cache_dtype != Dtype::kFloat) {
      kernels_.widen(reinterpret_cast<const uint16_t*>(summary), widened_, elements);
      low = widened_;
    }
    const float* high = params_.pooling == Pooling::kMinMax ? low + params_.head_dim : nullptr;
    kernels_.score(queries_, count_, low, high, pooled_width(params_), scores);
  }

 private:
  int64_t element_bytes() const { return params_.cache_dtype == Dtype::kFloat ? 4 : 2; }

  const Params& params_;
  const Kernels& kernels_;
  const float* queries_;
  int64_t count_;
  float* widened_;
  const char* summaries_;
};

// A run of candidate micro-blocks that share a score.
struct Chunk {
  float score;
  uint16_t first;  // from the sink on
  uint16_t count;
};

// Heap order: the chunk that is taken next is the largest. A NaN score is ranked last: an order stays one.
bool taken_later(const Chunk& a, const Chunk& b) { return a.score != b.score ? a.score < b.score : a.first > b.first; }

// log(exp(a) + exp(b)) without overflow; NaN if either is.
float log_add(float a, float b) {
  if (std::isnan(b)) return b;  // std::max and std::min would return a
  const float high = std::max(a, b);
  return high == -INFINITY ? high : high + std::log1p(std::exp(std::min(a, b) - high));
}

// A micro-block's score joins its chunk's.
float combine(Pooling pooling, float a, float b) {
  if (pooling == Pooling::kMinMax) return std::max(a, b);
  return pooling == Pooling::kMoments ? log_add(a, b) : a + b;
}

// What every score of a pooled query is measured from: the mean score over [0, blocks), or the logarithm of the sum of
// its exponentials; 0 where scores stand alone.
void score_origins(const Params& params, const Scorer& scorer, int64_t pooled, int64_t blocks, float* scores,
                   float* origins) {
  const bool moments = params.pooling == Pooling::kMoments;
  std::fill_n(origins, pooled, moments ? -INFINITY : 0.0f);
  if (!moments && params.pooling != Pooling::kCentred) return;
  for (int64_t block = 0; block < blocks; ++block) {
    scorer(block, scores);
    for (int64_t q = 0; q < pooled; ++q) origins[q] = combine(params.pooling, origins[q], scores[q]);
  }
  for (int64_t q = 0; !moments && q < pooled; ++q) origins[q] /= static_cast<float>(blocks);
}

// Scores the chunks of [0, blocks) that reach beyond the sink, each by its micro-blocks from the sink on.
// Scratch: three floats per pooled query.
int64_t score_chunks(const Params& params, const Tensors& tensors, const Scorer& scorer, int64_t pooled, int64_t blocks,
                     int64_t sink_blocks, float* scratch, Chunk* chunks) {
  float* scores = scratch;
  float* sums = scratch + pooled;
  float* origins = scratch + 2 * pooled;
  score_origins(params, scorer, pooled, blocks, scores, origins);
  int64_t count = 0;
  for (int64_t first = 0; first < blocks;) {
    int64_t end = first + 1;
    while (end < blocks && tensors.boundaries[end] == 0) ++end;
    const int64_t start = std::max(first, sink_blocks);
    first = end;
    if (end <= sink_blocks) continue;
    const float length = static_cast<float>(end - start);
    for (int64_t block = start; block < end; ++block) {
      scorer(block, block == start ? sums : scores);
      if (block == start) continue;
      for (int64_t q = 0; q < pooled; ++q) {
        sums[q] = combine(params.pooling, sums[q], scores[q]);
      }
    }
    float best = -INFINITY;
    for (int64_t q = 0; q < pooled; ++q) {
      float score = sums[q];
      if (params.pooling == Pooling::kMoments) {
        score -= std::log(length) + origins[q];
      } else if (params.pooling != Pooling::kMinMax) {
        score = score / length - origins[q];
      }
      if (params.pooling == Pooling::kSqrt || params.pooling == Pooling::kCentred) {
        score *= std::sqrt(static_cast<float>(kMicroBlock) * length);
      }
      best = score > best ? score : best;
    }
    chunks[count++] = Chunk{best, static_cast<uint16_t>(start), static_cast<uint16_t>(end - start)};
  }
  return count;
}

// What a second ranking reads of the pooled queries of one row: per query its largest channels, scaled to log2 units.
struct Refinement {
  float* weights;     // [Q, D], the first counts[q] of a row
  int32_t* channels;  // [Q, D]
  int32_t* counts;    // [Q]
  float* magnitudes;  // [D]
};

int64_t refinement_floats(const Params& params) {
  if (params.refine == 0 || params.pooling != Pooling::kMoments) return 0;
  return group_size(params) * (2 * params.head_dim + 1) + params.head_dim;
}

Refinement refinement_at(const Params& params, float* scratch) {
  const int64_t vectors = group_size(params) * params.head_dim;
  int32_t* integers = reinterpret_cast<int32_t*>(scratch + vectors);
  return Refinement{scratch, integers, integers + vectors,
                    reinterpret_cast<float*>(integers + vectors + group_size(params))};
}

// Moves the largest channels of expanded queries [scale q, 1/2 scale^2 q^2] into the refinement: they become 0 here.
void take_largest_channels(const Params& params, int64_t pooled, float* queries, const Refinement& refinement) {
  const int64_t depth = params.head_dim;
  const int64_t kept = std::min(params.refine, depth);
  for (int64_t q = 0; q < pooled; ++q) {
    float* linear = queries + q * 2 * depth;
    float* magnitudes = refinement.magnitudes;
    for (int64_t d = 0; d < depth; ++d) magnitudes[d] = std::isnan(linear[d]) ? 0.0f : std::fabs(linear[d]);
    std::nth_element(magnitudes, magnitudes + (depth - kept), magnitudes + depth);
    const float least = magnitudes[depth - kept];
    int32_t count = 0;
    for (int64_t d = 0; d < depth; ++d) {
      if (!(std::fabs(linear[d]) >= least)) continue;
      refinement.weights[q * depth + count] = linear[d] * 1.44269504f;
      refinement.channels[q * depth + count++] = static_cast<int32_t>(d);
      linear[d] = linear[depth + d] = 0.0f;
    }
    refinement.counts[q] = count;
  }
}

// Scores `count` micro-blocks again, by ids, into ranked.
void refine_scores(const Params& params, const Tensors& tensors, int64_t head, const Scorer& rest, int64_t pooled,
                   const Refinement& refinement, const float* origins, const uint16_t* ids, int64_t count,
                   float* scores, Chunk* ranked) {
  const int64_t depth = params.head_dim;
  const int64_t block_bytes = key_block_bytes(params.cache_dtype, depth);
  const char* keys = static_cast<const char*>(tensors.key_cache) + head * params.capacity_blocks * block_bytes;
  const auto channel_mass = kernels().channel_mass;
  for (int64_t i = 0; i < count; ++i) {
    rest(ids[i], scores);
    float best = -INFINITY;
    for (int64_t q = 0; q < pooled; ++q) {
      float peak;
      float sum;
      channel_mass(refinement.weights + q * depth, refinement.channels + q * depth, refinement.counts[q],
                   keys + ids[i] * block_bytes, depth, params.cache_dtype, &peak, &sum);
      const float score = scores[q] - origins[q] + 0.69314718f * (peak + std::log2(sum) - 4.0f);
      best = score > best ? score : best;
    }
    ranked[i] = Chunk{best, ids[i], 1};
  }
}

int32_t append_range(uint16_t* ids, int64_t count, int64_t first, int64_t end) {
  for (int64_t block = first; block < end; ++block) ids[count++] = static_cast<uint16_t>(block);
  return static_cast<int32_t>(count);
}

// Start of what a group always attends, in micro-blocks: the last cut that was decided before the group began.
int64_t local_start(const Tensors& tensors, int64_t start) {
  int64_t block = start < kBoundaryReach ? 0 : (start - kBoundaryReach) / kMicroBlock;
  while (block > 0 && tensors.boundaries[block] == 0) --block;
  return block;
}

}  // namespace

bool scores_chunks(const Params& params) {
  if (params.window > 0 || params.selector != Selector::kChunk) return false;
  return !attends_densely(params, Group{0, params.tokens, params.input_pos, params.input_pos + params.tokens});
}

int64_t select_scratch_floats(const Params& params) {
  if (params.budget == 0 || params.window > 0 || params.selector != Selector::kChunk) return 0;
  const int64_t pooled = most_pooled(params);
  const int64_t chunk_floats = static_cast<int64_t>(sizeof(Chunk) / sizeof(float));
  return pooled * (pooled_width(params) + 3) + 2 * params.head_dim + chunk_floats * params.capacity_blocks +
         refinement_floats(params);
}

int32_t select_group(const Params& params, const Tensors& tensors, int64_t head, const Group& group, uint16_t* ids,
                     float* scratch) {
  const int64_t end = blocks_for(group.end);
  if (params.window > 0) {
    const int64_t first_token = std::max<int64_t>(0, group.start - params.window + 1);
    return append_range(ids, 0, first_token / kMicroBlock, end);
  }
  if (attends_densely(params, group)) return append_range(ids, 0, 0, end);

  const int64_t local = local_start(tensors, group.start);
  const int64_t sink = std::min(params.sink / kMicroBlock, local);
  const int64_t forced_tokens = sink * kMicroBlock + group.end - local * kMicroBlock;
  const int64_t extra = std::clamp<int64_t>((params.budget - forced_tokens) / kMicroBlock, 0, local - sink);
  if (extra == local - sink) return append_range(ids, 0, 0, end);
  int64_t count = append_range(ids, 0, 0, sink);
  if (params.selector == Selector::kRecent) return append_range(ids, count, local - extra, end);

  Chunk* chunks = reinterpret_cast<Chunk*>(scratch);
  float* pooled_queries = scratch + params.capacity_blocks * static_cast<int64_t>(sizeof(Chunk) / sizeof(float));
  float* widened = pooled_queries + most_pooled(params) * pooled_width(params);
  const int64_t pooled = pool_queries(params, tensors, head, group, pooled_queries);
  if (params.pooling == Pooling::kMoments) expand_for_moments(params, pooled, pooled_queries);
  const Scorer scorer(params, tensors, head, pooled_queries, pooled, widened);
  float* scores = widened + 2 * params.head_dim;
  const int64_t chunk_count = score_chunks(params, tensors, scorer, pooled, local, sink, scores, chunks);
  std::make_heap(chunks, chunks + chunk_count, taken_later);
  const bool again = params.refine > 0 && params.pooling == Pooling::kMoments && group.rows == 1;
  int64_t left = again ? std::min(local - sink, std::max(kRefineFactor * extra, kRefineLeast)) : extra;
  for (int64_t remaining = chunk_count; left > 0; --remaining) {
    std::pop_heap(chunks, chunks + remaining, taken_later);
    const Chunk& best = chunks[remaining - 1];
    const int64_t taken = std::min<int64_t>(best.count, left);
    count = append_range(ids, count, best.first, best.first + taken);
    left -= taken;
  }
  if (again && count > sink + extra) {
    const Refinement refinement = refinement_at(params, scores + 3 * most_pooled(params));
    take_largest_channels(params, pooled, pooled_queries, refinement);
    refine_scores(params, tensors, head, scorer, pooled, refinement, scores + 2 * pooled, ids + sink, count - sink,
                  scores, chunks);
    std::nth_element(chunks, chunks + extra, chunks + (count - sink),
                     [](const Chunk& a, const Chunk& b) { return taken_later(b, a); });
    for (int64_t i = 0; i < extra; ++i) ids[sink + i] = chunks[i].first;
    count = sink + extra;
  }
  std::sort(ids + sink, ids + count);
  return append_range(ids, count, local, end);
}

}  // namespace edgerun::dhsa
