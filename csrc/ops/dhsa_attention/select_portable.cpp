// Which micro-blocks a group of queries attends: a window, everything, or the best chunks within the budget.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "csrc/base/prefetch.h"
#include "csrc/ops/dhsa_attention/kernels.h"
#include "csrc/ops/dhsa_attention/state.h"

namespace edgerun::dhsa {
namespace {

int64_t blocks_for(int64_t tokens) { return (tokens + kMicroBlock - 1) / kMicroBlock; }

bool attends_densely(const Params& params, const Group& group) {
  return params.budget == 0 || group.end <= params.budget || (params.tokens >= 2 && params.tokens <= params.dense_tail);
}

int64_t group_size(const Params& params) { return params.query_heads / params.kv_heads; }

// Whether a chunk starts at this micro-block. Every 64 tokens one does, whatever the flags say: lists rest on it.
bool starts_chunk(const Tensors& tensors, int64_t block) {
  return block % (kMaxChunk / kMicroBlock) == 0 || tensors.boundaries[block] != 0;
}

// Columns of scores: one for every pooled query, in whole vectors.
int64_t score_stride(int64_t pooled) { return round_up(pooled, kernels().lanes); }

constexpr float kLog2[kMaxChunk / kMicroBlock + 1] = {0.0f, 0.0f, 1.0f, 1.58496250f, 2.0f};  // of 1 to 4

// Most vectors that a group's queries are pooled into.
int64_t most_pooled(const Params& params) {
  if (params.query_pooling == QueryPooling::kQueryMean) return 1;
  const int64_t rows = std::min(params.tile, params.tokens);
  return group_size(params) * ((rows + kMicroBlock - 2) / kMicroBlock + 1);  // rows may begin inside a segment
}

// Adds `rows` query rows to sum, in order.
void add_rows(const Params& params, const Tensors& tensors, int64_t query_head, int64_t first_row, int64_t rows,
              float* sum) {
  const int64_t depth = params.head_dim;
  const int64_t offset = (query_head * params.tokens + first_row) * depth;
  const auto add = [&]<typename Element>(const Element* query) {
    for (int64_t row = 0; row < rows; ++row, query += depth) {
      for (int64_t d = 0; d < depth; ++d) sum[d] += to_float(query[d]);
    }
  };
  params.dtype == Dtype::kHalf ? add(static_cast<const uint16_t*>(tensors.query) + offset)
                               : add(static_cast<const float*>(tensors.query) + offset);
}

void divide(float* sum, int64_t depth, int64_t count) {
  for (int64_t d = 0; d < depth; ++d) sum[d] /= static_cast<float>(count);
}

// Floats of a pooled query: as it meets a summary's vectors one after the other, or once when they are two bounds.
int64_t pooled_width(const Params& params) {
  return params.pooling == Pooling::kMoments ? 2 * params.head_dim : params.head_dim;
}

// q -> [scale q, 1/2 scale^2 q^2] log2(e): its product with [mean, variance] is t(b) in log2 units. Rows move from the
// last to the first, in place.
void expand_for_moments(const Params& params, int64_t count, float* pooled) {
  constexpr float kLog2E = 1.44269504f;
  const int64_t depth = params.head_dim;
  for (int64_t q = count - 1; q >= 0; --q) {
    const float* source = pooled + q * depth;
    float* target = pooled + q * 2 * depth;
    for (int64_t d = depth - 1; d >= 0; --d) {
      const float x = params.scale * source[d];
      target[depth + d] = 0.5f * kLog2E * x * x;
    }
    for (int64_t d = depth - 1; d >= 0; --d) target[d] = params.scale * kLog2E * source[d];
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

// The pooled queries of a group against the summaries of one KV head. Scores lie as [micro-blocks, stride], zero in the
// columns that no query has.
class Scorer {
 public:
  Scorer(const Params& params, const Tensors& tensors, int64_t head, const float* queries, int64_t pooled, float* rows)
      : params_(params),
        queries_(queries),
        pooled_(pooled),
        stride_(score_stride(pooled)),
        row_elements_(summary_vectors(params.pooling) * params.head_dim),
        rows_(reinterpret_cast<uint16_t*>(rows)),
        summaries_(static_cast<const uint16_t*>(tensors.summaries) + head * params.capacity_blocks * row_elements_) {}

  int64_t pooled() const { return pooled_; }
  int64_t stride() const { return stride_; }

  // Of micro-blocks [0, count).
  void score_first(int64_t count, float* scores) const {
    clear(count, scores);
    // A token finds its summaries cold. Rows scored side by side are read out of order, which hides from the CPU that
    // they are one stream; so about a page of them is asked for, in order, before it is scored. One line of the pages
    // after the next comes with it: finding where a page lies takes as long as reading some of it.
    constexpr int64_t kAhead = 2 * kSmallPage;
    const bool cold = params_.tokens == 1;
    const int64_t page = std::clamp(kSmallPage / row_bytes(1), kRowsAtOnce / 4, kRowsAtOnce);
    const int64_t most = cold ? page : count;
    for (int64_t first = 0; first < count; first += most) {
      const int64_t rows = std::min(most, count - first);
      const uint16_t* source = summaries_ + first * row_elements_;
      if (cold) {
        const char* bytes = reinterpret_cast<const char*>(source);
        prefetch(bytes + kAhead, std::min(row_bytes(rows), row_bytes(count - first) - kAhead), kSmallPage);
        prefetch(bytes, row_bytes(rows));
      }
      score(source, rows, scores + first * stride_);
    }
  }

  // Of the micro-blocks of a list.
  void score_listed(const uint16_t* ids, int64_t count, float* scores) const {
    clear(count, scores);
    for (int64_t first = 0; first < count; first += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, count - first);
      for (int64_t i = 0; i < rows; ++i) prefetch(summaries_ + ids[first + i] * row_elements_, row_bytes(1));
      for (int64_t i = 0; i < rows; ++i) {
        std::copy_n(summaries_ + ids[first + i] * row_elements_, row_elements_, rows_ + i * row_elements_);
      }
      score(rows_, rows, scores + first * stride_);
    }
  }

  static int64_t scratch_floats(const Params& params) {
    return kRowsAtOnce * summary_vectors(params.pooling) * params.head_dim / 2;
  }

 private:
  static constexpr int64_t kRowsAtOnce = 16;

  int64_t row_bytes(int64_t rows) const { return rows * row_elements_ * static_cast<int64_t>(sizeof(uint16_t)); }

  void clear(int64_t count, float* scores) const {
    if (pooled_ != stride_) std::fill_n(scores, count * stride_, 0.0f);
  }

  void score(const uint16_t* rows, int64_t count, float* scores) const {
    kernels().score(queries_, pooled_, rows, count, pooled_width(params_), params_.pooling == Pooling::kMinMax, scores,
                    stride_);
  }

  const Params& params_;
  const float* queries_;
  int64_t pooled_;
  int64_t stride_;
  int64_t row_elements_;
  uint16_t* rows_;
  const uint16_t* summaries_;
};

// Candidates, ascending: runs of micro-blocks that share a score. Scores are kept as integers of the same order.
struct Ranking {
  int32_t* keys;
  int32_t* counts;
  int32_t* firsts;
  int64_t size = 0;

  static constexpr int64_t kFloats = 3;  // of scratch per micro-block

  void add(float score, int64_t first, int64_t count) {
    score += 0.0f;  // -0 and 0 are one score
    int32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    keys[size] = bits >= 0 ? bits : bits ^ 0x7fffffff;
    counts[size] = static_cast<int32_t>(count);
    firsts[size++] = static_cast<int32_t>(first);
  }
};

// Micro-blocks of the candidates whose key is at least `least`.
int64_t count_at_least(const Ranking& ranking, int32_t least) {
  int32_t total = 0;
  for (int64_t i = 0; i < ranking.size; ++i) {
    total += -static_cast<int32_t>(ranking.keys[i] >= least) & ranking.counts[i];  // no branch: compilers vectorise it
  }
  return total;
}

// Writes the best candidates' micro-blocks, `room` of them, ascending: whole candidates in the order (score descending,
// id ascending), and of the first that does not fit its leading micro-blocks. The key at which the room is full is
// found by bisection, so nothing is sorted.
int64_t take_best(const Ranking& ranking, int64_t room, uint16_t* ids) {
  if (room == 0) return 0;
  int64_t low = *std::min_element(ranking.keys, ranking.keys + ranking.size);  // at least `room` are not below it
  int64_t high = *std::max_element(ranking.keys, ranking.keys + ranking.size);
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    const int64_t found = count_at_least(ranking, static_cast<int32_t>(middle));
    if (found >= room) low = middle;
    if (found < room) high = middle - 1;
    if (found == room) break;
  }
  const int64_t above = low < INT32_MAX ? count_at_least(ranking, static_cast<int32_t>(low + 1)) : 0;
  int64_t equal = room - above;  // for those at the key itself
  int64_t count = 0;
  for (int64_t i = 0; i < ranking.size; ++i) {
    if (ranking.keys[i] < low) continue;
    int64_t taken = ranking.counts[i];
    if (ranking.keys[i] == low) equal -= taken = std::min(taken, equal);
    for (int64_t k = 0; k < taken; ++k) ids[count++] = static_cast<uint16_t>(ranking.firsts[i] + k);
  }
  return count;
}

// A chunk's score for one pooled query by all poolings but kMoments, from its micro-blocks' scores.
float plain_score(Pooling pooling, const float* scores, int64_t stride, int64_t count, float origin) {
  float total = scores[0];
  for (int64_t i = 1; i < count; ++i) {
    const float score = scores[i * stride];
    total = pooling == Pooling::kMinMax ? std::max(total, score) : total + score;
  }
  if (pooling == Pooling::kMinMax) return total;
  const float length = static_cast<float>(count);
  const float mean = total / length - origin;
  return pooling == Pooling::kMean ? mean : mean * std::sqrt(static_cast<float>(kMicroBlock) * length);
}

// What every score of a pooled query is measured from: the logarithm of the sum of its exponentials over [0, blocks),
// with kCentred the mean, else 0.
void score_origins(const Params& params, const Scorer& scorer, int64_t blocks, const float* scores, float* origins) {
  if (params.pooling == Pooling::kMoments) {
    kernels().mass(scores, scorer.stride(), blocks, origins);
    return;
  }
  std::fill_n(origins, scorer.stride(), 0.0f);
  if (params.pooling != Pooling::kCentred) return;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t q = 0; q < scorer.stride(); ++q) origins[q] += scores[block * scorer.stride() + q];
  }
  for (int64_t q = 0; q < scorer.stride(); ++q) origins[q] /= static_cast<float>(blocks);
}

// The chunks of [0, blocks) that reach beyond the sink, each scored by its micro-blocks from the sink on.
void rank_chunks(const Params& params, const Tensors& tensors, const Scorer& scorer, int64_t blocks,
                 int64_t sink_blocks, const float* scores, const float* origins, Ranking* ranking) {
  const int64_t stride = scorer.stride();
  const auto largest_share = kernels().largest_share;
  for (int64_t first = 0; first < blocks;) {
    int64_t end = first + 1;
    while (end < blocks && !starts_chunk(tensors, end)) ++end;
    const int64_t start = std::max(first, sink_blocks);
    first = end;
    if (end <= sink_blocks) continue;
    const int64_t length = end - start;
    const float* own = scores + start * stride;
    float best = -INFINITY;
    if (params.pooling == Pooling::kMoments) {
      best = largest_share(own, stride, length, origins, scorer.pooled()) - kLog2[length];
    } else {
      for (int64_t q = 0; q < scorer.pooled(); ++q) {
        const float score = plain_score(params.pooling, own + q, stride, length, origins[q]);
        best = score > best ? score : best;
      }
    }
    ranking->add(best, start, length);
  }
}

constexpr float kLog2OfMicroBlock = 4.0f;

// What a second ranking reads of the pooled queries of one row: the channels where one of them is largest.
struct Refinement {
  float* weights;     // [Q, count], in log2 units
  int32_t* channels;  // [count], ascending
  float* magnitudes;  // [D]
  float* masses;      // [Q]
  int64_t count;
};

int64_t refinement_floats(const Params& params) {
  if (params.refine == 0 || params.pooling != Pooling::kMoments) return 0;
  return group_size(params) * (params.head_dim + 1) + 2 * params.head_dim;
}

Refinement refinement_at(const Params& params, float* scratch) {
  float* channels = scratch + group_size(params) * params.head_dim;
  float* magnitudes = channels + params.head_dim;
  return Refinement{scratch, reinterpret_cast<int32_t*>(channels), magnitudes, magnitudes + params.head_dim, 0};
}

// Moves the largest channels of expanded queries [scale q, 1/2 scale^2 q^2] into the refinement: they become 0 here.
void take_largest_channels(const Params& params, int64_t pooled, float* queries, Refinement* refinement) {
  const int64_t depth = params.head_dim;
  const auto strongest = [&](int64_t d) {
    float most = 0.0f;  // a NaN is passed over: it stays, and its query counts for nothing
    for (int64_t q = 0; q < pooled; ++q) most = std::max(most, std::fabs(queries[q * 2 * depth + d]));
    return most;
  };
  float* magnitudes = refinement->magnitudes;
  for (int64_t d = 0; d < depth; ++d) magnitudes[d] = strongest(d);
  const int64_t kept = std::min(params.refine, depth);
  std::nth_element(magnitudes, magnitudes + (depth - kept), magnitudes + depth);
  const float least = magnitudes[depth - kept];
  for (int64_t d = 0; d < depth; ++d) {
    if (strongest(d) >= least) refinement->channels[refinement->count++] = static_cast<int32_t>(d);
  }
  for (int64_t q = 0; q < pooled; ++q) {
    float* linear = queries + q * 2 * depth;
    for (int64_t c = 0; c < refinement->count; ++c) {
      const int64_t d = refinement->channels[c];
      refinement->weights[q * refinement->count + c] = linear[d];
      linear[d] = linear[depth + d] = 0.0f;
    }
  }
}

// Asks for what channel_masses reads of a micro-block of keys.
inline __attribute__((always_inline)) void prefetch_channels(const Params& params, const Refinement& refinement,
                                                             const char* block) {
  const bool integers = params.cache_dtype == Dtype::kInt8;
  const int64_t channel_bytes = kMicroBlock * (integers ? 1 : params.cache_dtype == Dtype::kHalf ? 2 : 4);
  for (int64_t c = 0; c < refinement.count; ++c) {
    prefetch(block + refinement.channels[c] * channel_bytes, 1);
  }
  const int64_t bytes = params.head_dim * channel_bytes;
  if (integers) prefetch(block + bytes, key_block_bytes(Dtype::kInt8, params.head_dim) - bytes);  // the scales
}

// Ranks `count` listed micro-blocks again, one by one. `rest` has the queries without their largest channels.
void rank_again(const Params& params, const Tensors& tensors, int64_t head, const Scorer& rest,
                const Refinement& refinement, const float* origins, const uint16_t* ids, int64_t count, float* scores,
                Ranking* ranking) {
  const int64_t depth = params.head_dim;
  const int64_t block_bytes = key_block_bytes(params.cache_dtype, depth);
  const char* keys = static_cast<const char*>(tensors.key_cache) + head * params.capacity_blocks * block_bytes;
  const auto channel_masses = kernels().channel_masses;
  rest.score_listed(ids, count, scores);
  ranking->size = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + 1 < count) prefetch_channels(params, refinement, keys + ids[i + 1] * block_bytes);
    channel_masses(refinement.weights, rest.pooled(), refinement.channels, refinement.count,
                   keys + ids[i] * block_bytes, depth, params.cache_dtype, refinement.masses);
    float best = -INFINITY;
    for (int64_t q = 0; q < rest.pooled(); ++q) {
      const float score = scores[i * rest.stride() + q] - origins[q] + refinement.masses[q] - kLog2OfMicroBlock;
      best = score > best ? score : best;
    }
    ranking->add(best, ids[i], 1);
  }
}

int32_t append_range(uint16_t* ids, int64_t count, int64_t first, int64_t end) {
  for (int64_t block = first; block < end; ++block) ids[count++] = static_cast<uint16_t>(block);
  return static_cast<int32_t>(count);
}

// Start of what a group always attends, in micro-blocks: the last cut that was decided before the group began.
int64_t local_start(const Tensors& tensors, int64_t start) {
  int64_t block = start < kBoundaryReach ? 0 : (start - kBoundaryReach) / kMicroBlock;
  while (!starts_chunk(tensors, block)) --block;
  return block;
}

}  // namespace

int64_t select_scratch_floats(const Params& params) {
  if (params.budget == 0 || params.window > 0 || params.selector != Selector::kChunk) return 0;
  const int64_t blocks = blocks_for(params.input_pos + params.tokens);
  const int64_t pooled = most_pooled(params);
  return (blocks + 1) * (Ranking::kFloats + score_stride(pooled)) + pooled * pooled_width(params) +
         Scorer::scratch_floats(params) + refinement_floats(params);
}

int64_t list_capacity(const Params& params) {
  if (params.budget == 0 || params.window > 0) return 0;
  const int64_t blocks = params.budget / kMicroBlock + 1;  // what is forced need not begin or end at a micro-block
  const int64_t again = params.refine > 0 ? std::max(kRefineFactor * blocks, kRefineLeast) : 0;
  return std::min(blocks + again, params.capacity_blocks);
}

List select_group(const Params& params, const Tensors& tensors, int64_t head, const Group& group, uint16_t* ids,
                  float* scratch) {
  const int64_t end = blocks_for(group.end);
  const auto range = [&](int64_t first) {
    return List{static_cast<int32_t>(first), static_cast<int32_t>(end - first)};
  };
  if (params.window > 0) return range(std::max<int64_t>(0, group.start - params.window + 1) / kMicroBlock);
  if (attends_densely(params, group)) return range(0);

  const int64_t local = local_start(tensors, group.start);
  const int64_t sink = std::min(params.sink / kMicroBlock, local);
  const int64_t forced_tokens = sink * kMicroBlock + group.end - local * kMicroBlock;
  const int64_t room_tokens = params.budget - forced_tokens - (params.tokens == 1 ? params.reselect - 1 : 0);
  const int64_t extra = std::clamp<int64_t>(room_tokens / kMicroBlock, 0, local - sink);
  if (extra == local - sink) return range(0);
  append_range(ids, 0, 0, sink);
  if (params.selector == Selector::kRecent) return List{kListed, append_range(ids, sink, local - extra, end)};

  const int64_t most = most_pooled(params);
  const int64_t blocks = blocks_for(params.input_pos + params.tokens) + 1;
  float* scores = scratch;
  float* origins = scores + (blocks - 1) * score_stride(most);
  int32_t* integers = reinterpret_cast<int32_t*>(origins + score_stride(most));
  Ranking ranking{integers, integers + blocks, integers + 2 * blocks};
  float* queries = reinterpret_cast<float*>(integers + Ranking::kFloats * blocks);
  float* rows = queries + most * pooled_width(params);

  const int64_t pooled = pool_queries(params, tensors, head, group, queries);
  if (params.pooling == Pooling::kMoments) expand_for_moments(params, pooled, queries);
  const Scorer scorer(params, tensors, head, queries, pooled, rows);
  scorer.score_first(local, scores);
  score_origins(params, scorer, local, scores, origins);
  rank_chunks(params, tensors, scorer, local, sink, scores, origins, &ranking);

  const bool again = params.refine > 0 && params.pooling == Pooling::kMoments && group.rows == 1 && extra > 0;
  const int64_t room = again ? std::min(local - sink, std::max(kRefineFactor * extra, kRefineLeast)) : extra;
  take_best(ranking, room, ids + sink);
  if (again) {
    Refinement refinement = refinement_at(params, rows + Scorer::scratch_floats(params));
    take_largest_channels(params, pooled, queries, &refinement);
    rank_again(params, tensors, head, scorer, refinement, origins, ids + sink, room, scores, &ranking);
    take_best(ranking, extra, ids + sink);
  }
  return List{kListed, append_range(ids, sink + extra, local, end)};
}

namespace {

// A KV head's row of `selection`.
struct Kept {
  enum Field { kLast, kCallsLeft, kLocal, kCount };
  static int32_t* row(const Params& params, const Tensors& tensors, int64_t head) {
    return tensors.selection + head * kept_integers(params.budget);
  }
};

constexpr int32_t kNoCall = -2;  // no position, nor one before the first

}  // namespace

bool keeps_lists(const Params& params) { return params.reselect > 1 && params.budget > 0 && params.window == 0; }

List kept_list(const Params& params, const Tensors& tensors, int64_t head, const Group& group, int64_t last,
               uint16_t* ids) {
  const List none{kListed, 0};
  if (!keeps_lists(params) || params.tokens != 1 || attends_densely(params, group)) return none;
  const int32_t* kept = Kept::row(params, tensors, head);
  const int64_t count = kept[Kept::kCount], local = kept[Kept::kLocal], end = blocks_for(group.end);
  if (kept[Kept::kLast] != last || (last < group.start && kept[Kept::kCallsLeft] <= 0)) return none;
  const int64_t sink = params.sink / kMicroBlock, room = params.budget / kMicroBlock;
  // Memory that no call wrote can hold anything: a list is taken only if it is one, within the budget.
  if (local < sink || local >= end || count < 0 || count > room || kept[Kept::kCallsLeft] >= params.reselect)
    return none;
  if (sink + count + end - local > room + 1) return none;
  append_range(ids, 0, 0, sink);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = kept[kKeptHeader + i];
    if (id < sink || id >= local || (i > 0 && id <= ids[sink + i - 1])) return none;
    ids[sink + i] = static_cast<uint16_t>(id);
  }
  return List{kListed, append_range(ids, sink + count, local, end)};
}

void keep_list(const Params& params, const Tensors& tensors, int64_t head, const Group& group, const List& list,
               const uint16_t* ids) {
  int32_t* kept = Kept::row(params, tensors, head);
  if (list.first != kListed) {
    kept[Kept::kLast] = kNoCall;
    return;
  }
  const int64_t local = local_start(tensors, group.start);
  const int64_t sink = params.sink / kMicroBlock;
  const int64_t count = list.count - sink - (blocks_for(group.end) - local);
  kept[Kept::kLast] = static_cast<int32_t>(group.start);
  kept[Kept::kCallsLeft] = static_cast<int32_t>(params.reselect - 1);
  kept[Kept::kLocal] = static_cast<int32_t>(local);
  kept[Kept::kCount] = static_cast<int32_t>(count);
  std::copy_n(ids + sink, count, kept + kKeptHeader);
}

void serve_kept_list(const Params& params, const Tensors& tensors, int64_t head) {
  int32_t* kept = Kept::row(params, tensors, head);
  kept[Kept::kLast] = static_cast<int32_t>(params.input_pos);
  --kept[Kept::kCallsLeft];
}

void forget_lists(const Params& params, const Tensors& tensors) {
  for (int64_t head = 0; head < params.kv_heads; ++head) Kept::row(params, tensors, head)[Kept::kLast] = kNoCall;
}

}  // namespace edgerun::dhsa
