// The inner kernel of embedding_logits, and the table of its variants: one source (kernels_impl.h), compiled once for
// each instruction set. Dispatch, tests and benchmarks all walk this table, so an untested variant cannot exist.
#pragma once

#include <cstdint>

#include "csrc/ops/embedding_lookup/embedding_lookup.h"

namespace edgerun::embedding {

struct Product {
  const Table& table;
  const float* hidden;  // [rows, hidden]
  int64_t rows;
  float* out;  // [rows, vocab]
};

struct Kernels {
  const char* name;
  void (*multiply)(const Product& product, int64_t begin, int64_t end);  // out[:, begin:end]
};

// The variants that this CPU can run, the fastest first and "portable" last.
int64_t kernel_count();
const Kernels& kernel_at(int64_t index);

// The variant in use: the fastest unless a test or a benchmark chose another. Not for use while an op runs.
const Kernels& kernels();
bool use_kernels(const char* name);

}  // namespace edgerun::embedding
