// SHA-256 (FIPS 180-4): a bundle's files are checked against the manifest before any byte of them is used.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "csrc/base/sha256_variants.h"

namespace edgerun {

class Sha256 {
 public:
  // By the fastest variant that this CPU has, unless a test asks for another.
  explicit Sha256(const Sha256Variant& variant = sha256_variant_at(0)) : variant_(&variant) {}
  void update(const void* data, size_t bytes);
  std::string hex_digest();  // 64 lower-case digits; ends the message

 private:
  const Sha256Variant* variant_;
  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> pending_ = {};
  size_t pending_bytes_ = 0;
  uint64_t total_bytes_ = 0;
};

}  // namespace edgerun
