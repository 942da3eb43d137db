// rms_norm: each row divided by its root mean square, times one weight a column (Zhang and Sennrich 2019, equation 4).
//
//   out[i, d] = x[i, d] / sqrt(mean_d(x[i, d]^2) + eps) * weight[d]        weight 1 when there is none
//
//   x, out  [rows, size]  float32 | float16 (IEEE bits), both of one type; out is another buffer than x
//   weight  [size]        float32; a model that multiplies by 1 + w hands over 1 + w
// Arithmetic is float32 and only the result is rounded to the type of x. A row's sum has an order that depends on `size`
// alone: neither the threads nor the other rows of a call change a result's bits.
#pragma once

#include <cstdint>

#include "csrc/base/parallel.h"

namespace edgerun::rms_norm {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1 };

struct Params {
  int64_t rows;
  int64_t size;  // elements of a row
  float eps;     // >= 0
  Dtype dtype;
};

// weight is nullptr when there is none. Allocates nothing.
void normalize(const Params& params, const void* x, const float* weight, void* out, const Parallel& parallel);

}  // namespace edgerun::rms_norm
