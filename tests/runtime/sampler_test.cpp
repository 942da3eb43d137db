// The sampler for tests/runtime/test_runtime.py, whose truth is numpy; it also runs on emulated arm64, for the same tokens:
//   sampler_test FILE TEMPERATURE TOP_K TOP_P SEED COUNT    COUNT tokens drawn from FILE's logits, text, in one sequence
#include "csrc/runtime/sampler.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

int main(int, char** argv) {
  std::ifstream file(argv[1]);
  std::vector<float> logits;
  for (std::string word; file >> word;) logits.push_back(std::strtof(word.c_str(), nullptr));
  const edgerun::SamplerOptions options = {std::strtof(argv[2], nullptr), std::atoll(argv[3]),
                                           std::strtof(argv[4], nullptr), std::strtoull(argv[5], nullptr, 10)};
  edgerun::Status status = edgerun::check(options);
  edgerun::Sampler sampler(options);
  for (int left = std::atoi(argv[6]); status.ok() && left > 0; --left) {
    int64_t token = -1;
    status = sampler.sample(logits, &token);
    if (status.ok()) std::printf("%lld\n", static_cast<long long>(token));
  }
  if (!status.ok()) std::puts(status.message().c_str());
  return status.ok() ? 0 : 1;
}
