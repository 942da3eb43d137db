// The inner kernels of selection: summaries against pooled queries, and what the moments of a chunk are worth. Part of
// kernels_impl.h, which says how a variant is compiled. Scores lie as [micro-blocks, stride], one query after the
// other.
#pragma once

#include "csrc/base/vector.h"
#include "csrc/ops/dhsa_attention/kernels.h"
#include "csrc/ops/dhsa_attention/kernels_cache_impl.h"

namespace edgerun::dhsa::EDGERUN_VARIANT {
namespace {

constexpr int kScoreQueries = 4;
// 4 x 4 sums, 4 queries and a summary fit in 32 registers, 4 x 2 in 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kScoreRows = 4;
#else
constexpr int kScoreRows = 2;
#endif

// A vector of halves as floats.
EDGERUN_INLINE Vector load_halves(const uint16_t* source) {
#if defined(__AVX512F__) && EDGERUN_LANES == 16
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__) && EDGERUN_LANES == 8
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#elif defined(__aarch64__)
  typedef __fp16 Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(source), Vector);
#else
  float floats[kLanes];
  halves_to_floats(source, floats, kLanes);
  return load(floats);
#endif
}
EDGERUN_INLINE Vector load_first_halves(const uint16_t* source, int64_t count) {
  uint16_t halves[kLanes] = {};
  __builtin_memcpy(halves, source, static_cast<size_t>(count) * sizeof(uint16_t));
  return load_halves(halves);
}

// scores[r][q] = query q . row r for kQ queries [kQ, width] and kR rows; with kBounds sum_d max(q_d low_d, q_d high_d),
// where a row is [low, high]. A score is summed in an order that does not depend on kQ and kR.
template <bool kBounds, int kQ, int kR>
void score_tile(const float* queries, const uint16_t* rows, int64_t width, float* scores, int64_t stride) {
  const int64_t row_elements = kBounds ? 2 * width : width;
  constexpr int kSums = kQ * kR;
  Vector sums[kSums] = {};
  const auto add = [&](int64_t d, auto load_lanes, auto load_row) __attribute__((always_inline)) {
    Vector query[kQ];
#pragma GCC unroll 4
    for (int q = 0; q < kQ; ++q) query[q] = load_lanes(queries + q * width + d);
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      const Vector low = load_row(rows + r * row_elements + d);
      const Vector high = kBounds ? load_row(rows + r * row_elements + width + d) : low;
#pragma GCC unroll 4
      for (int q = 0; q < kQ; ++q) {
        sums[r * kQ + q] += kBounds ? larger(query[q] * low, query[q] * high) : query[q] * low;
      }
    }
  };
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) add(d, load, load_halves);
  if (d < width) {
    add(
        d, [&](const float* source) { return load_first(source, width - d); },
        [&](const uint16_t* source) { return load_first_halves(source, width - d); });
  }
  constexpr int kFolded = kSums < kLanes ? kSums : kLanes;
  float totals[kSums + kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kSums; i += kFolded) store(totals + i, fold_vectors<kFolded>(sums + i));
  for (int r = 0; r < kR; ++r) __builtin_memcpy(scores + r * stride, totals + r * kQ, kQ * sizeof(float));
}

template <bool kBounds, int kR>
EDGERUN_INLINE void score_some_rows(const float* queries, int64_t pooled, const uint16_t* rows, int64_t width,
                                    float* scores, int64_t stride) {
  int64_t q = 0;
  for (; q + kScoreQueries <= pooled; q += kScoreQueries) {
    score_tile<kBounds, kScoreQueries, kR>(queries + q * width, rows, width, scores + q, stride);
  }
  for (; q < pooled; ++q) score_tile<kBounds, 1, kR>(queries + q * width, rows, width, scores + q, stride);
}

template <bool kBounds>
void score_rows_of(const float* queries, int64_t pooled, const uint16_t* rows, int64_t count, int64_t width,
                   float* scores, int64_t stride) {
  const int64_t row_elements = kBounds ? 2 * width : width;
  int64_t r = 0;
  for (; r + kScoreRows <= count; r += kScoreRows) {
    score_some_rows<kBounds, kScoreRows>(queries, pooled, rows + r * row_elements, width, scores + r * stride, stride);
  }
  for (; r < count; ++r) {
    score_some_rows<kBounds, 1>(queries, pooled, rows + r * row_elements, width, scores + r * stride, stride);
  }
}

void score(const float* queries, int64_t pooled, const uint16_t* rows, int64_t count, int64_t width, bool bounds,
           float* scores, int64_t stride) {
  (bounds ? score_rows_of<true> : score_rows_of<false>)(queries, pooled, rows, count, width, scores, stride);
}

// log2 sum_r 2^scores[r] of the vector of queries at `scores`.
EDGERUN_INLINE Vector log2_mass(const float* scores, int64_t stride, int64_t count) {
  Vector top = load(scores);
  if (count == 1) return top;
  for (int64_t r = 1; r < count; ++r) top = larger(load(scores + r * stride), top);
  Vector sum = {};
  for (int64_t r = 0; r < count; ++r) sum += weight(load(scores + r * stride) - top);
  return top + log2_vector(sum);
}

void mass(const float* scores, int64_t stride, int64_t count, float* masses) {
  for (int64_t q = 0; q < stride; q += kLanes) store(masses + q, log2_mass(scores + q, stride, count));
}

float largest_share(const float* scores, int64_t stride, int64_t count, const float* masses, int64_t pooled) {
  const Vector least = splat(-__builtin_inff());
  Vector best = least;
  for (int64_t q = 0; q < pooled; q += kLanes) {
    Vector share = log2_mass(scores + q, stride, count) - load(masses + q);
    share = lane_numbers() < static_cast<int32_t>(pooled - q) ? share : least;
    best = larger(share, best);  // false for NaN
  }
  return largest_lane(best);
}

// The sums that boundary scores are made of, over the channels of two micro-blocks of keys [depth, 16] around an edge:
// window w[i] = x[i] + .. + x[i + 3] of the tokens from 12 before the edge on, squares[i] += w[i]^2 and
// dots[i] += w[i] w[i + 4]. In double; kGapSums of each, of which 21 and 17 mean something.
void gap_sums(const void* before, const void* after, int64_t depth, Dtype cache_dtype, double* dots, double* squares) {
  constexpr int64_t kFirst = kMicroBlock - kBoundaryReach;
  constexpr int kVectors = kGapSums / kPairs;
  Doubles dot[kVectors];
  Doubles square[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    dot[v] = load_doubles(dots + v * kPairs);
    square[v] = load_doubles(squares + v * kPairs);
  }
  // Some channels at a time, stage by stage: a load over what was just stored in parts would wait for it.
  constexpr int64_t kTogether = 8;
  constexpr int64_t kTokens = 3 * kMicroBlock;  // zeros behind the 32 that count
  constexpr int64_t kWindows = kGapSums + kBoundaryWindow;
  static_assert(kFirst + kGapSums + kLanes <= kTokens);
  float keys[kTogether][kTokens] = {};
  double windows[kTogether][kWindows] = {};
  for (int64_t first = 0; first < depth; first += kTogether) {
    const int64_t channels = smaller(kTogether, depth - first);
    for (int64_t c = 0; c < channels; ++c) {
      load_channel(cache_dtype, before, depth, first + c, keys[c]);
      load_channel(cache_dtype, after, depth, first + c, keys[c] + kMicroBlock);
    }
    for (int64_t c = 0; c < channels; ++c) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kGapSums; i += kPairs) {
        const float* at = keys[c] + kFirst + i;
        store_doubles(windows[c] + i, (load_as_doubles(at) + load_as_doubles(at + 1)) +
                                          (load_as_doubles(at + 2) + load_as_doubles(at + 3)));
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const Doubles w = load_doubles(windows[c] + v * kPairs);
        square[v] += w * w;
        dot[v] += w * load_doubles(windows[c] + v * kPairs + kBoundaryWindow);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store_doubles(dots + v * kPairs, dot[v]);
    store_doubles(squares + v * kPairs, square[v]);
  }
}

}  // namespace
}  // namespace edgerun::dhsa::EDGERUN_VARIANT
