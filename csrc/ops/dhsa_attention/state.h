// What the stages of dhsa_attention share between their files. Not part of the op's contract.
#pragma once

#include <atomic>
#include <cstdint>

#include "csrc/base/half.h"
#include "csrc/ops/dhsa_attention/dhsa_attention.h"

namespace edgerun::dhsa {

// An element of a tensor is a float, or half precision as its bits.
static inline float to_float(float value) { return value; }
static inline float to_float(uint16_t value) { return half_to_float(value); }
static inline void from_float(float value, float* target) { *target = value; }
static inline void from_float(float value, uint16_t* target) { *target = float_to_half(value); }

// The rows of a call that lie in one tile of the absolute grid.
struct Group {
  int64_t first_row;  // within the call
  int64_t rows;
  int64_t start;  // position of the first row
  int64_t end;    // position after the last row
};

Group group_at(const Params& params, int64_t index);

bool keeps_summaries(const Params& params, const Tensors& tensors);

// Micro-blocks that the call writes, [first, end), and the stages of some of them. Summaries of incomplete ones are
// left out, and of boundaries (but for the first) those that are not decidable yet.
struct BlockRange {
  int64_t first;
  int64_t end;
};
BlockRange touched_blocks(const Params& params);
void append_blocks(const Params& params, const Tensors& tensors, int64_t head, BlockRange blocks);
void summarize_blocks(const Params& params, const Tensors& tensors, int64_t head, BlockRange blocks);

// Flags whose edge the call decides: clear what it makes undecided, then decide each by its keys.
BlockRange decided_edges(const Params& params);
void clear_edges(const Params& params, const Tensors& tensors);
void decide_edges(const Params& params, const Tensors& tensors, BlockRange edges);

// Floats that selection needs per worker.
int64_t select_scratch_floats(const Params& params);

// The micro-blocks of a group: `count` of them from `first` on, or, with first == kListed, those written down.
struct List {
  int32_t first;
  int32_t count;
};
inline constexpr int32_t kListed = -1;

// Most micro-blocks that select_group writes down: bounded by the budget, not by the length.
int64_t list_capacity(const Params& params);

// The list of one group of one KV head; ids has room for list_capacity(params).
List select_group(const Params& params, const Tensors& tensors, int64_t head, const Group& group, uint16_t* ids,
                  float* scratch);

// What a call of one row keeps of its selection for the calls after it, and what it finds. `last` is the position that
// the kept one must have served last; count 0: there is none. Lists are per KV head; any other call forgets them.
bool keeps_lists(const Params& params);
List kept_list(const Params& params, const Tensors& tensors, int64_t head, const Group& group, int64_t last,
               uint16_t* ids);
void keep_list(const Params& params, const Tensors& tensors, int64_t head, const Group& group, const List& list,
               const uint16_t* ids);
void serve_kept_list(const Params& params, const Tensors& tensors, int64_t head);
void forget_lists(const Params& params, const Tensors& tensors);

// Runs task(index, worker) for every index in [0, count), each on whichever worker is free.
template <typename Task>
void for_each_task(const Parallel& parallel, int64_t count, const Task& task) {
  struct Shared {
    const Task* task;
    int64_t count;
    std::atomic<int64_t> next{0};
  };
  Shared shared{&task, count};
  const int64_t workers = parallel.threads < count ? parallel.threads : count;
  if (workers <= 1) {
    for (int64_t index = 0; index < count; ++index) task(index, 0);
    return;
  }
  parallel.run(
      parallel.pool, workers,
      [](void* context, int64_t worker) {
        Shared& mine = *static_cast<Shared*>(context);
        for (int64_t index; (index = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.count;) {
          (*mine.task)(index, worker);
        }
      },
      &shared);
}

}  // namespace edgerun::dhsa
