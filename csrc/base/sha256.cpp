// SHA-256: the message in blocks, the portable variant, and which variant a CPU gets.
#include "csrc/base/sha256.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "csrc/base/cpu_features.h"

namespace edgerun {

#if defined(__x86_64__)
namespace sha_ni {
extern const Sha256Variant kVariant;
}
#elif defined(__aarch64__)
namespace armv8_sha2 {
extern const Sha256Variant kVariant;
}
#endif

namespace {

void compress_block(uint32_t* state, const uint8_t* bytes) {
  uint32_t words[64];
  for (int i = 0; i < 16; ++i) {
    words[i] = static_cast<uint32_t>(bytes[4 * i]) << 24 | static_cast<uint32_t>(bytes[4 * i + 1]) << 16 |
               static_cast<uint32_t>(bytes[4 * i + 2]) << 8 | static_cast<uint32_t>(bytes[4 * i + 3]);
  }
  for (int i = 16; i < 64; ++i) {
    const uint32_t early = words[i - 15], late = words[i - 2];
    words[i] = words[i - 16] + words[i - 7] + (std::rotr(early, 7) ^ std::rotr(early, 18) ^ (early >> 3)) +
               (std::rotr(late, 17) ^ std::rotr(late, 19) ^ (late >> 10));
  }
  uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
  uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
  for (int i = 0; i < 64; ++i) {
    const uint32_t first =
        h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) + ((e & f) ^ (~e & g)) + kSha256Round[i] + words[i];
    const uint32_t second = (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g;
    g = f;
    f = e;
    e = d + first;
    d = c;
    c = b;
    b = a;
    a = first + second;
  }
  const uint32_t add[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state[i] += add[i];
}

void compress_portable(uint32_t* state, const uint8_t* blocks, size_t count) {
  for (; count > 0; --count, blocks += 64) compress_block(state, blocks);
}

constexpr Sha256Variant kPortable = {"portable", compress_portable};

struct Table {
  const Sha256Variant* rows[2];
  int64_t count = 0;
};

const Table& table() {
  static const Table available = [] {
    Table found;
#if defined(__x86_64__)
    if (cpu_features().sha) found.rows[found.count++] = &sha_ni::kVariant;
#elif defined(__aarch64__)
    if (cpu_features().sha) found.rows[found.count++] = &armv8_sha2::kVariant;
#endif
    found.rows[found.count++] = &kPortable;
    return found;
  }();
  return available;
}

}  // namespace

int64_t sha256_variant_count() { return table().count; }
const Sha256Variant& sha256_variant_at(int64_t index) { return *table().rows[index]; }

void Sha256::update(const void* data, size_t bytes) {
  const uint8_t* at = static_cast<const uint8_t*>(data);
  total_bytes_ += bytes;
  if (pending_bytes_ > 0) {
    const size_t taken = std::min(bytes, pending_.size() - pending_bytes_);
    std::memcpy(pending_.data() + pending_bytes_, at, taken);
    pending_bytes_ += taken;
    at += taken;
    bytes -= taken;
    if (pending_bytes_ < pending_.size()) return;
    variant_->compress(state_.data(), pending_.data(), 1);
    pending_bytes_ = 0;
  }
  const size_t whole = bytes / pending_.size();
  variant_->compress(state_.data(), at, whole);
  pending_bytes_ = bytes % pending_.size();
  if (pending_bytes_ > 0) std::memcpy(pending_.data(), at + whole * pending_.size(), pending_bytes_);
}

std::string Sha256::hex_digest() {
  const uint64_t bits = total_bytes_ * 8;
  const uint8_t one = 0x80, zero = 0;
  update(&one, 1);
  while (pending_bytes_ != 56) update(&zero, 1);
  uint8_t length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
  update(length, sizeof(length));
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string digest;
  for (const uint32_t word : state_) {
    for (int shift = 28; shift >= 0; shift -= 4) digest.push_back(kDigits[word >> shift & 15]);
  }
  return digest;
}

}  // namespace edgerun
