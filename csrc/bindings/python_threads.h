// Threads for ops that Python calls directly: ExecuTorch's pool when it has as many as are asked for, as it has unless
// a test or a benchmark wants another number; else threads that are started for the call and gone after it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "csrc/base/executorch_binding.h"
#include "csrc/base/parallel.h"
#include "csrc/runtime/executorch_log.h"

namespace edgerun {

// At most `threads` of them, however many tasks there are, and fewer where the system refuses to start more.
inline Parallel python_threads(int64_t threads) {
  if (threads <= 1) return serial();
  const ExecutorchLog quiet;  // the pool is made at the first call, which is no error to report
  if (const Parallel pool = executorch_pool(); pool.threads == threads) return pool;
  const auto run = [](void* pool, int64_t workers, ParallelBody body, void* body_context) {
    std::atomic<int64_t> next{0};
    const auto take_tasks = [&] {
      for (int64_t worker; (worker = next.fetch_add(1)) < workers;) body(body_context, worker);
    };
    const int64_t count = std::min(static_cast<int64_t>(reinterpret_cast<intptr_t>(pool)), workers);
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(std::max<int64_t>(count, 1) - 1));
    try {
      for (int64_t started = 1; started < count; ++started) others.emplace_back(take_tasks);
    } catch (const std::system_error&) {  // the tasks are shared out all the same
    }
    take_tasks();
    for (std::thread& other : others) other.join();
  };
  return Parallel{run, reinterpret_cast<void*>(static_cast<intptr_t>(threads)), threads};
}

}  // namespace edgerun
