// block_plan: how many of a chain's blocks stay in memory, and how many may be loaded ahead, within a number of bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "csrc/base/status.h"

namespace edgerun {

inline constexpr int64_t kUnlimitedBytes = std::numeric_limits<int64_t>::max();

struct BlockCost {
  int64_t loaded_bytes = 0;   // while it is in memory
  int64_t loading_bytes = 0;  // at most while it is being loaded; never below loaded_bytes
};

struct BlockPlan {
  size_t resident = 0;   // blocks, from the first on
  int64_t prefetch = 0;  // blocks ahead of the executing one
};

// What is not a block: values, and what executing needs.
struct Activations {
  int64_t bytes = 0;          // while blocks are loaded and executed in turn
  int64_t ahead_bytes = 0;    // more, for every block that may be loaded ahead of the executing one
  int64_t growing_bytes = 0;  // more, as soon as a block stays: what the others share then grows in place
  int64_t with(const BlockPlan& plan) const {
    return bytes + plan.prefetch * ahead_bytes + (plan.resident > 0 ? growing_bytes : 0);
  }
};

// As many blocks ahead as fit in the budget, at most `prefetch`; then as many resident ones. again: the chain runs more
// than once, so that all blocks resident, where that fits, is better than any ahead.
BlockPlan plan_blocks(const std::vector<BlockCost>& costs, int64_t prefetch, const Activations& activations,
                      int64_t budget_bytes, bool again);

// kOutOfMemory, with value, limit and next step, when one of the blocks would not fit even alone.
Status check_fits(const std::vector<BlockCost>& costs, const std::vector<std::string>& names,
                  const Activations& activations, int64_t budget_bytes);

}  // namespace edgerun
