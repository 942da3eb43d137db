// SHA-256 for tests/runtime/test_runtime.py, whose truth is hashlib:
//   sha256_test                       the variants that this CPU runs, one a line
//   sha256_test FILE BYTES VARIANT    the digest of FILE, given to the hash BYTES at a time
#include "csrc/base/sha256.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

int main(int count, char** argv) {
  for (int64_t i = 0; i < edgerun::sha256_variant_count(); ++i) {
    const edgerun::Sha256Variant& variant = edgerun::sha256_variant_at(i);
    if (count == 1) std::puts(variant.name);
    if (count < 4 || std::strcmp(variant.name, argv[3]) != 0) continue;
    std::ifstream file(argv[1], std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    const size_t step = std::strtoul(argv[2], nullptr, 10);
    edgerun::Sha256 hash(variant);
    for (size_t at = 0; at < text.size(); at += step) hash.update(text.data() + at, std::min(step, text.size() - at));
    std::puts(hash.hex_digest().c_str());
  }
  return 0;
}
