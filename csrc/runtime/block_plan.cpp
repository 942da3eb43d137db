#include "csrc/runtime/block_plan.h"

#include <algorithm>

namespace edgerun {

namespace {

// Whether the blocks after the first `resident` can stream through: one executes, the next ones are loaded, and the
// last of those is loading. The chain runs over and over: the first of them follows the last.
bool streams(const std::vector<BlockCost>& costs, size_t resident, int64_t prefetch, int64_t room) {
  const size_t count = costs.size() - resident;
  int64_t kept = 0, extra = 0;
  for (size_t i = 0; i < resident; ++i) {
    kept += costs[i].loaded_bytes;
    extra = std::max(extra, costs[i].loading_bytes - costs[i].loaded_bytes);
  }
  if (count == 0) return kept + extra <= room;
  const size_t ahead = std::min(static_cast<size_t>(prefetch), count - 1);
  for (size_t first = 0; first < count; ++first) {
    int64_t bytes = kept;
    for (size_t offset = 0; offset <= ahead; ++offset) {
      const BlockCost& cost = costs[resident + (first + offset) % count];
      bytes += offset == ahead ? cost.loading_bytes : cost.loaded_bytes;
    }
    if (bytes > room) return false;
  }
  return true;
}

}  // namespace

BlockPlan plan_blocks(const std::vector<BlockCost>& costs, int64_t prefetch, const Activations& activations,
                      int64_t budget_bytes, bool again) {
  for (int64_t ahead = prefetch; again && ahead >= 0; --ahead) {
    const BlockPlan all = {costs.size(), ahead};
    if (streams(costs, all.resident, ahead, budget_bytes - activations.with(all))) return all;
  }
  for (; prefetch >= 0; --prefetch) {
    for (size_t resident = costs.size() + 1; resident-- > 0;) {
      const BlockPlan plan = {resident, prefetch};
      if (streams(costs, resident, prefetch, budget_bytes - activations.with(plan))) return plan;
    }
  }
  return {};
}

Status check_fits(const std::vector<BlockCost>& costs, const std::vector<std::string>& names,
                  const Activations& activations, int64_t budget_bytes) {
  size_t largest = 0;
  for (size_t i = 0; i < costs.size(); ++i) {
    if (costs[i].loading_bytes > costs[largest].loading_bytes) largest = i;
  }
  const int64_t block_bytes = costs[largest].loading_bytes, activation_bytes = activations.bytes;
  if (block_bytes <= budget_bytes && activation_bytes <= budget_bytes - block_bytes) return Status();
  const std::string least = std::to_string(block_bytes + activation_bytes);
  return Status(StatusCode::kOutOfMemory, "a budget of " + std::to_string(budget_bytes) + " bytes is below the " +
                                              least + " that block '" + names[largest] + "' needs (" +
                                              std::to_string(block_bytes) + " to load it, " +
                                              std::to_string(activation_bytes) + " for activations): give at least " +
                                              least + " bytes, or export smaller blocks");
}

}  // namespace edgerun
