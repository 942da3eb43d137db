// dhsa_attention's inner kernels for arm64 with 8-bit matrix products (Cortex-A510, A710, X2 and later): float as the
// baseline, and 8-bit caches by integer products.
#define EDGERUN_VARIANT neon_i8mm
#define EDGERUN_LANES 4
#define EDGERUN_ROWS 5
#define EDGERUN_WIDE 1
#define EDGERUN_DEEP 8
#include "csrc/ops/dhsa_attention/kernels_impl.h"
