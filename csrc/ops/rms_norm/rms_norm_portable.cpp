// rms_norm, portable: a row is read twice, once for 16 partial sums of squares and once to be scaled.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "csrc/base/half.h"
#include "csrc/ops/rms_norm/rms_norm.h"

namespace edgerun::rms_norm {
namespace {

// Vectors of 16 bytes, which SSE2 and NEON both have. Four sums hide the latency of an addition.
using Floats __attribute__((vector_size(16))) = float;
constexpr int kVectors = 4;
constexpr int kStep = 4 * kVectors;
// Elements given to a worker at once: reading and writing 128 KiB takes several times what handing it out costs.
constexpr int64_t kElementsPerTask = 16384;

inline void load(const float* source, float* values, int64_t count) {
  std::memcpy(values, source, static_cast<size_t>(count) * sizeof(float));
}
inline void load(const uint16_t* source, float* values, int64_t count) { halves_to_floats(source, values, count); }

inline void store(const float* values, float* target, int64_t count) {
  std::memcpy(target, values, static_cast<size_t>(count) * sizeof(float));
}
inline void store(const float* values, uint16_t* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = float_to_half(values[i]);
}

template <typename Element>
inline float sum_of_squares(const Element* row, int64_t size) {
  Floats partial[kVectors] = {};
  int64_t d = 0;
  for (; d + kStep <= size; d += kStep) {
    Floats values[kVectors];
    load(row + d, reinterpret_cast<float*>(values), kStep);
    for (int i = 0; i < kVectors; ++i) partial[i] += values[i] * values[i];
  }
  const Floats lanes = (partial[0] + partial[1]) + (partial[2] + partial[3]);
  float sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  for (; d < size; ++d) {
    float value;
    load(row + d, &value, 1);
    sum += value * value;
  }
  return sum;
}

// At most kStep elements; inlined, so that the loops of whole steps have a length the compiler knows.
template <typename Element>
inline void scale_step(const Element* x, float scale, const float* weight, int64_t count, Element* out) {
  float values[kStep];
  load(x, values, count);
  for (int64_t i = 0; i < count; ++i) values[i] *= scale;
  if (weight != nullptr) {
    for (int64_t i = 0; i < count; ++i) values[i] *= weight[i];
  }
  store(values, out, count);
}

template <typename Element>
inline void scale_row(const Element* row, float scale, const float* weight, int64_t size, Element* out) {
  const auto weight_at = [&](int64_t d) { return weight == nullptr ? nullptr : weight + d; };
  int64_t d = 0;
  for (; d + kStep <= size; d += kStep) scale_step(row + d, scale, weight_at(d), kStep, out + d);
  if (d < size) scale_step(row + d, scale, weight_at(d), size - d, out + d);
}

struct Call {
  const Params& params;
  const void* x;
  const float* weight;
  void* out;
  int64_t rows_per_task;
};

template <typename Element>
void run_rows(const Call& call, int64_t begin, int64_t end) {
  const int64_t size = call.params.size;
  for (int64_t i = begin; i < end; ++i) {
    const Element* row = static_cast<const Element*>(call.x) + i * size;
    const float mean = sum_of_squares(row, size) / static_cast<float>(size);
    const float scale = 1.0f / std::sqrt(mean + call.params.eps);
    scale_row(row, scale, call.weight, size, static_cast<Element*>(call.out) + i * size);
  }
}

void run_task(void* context, int64_t task) {
  const Call& call = *static_cast<const Call*>(context);
  const int64_t begin = task * call.rows_per_task;
  const int64_t end = std::min(call.params.rows, begin + call.rows_per_task);
  switch (call.params.dtype) {
    case Dtype::kFloat32:
      return run_rows<float>(call, begin, end);
    case Dtype::kFloat16:
      return run_rows<uint16_t>(call, begin, end);
  }
}

}  // namespace

void normalize(const Params& params, const void* x, const float* weight, void* out, const Parallel& parallel) {
  if (params.rows == 0 || params.size == 0) return;
  Call call{params, x, weight, out, std::max<int64_t>(1, kElementsPerTask / params.size)};
  const int64_t tasks = (params.rows + call.rows_per_task - 1) / call.rows_per_task;
  if (tasks == 1) return run_task(&call, 0);  // decode: no other thread is woken
  parallel.run(parallel.pool, tasks, run_task, &call);
}

}  // namespace edgerun::rms_norm
