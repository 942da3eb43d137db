// dhsa_attention's inner kernels for the compiler's baseline: SSE2 on x86-64, NEON on arm64. The truth for the others.
#if defined(__aarch64__)
#define EDGERUN_ROWS 5  // 5 x 4 accumulators, 4 vectors of keys and 5 of queries: 29 of 32 registers
#else
#define EDGERUN_ROWS 2  // 2 x 4 accumulators, 4 vectors of keys, 2 queries and a product: 15 of 16 registers
#endif
#define EDGERUN_VARIANT portable
#define EDGERUN_LANES 4
#define EDGERUN_WIDE 1
#include "csrc/ops/dhsa_attention/kernels_impl.h"

#include "csrc/base/cpu_features.h"

namespace edgerun::dhsa {

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#elif defined(__aarch64__)
namespace neon_dotprod {
extern const Kernels kKernels;
}
namespace neon_i8mm {
extern const Kernels kKernels;
}
#endif

namespace {

struct Table {
  const Kernels* rows[3];
  int64_t count = 0;
  const Kernels* chosen;
};

Table& table() {
  static Table available = [] {
    Table found;
#if defined(__x86_64__)
    if (cpu_features().avx512) found.rows[found.count++] = &avx512::kKernels;
    if (cpu_features().avx2) found.rows[found.count++] = &avx2::kKernels;
#elif defined(__aarch64__)
    if (cpu_features().i8mm) found.rows[found.count++] = &neon_i8mm::kKernels;
    if (cpu_features().dotprod) found.rows[found.count++] = &neon_dotprod::kKernels;
#endif
    found.rows[found.count++] = &portable::kKernels;
    found.chosen = found.rows[0];
    return found;
  }();
  return available;
}

}  // namespace

int64_t kernel_count() { return table().count; }
const Kernels& kernel_at(int64_t index) { return *table().rows[index]; }
const Kernels& kernels() { return *table().chosen; }

bool use_kernels(const char* name) {
  for (int64_t i = 0; i < kernel_count(); ++i) {
    if (std::strcmp(kernel_at(i).name, name) == 0) {
      table().chosen = &kernel_at(i);
      return true;
    }
  }
  return false;
}

}  // namespace edgerun::dhsa
