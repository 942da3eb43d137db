// Vectors of EDGERUN_LANES floats (4, 8 or 16) and the functions on them that kernels share: arithmetic by the
// compiler's vector extension, for every instruction set from one source. A file sets EDGERUN_LANES, then includes
// this. All of it has internal linkage: a file is compiled for one instruction set, and the linker must not mix them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#define EDGERUN_INLINE static inline __attribute__((always_inline))

#if defined(__clang__) || __GNUC__ >= 12
#define EDGERUN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define EDGERUN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif

namespace edgerun {
namespace {

constexpr int kLanes = EDGERUN_LANES;

// Loads and stores are unaligned: a head dimension need not be a multiple of the vector.
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

constexpr int kPairs = kLanes / 2;  // doubles in a vector of the same size
typedef double Doubles __attribute__((vector_size(kPairs * 8), aligned(8), may_alias));

EDGERUN_INLINE Vector load(const float* source) { return *reinterpret_cast<const Vector*>(source); }
EDGERUN_INLINE Vector load_first(const float* source, int64_t count) {  // zeros in the lanes from `count` on
  Vector value = {};
  __builtin_memcpy(&value, source, static_cast<size_t>(count) * sizeof(float));
  return value;
}
EDGERUN_INLINE void store(float* target, Vector value) { *reinterpret_cast<Vector*>(target) = value; }
EDGERUN_INLINE Doubles load_doubles(const double* source) { return *reinterpret_cast<const Doubles*>(source); }
EDGERUN_INLINE Doubles load_as_doubles(const float* source) {  // as many floats as there are doubles in a vector
  typedef float Floats __attribute__((vector_size(kPairs * 4), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Floats*>(source), Doubles);
}
EDGERUN_INLINE void store_doubles(double* target, Doubles value) { *reinterpret_cast<Doubles*>(target) = value; }
// x - 0 is x, sign of zero included, so that no subtraction is left.
EDGERUN_INLINE Vector splat(float value) { return value - Vector{}; }
// A NaN in `a` gives b, one in `b` stays.
EDGERUN_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }
EDGERUN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// 2^x, relative error below 2e-7; below -126 its smallest normal value. NaN stays NaN: the comparison is false, and 2^n
// multiplies the polynomial rather than being added to its exponent.
EDGERUN_INLINE Vector exp2_vector(Vector x) {
  x = x < -126.0f ? splat(-126.0f) : x;
  const Vector shifted = x + 12582912.0f;  // 1.5 * 2^23: the nearest integer in the low bits
  const Vector f = x - (shifted - 12582912.0f);
  Vector p = 1.32647273e-3f * f + 9.67151299e-3f;  // minimax on [-1/2, 1/2] with p(0) = 1
  p = p * f + 5.55073358e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1.0f;
  return p * (Vector)(((Bits)shifted << 23) + 0x3f800000u);
}

// A softmax weight: 2^x, and exactly 0 below 2^-100, where it cannot change a sum that holds a 1 (nor make subnormals).
EDGERUN_INLINE Vector weight(Vector x) {
  const Vector value = exp2_vector(x);
  return x < -100.0f ? Vector{} : value;
}

// log2 of finite x >= 1, error below 2e-7 of the larger of 1 and the result, exactly 0 for 1; NaN stays NaN. With x =
// 2^n m, m in [sqrt 1/2, sqrt 2), and s = (m - 1) / (m + 1): log m = 2 (s + s^3 / 3 + s^5 / 5 + ...), |s| < 0.172.
EDGERUN_INLINE Vector log2_vector(Vector x) {
  const Integers exponent = ((Integers)x - 0x3f3504f3) >> 23;
  const Vector m = (Vector)((Integers)x - (exponent << 23));
  const Vector s = (m - 1.0f) / (m + 1.0f);
  const Vector z = s * s;
  Vector p = 0.111111111f * z + 0.142857143f;
  p = p * z + 0.2f;
  p = p * z + 0.333333333f;
  p = p * z + 1.0f;
  const Vector value = 2.88539008f * s * p + __builtin_convertvector(exponent, Vector);
  return x != x ? x : value;
}

// tanh, error below 2e-7 relative: an odd polynomial near 0, else 1 - 2 / (e^2|x| + 1).
EDGERUN_INLINE Vector tanh_vector(Vector x) {
  const Vector magnitude = x < 0.0f ? -x : x;
  const Vector square = x * x;
  Vector p = -5.7049864e-3f * square + 2.06390886e-2f;
  p = p * square - 5.37397154e-2f;
  p = p * square + 1.33314416e-1f;
  p = p * square - 3.33332807e-1f;
  const Vector near = x + x * square * p;
  const Vector exponent = magnitude * 2.88539008f;
  const Vector far = 1.0f - 2.0f / (exp2_vector(exponent > 126.0f ? splat(126.0f) : exponent) + 1.0f);
  return magnitude < 0.625f ? near : (x < 0.0f ? -far : far);
}

// One level of fold_vectors: of every run of kRun lanes of x, then of y, its first half plus its second half.
template <int kRun, int... kLane>
EDGERUN_INLINE Vector fold_pair(Vector x, Vector y, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kRun / 2;
  return EDGERUN_SHUFFLE(x, y, (kLane / kHalf * kRun + kLane % kHalf)...) +
         EDGERUN_SHUFFLE(x, y, (kLane / kHalf * kRun + kLane % kHalf + kHalf)...);
}

// Lane i of the result is the sum of the lanes of vectors[i], i < kCount <= kLanes (a power of two). Lanes are added in
// an order that does not depend on kCount. Overwrites the vectors.
template <int kCount, int kRun = kLanes>
EDGERUN_INLINE Vector fold_vectors(Vector* vectors) {
  if constexpr (kRun == 1) {
    return vectors[0];
  } else {
    constexpr int kNext = (kCount + 1) / 2;
#pragma GCC unroll 8
    for (int i = 0; i < kNext; ++i) {
      vectors[i] = fold_pair<kRun>(vectors[2 * i], vectors[kCount > 1 ? 2 * i + 1 : 0],
                                   std::make_integer_sequence<int, kLanes>{});
    }
    return fold_vectors<kNext, kRun / 2>(vectors);
  }
}

EDGERUN_INLINE Integers lane_numbers() {
  return []<int... kLane>(std::integer_sequence<int, kLane...>) {
    return Integers{kLane...};
  }(std::make_integer_sequence<int, kLanes>{});
}

// The largest lane of a vector without NaN.
template <int kRun = kLanes>
EDGERUN_INLINE float largest_lane(Vector vector) {
  if constexpr (kRun == 1) {
    return vector[0];
  } else {
    const auto halves = [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
      return EDGERUN_SHUFFLE(vector, vector, ((kLane + kRun / 2) % kLanes)...);
    };
    return largest_lane<kRun / 2>(larger(vector, halves(std::make_integer_sequence<int, kLanes>{})));
  }
}

}  // namespace
}  // namespace edgerun
