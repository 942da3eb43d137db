#include "csrc/runtime/executorch_log.h"

#include <executorch/runtime/platform/platform.h>

#include <algorithm>

namespace edgerun {

namespace {

thread_local ExecutorchLog* current = nullptr;
pal_emit_log_message_method emit_before = nullptr;

}  // namespace

struct ExecutorchLogSink {
  static void take(et_timestamp_t timestamp, et_pal_log_level_t level, const char* file, const char* function,
                   size_t line, const char* message, size_t length) {
    if (current == nullptr) {
      if (emit_before != nullptr) emit_before(timestamp, level, file, function, line, message, length);
    } else if (level == et_pal_log_level_t::kError || level == et_pal_log_level_t::kFatal) {
      current->last_error_.assign(message, length);
      std::replace(current->last_error_.begin(), current->last_error_.end(), '\n', ' ');
    }
  }
  static bool install() {
    emit_before = executorch::runtime::get_pal_impl()->emit_log_message;
    return executorch::runtime::register_pal(executorch::runtime::PalImpl::create(take, __FILE__));
  }
};

ExecutorchLog::ExecutorchLog() : outer_(current) {
  static const bool installed = ExecutorchLogSink::install();
  if (installed) current = this;
}

ExecutorchLog::~ExecutorchLog() { current = outer_; }

}  // namespace edgerun
