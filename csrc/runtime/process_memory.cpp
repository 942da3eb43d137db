#include "csrc/runtime/process_memory.h"

#include <sys/mman.h>
#include <sys/resource.h>

#include <cstdio>
#include <cstring>
#include <utility>

namespace edgerun {

int64_t peak_rss_bytes() {
#if defined(__linux__)
  // Not getrusage: its maximum survives exec, so a child would report its parent's peak.
  std::FILE* const file = std::fopen("/proc/self/status", "r");
  if (file == nullptr) return -1;
  long long kibibytes = -1;
  char line[256];
  while (std::fgets(line, sizeof(line), file) != nullptr && std::sscanf(line, "VmHWM: %lld", &kibibytes) != 1) {
  }
  std::fclose(file);
  return kibibytes < 0 ? -1 : static_cast<int64_t>(kibibytes) * 1024;
#else
  rusage usage = {};
  return getrusage(RUSAGE_SELF, &usage) == 0 ? static_cast<int64_t>(usage.ru_maxrss) : -1;  // bytes on Darwin
#endif
}

LazyMemory::~LazyMemory() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

LazyMemory::LazyMemory(LazyMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

bool LazyMemory::allocate(size_t bytes) {
  if (bytes == 0) return true;
#if defined(MAP_NORESERVE)
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
#else
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS;
#endif
  void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (data == MAP_FAILED) return false;
#if defined(MADV_NOHUGEPAGE)
  // A cache is a few KiB here and a few there; a 2 MiB page for each would take memory for the context reserved. Where
  // a prompt will fill such pages, attention asks for them (set_attention_expected_tokens).
  madvise(data, bytes, MADV_NOHUGEPAGE);
#endif
  data_ = static_cast<uint8_t*>(data);
  bytes_ = bytes;
  return true;
}

}  // namespace edgerun
