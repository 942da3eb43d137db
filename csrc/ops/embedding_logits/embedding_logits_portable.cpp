// embedding_logits for the compiler's baseline, SSE2 on x86-64 and NEON on arm64, and what shares the table's rows out.
#define EDGERUN_VARIANT portable
#define EDGERUN_LANES 4
#include <algorithm>
#include <cstring>

#include "csrc/base/cpu_features.h"
#include "csrc/ops/embedding_logits/embedding_logits.h"
#include "csrc/ops/embedding_logits/kernels_impl.h"

namespace edgerun::embedding {

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
#endif

namespace {

// Rows given to a worker at once: enough to hide the cost of handing them out, few enough to balance.
constexpr int64_t kRowsPerTask = 256;

struct Variants {
  const Kernels* rows[2];
  int64_t count = 0;
  const Kernels* chosen;
};

Variants& variants() {
  static Variants available = [] {
    Variants found;
#if defined(__x86_64__)
    if (cpu_features().avx2) found.rows[found.count++] = &avx2::kKernels;
#endif
    found.rows[found.count++] = &portable::kKernels;
    found.chosen = found.rows[0];
    return found;
  }();
  return available;
}

void run_task(void* context, int64_t task) {
  const Product& product = *static_cast<const Product*>(context);
  const int64_t begin = task * kRowsPerTask;
  kernels().multiply(product, begin, std::min(product.table.vocab, begin + kRowsPerTask));
}

}  // namespace

int64_t kernel_count() { return variants().count; }
const Kernels& kernel_at(int64_t index) { return *variants().rows[index]; }
const Kernels& kernels() { return *variants().chosen; }

bool use_kernels(const char* name) {
  for (int64_t i = 0; i < kernel_count(); ++i) {
    if (std::strcmp(kernel_at(i).name, name) != 0) continue;
    variants().chosen = &kernel_at(i);
    return true;
  }
  return false;
}

void logits(const Table& table, const float* hidden, int64_t rows, float* out, const Parallel& parallel) {
  Product product{table, hidden, rows, out};
  parallel.run(parallel.pool, (table.vocab + kRowsPerTask - 1) / kRowsPerTask, run_task, &product);
}

}  // namespace edgerun::embedding
