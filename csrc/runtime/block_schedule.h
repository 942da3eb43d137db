// block_schedule: which block of a chain is in memory when. A chain runs its blocks one after another, often many times
// over; while block i executes, a second thread loads the next ones, at the end of a pass those of the next pass
// (concurrent inference and dynamic loading, arXiv 2502.04363 section 3.3). It knows no ExecuTorch: a source does the
// work, so that the order, the budget and the ends can be tested with blocks that are made up.
//
// Within a budget of bytes, the first blocks stay in memory (the resident ones) and the others stream through:
//
//   resident + executing + loaded ahead + loading + activations <= budget
//
// As many are resident as that allows with `prefetch` blocks ahead; of several passes, where all can be resident, none
// need be ahead. A block's bytes are estimates until it was loaded by itself: the first of several passes loads and
// executes in turn, keeps nothing, and measures.
#pragma once

#include <signal.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "csrc/base/status.h"
#include "csrc/runtime/block_plan.h"

namespace edgerun {

// How a block is loaded.
struct LoadMode {
  bool alone = false;  // nothing else of the chain runs meanwhile: what the process grows by is this block
  int64_t ahead = 0;   // so many may be loaded ahead of the one that may execute meanwhile; 0: none executes
  bool stays = false;  // it is to be resident, while others stream
};

// What the blocks are. No two calls for one block overlap; `load` and `unload` of one block may run while another
// executes, on another thread.
class BlockSource {
 public:
  virtual ~BlockSource() = default;
  // *cost holds what is assumed and may be set to what was measured. A failure leaves nothing of the block in memory.
  virtual Status load(size_t block, const LoadMode& mode, BlockCost* cost) = 0;
  // alone: as LoadMode's; what the process then has beyond the loaded blocks is the activations.
  virtual Status execute(size_t block, bool alone) = 0;
  virtual void unload(size_t block) = 0;
  virtual Activations activations() = 0;  // to keep room for; asked around execute, on its thread
};

struct ScheduleOptions {
  int64_t prefetch = 1;                    // blocks to load ahead of the executing one; 0: none, and no thread
  int64_t budget_bytes = kUnlimitedBytes;  // for blocks and activations
  std::vector<std::string> names;          // of the blocks, for messages
  std::vector<BlockCost> costs;            // estimates
  std::function<bool()> keep_going;        // asked before every block, on the pass's thread; false: the pass ends
  // Starts the thread that loads; a test puts one there that fails.
  std::function<std::thread(std::function<void()>)> start_thread = [](std::function<void()> body) {
    return std::thread(std::move(body));
  };
};

// Times in milliseconds. Over all passes so far.
struct BlockStats {
  int64_t loads = 0, executions = 0;
  double load_ms = 0.0, unload_ms = 0.0, execute_ms = 0.0, wait_ms = 0.0;  // wait: the pass stood still for its load
  BlockCost cost;
  bool measured = false;
};

// One pass. Loads that ended during it are its own, also when they were for the next.
struct PassStats {
  double wall_ms = 0.0, load_ms = 0.0, unload_ms = 0.0, execute_ms = 0.0, wait_ms = 0.0;
  int64_t loads = 0;
  int64_t early_loads = 0;      // blocks of the next pass that were loaded, or on their way, when this one ended
  int64_t resident_blocks = 0;  // at its end
  int64_t prefetch = 0;         // blocks ahead that the budget allowed
  int64_t peak_bytes = 0;       // blocks and activations
  int64_t budget_bytes = 0;     // at its end
  bool measuring = false;       // the first of several: blocks one by one
};

class BlockSchedule {
 public:
  // The source must outlive the schedule. kOutOfMemory when the budget is too small for one of the blocks.
  static Status open(BlockSource* source, ScheduleOptions options, std::unique_ptr<BlockSchedule>* schedule);
  ~BlockSchedule();  // waits for what is being loaded

  // Executes all blocks once, in order. more_follow: another pass will come, so its first blocks are worth loading and
  // the resident ones worth keeping; after a pass without, no block is left in memory.
  // A failure is the status of the block that failed; what was loaded before stays, and the next call tries again.
  Status run(bool more_follow);

  // From any thread. Blocks that no longer fit go at once, except the one that executes; a load that began is
  // finished first. kOutOfMemory, and the budget stays, when a block would not fit.
  Status set_budget(int64_t bytes);
  void cancel();   // from any thread: the running pass ends before its next block; nothing runs: no effect
  Status clear();  // unloads everything, once nothing executes

  int64_t used_bytes() const;  // by blocks, without activations
  int64_t budget_bytes() const;
  std::vector<BlockStats> block_stats() const;
  std::vector<PassStats> pass_stats() const;  // of every pass that reached its end

 private:
  enum class State { kAbsent, kLoading, kLoaded, kLeaving, kUnloading, kFailed };
  struct Block {
    State state = State::kAbsent;
    Status failure;
    BlockStats stats;
  };
  using Lock = std::unique_lock<std::mutex>;
  static constexpr size_t kNone = std::numeric_limits<size_t>::max();

  BlockSchedule(BlockSource* source, ScheduleOptions options);
  std::vector<BlockCost> costs() const;
  Status check_budget(int64_t budget) const;
  int64_t reserve() const;  // for activations
  int64_t room() const;     // for blocks
  bool fits(int64_t bytes) const;
  bool moving() const;
  void refresh();
  void evict(int64_t bytes, size_t needed);
  bool find_next(size_t* block) const;
  Status start_thread();
  void loading_thread(const sigset_t& open);
  void end_of_thread();
  Status load_now(size_t block, LoadMode mode, Lock* lock);
  void unload_now(size_t block, Lock* lock);
  void unload_leaving(Lock* lock);
  void leave(size_t block, Lock* lock);
  Status acquire(size_t block, Lock* lock);
  Status run_blocks(Lock* lock);
  void note_peak();

  BlockSource* const source_;
  const ScheduleOptions options_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Block> blocks_;
  std::vector<PassStats> passes_;
  PassStats pass_;  // the one that runs
  BlockPlan plan_;
  int64_t budget_bytes_ = 0;
  Activations activations_;
  int64_t used_bytes_ = 0;  // loaded_bytes of what is loaded, loading_bytes of what is being loaded
  size_t position_ = 0;     // the block that executes, or is waited for, or comes next
  bool running_ = false, executing_ = false, cancelled_ = false;
  bool measured_ = false, measuring_ = false, more_follow_ = false;
  bool wanted_ = false;  // the thread may load: a pass runs, or another follows
  bool again_ = false;   // the pass is one of several
  bool stopping_ = false, thread_lives_ = false;
  bool lost_ = false;  // the thread was ended from outside, and nobody was told yet
  std::thread thread_;
};

}  // namespace edgerun
