// dhsa_attention's inner kernels for x86 with AVX-512. 6 x 4 accumulators, 4 vectors of keys and a broadcast query: 29
// of 32 registers, and 10 loads for 24 multiply-adds, so that the multiply-adds are the bound.
#define EDGERUN_VARIANT avx512
#define EDGERUN_LANES 16
#define EDGERUN_ROWS 6
#define EDGERUN_WIDE 4
#include "csrc/ops/dhsa_attention/kernels_impl.h"
