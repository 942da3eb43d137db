// dhsa_attention: checks a call, then runs its stages. A task is one KV head and one group of rows: it selects, then
// attends, at most 256 query rows at a time. The stages are in state_portable.cpp and select_portable.cpp, the
// arithmetic in kernels_impl.h.
#include <algorithm>
#include <cmath>

#include "csrc/ops/dhsa_attention/dhsa_attention.h"

#include "csrc/ops/dhsa_attention/kernels.h"
#include "csrc/ops/dhsa_attention/state.h"

namespace edgerun::dhsa {
namespace {

constexpr int64_t kAlignment = 64;  // bytes

int64_t group_size(const Params& params) { return params.query_heads / params.kv_heads; }

// Tokens that are attended at a time: a group too large for a worker's scratch is cut.
int64_t tokens_per_task(const Params& params) { return std::min(task_tokens(group_size(params)), params.tile); }

// What one worker has to itself: its list, and floats that selection and attention use in turn.
struct Worker {
  Counters* counters;
  uint16_t* ids;
  float* scratch;
};

int64_t worker_header_bytes(const Params& params) {
  return round_up(sizeof(Counters), kAlignment) +
         round_up(list_capacity(params) * static_cast<int64_t>(sizeof(uint16_t)), kAlignment);
}

int64_t worker_bytes(const Params& params) {
  const int64_t rows = std::min(tokens_per_task(params), params.tokens) * group_size(params);
  const int64_t attend = attend_scratch_floats(rows, params.head_dim, params.cache_dtype);
  const int64_t floats = std::max(attend, select_scratch_floats(params));
  return worker_header_bytes(params) + round_up(floats * static_cast<int64_t>(sizeof(float)), kAlignment);
}

Worker worker_at(const Params& params, void* scratch, int64_t worker) {
  char* memory = static_cast<char*>(scratch) + worker * worker_bytes(params);
  return Worker{reinterpret_cast<Counters*>(memory),
                reinterpret_cast<uint16_t*>(memory + round_up(sizeof(Counters), kAlignment)),
                reinterpret_cast<float*>(memory + worker_header_bytes(params))};
}

// Of one KV head's list.
void add_counters(const Params& params, const Group& group, const List& list, const uint16_t* ids, Counters* counters) {
  // Keys of a micro-block that one row sees: the row's causal range and window, cut to the micro-block.
  const auto seen = [&](int64_t position, int64_t base) {
    const int64_t low = params.window > 0 ? std::max(base, position - params.window + 1) : base;
    return std::max<int64_t>(0, std::min(base + kMicroBlock, position + 1) - low);
  };
  for (int64_t position = group.start; position < group.end; ++position) {
    counters->causal_pairs += params.window > 0 ? std::min(position + 1, params.window) : position + 1;
  }
  for (int32_t i = 0; i < list.count; ++i) {
    const int64_t base = (list.first == kListed ? ids[i] : list.first + i) * kMicroBlock;
    if (params.window == 0 && base + kMicroBlock <= group.start + 1) {
      counters->attended_pairs += kMicroBlock * group.rows;
      continue;
    }
    for (int64_t position = group.start; position < group.end; ++position) {
      counters->attended_pairs += seen(position, base);
    }
  }
}

// Attends a group's rows of one KV head, as many at a time as the scratch has room for.
void attend_group(const Params& params, const Tensors& tensors, const Kernels& variant, int64_t head,
                  const Group& group, const List& list, const uint16_t* ids, float* scratch) {
  const int64_t size = group_size(params);
  const int64_t depth = params.head_dim;
  const int64_t element_bytes = params.dtype == Dtype::kHalf ? 2 : 4;
  const auto head_of = [&](const void* cache, int64_t block_bytes) {
    return static_cast<const char*>(cache) + head * params.capacity_blocks * block_bytes;
  };
  const int64_t most = tokens_per_task(params);
  for (int64_t first = 0; first < group.rows; first += most) {
    const int64_t row = group.first_row + first;
    AttendTask task;
    task.query = static_cast<const char*>(tensors.query) + (head * size * params.tokens + row) * depth * element_bytes;
    task.query_head_stride = params.tokens * depth;
    task.key_blocks = head_of(tensors.key_cache, key_block_bytes(params.cache_dtype, depth));
    task.value_blocks = head_of(tensors.value_cache, value_block_bytes(params.cache_dtype, depth));
    task.out = static_cast<char*>(tensors.out) + (row * params.query_heads + head * size) * depth * element_bytes;
    task.out_token_stride = params.query_heads * depth;
    task.ids = list.first == kListed ? ids : nullptr;
    task.first = list.first;
    task.count = list.count;
    task.tokens = std::min(most, group.rows - first);
    task.group = size;
    task.head_dim = depth;
    task.first_position = group.start + first;
    task.window = params.window;
    task.scale = params.scale;
    task.softcap = params.softcap;
    task.dtype = params.dtype;
    task.cache_dtype = params.cache_dtype;
    task.scratch = scratch;
    variant.attend(task);
  }
}

// Runs task(head, group index, worker index) for every group of every KV head. One head's tasks stay together, for its
// keys are warm; of those the last, which attend most, come first.
template <typename Task>
void for_each_group(const Params& params, const Parallel& parallel, const Task& task) {
  const int64_t groups = group_count(params);
  for_each_task(parallel, params.kv_heads * groups,
                [&](int64_t index, int64_t worker) { task(index / groups, groups - 1 - index % groups, worker); });
}

// A group's list: what an earlier call kept for this one, or a new selection.
List choose_list(const Params& params, const Tensors& tensors, int64_t head, const Group& group, const Worker& mine) {
  const List kept = kept_list(params, tensors, head, group, group.start - 1, mine.ids);
  if (kept.count > 0) {
    serve_kept_list(params, tensors, head);
    return kept;
  }
  const List list = select_group(params, tensors, head, group, mine.ids, mine.scratch);
  if (keeps_lists(params) && params.tokens == 1) keep_list(params, tensors, head, group, list, mine.ids);
  return list;
}

// Appends, summarises and finds boundaries: what a call leaves behind.
void update_state(const Params& params, const Tensors& tensors, const Parallel& parallel) {
  constexpr int64_t kWorthThreads = 16;  // tokens: below, waking a thread costs more than the copy
  constexpr int64_t kPart = 8;           // micro-blocks of a task: few enough that what one stage writes is warm for
                                         // the next, enough that it is no longer on its way to memory
  const Parallel& pool = params.tokens >= kWorthThreads ? parallel : serial();
  const bool summaries = keeps_summaries(params, tensors);
  const BlockRange blocks = touched_blocks(params);
  const BlockRange edges = params.finds_boundaries ? decided_edges(params) : BlockRange{0, 0};
  const int64_t parts = (blocks.end - blocks.first + kPart - 1) / kPart;
  const int64_t heads = params.finds_boundaries ? params.kv_heads : 1;  // of a task: an edge is decided by all
  const auto part_at = [&](int64_t index) {
    const int64_t first = blocks.first + index % parts * kPart;
    return BlockRange{first, std::min(first + kPart, blocks.end)};
  };
  if (params.finds_boundaries) clear_edges(params, tensors);
  if (keeps_lists(params) && params.tokens > 1) forget_lists(params, tensors);
  for_each_task(pool, params.kv_heads / heads * parts, [&](int64_t index, int64_t) {
    const BlockRange part = part_at(index);
    for (int64_t head = index / parts * heads; head < (index / parts + 1) * heads; ++head) {
      append_blocks(params, tensors, head, part);
      if (summaries) summarize_blocks(params, tensors, head, part);
    }
    decide_edges(params, tensors, BlockRange{std::max(part.first + 1, edges.first), std::min(part.end, edges.end)});
  });
  if (!params.finds_boundaries) return;
  for_each_task(pool, parts, [&](int64_t index, int64_t) {  // edges between what two tasks wrote
    const int64_t edge = part_at(index).first;
    if (edge >= edges.first && edge < edges.end) decide_edges(params, tensors, BlockRange{edge, edge + 1});
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
  if (params.reselect < 1) return "reselect must be at least 1 token";
  const auto too_small = [&] {  // each subtracted from what is left: a sum of them could overflow
    int64_t left = params.budget - kLocal;
    for (const int64_t needed : {params.sink, params.tile, params.reselect - 1}) {
      if (left < needed) return true;
      left -= needed;
    }
    return false;
  };
  if (params.budget < 0 || (params.budget > 0 && too_small())) {
    return "budget must be 0 (dense) or at least sink + 64 + 12 + tile + reselect - 1 tokens: raise it, or lower the "
           "others";
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
  if (sparse && params.reselect > 1 && !tensors.selection) return "reselect above 1 needs the selection buffer";
  return nullptr;
}

size_t scratch_bytes(const Params& params, int64_t workers) {
  return static_cast<size_t>(workers * worker_bytes(params));
}

void select(const Params& params, const Tensors& tensors, const Lists& lists, void* scratch, const Parallel& parallel) {
  const int64_t groups = group_count(params);
  for_each_group(params, parallel, [&](int64_t head, int64_t index, int64_t worker) {
    const Worker mine = worker_at(params, scratch, worker);
    const Group group = group_at(params, index);
    List list = kept_list(params, tensors, head, group, group.start, mine.ids);
    if (list.count == 0) list = select_group(params, tensors, head, group, mine.ids, mine.scratch);
    const int64_t row = head * groups + index;
    uint16_t* ids = lists.ids + row * params.capacity_blocks;
    lists.counts[row] = list.count;
    for (int32_t i = 0; i < list.count; ++i) {
      ids[i] = list.first == kListed ? mine.ids[i] : static_cast<uint16_t>(list.first + i);
    }
  });
}

void attend(const Params& params, const Tensors& tensors, const Lists& lists, void* scratch, const Parallel& parallel,
            Counters* counters) {
  const int64_t groups = group_count(params);
  const Kernels& variant = kernels();
  const auto row_of = [&](int64_t head, int64_t index) { return head * groups + index; };
  for_each_group(params, parallel, [&](int64_t head, int64_t index, int64_t worker) {
    const int64_t row = row_of(head, index);
    attend_group(params, tensors, variant, head, group_at(params, index), List{kListed, lists.counts[row]},
                 lists.ids + row * params.capacity_blocks, worker_at(params, scratch, worker).scratch);
  });
  if (!counters) return;
  *counters = Counters{};
  for (int64_t head = 0; head < params.kv_heads; ++head) {
    for (int64_t index = 0; index < groups; ++index) {
      const int64_t row = row_of(head, index);
      add_counters(params, group_at(params, index), List{kListed, lists.counts[row]},
                   lists.ids + row * params.capacity_blocks, counters);
    }
  }
}

void run(const Params& params, const Tensors& tensors, void* scratch, const Parallel& parallel, Counters* counters) {
  update_state(params, tensors, parallel);
  for (int64_t worker = 0; worker < parallel.threads; ++worker) {
    *worker_at(params, scratch, worker).counters = Counters{};
  }
  const Kernels& variant = kernels();
  for_each_group(params, parallel, [&](int64_t head, int64_t index, int64_t worker) {
    const Worker mine = worker_at(params, scratch, worker);
    const Group group = group_at(params, index);
    const List list = choose_list(params, tensors, head, group, mine);
    attend_group(params, tensors, variant, head, group, list, mine.ids, mine.scratch);
    if (counters) add_counters(params, group, list, mine.ids, mine.counters);
  });
  if (!counters) return;
  *counters = Counters{};
  for (int64_t worker = 0; worker < parallel.threads; ++worker) {
    const Counters& part = *worker_at(params, scratch, worker).counters;
    counters->attended_pairs += part.attended_pairs;
    counters->causal_pairs += part.causal_pairs;
  }
}

}  // namespace edgerun::dhsa
