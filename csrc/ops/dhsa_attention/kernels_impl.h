// The inner kernels of dhsa_attention, written once over the vector width. A variant file sets, then includes:
//   EDGERUN_VARIANT  its namespace and name          EDGERUN_LANES  floats in a vector register: 4, 8 or 16
//   EDGERUN_ROWS     query rows kept in registers    EDGERUN_WIDE   micro-blocks scored side by side
//   EDGERUN_DEEP     if 8-bit caches are multiplied as integers: rows of a product's sum, 4 or 8 (kernels_int8_neon.h)
// EDGERUN_ROWS * EDGERUN_WIDE * 16 / EDGERUN_LANES accumulators and what feeds them must fit in the register file.
//
//   S = (scale log2(e) Q) K^T,   P = 2^(S - m),   O += P V,   out = O / rowsum(P)   (online softmax, 128 keys a step)
//
// A row's result does not depend on which rows share its register tile or its task: every sum runs over d or over the
// list in order, and masked keys add exact zeros. Functions of the standard library stay out of this file: the linker
// could take the copy compiled for a wider instruction set for everyone's.

#include <cstdint>
#include <cstring>

#include "csrc/base/half.h"
#include "csrc/base/prefetch.h"
#include "csrc/base/vector.h"
#include "csrc/ops/dhsa_attention/kernels.h"
#include "csrc/ops/dhsa_attention/kernels_select_impl.h"
#if defined(EDGERUN_DEEP)
#include "csrc/ops/dhsa_attention/kernels_int8_neon.h"
#endif

namespace edgerun::dhsa::EDGERUN_VARIANT {
namespace {

#if defined(EDGERUN_DEEP)
constexpr bool kIntegerProducts = true;
#else
constexpr bool kIntegerProducts = false;
#endif
constexpr int kRows = EDGERUN_ROWS;
constexpr int kWide = EDGERUN_WIDE;
constexpr int kPerBlock = 16 / kLanes;  // vectors in 16 floats
constexpr int64_t kPanel = 64;          // head dimensions per pass over the keys: 4 micro-blocks x 64 floats stay in L1

// s[r][16 b + i] (+)= sum over depth of q[r][d] k[b][d][i]
template <int kR, int kB>
void score_rows(const float* q, int64_t q_stride, const float* const* k, int64_t depth, float* s, bool first) {
  constexpr int kVectors = kB * kPerBlock;
  Vector acc[kR][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] = first ? Vector{} : load(s + r * kStepKeys + v * kLanes);
  }
  const auto add = [&](int64_t d, auto query) __attribute__((always_inline)) {  // query(r): q[r][d]
    Vector key[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) key[v] = load(k[v / kPerBlock] + d * 16 + (v % kPerBlock) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const float a = query(r);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[r][v] += a * key[v];
    }
  };
  int64_t d = 0;
#if defined(__aarch64__) && defined(__clang__)
  // A lane of a register is a multiply-add's operand: fewer loads. (g++ spills this form, and needs it less.)
  for (; d + kLanes <= depth; d += kLanes) {
    Vector query[kR];
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) query[r] = load(q + r * q_stride + d);
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; ++lane) add(d + lane, [&](int r) { return query[r][lane]; });
  }
#endif
  for (; d < depth; ++d) add(d, [&](int r) { return q[r * q_stride + d]; });
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(s + r * kStepKeys + v * kLanes, acc[r][v]);
  }
}

// o[r][0 .. kV vectors) += sum over the step's keys j of p[r][j] v[j]
template <int kR, int kV>
void weigh_rows(const float* p, const float* const* v, int64_t blocks, int64_t head_dim, int64_t column, float* o,
                int64_t o_stride) {
  Vector acc[kR][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kV; ++c) acc[r][c] = load(o + r * o_stride + c * kLanes);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const float* value = v[b] + column;
    const float* weights = p + b * kMicroBlock;
    for (int64_t j = 0; j < kMicroBlock; ++j, value += head_dim, ++weights) {
      Vector row[kV];
#pragma GCC unroll 8
      for (int c = 0; c < kV; ++c) row[c] = load(value + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
        const float a = weights[r * kStepKeys];
#pragma GCC unroll 8
        for (int c = 0; c < kV; ++c) acc[r][c] += a * row[c];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kV; ++c) store(o + r * o_stride + c * kLanes, acc[r][c]);
  }
}

// The same functions for any number of rows up to kRows.
template <int kB, int kR = kRows>
EDGERUN_INLINE void score_group(int64_t rows, const float* q, int64_t q_stride, const float* const* k, int64_t depth,
                                float* s, bool first) {
  if (rows == kR) {
    score_rows<kR, kB>(q, q_stride, k, depth, s, first);
  } else if constexpr (kR > 1) {
    score_group<kB, kR - 1>(rows, q, q_stride, k, depth, s, first);
  }
}

template <int kV, int kR = kRows>
EDGERUN_INLINE void weigh_group(int64_t rows, const float* p, const float* const* v, int64_t blocks, int64_t head_dim,
                                int64_t column, float* o, int64_t o_stride) {
  if (rows == kR) {
    weigh_rows<kR, kV>(p, v, blocks, head_dim, column, o, o_stride);
  } else if constexpr (kR > 1) {
    weigh_group<kV, kR - 1>(rows, p, v, blocks, head_dim, column, o, o_stride);
  }
}

struct Scratch {
  float* q;        // [rows, D]
  float* o;        // [rows, width]
  float* s;        // [rows, 128]: scores, then weights
  float* sums;     // [rows, 16]: one sum per lane of a micro-block, added up at the end
  float* maximum;  // [rows], log2 units; -inf before the first visible key
  float* keys;     // one step widened from a narrower cache, else unused
  float* values;
  int64_t width;  // D rounded up to 16
#if defined(EDGERUN_DEEP)
  Int8Scratch digits;  // in the place of keys and values
#endif
};

struct Step {
  const float* k[kStepBlocks];
  const float* v[kStepBlocks];
  int64_t ids[kStepBlocks];
  int64_t count;
  bool masked;  // some row of the task does not see some key
};

EDGERUN_INLINE int64_t position_of(const AttendTask& task, int64_t row) {
  return task.first_position + row / task.group;
}

EDGERUN_INLINE int64_t micro_block(const AttendTask& task, int64_t index) {
  return task.ids != nullptr ? task.ids[index] : task.first + index;
}

// Micro-blocks of the step that begin at or before `position`.
EDGERUN_INLINE int64_t visible_blocks(const Step& step, int64_t position) {
  int64_t count = step.count;
  while (count > 0 && step.ids[count - 1] * kMicroBlock > position) --count;
  return count;
}

// Rows [first, first + count) see this many of the step's micro-blocks between them.
EDGERUN_INLINE int64_t seen_blocks(const AttendTask& task, const Step& step, int64_t first, int64_t count) {
  return step.masked ? visible_blocks(step, position_of(task, first + count - 1)) : step.count;
}

void load_queries(const AttendTask& task, const Scratch& scratch) {
  const float factor = task.softcap > 0.0f ? task.scale / task.softcap : task.scale * 1.44269504f;
  const int64_t depth = task.head_dim;
  for (int64_t token = 0; token < task.tokens; ++token) {
    for (int64_t head = 0; head < task.group; ++head) {
      float* target = scratch.q + (token * task.group + head) * depth;
      const int64_t offset = head * task.query_head_stride + token * depth;
      if (task.dtype == Dtype::kHalf) {
        halves_to_floats(static_cast<const uint16_t*>(task.query) + offset, target, depth);
      } else {
        std::memcpy(target, static_cast<const float*>(task.query) + offset, depth * sizeof(float));
      }
      for (int64_t d = 0; d < depth; ++d) target[d] *= factor;
    }
  }
}

void load_step(const AttendTask& task, const Scratch& scratch, int64_t begin, Step& step) {
  step.count = smaller(kStepBlocks, task.count - begin);
  const int64_t depth = task.head_dim;
  const int64_t block_floats = kMicroBlock * depth;
  const int64_t key_bytes = key_block_bytes(task.cache_dtype, depth);
  const int64_t value_bytes = value_block_bytes(task.cache_dtype, depth);
  for (int64_t b = 0; b < step.count; ++b) {
    step.ids[b] = micro_block(task, begin + b);
    const char* key = static_cast<const char*>(task.key_blocks) + step.ids[b] * key_bytes;
    const char* value = static_cast<const char*>(task.value_blocks) + step.ids[b] * value_bytes;
    step.k[b] = reinterpret_cast<const float*>(key);
    step.v[b] = reinterpret_cast<const float*>(value);
    if (task.tokens > 1) continue;
    // A token finds its blocks cold, scattered over pages whose addresses the CPU looks up first: all at once here.
    // The lines after a page's first are left to the CPU, which is better at them than requests are.
    prefetch(key, key_bytes, kSmallPage);
    prefetch(value, value_bytes, kSmallPage);
  }
  for (int64_t b = 0; b < step.count && task.cache_dtype != Dtype::kFloat; ++b) {
    const char* key = reinterpret_cast<const char*>(step.k[b]);
    const char* value = reinterpret_cast<const char*>(step.v[b]);
#if defined(EDGERUN_DEEP)
    if (task.cache_dtype == Dtype::kInt8) {
      int8_load_block(reinterpret_cast<const int8_t*>(key), reinterpret_cast<const int8_t*>(value), depth, b,
                      scratch.digits);
      continue;
    }
#endif
    widen_keys(task.cache_dtype, key, depth, scratch.keys + b * block_floats);
    widen_values(task.cache_dtype, value, depth, scratch.values + b * block_floats);
    step.k[b] = scratch.keys + b * block_floats;
    step.v[b] = scratch.values + b * block_floats;
  }
  const int64_t last_position = task.first_position + task.tokens - 1;
  step.masked = step.ids[step.count - 1] * kMicroBlock + kMicroBlock - 1 > task.first_position ||
                (task.window > 0 && step.ids[0] * kMicroBlock <= last_position - task.window);
}

void score_step(const AttendTask& task, const Scratch& scratch, const Step& step, int64_t rows) {
  const int64_t depth = task.head_dim;
  for (int64_t b = 0; b < step.count; b += kWide) {
    for (int64_t d = 0; d < depth; d += kPanel) {
      const int64_t panel = smaller(kPanel, depth - d);
      const float* k[kWide];
      for (int i = 0; i < kWide; ++i) k[i] = b + i < step.count ? step.k[b + i] + d * kMicroBlock : nullptr;
      for (int64_t row = 0; row < rows; row += kRows) {
        const int64_t group = smaller(kRows, rows - row);
        const int64_t blocks = seen_blocks(task, step, row, group) - b;
        const float* q = scratch.q + row * depth + d;
        float* s = scratch.s + row * kStepKeys + b * kMicroBlock;
        if (blocks >= kWide) {
          score_group<kWide>(group, q, depth, k, panel, s, d == 0);
        } else {
          for (int64_t i = 0; i < blocks; ++i) {
            score_group<1>(group, q, depth, k + i, panel, s + i * kMicroBlock, d == 0);
          }
        }
      }
    }
  }
}

// The same for a token whose list is a range: it reads its keys and values at the rate of memory, so micro-block by
// micro-block as they lie, with the values on their way while the keys are scored. Micro-blocks of a page or less are
// read better by the CPU itself.
void score_range(const AttendTask& task, const Scratch& scratch, const Step& step, int64_t rows) {
  const int64_t depth = task.head_dim;
  const int64_t seen = seen_blocks(task, step, 0, rows);
  for (int64_t b = 0; b < seen; ++b) {
    prefetch(step.v[b], value_block_bytes(Dtype::kFloat, depth));
    for (int64_t row = 0; row < rows; row += kRows) {
      score_group<1>(smaller(kRows, rows - row), scratch.q + row * depth, depth, step.k + b, depth,
                     scratch.s + row * kStepKeys + b * kMicroBlock, true);
    }
  }
}

// Softmax of one row over the step's first `blocks` micro-blocks, in place.
void soften_row(const AttendTask& task, const Scratch& scratch, const Step& step, int64_t row, int64_t blocks) {
  float* s = scratch.s + row * kStepKeys;
  const int64_t keys = blocks * kMicroBlock;
  if (task.softcap > 0.0f) {
    const float cap = task.softcap * 1.44269504f;
    for (int64_t j = 0; j < keys; j += kLanes) store(s + j, cap * tanh_vector(load(s + j)));
  }
  if (step.masked) {
    const int64_t position = position_of(task, row);
    bool any = false;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t base = step.ids[b] * kMicroBlock;
      const int64_t last = position - base;                              // lanes up to this one are causal
      const int64_t before = task.window > 0 ? last - task.window : -1;  // lanes up to this one left the window
      if (last >= kMicroBlock - 1 && before < 0) {
        any = true;
        continue;
      }
      for (int64_t i = 0; i < kMicroBlock; ++i) {
        const bool visible = i <= last && i > before;
        any |= visible;
        s[b * kMicroBlock + i] = visible ? s[b * kMicroBlock + i] : -__builtin_inff();
      }
    }
    if (!any) {  // exact zeros; and no reference to take from scores that are all masked
      std::memset(s, 0, keys * sizeof(float));
      return;
    }
  }
  Vector top = load(s);
  for (int64_t j = kLanes; j < keys; j += kLanes) top = larger(load(s + j), top);
  float highest = top[0];
  for (int lane = 1; lane < kLanes; ++lane) highest = top[lane] > highest ? top[lane] : highest;
  float* sums = scratch.sums + row * kMicroBlock;
  float& maximum = scratch.maximum[row];
  if (highest > maximum + 8.0f) {  // a weight may reach 2^8 before the row is rescaled
    const float factor = weight(splat(maximum - highest))[0];
    float* o = scratch.o + row * scratch.width;
    for (int64_t d = 0; d < scratch.width; d += kLanes) store(o + d, load(o + d) * factor);
    for (int64_t i = 0; i < kMicroBlock; i += kLanes) store(sums + i, load(sums + i) * factor);
    maximum = highest;
  }
  const float reference = maximum == -__builtin_inff() ? 0.0f : maximum;
  Vector partial[kPerBlock];
  for (int v = 0; v < kPerBlock; ++v) partial[v] = load(sums + v * kLanes);
  for (int64_t j = 0; j < keys; j += kMicroBlock) {
#pragma GCC unroll 4
    for (int v = 0; v < kPerBlock; ++v) {
      const Vector p = weight(load(s + j + v * kLanes) - reference);
      store(s + j + v * kLanes, p);
      partial[v] += p;
    }
  }
  for (int v = 0; v < kPerBlock; ++v) store(sums + v * kLanes, partial[v]);
}

// Columns [*column, D) in panels of kV vectors, as many as fit; moves *column behind them.
template <int kV>
void weigh_panels(const AttendTask& task, const Scratch& scratch, const Step& step, int64_t rows, int64_t* column) {
  const int64_t depth = task.head_dim;
  for (; *column + kV * kLanes <= depth; *column += kV * kLanes) {
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t group = smaller(kRows, rows - row);
      const int64_t blocks = seen_blocks(task, step, row, group);
      weigh_group<kV>(group, scratch.s + row * kStepKeys, step.v, blocks, depth, *column,
                      scratch.o + row * scratch.width + *column, scratch.width);
    }
  }
}

void weigh_step(const AttendTask& task, const Scratch& scratch, const Step& step, int64_t rows) {
  const int64_t depth = task.head_dim;
  int64_t column = 0;
  weigh_panels<kWide * kPerBlock>(task, scratch, step, rows, &column);
  weigh_panels<kPerBlock>(task, scratch, step, rows, &column);
  if (column == depth) return;
  for (int64_t row = 0; row < rows; ++row) {  // the last D % 16 dimensions
    const int64_t blocks = seen_blocks(task, step, row, 1);
    const float* p = scratch.s + row * kStepKeys;
    float* o = scratch.o + row * scratch.width;
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t j = 0; j < kMicroBlock; ++j) {
        const float* value = step.v[b] + j * depth;
        for (int64_t c = column; c < depth; ++c) o[c] += p[b * kMicroBlock + j] * value[c];
      }
    }
  }
}

void store_rows(const AttendTask& task, const Scratch& scratch) {
  const int64_t depth = task.head_dim;
  for (int64_t token = 0; token < task.tokens; ++token) {
    for (int64_t head = 0; head < task.group; ++head) {
      const int64_t row = token * task.group + head;
      const float* o = scratch.o + row * scratch.width;
      float total = 0.0f;
      for (int64_t i = 0; i < kMicroBlock; ++i) total += scratch.sums[row * kMicroBlock + i];
      const int64_t offset = token * task.out_token_stride + head * depth;
      if (task.dtype == Dtype::kHalf) {
        uint16_t* out = static_cast<uint16_t*>(task.out) + offset;
        for (int64_t d = 0; d < depth; ++d) out[d] = float_to_half(o[d] / total);
      } else {
        float* out = static_cast<float*>(task.out) + offset;
        for (int64_t d = 0; d < depth; ++d) out[d] = o[d] / total;
      }
    }
  }
}

// One step of the online softmax in float.
void take_step(const AttendTask& task, const Scratch& scratch, const Step& step, int64_t rows) {
  const bool streams = task.tokens == 1 && task.ids == nullptr && task.cache_dtype == Dtype::kFloat &&
                       value_block_bytes(Dtype::kFloat, task.head_dim) >= 2 * kSmallPage;
  (streams ? score_range : score_step)(task, scratch, step, rows);
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t group = smaller(kRows, rows - first);
    const int64_t blocks = seen_blocks(task, step, first, group);
    if (blocks == 0) continue;
    for (int64_t row = first; row < first + group; ++row) soften_row(task, scratch, step, row, blocks);
  }
  weigh_step(task, scratch, step, rows);
}

#if defined(EDGERUN_DEEP)
// The same with both products in integers.
void take_int8_step(const AttendTask& task, const Scratch& scratch, const Step& step, int64_t rows) {
  for (int64_t first = 0; first < rows; first += kDigitRows) {
    const int64_t group = smaller(kDigitRows, rows - first);
    const int64_t blocks = seen_blocks(task, step, first, group);
    if (blocks == 0) continue;
    float* s = scratch.s + first * kStepKeys;
    for (int64_t b = 0; b < blocks; ++b) int8_score_group(group, scratch.digits, first, b, s + b * kMicroBlock);
    for (int64_t row = first; row < first + group; ++row) {
      soften_row(task, scratch, step, row, blocks);
      int8_load_weights(scratch.s + row * kStepKeys, blocks, row, scratch.digits);
    }
    for (int64_t column = 0; column < task.head_dim; column += kMicroBlock) {
      int8_weigh_group(group, scratch.digits, first, blocks, column, scratch.o + first * scratch.width + column);
    }
  }
}
#endif

void attend(const AttendTask& whole) {
  AttendTask task = whole;
  const int64_t rows = task.tokens * task.group;
  const int64_t last_position = task.first_position + task.tokens - 1;
  while (task.count > 0 && micro_block(task, task.count - 1) * kMicroBlock > last_position) --task.count;
  Scratch scratch;
  scratch.width = round_up(task.head_dim, kMicroBlock);
  scratch.s = task.scratch;
  scratch.sums = scratch.s + rows * kStepKeys;
  scratch.o = scratch.sums + rows * kMicroBlock;
  scratch.q = scratch.o + rows * scratch.width;
  scratch.maximum = scratch.q + rows * task.head_dim;
  scratch.keys = scratch.maximum + round_up(rows, kMicroBlock);
  scratch.values = scratch.keys + kStepKeys * scratch.width;
  std::memset(scratch.sums, 0, rows * (kMicroBlock + scratch.width) * sizeof(float));
  for (int64_t row = 0; row < rows; ++row) scratch.maximum[row] = -__builtin_inff();
  load_queries(task, scratch);
  auto step_of = take_step;
#if defined(EDGERUN_DEEP)
  if (task.cache_dtype == Dtype::kInt8) {
    scratch.digits = int8_scratch(rows, task.head_dim, scratch.keys);
    int8_load_queries(scratch.q, rows, task.head_dim, scratch.digits);
    step_of = take_int8_step;
  }
#endif
  for (int64_t begin = 0; begin < task.count; begin += kStepBlocks) {
    Step step;
    load_step(task, scratch, begin, step);
    step_of(task, scratch, step, rows);
  }
  store_rows(task, scratch);
}

template <int kQ>
void some_channel_masses(const float* weights, const int32_t* channels, int64_t count, const void* key_block,
                         int64_t depth, Dtype cache_dtype, float* masses) {
  Vector logits[kQ][kPerBlock] = {};
  for (int64_t c = 0; c < count; ++c) {
    float row[kMicroBlock];
    load_channel(cache_dtype, key_block, depth, channels[c], row);
#pragma GCC unroll 4
    for (int v = 0; v < kPerBlock; ++v) {
      const Vector key = load(row + v * kLanes);
#pragma GCC unroll 4
      for (int q = 0; q < kQ; ++q) logits[q][v] += weights[q * count + c] * key;
    }
  }
  float highest[kQ];
  Vector sums[kQ] = {};
#pragma GCC unroll 4
  for (int q = 0; q < kQ; ++q) {
    Vector top = logits[q][0];
    for (int v = 1; v < kPerBlock; ++v) top = larger(logits[q][v], top);
    highest[q] = largest_lane(top);  // whatever it is, a NaN among the logits makes the sum one
    for (int v = 0; v < kPerBlock; ++v) sums[q] += weight(logits[q][v] - highest[q]);
  }
  const Vector totals = log2_vector(fold_vectors<kQ>(sums));
  for (int q = 0; q < kQ; ++q) masses[q] = highest[q] + totals[q];
}

void channel_masses(const float* weights, int64_t queries, const int32_t* channels, int64_t count,
                    const void* key_block, int64_t depth, Dtype cache_dtype, float* masses) {
  int64_t q = 0;
  for (; q + 4 <= queries; q += 4) {
    some_channel_masses<4>(weights + q * count, channels, count, key_block, depth, cache_dtype, masses + q);
  }
  for (; q < queries; ++q) {
    some_channel_masses<1>(weights + q * count, channels, count, key_block, depth, cache_dtype, masses + q);
  }
}

#define EDGERUN_TEXT_OF(name) #name
#define EDGERUN_TEXT(name) EDGERUN_TEXT_OF(name)

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {EDGERUN_TEXT(EDGERUN_VARIANT),
                          kLanes,
                          kIntegerProducts,
                          attend,
                          score,
                          mass,
                          largest_share,
                          channel_masses,
                          gap_sums};

}  // namespace edgerun::dhsa::EDGERUN_VARIANT
