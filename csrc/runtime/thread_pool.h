// thread_pool: how many threads ExecuTorch's pool has. The pool is one for the whole process: XNNPACK and our ops use it.
#pragma once

#include <cstdint>

#include "csrc/base/status.h"

namespace edgerun {

int64_t pool_threads();

// Holds the pool at `threads` (0: as it is) for as long as one holder lives; programs keep a pointer into the pool,
// so it cannot change under them. kInvalidArgument when another holder wants another number.
class ThreadPoolHold {
 public:
  ThreadPoolHold() = default;
  ~ThreadPoolHold();
  ThreadPoolHold(const ThreadPoolHold&) = delete;
  ThreadPoolHold& operator=(const ThreadPoolHold&) = delete;
  Status acquire(int64_t threads);

 private:
  bool held_ = false;
};

}  // namespace edgerun
