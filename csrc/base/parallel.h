// How a kernel is given threads without knowing whose they are.
// The ExecuTorch binding passes ExecuTorch's pool, tests pass std::thread or nothing at all.
#pragma once

#include <cstdint>

namespace edgerun {

// Runs body(body_context, worker) for every worker in [0, workers), in any order and possibly at the same time,
// and returns when all have returned. `workers` is a count of tasks, not a promise of threads: a kernel's result
// never depends on it.
using ParallelBody = void (*)(void* body_context, int64_t worker);

struct Parallel {
  void (*run)(void* pool, int64_t workers, ParallelBody body, void* body_context);
  void* pool;
  int64_t threads;  // how many bodies may run at the same time; >= 1
};

inline void run_serially(void*, int64_t workers, ParallelBody body, void* body_context) {
  for (int64_t worker = 0; worker < workers; ++worker) body(body_context, worker);
}

inline Parallel serial() { return Parallel{run_serially, nullptr, 1}; }

}  // namespace edgerun
