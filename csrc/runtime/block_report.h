// block_report: what the schedules of a stage's chains measured, as JSON.
#pragma once

#include <string>
#include <vector>

#include "csrc/base/json.h"
#include "csrc/runtime/block_loader.h"

namespace edgerun {

struct ChainStats {
  std::vector<std::string> names;  // of the blocks, chain after chain
  std::vector<BlockStats> blocks;
  std::vector<PassStats> passes;
  int64_t activation_bytes = 0;  // of the chain that needs most

  void add(BlockLoader* loader);  // what its schedule has measured so far
};

// {"budget_bytes", "activation_bytes", "resident_blocks", "prefetch", "peak_bytes", "passes": {"count", "wall_ms",
// "load_ms", "unload_ms", "execute_ms", "wait_ms", "loads"}, "hidden_share", "blocks": [...]}; null: not known.
// Budget, resident blocks and prefetch are those of the last pass. The hidden share is (load + execute - wall) /
// min(load, execute), over the passes that did not measure.
void write_chains(const ChainStats& stats, json::Writer* json);

}  // namespace edgerun
