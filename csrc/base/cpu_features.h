// What the CPU that runs us can do. Kernels pick their variant by it at run time: one build serves every machine.
#pragma once

namespace edgerun {

struct CpuFeatures {
  bool avx2 = false;     // x86: AVX2, FMA and F16C together, enabled by the operating system
  bool avx512 = false;   // x86: AVX-512 F, VL, BW and DQ besides
  bool sha = false;      // x86: SHA extensions and SSE4.1; arm64: SHA-256 instructions
  bool fp16 = false;     // arm64: half-precision arithmetic
  bool dotprod = false;  // arm64: 8-bit dot products
  bool i8mm = false;     // arm64: 8-bit matrix products
};

// Asked of the CPU once, then remembered.
const CpuFeatures& cpu_features();

}  // namespace edgerun
