#include "csrc/runtime/thread_pool.h"

#include <mutex>
#include <string>

// The SDK ships the library without this header. Only members that are functions are named, so the layout is not.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace edgerun {

namespace {

constexpr int64_t kMaxThreads = 256;
std::mutex holders_mutex;
int holders = 0;

}  // namespace

int64_t pool_threads() {
  const auto* const pool = executorch::extension::threadpool::get_threadpool();
  return pool == nullptr ? 1 : static_cast<int64_t>(pool->get_thread_count());
}

Status ThreadPoolHold::acquire(int64_t threads) {
  if (threads < 0 || threads > kMaxThreads) {
    return Status(StatusCode::kInvalidArgument, "threads is " + std::to_string(threads) + "; it must be 1 to " +
                                                    std::to_string(kMaxThreads) + ", or 0 for the pool's own number");
  }
  const std::lock_guard<std::mutex> lock(holders_mutex);
  if (threads != 0 && threads != pool_threads()) {
    if (holders > 0) {
      return Status(StatusCode::kInvalidArgument,
                    "threads is " + std::to_string(threads) + ", but an open session uses the process's pool of " +
                        std::to_string(pool_threads()) + ": close it first, or leave threads out");
    }
    auto* const pool = executorch::extension::threadpool::get_threadpool();
    if (pool == nullptr || !pool->_unsafe_reset_threadpool(static_cast<uint32_t>(threads))) {
      return Status(StatusCode::kInternal, "the thread pool cannot be set to " + std::to_string(threads) + " threads");
    }
  }
  ++holders;
  held_ = true;
  return Status();
}

ThreadPoolHold::~ThreadPoolHold() {
  const std::lock_guard<std::mutex> lock(holders_mutex);
  if (held_) --holders;
}

}  // namespace edgerun
