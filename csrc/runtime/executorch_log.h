// executorch_log: what ExecuTorch logs while a session is in it. The first error, the cause of those after it, becomes
// part of our message instead of a line on the standard error; what it says about its own work is dropped. Other users
// of ExecuTorch in the process keep their log.
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
  const std::string& first_error() const { return first_error_; }  // one line; empty: none

 private:
  friend struct ExecutorchLogSink;
  std::string first_error_;
  ExecutorchLog* outer_;
};

}  // namespace edgerun
