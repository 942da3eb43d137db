// embedding_lookup, portable: out[i] = scale(ids[i]) * table[ids[i]], row by row.
#include <cstring>

#include "csrc/base/half.h"
#include "csrc/ops/embedding_lookup/embedding_lookup.h"

namespace edgerun::embedding {

int64_t first_invalid_id(const Table& table, const int64_t* ids, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= table.vocab) return i;
  }
  return -1;
}

void lookup(const Table& table, const int64_t* ids, int64_t count, float* out) {
  const int64_t hidden = table.hidden;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = ids[i] * hidden;
    float* row = out + i * hidden;
    switch (table.type) {
      case TableType::kFloat32:
        std::memcpy(row, static_cast<const float*>(table.data) + start, static_cast<size_t>(hidden) * sizeof(float));
        break;
      case TableType::kFloat16: {
        halves_to_floats(static_cast<const uint16_t*>(table.data) + start, row, hidden);
        break;
      }
      case TableType::kInt8: {
        const int8_t* source = static_cast<const int8_t*>(table.data) + start;
        const float scale = table.scales[ids[i]];
        for (int64_t d = 0; d < hidden; ++d) row[d] = scale * static_cast<float>(source[d]);
        break;
      }
    }
  }
}

}  // namespace edgerun::embedding
