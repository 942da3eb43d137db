#include "csrc/runtime/process_memory.h"

#include <sys/mman.h>
#include <sys/resource.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <cstdio>
#include <cstring>
#include <utility>

namespace edgerun {

#if defined(__linux__)
namespace {

// Each `label` of /proc/self/status → bytes; -1 where it is missing.
template <size_t count>
void read_status(const char* const (&labels)[count], int64_t (&bytes)[count]) {
  for (int64_t& value : bytes) value = -1;
  std::FILE* const file = std::fopen("/proc/self/status", "r");
  if (file == nullptr) return;
  char line[256];
  while (std::fgets(line, sizeof(line), file) != nullptr) {
    for (size_t i = 0; i < count; ++i) {
      const size_t length = std::strlen(labels[i]);
      long long kibibytes = 0;
      if (std::strncmp(line, labels[i], length) == 0 && std::sscanf(line + length, ": %lld", &kibibytes) == 1) {
        bytes[i] = static_cast<int64_t>(kibibytes) * 1024;
      }
    }
  }
  std::fclose(file);
}

}  // namespace
#endif

int64_t peak_rss_bytes() {
#if defined(__linux__)
  // Not getrusage: its maximum survives exec, so a child would report its parent's peak.
  int64_t bytes[1];
  read_status({"VmHWM"}, bytes);
  return bytes[0];
#else
  rusage usage = {};
  return getrusage(RUSAGE_SELF, &usage) == 0 ? static_cast<int64_t>(usage.ru_maxrss) : -1;  // bytes on Darwin
#endif
}

ResidentBytes resident_bytes() {
#if defined(__linux__)
  int64_t bytes[2];
  read_status({"RssAnon", "RssFile"}, bytes);
  return {bytes[0], bytes[1]};
#else
  return {};
#endif
}

void return_large_memory() {
#if defined(__GLIBC__)
  constexpr int kLargeBytes = 1 << 20;
  mallopt(M_MMAP_THRESHOLD, kLargeBytes);
  mallopt(M_TRIM_THRESHOLD, kLargeBytes);
#endif
}

void release_free_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
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
