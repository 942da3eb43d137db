// executorch_errors: what ExecuTorch says, as a Status that names the file and the next step.
#pragma once

#include <executorch/runtime/core/error.h>

#include <string>
#include <vector>

#include "csrc/base/status.h"
#include "csrc/runtime/executorch_log.h"

namespace edgerun {

Status executorch_failed(const std::string& what, executorch::runtime::Error error, const ExecutorchLog& log);

// Names the operators ("namespace::name") that nothing in this process defines, before ExecuTorch would fail with 0x14
// and no name.
Status check_operators(const std::vector<std::string>& operators);

}  // namespace edgerun
