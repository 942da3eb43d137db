// dhsa_attention: checks a call, then runs its stages over tasks of one KV head and up to 256 query rows each. The
// stages are in state_portable.cpp and select_portable.cpp, the arithmetic in kernels_impl.h.
#include <algorithm>
#include <cmath>

#include "csrc/ops/dhsa_attention/dhsa_attention.h"

#include "csrc/ops/dhsa_attention/kernels.h"
#include "csrc/ops/dhsa_attention/state.h"

namespace edgerun::dhsa {
namespace {

constexpr int64_t kAlignment = 64;    // bytes
constexpr int64_t kBatchGroups = 32;  // groups whose lists are kept at a time: bounds their memory for small tiles

int64_t group_size(const Params& params) { return params.query_heads / params.kv_heads; }

// Tokens per task, and tasks per group: a tile too large for a worker's scratch is cut.
int64_t tokens_per_task(const Params& params) { return std::min(task_tokens(group_size(params)), params.tile); }
int64_t tasks_per_group(const Params& params) {
  const int64_t rows = std::min(params.tile, params.tokens);
  return (rows + tokens_per_task(params) - 1) / tokens_per_task(params);
}

int64_t worker_floats(const Params& params) {
  const int64_t rows = std::min(tokens_per_task(params), params.tokens) * group_size(params);
  const int64_t attend = attend_scratch_floats(rows, params.head_dim, params.cache_dtype != Dtype::kFloat);
  return round_up(std::max(attend, select_scratch_floats(params)), kAlignment / sizeof(float));
}

void add_counters(const Params& params, const Lists& lists, int64_t first_group, int64_t groups, Counters* counters) {
  for (int64_t g = 0; g < groups; ++g) {
    const Group group = group_at(params, first_group + g);
    // Keys of a micro-block that one row sees: the row's causal range and window, cut to the micro-block.
    const auto seen = [&](int64_t position, int64_t base) {
      const int64_t low = params.window > 0 ? std::max(base, position - params.window + 1) : base;
      return std::max<int64_t>(0, std::min(base + kMicroBlock, position + 1) - low);
    };
    for (int64_t position = group.start; position < group.end; ++position) {
      const int64_t causal = params.window > 0 ? std::min(position + 1, params.window) : position + 1;
      counters->causal_pairs += causal * params.kv_heads;
    }
    for (int64_t head = 0; head < params.kv_heads; ++head) {
      const uint16_t* ids = lists.ids + (head * groups + g) * params.capacity_blocks;
      for (int32_t i = 0; i < lists.counts[head * groups + g]; ++i) {
        const int64_t base = ids[i] * kMicroBlock;
        if (params.window == 0 && base + kMicroBlock <= group.start + 1) {
          counters->attended_pairs += kMicroBlock * group.rows;
          continue;
        }
        for (int64_t position = group.start; position < group.end; ++position) {
          counters->attended_pairs += seen(position, base);
        }
      }
    }
  }
}

void select_groups(const Params& params, const Tensors& tensors, int64_t first_group, int64_t groups,
                   const Lists& lists, float* scratch, const Parallel& parallel) {
  const int64_t floats = worker_floats(params);
  for_each_task(scores_chunks(params) ? parallel : serial(), params.kv_heads * groups,
                [&](int64_t index, int64_t worker) {
                  lists.counts[index] =
                      select_group(params, tensors, index / groups, group_at(params, first_group + index % groups),
                                   lists.ids + index * params.capacity_blocks, scratch + worker * floats);
                });
}

void attend_groups(const Params& params, const Tensors& tensors, int64_t first_group, int64_t groups,
                   const Lists& lists, float* scratch, const Parallel& parallel) {
  const int64_t floats = worker_floats(params);
  const int64_t size = group_size(params);
  const int64_t depth = params.head_dim;
  const int64_t element_bytes = params.dtype == Dtype::kHalf ? 2 : 4;
  const int64_t cuts = tasks_per_group(params);
  const int64_t cut_tokens = tokens_per_task(params);
  const Kernels& variant = kernels();
  // One head's tasks stay together, for its keys are warm; of those the last, which attend most, come first.
  for_each_task(parallel, params.kv_heads * groups * cuts, [&](int64_t index, int64_t worker) {
    const int64_t head = index / (groups * cuts);
    const int64_t reverse = groups * cuts - 1 - index % (groups * cuts);
    const int64_t list = head * groups + reverse / cuts;
    const Group group = group_at(params, first_group + reverse / cuts);
    const int64_t first = reverse % cuts * cut_tokens;
    if (first >= group.rows) return;
    const int64_t row = group.first_row + first;
    const auto at = [&](const void* base, int64_t elements) {
      return static_cast<const char*>(base) + elements * element_bytes;
    };
    const auto head_of = [&](const void* cache, int64_t block_bytes) {
      return static_cast<const char*>(cache) + head * params.capacity_blocks * block_bytes;
    };
    AttendTask task;
    task.query = at(tensors.query, (head * size * params.tokens + row) * depth);
    task.query_head_stride = params.tokens * depth;
    task.key_blocks = head_of(tensors.key_cache, key_block_bytes(params.cache_dtype, depth));
    task.value_blocks = head_of(tensors.value_cache, value_block_bytes(params.cache_dtype, depth));
    task.out = static_cast<char*>(tensors.out) + (row * params.query_heads + head * size) * depth * element_bytes;
    task.out_token_stride = params.query_heads * depth;
    task.ids = lists.ids + list * params.capacity_blocks;
    task.count = lists.counts[list];
    task.tokens = std::min(cut_tokens, group.rows - first);
    task.group = size;
    task.head_dim = depth;
    task.first_position = group.start + first;
    task.window = params.window;
    task.scale = params.scale;
    task.softcap = params.softcap;
    task.dtype = params.dtype;
    task.cache_dtype = params.cache_dtype;
    task.scratch = scratch + worker * floats;
    variant.attend(task);
  });
}

}  // namespace

int64_t group_count(const Params& params) {
  return (params.input_pos + params.tokens - 1) / params.tile - params.input_pos / params.tile + 1;
}

Group group_at(const Params& params, int64_t index) {
  const int64_t end_of_call = params.input_pos + params.tokens;
  const int64_t tile = params.input_pos / params.tile + index;
  Group group;
  group.start = std::max(params.input_pos, tile * params.tile);
  group.end = std::min(end_of_call, (tile + 1) * params.tile);
  group.first_row = group.start - params.input_pos;
  group.rows = group.end - group.start;
  return group;
}

const char* check(const Params& params, const Tensors& tensors) {
  if (params.tokens < 1) return "a call needs at least one token";
  if (params.kv_heads < 1 || params.query_heads < 1 || params.query_heads % params.kv_heads != 0) {
    return "the number of query heads must be a multiple of the number of key/value heads";
  }
  if (params.head_dim < 1 || params.head_dim > 4096) return "head_dim must be in [1, 4096]";
  if (params.capacity_blocks < 1 || params.capacity_blocks > 65536) {
    return "the cache must hold between 1 and 65536 micro-blocks of 16 tokens";
  }
  if (params.input_pos < 0) return "input_pos is negative";
  if (params.input_pos > params.capacity_blocks * kMicroBlock - params.tokens) {
    return "input_pos + tokens exceeds the cache: export with a larger max-context, or pass fewer tokens";
  }
  if (params.dtype != Dtype::kFloat && params.dtype != Dtype::kHalf) return "dtype must be float32 or float16";
  if (static_cast<int>(params.cache_dtype) < 0 || static_cast<int>(params.cache_dtype) > 2) {
    return "the cache must be float32, float16 or int8";
  }
  if (!std::isfinite(params.scale)) return "scale is not finite";
  if (!std::isfinite(params.softcap) || params.softcap < 0.0f) return "softcap must be 0 (none) or a positive number";
  if (params.window < 0) return "window must be 0 (none) or a number of tokens";
  if (params.tile < 1) return "tile must be at least 1 token";
  if (params.sink < 0 || params.sink % kMicroBlock != 0) return "sink must be a multiple of 16 tokens";
  if (params.dense_tail < 0) return "dense_tail must not be negative";
  if (params.refine < 0) return "refine must be 0 (none) or a number of channels";
  constexpr int64_t kLocal = kMaxChunk + kBoundaryReach;
  const auto too_small = [&] {  // without the sum of sink and tile, which could overflow
    return params.budget - kLocal < params.sink || params.budget - kLocal - params.sink < params.tile;
  };
  if (params.budget < 0 || (params.budget > 0 && too_small())) {
    return "budget must be 0 (dense) or at least sink + 64 + 12 + tile tokens: raise it, or lower the tile or the sink";
  }
  if (std::isnan(params.boundary_threshold)) return "boundary_threshold is not a number";
  const auto among = [](auto value, int count) {
    return static_cast<int>(value) >= 0 && static_cast<int>(value) < count;
  };
  if (!among(params.chunking, 2) || !among(params.pooling, 5) || !among(params.query_pooling, 2) ||
      !among(params.selector, 2)) {
    return "chunking, pooling, query_pooling or selector is none of its values";
  }
  if (!tensors.query || !tensors.key || !tensors.value || !tensors.out || !tensors.key_cache || !tensors.value_cache) {
    return "query, key, value, out, key_cache and value_cache are all needed";
  }
  const bool sparse = params.budget > 0 && params.window == 0;
  if ((sparse || params.finds_boundaries) && !tensors.boundaries)
    return "a budget, or finds_boundaries, needs the boundaries buffer";
  if (sparse && params.selector == Selector::kChunk && !tensors.summaries)
    return "selection by chunks needs the summaries";
  return nullptr;
}

size_t scratch_bytes(const Params& params, int64_t workers) {
  const int64_t lists = params.kv_heads * std::min(group_count(params), kBatchGroups);
  const int64_t bytes = round_up(lists * params.capacity_blocks * static_cast<int64_t>(sizeof(uint16_t)), kAlignment) +
                        round_up(lists * static_cast<int64_t>(sizeof(int32_t)), kAlignment) +
                        workers * worker_floats(params) * static_cast<int64_t>(sizeof(float));
  return static_cast<size_t>(bytes);
}

void select(const Params& params, const Tensors& tensors, const Lists& lists, void* scratch, const Parallel& parallel) {
  select_groups(params, tensors, 0, group_count(params), lists, static_cast<float*>(scratch), parallel);
}

void attend(const Params& params, const Tensors& tensors, const Lists& lists, void* scratch, const Parallel& parallel,
            Counters* counters) {
  attend_groups(params, tensors, 0, group_count(params), lists, static_cast<float*>(scratch), parallel);
  if (counters) {
    *counters = Counters{};
    add_counters(params, lists, 0, group_count(params), counters);
  }
}

void run(const Params& params, const Tensors& tensors, void* scratch, const Parallel& parallel, Counters* counters) {
  const bool summaries = keeps_summaries(params, tensors);
  constexpr int64_t kWorthThreads = 16;  // tokens: below, waking a thread costs more than the copy
  for_each_task(params.tokens >= kWorthThreads ? parallel : serial(), params.kv_heads, [&](int64_t head, int64_t) {
    append_head(params, tensors, head);
    if (summaries) summarize_head(params, tensors, head);
  });
  find_boundaries(params, tensors);
  if (counters) *counters = Counters{};

  const int64_t groups = group_count(params);
  const int64_t batch = std::min(groups, kBatchGroups);
  char* memory = static_cast<char*>(scratch);
  Lists lists;
  lists.ids = reinterpret_cast<uint16_t*>(memory);
  memory +=
      round_up(params.kv_heads * batch * params.capacity_blocks * static_cast<int64_t>(sizeof(uint16_t)), kAlignment);
  lists.counts = reinterpret_cast<int32_t*>(memory);
  memory += round_up(params.kv_heads * batch * static_cast<int64_t>(sizeof(int32_t)), kAlignment);
  float* worker_scratch = reinterpret_cast<float*>(memory);
  for (int64_t first = 0; first < groups; first += batch) {
    const int64_t count = std::min(batch, groups - first);
    select_groups(params, tensors, first, count, lists, worker_scratch, parallel);
    attend_groups(params, tensors, first, count, lists, worker_scratch, parallel);
    if (counters) add_counters(params, lists, first, count, counters);
  }
}

}  // namespace edgerun::dhsa
