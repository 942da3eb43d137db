// dhsa_attention's inner kernels for x86 with AVX2, FMA and F16C. 6 x 2 accumulators, 2 vectors of keys and a broadcast
// query: 15 of 16 registers, and 12 multiply-adds cover their latency of 4 on 2 pipes.
#define EDGERUN_VARIANT avx2
#define EDGERUN_LANES 8
#define EDGERUN_ROWS 6
#define EDGERUN_WIDE 1
#include "csrc/ops/dhsa_attention/kernels_impl.h"
