// sampler: logits in, one token id out. The same seed gives the same tokens on every platform: the random numbers
// are PCG32's (M. O'Neill, HMC-CS-2014-0905), exp() is written out, and this file is compiled without contraction.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "csrc/base/status.h"

namespace edgerun {

struct SamplerOptions {
  float temperature = 0.0f;  // 0: greedy, the highest logit
  int64_t top_k = 0;         // only the k highest logits; 0: all
  float top_p = 1.0f;        // then the fewest of those whose probability reaches top_p; 1: all
  uint64_t seed = 0;
};

// kInvalidArgument with value, limit and next step when an option is outside its range.
Status check(const SamplerOptions& options);

// Applied in the order temperature, top_k, top_p. Equal logits rank by the lower id.
class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options);
  // kInternal when a logit is NaN or +infinity, or when all are -infinity.
  Status sample(std::span<const float> logits, int64_t* token);

 private:
  double uniform();  // in [0, 1), 53 bits

  SamplerOptions options_;
  uint64_t state_ = 0;
  std::vector<int64_t> order_;   // candidates, best first as far as they are sorted
  std::vector<double> weights_;  // exp((logit - highest) / temperature) by id
};

}  // namespace edgerun
