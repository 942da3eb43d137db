// embedding_logits, portable: two table rows at a time against one hidden vector, 16 partial sums a row.
#include <algorithm>
#include <bit>
#include <cstring>

#include "csrc/base/half.h"
#include "csrc/ops/embedding_logits/embedding_logits.h"

namespace edgerun::embedding {
namespace {

// Vectors of 16 bytes, which SSE2 and NEON both have. Four of them are a step: 16 elements, so one load of an int8 row.
// Two rows of four accumulators leave eight registers of SSE2's sixteen for the operands.
constexpr int kVectors = 4;
constexpr int kStep = 4 * kVectors;
constexpr int kRows = 2;
// Rows given to a worker at once: enough to hide the cost of handing them out, few enough to balance.
constexpr int64_t kRowsPerTask = 256;

inline float to_float(float value) { return value; }
inline float to_float(uint16_t half) { return half_to_float(half); }
inline float to_float(int8_t value) { return static_cast<float>(value); }

template <typename Element>
using Vector __attribute__((vector_size(16))) = Element;
using Floats = Vector<float>;

// Zips the halves of two vectors; widening by zips is one instruction where a conversion of vectors is scalarised.
inline Vector<uint8_t> zip_low(Vector<uint8_t> a, Vector<uint8_t> b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Vector<uint8_t> zip_high(Vector<uint8_t> a, Vector<uint8_t> b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline Vector<uint16_t> zip_low(Vector<uint16_t> a, Vector<uint16_t> b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Vector<uint16_t> zip_high(Vector<uint16_t> a, Vector<uint16_t> b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

template <typename To, typename From>
inline To load_vector(const From* source) {
  To vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
}

inline void load(const float* source, Floats (&out)[kVectors]) {
  for (int i = 0; i < kVectors; ++i) out[i] = load_vector<Floats>(source + 4 * i);
}

// A byte b in the low bits of 0x4b000000 is the float 2^23 + b: widening ends in a subtraction, not a conversion.
inline void load(const int8_t* source, Floats (&out)[kVectors]) {
  const Vector<uint8_t> biased = load_vector<Vector<uint8_t>>(source) ^ 0x80;  // value + 128
  const Vector<uint8_t> zero = {};
  const Vector<uint16_t> exponent = Vector<uint16_t>{} + 0x4b00;
  const auto low = std::bit_cast<Vector<uint16_t>>(zip_low(biased, zero));
  const auto high = std::bit_cast<Vector<uint16_t>>(zip_high(biased, zero));
  constexpr float kBias = 8388608.0f + 128.0f;
  out[0] = std::bit_cast<Floats>(zip_low(low, exponent)) - kBias;
  out[1] = std::bit_cast<Floats>(zip_high(low, exponent)) - kBias;
  out[2] = std::bit_cast<Floats>(zip_low(high, exponent)) - kBias;
  out[3] = std::bit_cast<Floats>(zip_high(high, exponent)) - kBias;
}

inline Floats halves_to_floats(Vector<uint32_t> bits) {  // as half_to_float, four at a time
  const Vector<uint32_t> magnitude = (bits & 0x7fffu) << 13;
  const Floats finite = std::bit_cast<Floats>(magnitude) * 0x1p112f;
  const auto special = std::bit_cast<Vector<uint32_t>>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return std::bit_cast<Floats>(std::bit_cast<Vector<uint32_t>>(finite) | special | (bits & 0x8000u) << 16);
}

inline void load(const uint16_t* source, Floats (&out)[kVectors]) {
  const Vector<uint16_t> zero = {};
  for (int i = 0; i < kVectors; i += 2) {
    const auto halves = load_vector<Vector<uint16_t>>(source + 4 * i);
    out[i] = halves_to_floats(std::bit_cast<Vector<uint32_t>>(zip_low(halves, zero)));
    out[i + 1] = halves_to_floats(std::bit_cast<Vector<uint32_t>>(zip_high(halves, zero)));
  }
}

template <int rows, typename Element>
inline void dot_rows(const Element* table, const float* hidden, int64_t size, float* sums) {
  Floats partial[rows][kVectors] = {};
  int64_t d = 0;
  for (; d + kStep <= size; d += kStep) {
    for (int row = 0; row < rows; ++row) {
      Floats weights[kVectors];
      load(table + row * size + d, weights);
      for (int i = 0; i < kVectors; ++i) partial[row][i] += weights[i] * load_vector<Floats>(hidden + d + 4 * i);
    }
  }
  for (int row = 0; row < rows; ++row) {
    const Floats lanes = (partial[row][0] + partial[row][1]) + (partial[row][2] + partial[row][3]);
    float sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    for (int64_t tail = d; tail < size; ++tail) sum += to_float(table[row * size + tail]) * hidden[tail];
    sums[row] = sum;
  }
}

struct Call {
  const Table& table;
  const float* hidden;
  int64_t rows;
  float* out;
};

template <typename Element>
void run_rows(const Call& call, int64_t begin, int64_t end) {
  const int64_t size = call.table.hidden;
  const Element* data = static_cast<const Element*>(call.table.data);
  const float* scales = call.table.type == TableType::kInt8 ? call.table.scales : nullptr;
  for (int64_t v = begin; v < end;) {
    const int64_t step = v + kRows <= end ? kRows : 1;
    for (int64_t i = 0; i < call.rows; ++i) {
      float* out = call.out + i * call.table.vocab + v;
      const float* hidden = call.hidden + i * size;
      if (step == kRows) {
        dot_rows<kRows>(data + v * size, hidden, size, out);
      } else {
        dot_rows<1>(data + v * size, hidden, size, out);
      }
      if (scales != nullptr) {
        for (int64_t row = 0; row < step; ++row) out[row] *= scales[v + row];
      }
    }
    v += step;
  }
}

void run_task(void* context, int64_t task) {
  const Call& call = *static_cast<const Call*>(context);
  const int64_t begin = task * kRowsPerTask;
  const int64_t end = std::min(call.table.vocab, begin + kRowsPerTask);
  switch (call.table.type) {
    case TableType::kFloat32:
      return run_rows<float>(call, begin, end);
    case TableType::kFloat16:
      return run_rows<uint16_t>(call, begin, end);
    case TableType::kInt8:
      return run_rows<int8_t>(call, begin, end);
  }
}

}  // namespace

void logits(const Table& table, const float* hidden, int64_t rows, float* out, const Parallel& parallel) {
  Call call{table, hidden, rows, out};
  parallel.run(parallel.pool, (table.vocab + kRowsPerTask - 1) / kRowsPerTask, run_task, &call);
}

}  // namespace edgerun::embedding
