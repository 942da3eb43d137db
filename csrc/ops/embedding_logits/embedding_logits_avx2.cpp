// embedding_logits for x86 with AVX2, FMA and F16C.
#define EDGERUN_VARIANT avx2
#define EDGERUN_LANES 8
#include "csrc/ops/embedding_logits/kernels_impl.h"
