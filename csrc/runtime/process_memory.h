// process_memory: what a process has used, and memory that costs nothing until it is touched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgerun {

// Most memory this process has had in RAM so far, in bytes; -1 where the system does not tell.
int64_t peak_rss_bytes();

// Memory of this process that is in RAM now, in bytes: its own, and pages of files that it has mapped; -1: unknown.
struct ResidentBytes {
  int64_t anonymous = -1;
  int64_t file = -1;
};
ResidentBytes resident_bytes();

// From now on, memory of a MiB or more goes back to the system as soon as it is freed. The C library keeps up to 64 MiB
// in each thread's heap otherwise, once something as large was freed, and its trimming does not reach all of them.
void return_large_memory();

// Gives back what is free between smaller pieces of memory.
void release_free_memory();

// Zeroed, page-aligned memory that is reserved now and takes RAM page by page as it is written.
class LazyMemory {
 public:
  LazyMemory() = default;
  ~LazyMemory();
  LazyMemory(LazyMemory&& other) noexcept;
  LazyMemory(const LazyMemory&) = delete;
  LazyMemory& operator=(const LazyMemory&) = delete;

  bool allocate(size_t bytes);  // once; false when the system refuses
  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace edgerun
