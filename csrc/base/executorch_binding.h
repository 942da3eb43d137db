// What every ExecuTorch binding of an op needs: ExecuTorch's own threads, scratch, repeatable registration.
#pragma once

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "csrc/base/parallel.h"

#ifndef ET_USE_THREADPOOL
#error "Compile with -DET_USE_THREADPOOL: without it ExecuTorch's parallel_for silently runs on one thread."
#endif

namespace edgerun {

// XNNPACK's pool, the one that ExecuTorch's own kernels use.
inline Parallel executorch_pool() {
  const auto run = [](void*, int64_t workers, ParallelBody body, void* body_context) {
    executorch::extension::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(body_context, worker);
    });
  };
  return Parallel{run, nullptr, executorch::extension::get_thread_count()};
}

// Scratch for one call: from the program's temporary allocator, or from the heap where it has none.
class Scratch {
 public:
  static constexpr size_t kAlignment = 64;  // bytes

  Scratch(executorch::runtime::KernelRuntimeContext& context, size_t bytes) {
    const auto temporary = context.allocate_temp(bytes, kAlignment);
    if (temporary.ok()) {
      data_ = temporary.get();
      return;
    }
    heap_.reset(::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow));
    data_ = heap_.get();
  }
  void* data() const { return data_; }  // nullptr: out of memory

 private:
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<void, Free> heap_;
  void* data_ = nullptr;
};

// ExecuTorch aborts the process when a name is registered twice, as a second copy of this library would do. The first
// one stays, and the log says so.
inline bool register_once(const char* name, const executorch::runtime::Kernel& kernel) {
  for (const executorch::runtime::Kernel& other : executorch::runtime::get_registered_kernels()) {
    if (std::strcmp(other.name_, name) != 0) continue;
    ET_LOG(Error, "%s is registered already: two copies of libedgerun_ops are loaded, the first is used; load one",
           name);
    return false;
  }
  return executorch::runtime::register_kernel(kernel) == executorch::runtime::Error::Ok;
}

}  // namespace edgerun

// EDGERUN_REGISTER_OP("edgerun::name.out", function): as EXECUTORCH_LIBRARY, but safe to load twice.
#define EDGERUN_REGISTER_OP(name, function)                                                    \
  static constexpr const char kEdgerunOpName_##function[] = name;                              \
  [[maybe_unused]] static const bool kEdgerunOpRegistered_##function = edgerun::register_once( \
      name, executorch::extension::make_boxed_kernel(name, EXECUTORCH_FN(function, kEdgerunOpName_##function)))
