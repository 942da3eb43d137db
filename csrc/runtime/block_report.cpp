#include "csrc/runtime/block_report.h"

#include <algorithm>
#include <limits>

namespace edgerun {

void ChainStats::add(BlockLoader* loader) {
  const std::vector<BlockStats> more_blocks = loader->schedule().block_stats();
  const std::vector<PassStats> more_passes = loader->schedule().pass_stats();
  for (const ChainProgram& program : loader->programs()) names.push_back(program.name);
  blocks.insert(blocks.end(), more_blocks.begin(), more_blocks.end());
  passes.insert(passes.end(), more_passes.begin(), more_passes.end());
  activation_bytes = std::max(activation_bytes, loader->activation_bytes());
}

void write_chains(const ChainStats& stats, json::Writer* json) {
  const std::vector<PassStats>& passes = stats.passes;
  PassStats sum, overlapped;
  for (const PassStats& pass : passes) {
    for (PassStats* const total : {&sum, &overlapped}) {
      if (total == &overlapped && pass.measuring) continue;
      total->wall_ms += pass.wall_ms;
      total->load_ms += pass.load_ms;
      total->unload_ms += pass.unload_ms;
      total->execute_ms += pass.execute_ms;
      total->wait_ms += pass.wait_ms;
      total->loads += pass.loads;
      total->peak_bytes = std::max(total->peak_bytes, pass.peak_bytes);
    }
  }
  json->begin_object().key("budget_bytes");
  const bool limited = !passes.empty() && passes.back().budget_bytes != kUnlimitedBytes;
  limited ? json->value(passes.back().budget_bytes) : json->null();
  json->key("activation_bytes").value(stats.activation_bytes);
  json->key("resident_blocks").value(passes.empty() ? int64_t{0} : passes.back().resident_blocks);
  json->key("prefetch").value(passes.empty() ? int64_t{0} : passes.back().prefetch);
  json->key("peak_bytes").value(sum.peak_bytes);
  json->key("passes").begin_object().key("count").value(static_cast<int64_t>(passes.size()));
  json->key("wall_ms").value(sum.wall_ms).key("load_ms").value(sum.load_ms).key("unload_ms").value(sum.unload_ms);
  json->key("execute_ms").value(sum.execute_ms).key("wait_ms").value(sum.wait_ms).key("loads").value(sum.loads);
  json->end_object().key("hidden_share");
  const double load_ms = overlapped.load_ms + overlapped.unload_ms, least = std::min(load_ms, overlapped.execute_ms);
  least > 0.0 ? json->value((load_ms + overlapped.execute_ms - overlapped.wall_ms) / least) : json->null();
  json->key("blocks").begin_array();
  for (size_t i = 0; i < stats.blocks.size(); ++i) {
    const BlockStats& block = stats.blocks[i];
    json->begin_object().key("name").value(stats.names[i]);
    json->key("loads").value(block.loads).key("executions").value(block.executions);
    json->key("load_ms").value(block.load_ms).key("unload_ms").value(block.unload_ms);
    json->key("execute_ms").value(block.execute_ms).key("wait_ms").value(block.wait_ms);
    json->key("loaded_bytes").value(block.cost.loaded_bytes).key("loading_bytes").value(block.cost.loading_bytes);
    json->key("measured").value(block.measured).end_object();
  }
  json->end_array().end_object();
}

}  // namespace edgerun
