// executorch_log: what ExecuTorch logs while a session is in it. The last error becomes part of our message instead of a
// line on the standard error; what it says about its own work is dropped. Other users of ExecuTorch keep their log.
#pragma once

#include <string>

namespace edgerun {

// Takes this thread's ExecuTorch log for as long as it lives. They nest.
class ExecutorchLog {
 public:
  ExecutorchLog();
  ~ExecutorchLog();
  ExecutorchLog(const ExecutorchLog&) = delete;
  ExecutorchLog& operator=(const ExecutorchLog&) = delete;
  const std::string& last_error() const { return last_error_; }  // one line; empty: none

 private:
  friend struct ExecutorchLogSink;
  std::string last_error_;
  ExecutorchLog* outer_;
};

}  // namespace edgerun
