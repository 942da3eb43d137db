// Threads for ops that Python calls directly: started for the call, gone after it.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

#include "csrc/base/parallel.h"

namespace edgerun {

inline Parallel python_threads(int64_t threads) {
  if (threads <= 1) return serial();
  const auto run = [](void*, int64_t workers, ParallelBody body, void* body_context) {
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(workers - 1));
    for (int64_t worker = 1; worker < workers; ++worker) others.emplace_back(body, body_context, worker);
    body(body_context, 0);
    for (std::thread& other : others) other.join();
  };
  return Parallel{run, nullptr, threads};
}

}  // namespace edgerun
