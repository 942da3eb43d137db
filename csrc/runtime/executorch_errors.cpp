#include "csrc/runtime/executorch_errors.h"

#include <executorch/runtime/kernel/operator_registry.h>

#include <algorithm>
#include <string_view>

namespace edgerun {

using executorch::runtime::Error;

Status executorch_failed(const std::string& what, Error error, const ExecutorchLog& log) {
  const StatusCode code = error == Error::MemoryAllocationFailed ? StatusCode::kOutOfMemory
                          : error == Error::InvalidProgram       ? StatusCode::kCorrupt
                                                                 : StatusCode::kInternal;
  std::string message = what + ": ExecuTorch says " + executorch::runtime::to_string(error);
  if (!log.first_error().empty()) message += " (" + log.first_error() + ")";
  if (error == Error::OperatorMissing) {
    message += ", 0x14: load the library that defines the program's operators before the bundle";
  }
  return Status(code, message);
}

Status check_operators(const std::vector<std::string>& operators) {
  const auto kernels = executorch::runtime::get_registered_kernels();
  for (const std::string& op : operators) {
    const bool found = std::any_of(kernels.begin(), kernels.end(), [&](const auto& kernel) {
      const std::string_view name = kernel.name_;
      return name == op || (name.substr(0, op.size()) == op && name[op.size()] == '.');
    });
    if (found) continue;
    const bool ours = op.rfind("edgerun::", 0) == 0;
    return Status(StatusCode::kNotFound,
                  "the program needs the operator " + op + ", which no loaded library defines: load " +
                      (ours ? "a libedgerun_ops that has it (update edgerun)" : "the library that defines it") +
                      " before the bundle");
  }
  return Status();
}

}  // namespace edgerun
