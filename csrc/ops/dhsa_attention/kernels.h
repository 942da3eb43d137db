// The inner kernels of dhsa_attention, and the table of their variants: one source (kernels_impl.h), compiled once
// for each instruction set. Dispatch, tests and benchmarks all walk this table, so an untested variant cannot exist.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/ops/dhsa_attention/dhsa_attention.h"

namespace edgerun::dhsa {

inline constexpr int64_t kStepBlocks = 8;  // micro-blocks per step of the online softmax
inline constexpr int64_t kStepKeys = kStepBlocks * kMicroBlock;
inline constexpr int64_t kTaskRows = 256;  // most rows of a task, unless one token alone has more query heads

inline constexpr int64_t kGapSums = 24;  // a boundary score looks at 17 gaps between 21 windows

// Consecutive tokens of one KV head's query heads against one list. Row = token * group + head within the group.
struct AttendTask {
  const void* query;          // first token of the task, first query head of the KV head; [group, ...] by head_stride
  int64_t query_head_stride;  // elements
  const void* key_blocks;     // [M, D, 16] of this KV head, in the cache's dtype
  const void* value_blocks;   // [M, 16, D]; int8 ones as dhsa_attention.h says
  void* out;                  // first token of the task, first query head: [tokens, group, D] by out_token_stride
  int64_t out_token_stride;   // elements
  const uint16_t* ids;        // micro-blocks, ascending; null for the `count` of them from `first` on
  int64_t first;
  int64_t count;
  int64_t tokens;
  int64_t group;  // query heads per KV head
  int64_t head_dim;
  int64_t first_position;  // of the first token
  int64_t window;
  float scale;
  float softcap;
  Dtype dtype;
  Dtype cache_dtype;
  float* scratch;  // attend_scratch_floats(...), aligned to 64 bytes
};

// Scores of selection lie as [micro-blocks, stride], a query after the other; stride is a multiple of `lanes`.
struct Kernels {
  const char* name;
  int64_t lanes;          // floats in a vector
  bool integer_products;  // over 8-bit caches: queries and weights are rounded to 16 bits
  void (*attend)(const AttendTask& task);
  // scores[r * stride + q] = queries[q] . rows[r], queries [pooled, width], rows [count, width] in halves; with
  // `bounds` the rows are [count, 2, width] and the score is sum_d max(q_d low_d, q_d high_d).
  void (*score)(const float* queries, int64_t pooled, const uint16_t* rows, int64_t count, int64_t width, bool bounds,
                float* scores, int64_t stride);
  // masses[q] = log2 sum_r 2^scores[r * stride + q] over `count` rows, for every column.
  void (*mass)(const float* scores, int64_t stride, int64_t count, float* masses);
  // The largest over q < pooled of log2 sum_r 2^scores[r * stride + q] - masses[q]; a NaN is passed over.
  float (*largest_share)(const float* scores, int64_t stride, int64_t count, const float* masses, int64_t pooled);
  // masses[q] = log2 of sum_i 2^(sum_c weights[q][c] key[channels[c]][i]) over the 16 tokens i of a micro-block [D,
  // 16].
  void (*channel_masses)(const float* weights, int64_t queries, const int32_t* channels, int64_t count,
                         const void* key_block, int64_t head_dim, Dtype cache_dtype, float* masses);
  // Adds to kGapSums dots and squares what two micro-blocks of keys around an edge give to boundary scores.
  void (*gap_sums)(const void* before, const void* after, int64_t head_dim, Dtype cache_dtype, double* dots,
                   double* squares);
};

static inline constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Rows of the largest task, and the scratch of one worker: queries, outputs, one step of scores, row sums and maxima;
// of a narrower cache also one step of keys and values widened, or, with integer products, what kernels_int8_neon.h
// keeps.
inline constexpr int64_t task_tokens(int64_t group) { return group >= kTaskRows ? 1 : kTaskRows / group; }
inline constexpr int64_t int8_scratch_floats(int64_t rows, int64_t head_dim) {
  const int64_t width = round_up(head_dim, kMicroBlock);
  const int64_t groups = round_up(head_dim, kScaleChannels) / kScaleChannels;
  return kStepKeys * (width / 2 + groups + 1) + rows * (width / 2 + groups + kStepKeys / 2 + 1) + 2 * kMicroBlock;
}
inline constexpr int64_t attend_scratch_floats(int64_t rows, int64_t head_dim, Dtype cache) {
  const int64_t width = round_up(head_dim, kMicroBlock);
  const int64_t widened = cache == Dtype::kFloat ? 0 : 2 * kStepKeys * width;
  const int64_t digits = cache == Dtype::kInt8 ? int8_scratch_floats(rows, head_dim) : 0;
  return round_up(rows * (2 * width + kStepKeys + kMicroBlock) + round_up(rows, kMicroBlock), kMicroBlock) +
         (widened > digits ? widened : digits);
}

// The variants that this CPU can run, the fastest first and "portable" last.
int64_t kernel_count();
const Kernels& kernel_at(int64_t index);

// The variant in use: the fastest unless a test or a benchmark chose another. Not for use while an op runs.
const Kernels& kernels();
bool use_kernels(const char* name);

}  // namespace edgerun::dhsa
