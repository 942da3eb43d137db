#include "csrc/runtime/executorch_log.h"

#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <mutex>

namespace edgerun {

namespace {

thread_local ExecutorchLog* current = nullptr;
pal_emit_log_message_method emit_before = nullptr;
std::mutex install_mutex;

}  // namespace

struct ExecutorchLogSink {
  static void take(et_timestamp_t timestamp, et_pal_log_level_t level, const char* file, const char* function,
                   size_t line, const char* message, size_t length) {
    if (current == nullptr) {
      if (emit_before != nullptr) emit_before(timestamp, level, file, function, line, message, length);
    } else if ((level == et_pal_log_level_t::kError || level == et_pal_log_level_t::kFatal) &&
               current->first_error_.empty()) {
      current->first_error_.assign(message, length);
      std::replace(current->first_error_.begin(), current->first_error_.end(), '\n', ' ');
    }
  }
  // Whoever loads ExecuTorch's Python library after us takes the log over: so this is looked at every time.
  static void install() {
    const std::lock_guard<std::mutex> lock(install_mutex);
    const auto emit_now = executorch::runtime::get_pal_impl()->emit_log_message;
    if (emit_now == take) return;
    emit_before = emit_now;
    executorch::runtime::register_pal(executorch::runtime::PalImpl::create(take, __FILE__));
  }
};

ExecutorchLog::ExecutorchLog() : outer_(current) {
  current = this;  // before the installation, which has its own line to say
  ExecutorchLogSink::install();
}

ExecutorchLog::~ExecutorchLog() { current = outer_; }

}  // namespace edgerun
