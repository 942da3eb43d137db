// Attention over an 8-bit cache by integer products, for arm64 with dot products (EDGERUN_DEEP 4) or 8-bit matrix
// products (EDGERUN_DEEP 8). Part of kernels_impl.h: the online softmax between the two products is the same.
//
// A query, and a step's weights, are written in two digits of 8 bits, x ~ scale (256 high + low), with scale =
// max |x| / 32512: of a query's channels that share a key's scale, and of a row's 128 weights, each times the scale of
// its value. So a product is integer throughout, exact in 32 bits, and x is off by at most max |x| / 65024: 1.5e-5 of
// the largest.
//
//   S[r][i] = sum_g qscale[r][g] kscale[g][i] sum_{d in g} (256 high + low)[r][d] K[d][i]
//   O[r][c] += wscale[r] sum_j (256 high + low)[r][j] V[j][c]
//
// Operands come in tiles of 8 rows (channels of keys, or tokens of values) and 16 columns (tokens, or channels), 128
// bytes, and digits in 16 bytes for the 8 rows: 8 high, then 8 low.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "csrc/base/half.h"
#include "csrc/base/vector.h"
#include "csrc/ops/dhsa_attention/kernels.h"
#include "csrc/ops/dhsa_attention/kernels_cache_impl.h"

namespace edgerun::dhsa::EDGERUN_VARIANT {
namespace {

constexpr int64_t kTileRows = 8;
constexpr int64_t kTileBytes = kTileRows * kMicroBlock;
constexpr int kDigitRows = 3;  // query rows in registers: 3 x 8 sums, 3 vectors of digits, and one or two of a tile
constexpr float kDigitSpan = 127.0f * 256.0f;

// What one task keeps besides the float scratch.
struct Int8Scratch {
  int8_t* q;       // digits [rows, D / 8, 16]
  float* q_scale;  // [rows, D / 32]
  int8_t* p;       // digits [rows, 16, 16] of one step's weights
  float* p_scale;  // [rows]
  int8_t* k;       // tiles [8 micro-blocks, D / 8]
  float* k_scale;  // [8 micro-blocks, D / 32, 16]
  int8_t* v;       // tiles [8 micro-blocks, D / 16, 2]
  float* v_scale;  // [128]
  int64_t depth;   // D rounded up to 8
  int64_t groups;  // of channels that share a scale
  int64_t width;   // D rounded up to 16
};

Int8Scratch int8_scratch(int64_t rows, int64_t head_dim, float* memory) {
  Int8Scratch scratch;
  scratch.depth = round_up(head_dim, kTileRows);
  scratch.groups = round_up(head_dim, kScaleChannels) / kScaleChannels;
  scratch.width = round_up(head_dim, kMicroBlock);
  const auto floats = [&](int64_t count) {
    float* start = memory;
    memory += round_up(count, 4);
    return start;
  };
  const auto bytes = [&](int64_t count) { return reinterpret_cast<int8_t*>(floats(round_up(count, 4) / 4)); };
  scratch.k = bytes(kStepKeys * scratch.depth);
  scratch.v = bytes(kStepKeys * scratch.width);
  scratch.k_scale = floats(kStepKeys * scratch.groups);
  scratch.v_scale = floats(kStepKeys);
  scratch.q = bytes(rows * 2 * scratch.depth);
  scratch.q_scale = floats(rows * scratch.groups);
  scratch.p = bytes(rows * 2 * kStepKeys);
  scratch.p_scale = floats(rows);
  return scratch;
}

// Digits of `count` values (a multiple of 8, zeros where there are none) and their scale: NaN if one is not finite.
float write_digits(const float* values, int64_t count, int8_t* digits) {
  float32x4_t most = vdupq_n_f32(0.0f);
  float32x4_t total = vdupq_n_f32(0.0f);  // NaN if a value is not finite: inf - inf, and NaN - NaN
  for (int64_t i = 0; i < count; i += 4) {
    const float32x4_t x = vld1q_f32(values + i);
    most = vmaxq_f32(most, vabsq_f32(x));
    total = vaddq_f32(total, vsubq_f32(x, x));
  }
  const float largest = vmaxvq_f32(most);
  const bool finite = vaddvq_f32(total) == 0.0f;
  const float inverse = finite && largest > 0.0f ? kDigitSpan / largest : 0.0f;
  const bool negligible = inverse > 3e38f;  // values too small for a float's scale count as zero
  for (int64_t i = 0; i < count; i += kTileRows) {
    int16x4_t low_half[2];
    int16x4_t high_half[2];
    for (int h = 0; h < 2; ++h) {
      const float32x4_t x = vmulq_n_f32(vld1q_f32(values + i + 4 * h), negligible ? 0.0f : inverse);
      const int32x4_t integer = vcvtnq_s32_f32(x);
      const int32x4_t high = vshrq_n_s32(vaddq_s32(integer, vdupq_n_s32(128)), 8);
      high_half[h] = vmovn_s32(high);
      low_half[h] = vmovn_s32(vsubq_s32(integer, vshlq_n_s32(high, 8)));
    }
    vst1_s8(digits + 2 * i, vmovn_s16(vcombine_s16(high_half[0], high_half[1])));
    vst1_s8(digits + 2 * i + kTileRows, vmovn_s16(vcombine_s16(low_half[0], low_half[1])));
  }
  return finite ? (negligible ? 0.0f : largest / kDigitSpan) : __builtin_nanf("");
}

// 8 rows of 16 bytes, `stride` apart, as a tile: with matrix products the 8 rows of each column side by side, with dot
// products of each column the first 4 rows, then of each column the last 4.
void pack_tile(const int8_t* rows, int64_t stride, int8_t* tile) {
  int8x16_t r[kTileRows];
  for (int i = 0; i < kTileRows; ++i) r[i] = vld1q_s8(rows + i * stride);
#if EDGERUN_DEEP == 8
  int8x16_t x[kTileRows];
  for (int i = 0; i < 4; ++i) {  // x[i]: columns 0-7 of rows i and i + 4; x[i + 4]: columns 8-15
    x[i] = vzip1q_s8(r[i], r[i + 4]);
    x[i + 4] = vzip2q_s8(r[i], r[i + 4]);
  }
  for (int half = 0; half < 2; ++half) {
    const int8x16_t* c = x + 4 * half;
    const int8x16_t even[2] = {vzip1q_s8(c[0], c[2]), vzip2q_s8(c[0], c[2])};
    const int8x16_t odd[2] = {vzip1q_s8(c[1], c[3]), vzip2q_s8(c[1], c[3])};
    for (int quarter = 0; quarter < 2; ++quarter) {
      int8_t* target = tile + 64 * half + 32 * quarter;
      vst1q_s8(target, vzip1q_s8(even[quarter], odd[quarter]));
      vst1q_s8(target + 16, vzip2q_s8(even[quarter], odd[quarter]));
    }
  }
#else
  for (int quad = 0; quad < 2; ++quad) {
    const int8x16_t* q = r + 4 * quad;
    const int8x16_t even[2] = {vzip1q_s8(q[0], q[2]), vzip2q_s8(q[0], q[2])};
    const int8x16_t odd[2] = {vzip1q_s8(q[1], q[3]), vzip2q_s8(q[1], q[3])};
    for (int half = 0; half < 2; ++half) {
      int8_t* target = tile + 64 * quad + 32 * half;
      vst1q_s8(target, vzip1q_s8(even[half], odd[half]));
      vst1q_s8(target + 16, vzip2q_s8(even[half], odd[half]));
    }
  }
#endif
}

// The same of fewer rows or columns: the others are zero.
void pack_part(const int8_t* source, int64_t stride, int64_t rows, int64_t columns, int8_t* tile) {
  if (rows >= kTileRows && columns >= kMicroBlock) return pack_tile(source, stride, tile);
  int8_t whole[kTileBytes] = {};
  for (int64_t r = 0; r < smaller(rows, kTileRows); ++r) {
    std::memcpy(whole + r * kMicroBlock, source + r * stride, smaller(columns, kMicroBlock));
  }
  pack_tile(whole, kMicroBlock, tile);
}

// sums[r][0 .. 16) += digits of row r . tile: the two digits apart, put together by `joined`.
template <int kR>
EDGERUN_INLINE void multiply_tile(const int8_t* digits, int64_t digit_stride, const int8_t* tile,
                                  int32x4_t (*sums)[8]) {
  int8x16_t row[kR];
  for (int r = 0; r < kR; ++r) row[r] = vld1q_s8(digits + r * digit_stride);
#if EDGERUN_DEEP == 8
#pragma GCC unroll 8
  for (int pair = 0; pair < 8; ++pair) {  // two columns: { high, high, low, low }
    const int8x16_t columns = vld1q_s8(tile + 16 * pair);
    for (int r = 0; r < kR; ++r) sums[r][pair] = vmmlaq_s32(sums[r][pair], row[r], columns);
  }
#else
#pragma GCC unroll 4
  for (int four = 0; four < 4; ++four) {  // four columns: high in sums[four], low in sums[four + 4]
    const int8x16_t first = vld1q_s8(tile + 16 * four);
    const int8x16_t last = vld1q_s8(tile + 64 + 16 * four);
    for (int r = 0; r < kR; ++r) {
      sums[r][four] = vdotq_laneq_s32(vdotq_laneq_s32(sums[r][four], first, row[r], 0), last, row[r], 1);
      sums[r][four + 4] = vdotq_laneq_s32(vdotq_laneq_s32(sums[r][four + 4], first, row[r], 2), last, row[r], 3);
    }
  }
#endif
}

// Columns 4 four .. 4 four + 3 of a row's sums, as floats.
EDGERUN_INLINE float32x4_t joined(const int32x4_t* sums, int four) {
#if EDGERUN_DEEP == 8
  const int64x2_t left = vreinterpretq_s64_s32(sums[2 * four]);
  const int64x2_t right = vreinterpretq_s64_s32(sums[2 * four + 1]);
  const int32x4_t high = vreinterpretq_s32_s64(vuzp1q_s64(left, right));
  const int32x4_t low = vreinterpretq_s32_s64(vuzp2q_s64(left, right));
#else
  const int32x4_t high = sums[four];
  const int32x4_t low = sums[four + 4];
#endif
  return vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high, 8), low));
}

// Scores of kR rows against one micro-block.
template <int kR>
void int8_score_rows(const Int8Scratch& scratch, int64_t row, int64_t block, float* s) {
  const int8_t* tiles = scratch.k + block * scratch.depth * kMicroBlock;
  float32x4_t scores[kR][4] = {};
  for (int64_t group = 0; group < scratch.groups; ++group) {
    int32x4_t sums[kR][8] = {};
    const int64_t end = smaller((group + 1) * kScaleChannels, scratch.depth);
    for (int64_t d = group * kScaleChannels; d < end; d += kTileRows) {
      multiply_tile<kR>(scratch.q + row * 2 * scratch.depth + 2 * d, 2 * scratch.depth, tiles + d * kMicroBlock, sums);
    }
    const float* scales = scratch.k_scale + (block * scratch.groups + group) * kMicroBlock;
    for (int r = 0; r < kR; ++r) {
      const float scale = scratch.q_scale[(row + r) * scratch.groups + group];
#pragma GCC unroll 4
      for (int four = 0; four < 4; ++four) {
        const float32x4_t both = vmulq_n_f32(vld1q_f32(scales + 4 * four), scale);
        scores[r][four] = vfmaq_f32(scores[r][four], joined(sums[r], four), both);
      }
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int four = 0; four < 4; ++four) vst1q_f32(s + r * kStepKeys + 4 * four, scores[r][four]);
  }
}

// kR rows' outputs in 16 columns gain what `blocks` micro-blocks give.
template <int kR>
void int8_weigh_rows(const Int8Scratch& scratch, int64_t row, int64_t blocks, int64_t column, float* o) {
  int32x4_t sums[kR][8] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    const int8_t* tiles = scratch.v + (block * scratch.width + column) * kMicroBlock;
    for (int64_t half = 0; half < 2; ++half) {
      multiply_tile<kR>(scratch.p + row * 2 * kStepKeys + (2 * block + half) * kMicroBlock, 2 * kStepKeys,
                        tiles + half * kTileBytes, sums);
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int four = 0; four < 4; ++four) {
      float* target = o + r * scratch.width + 4 * four;
      vst1q_f32(target, vfmaq_n_f32(vld1q_f32(target), joined(sums[r], four), scratch.p_scale[row + r]));
    }
  }
}

template <int kR = kDigitRows>
EDGERUN_INLINE void int8_score_group(int64_t rows, const Int8Scratch& scratch, int64_t row, int64_t block, float* s) {
  if (rows == kR) {
    int8_score_rows<kR>(scratch, row, block, s);
  } else if constexpr (kR > 1) {
    int8_score_group<kR - 1>(rows, scratch, row, block, s);
  }
}

template <int kR = kDigitRows>
EDGERUN_INLINE void int8_weigh_group(int64_t rows, const Int8Scratch& scratch, int64_t row, int64_t blocks,
                                     int64_t column, float* o) {
  if (rows == kR) {
    int8_weigh_rows<kR>(scratch, row, blocks, column, o);
  } else if constexpr (kR > 1) {
    int8_weigh_group<kR - 1>(rows, scratch, row, blocks, column, o);
  }
}

// Digits of the queries [rows, D], which are scaled already.
void int8_load_queries(const float* q, int64_t rows, int64_t head_dim, const Int8Scratch& scratch) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t group = 0; group < scratch.groups; ++group) {
      const int64_t first = group * kScaleChannels;
      float values[kScaleChannels] = {};
      std::memcpy(values, q + row * head_dim + first, smaller(kScaleChannels, head_dim - first) * sizeof(float));
      const int64_t count = smaller(kScaleChannels, scratch.depth - first);
      scratch.q_scale[row * scratch.groups + group] =
          write_digits(values, count, scratch.q + row * 2 * scratch.depth + 2 * first);
    }
  }
}

// Tiles and scales of a step's micro-block.
void int8_load_block(const int8_t* key, const int8_t* value, int64_t head_dim, int64_t block,
                     const Int8Scratch& scratch) {
  int8_t* keys = scratch.k + block * scratch.depth * kMicroBlock;
  for (int64_t d = 0; d < head_dim; d += kTileRows) {
    pack_part(key + d * kMicroBlock, kMicroBlock, head_dim - d, kMicroBlock, keys + d * kMicroBlock);
  }
  halves_to_floats(key_scales(key, head_dim), scratch.k_scale + block * scratch.groups * kMicroBlock,
                   scratch.groups * kMicroBlock);
  int8_t* values = scratch.v + block * scratch.width * kMicroBlock;
  for (int64_t c = 0; c < head_dim; c += kMicroBlock) {
    for (int64_t half = 0; half < 2; ++half) {
      pack_part(value + half * kTileRows * head_dim + c, head_dim, kTileRows, head_dim - c,
                values + c * kMicroBlock + half * kTileBytes);
    }
  }
  halves_to_floats(key_scales(value, head_dim), scratch.v_scale + block * kMicroBlock, kMicroBlock);
}

// Digits of a row's weights over the step's first `blocks` micro-blocks, each weight times its value's scale.
void int8_load_weights(const float* p, int64_t blocks, int64_t row, const Int8Scratch& scratch) {
  float weights[kStepKeys];
  const int64_t keys = blocks * kMicroBlock;
  for (int64_t j = 0; j < keys; ++j) weights[j] = p[j] * scratch.v_scale[j];
  scratch.p_scale[row] = write_digits(weights, keys, scratch.p + row * 2 * kStepKeys);
}

}  // namespace
}  // namespace edgerun::dhsa::EDGERUN_VARIANT
