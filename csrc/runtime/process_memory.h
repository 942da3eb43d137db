// process_memory: what a process has used, and memory that costs nothing until it is touched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgerun {

// Most memory this process has had in RAM so far, in bytes; -1 where the system does not tell.
int64_t peak_rss_bytes();

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
