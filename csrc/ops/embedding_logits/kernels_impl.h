// The inner kernel of embedding_logits, written once over the vector width. A variant file sets, then includes:
//   EDGERUN_VARIANT  its namespace and name          EDGERUN_LANES  floats in a vector register: 4 or 8
//
// One table row at a time, so that a table is read from first byte to last: what a CPU fetches ahead follows one
// such stream to the speed of memory, and loses several rows side by side at the end of each. A row has 32 partial sums
// whatever the width, added in one order: variants differ by the rounding of a multiply-add alone. Functions of the
// standard library stay out of this file: the linker could take the copy compiled for a wider instruction set for
// everyone's.

#include <cstdint>

#if EDGERUN_LANES == 8
#include <immintrin.h>
#endif

#include "csrc/base/half.h"
#include "csrc/base/vector.h"
#include "csrc/ops/embedding_logits/kernels.h"

namespace edgerun::embedding::EDGERUN_VARIANT {
namespace {

constexpr int kPart = 16;         // elements: one load of SSE2 or NEON of an int8 row
constexpr int kStep = 2 * kPart;  // with 8 lanes 4 sums cover the latency of a multiply-add
constexpr int kVectors = kPart / kLanes;

EDGERUN_INLINE float to_float(float value) { return value; }
EDGERUN_INLINE float to_float(uint16_t half) { return half_to_float(half); }
EDGERUN_INLINE float to_float(int8_t value) { return static_cast<float>(value); }

EDGERUN_INLINE void load_part(const float* source, Vector* out) {
  for (int i = 0; i < kVectors; ++i) out[i] = load(source + i * kLanes);
}

#if EDGERUN_LANES == 8  // by intrinsics: the compiler takes vectors that change their size apart

EDGERUN_INLINE void load_part(const int8_t* source, Vector* out) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  out[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  out[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
}

EDGERUN_INLINE void load_part(const uint16_t* source, Vector* out) {
  const __m128i* const halves = reinterpret_cast<const __m128i*>(source);
  for (int i = 0; i < kVectors; ++i) out[i] = _mm256_cvtph_ps(_mm_loadu_si128(halves + i));
}

#else

typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));

// Zips the halves of two vectors; widening by zips is one instruction where a conversion of vectors is scalarised.
EDGERUN_INLINE Bytes zip_low(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
EDGERUN_INLINE Bytes zip_high(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
EDGERUN_INLINE Halves zip_low(Halves a, Halves b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
EDGERUN_INLINE Halves zip_high(Halves a, Halves b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }

// A byte b in the low bits of 0x4b000000 is the float 2^23 + b: widening ends in a subtraction, not a conversion.
EDGERUN_INLINE void load_part(const int8_t* source, Vector* out) {
  const Bytes biased = *reinterpret_cast<const Bytes*>(source) ^ 0x80;  // value + 128
  const Halves exponent = Halves{} + 0x4b00;
  const Halves low = (Halves)zip_low(biased, Bytes{});
  const Halves high = (Halves)zip_high(biased, Bytes{});
  constexpr float kBias = 8388608.0f + 128.0f;
  out[0] = (Vector)zip_low(low, exponent) - kBias;
  out[1] = (Vector)zip_high(low, exponent) - kBias;
  out[2] = (Vector)zip_low(high, exponent) - kBias;
  out[3] = (Vector)zip_high(high, exponent) - kBias;
}

EDGERUN_INLINE Vector halves_to_vector(Bits bits) {  // as half_to_float, four at a time
  const Bits magnitude = (bits & 0x7fffu) << 13;
  const Vector finite = (Vector)magnitude * 0x1p112f;
  const Bits special = (Bits)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (Vector)((Bits)finite | special | (bits & 0x8000u) << 16);
}

EDGERUN_INLINE void load_part(const uint16_t* source, Vector* out) {
  for (int i = 0; i < kVectors; i += 2) {
    const Halves halves = *reinterpret_cast<const Halves*>(source + i * kLanes);
    out[i] = halves_to_vector((Bits)zip_low(halves, Halves{}));
    out[i + 1] = halves_to_vector((Bits)zip_high(halves, Halves{}));
  }
}

#endif

template <typename Element>
EDGERUN_INLINE float dot(const Element* row, const float* hidden, int64_t size) {
  Vector sums[2 * kVectors] = {};
  int64_t d = 0;
  for (; d + kStep <= size; d += kStep) {
    for (int part = 0; part < 2; ++part) {
      Vector weights[kVectors];
      Vector factors[kVectors];
      load_part(row + d + part * kPart, weights);
      load_part(hidden + d + part * kPart, factors);
      for (int i = 0; i < kVectors; ++i) sums[part * kVectors + i] += weights[i] * factors[i];
    }
  }
  float folded[kPart];
  for (int i = 0; i < kVectors; ++i) store(folded + i * kLanes, sums[i] + sums[kVectors + i]);
  float lanes[4];
  for (int lane = 0; lane < 4; ++lane) {
    lanes[lane] = (folded[lane] + folded[4 + lane]) + (folded[8 + lane] + folded[12 + lane]);
  }
  float sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  for (; d < size; ++d) sum += to_float(row[d]) * hidden[d];
  return sum;
}

template <typename Element>
void multiply_rows(const Product& product, int64_t begin, int64_t end) {
  const int64_t size = product.table.hidden;
  const Element* data = static_cast<const Element*>(product.table.data);
  const float* scales = product.table.type == TableType::kInt8 ? product.table.scales : nullptr;
  for (int64_t v = begin; v < end; ++v) {
    const float scale = scales == nullptr ? 1.0f : scales[v];
    for (int64_t i = 0; i < product.rows; ++i) {
      product.out[i * product.table.vocab + v] = dot(data + v * size, product.hidden + i * size, size) * scale;
    }
  }
}

void multiply(const Product& product, int64_t begin, int64_t end) {
  switch (product.table.type) {
    case TableType::kFloat32:
      return multiply_rows<float>(product, begin, end);
    case TableType::kFloat16:
      return multiply_rows<uint16_t>(product, begin, end);
    case TableType::kInt8:
      return multiply_rows<int8_t>(product, begin, end);
  }
}

}  // namespace

#define EDGERUN_TEXT_OF(name) #name
#define EDGERUN_TEXT(name) EDGERUN_TEXT_OF(name)
extern const Kernels kKernels;
const Kernels kKernels = {EDGERUN_TEXT(EDGERUN_VARIANT), multiply};

}  // namespace edgerun::embedding::EDGERUN_VARIANT
