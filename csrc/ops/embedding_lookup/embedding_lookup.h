// embedding_lookup: rows of a token table, as float.
//
//   out[i, d] = scale(ids[i]) * table[ids[i], d]        scale(r) = scales[r] for int8 tables, else 1
//
// The same table serves embedding_logits, so that tied weights stand once in a program. Rows are contiguous.
//   table  [vocab, hidden]  float32 | float16 (IEEE bits) | int8
//   scales [vocab]          float32, for int8 tables only
//   ids    [count]          int64, each in [0, vocab)
//   out    [count, hidden]  float32
#pragma once

#include <cstdint>

namespace edgerun::embedding {

enum class TableType : int { kFloat32 = 0, kFloat16 = 1, kInt8 = 2 };

struct Table {
  const void* data;
  const float* scales;  // nullptr unless type == kInt8
  TableType type;
  int64_t vocab;
  int64_t hidden;
};

// The position of the first id outside [0, vocab), or -1 when all are inside.
int64_t first_invalid_id(const Table& table, const int64_t* ids, int64_t count);

// Ids must be valid. Allocates nothing; one thread: a call copies a few hundred rows at most.
void lookup(const Table& table, const int64_t* ids, int64_t count, float* out);

}  // namespace edgerun::embedding
