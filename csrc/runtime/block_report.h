// block_report: what a chain's schedule measured, as JSON.
#pragma once

#include <string>
#include <vector>

#include "csrc/base/json.h"
#include "csrc/runtime/block_program.h"
#include "csrc/runtime/block_schedule.h"

namespace edgerun {

// {"budget_bytes", "activation_bytes", "resident_blocks", "prefetch", "peak_bytes", "passes": {"count", "wall_ms",
// "load_ms", "unload_ms", "execute_ms", "wait_ms", "loads"}, "hidden_share", "blocks": [...]}; null: not known.
// The hidden share is (load + execute - wall) / min(load, execute), over the passes that did not measure.
void write_chain(const BlockSchedule& schedule, const std::vector<ChainProgram>& programs, int64_t activation_bytes,
                 json::Writer* json);

}  // namespace edgerun
