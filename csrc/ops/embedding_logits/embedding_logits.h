// embedding_logits: the language model head that reads the token table (tied weights), so that the table stands once.
//
//   out[i, v] = scale(v) * sum_d hidden[i, d] * table[v, d]        scale(v) = scales[v] for int8 tables, else 1
//
//   hidden [rows, hidden]  float32      rows is 1 in prefill and in decode: only the last token's logits are computed
//   table  [vocab, hidden] and scales as in embedding_lookup.h
//   out    [rows, vocab]   float32
// A table is read once, in order, so memory bounds a call. Sums are float32, in an order that depends on the hidden
// size alone: neither the threads nor the other rows change a result's bits.
#pragma once

#include "csrc/base/parallel.h"
#include "csrc/ops/embedding_lookup/embedding_lookup.h"

namespace edgerun::embedding {

// Allocates nothing.
void logits(const Table& table, const float* hidden, int64_t rows, float* out, const Parallel& parallel);

}  // namespace edgerun::embedding
