// Status: the only way a kernel or the runtime says that something went wrong. No exceptions cross a boundary.
#pragma once

#include <string>
#include <utility>

namespace edgerun {

enum class StatusCode : int {
  kOk = 0,
  kInvalidArgument = 1,  // the caller passed something that cannot be served; the message has value, limit, next step
  kNotFound = 2,         // a file or a program that is named is not there
  kCorrupt = 3,          // a file is there but its size, hash or schema is not what the manifest says
  kOutOfMemory = 4,
  kCancelled = 5,
  kInternal = 6,  // ExecuTorch or edgerun failed in a way that the input does not explain
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}
  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace edgerun
