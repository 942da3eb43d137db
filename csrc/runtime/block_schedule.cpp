#include "csrc/runtime/block_schedule.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <new>
#include <system_error>
#include <utility>

#include "csrc/runtime/block_signals.h"

namespace edgerun {

namespace {

double now_ms() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

Status invalid(const std::string& message) { return Status(StatusCode::kInvalidArgument, message); }

// Runs one of the source's calls; an exception of the standard library becomes a status.
template <typename Call>
Status guarded(const std::string& name, const Call& call) {
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return Status(StatusCode::kOutOfMemory, "no memory for block '" + name + "': lower the budget or close other work");
  } catch (const std::exception& error) {
    return Status(StatusCode::kInternal, "block '" + name + "': unexpected: " + error.what());
  }
}

struct Unlocked {
  explicit Unlocked(std::unique_lock<std::mutex>* lock) : lock(lock) { lock->unlock(); }
  ~Unlocked() { lock->lock(); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  std::unique_lock<std::mutex>* lock;
};

}  // namespace

BlockSchedule::BlockSchedule(BlockSource* source, ScheduleOptions options)
    : source_(source),
      options_(std::move(options)),
      blocks_(options_.names.size()),
      budget_bytes_(options_.budget_bytes),
      activations_(source->activations()) {
  for (size_t i = 0; i < blocks_.size(); ++i) blocks_[i].stats.cost = options_.costs[i];
  plan_ = plan_blocks(costs(), options_.prefetch, activations_, budget_bytes_, again_);
}

Status BlockSchedule::open(BlockSource* source, ScheduleOptions options, std::unique_ptr<BlockSchedule>* schedule) {
  if (options.names.empty() || options.costs.size() != options.names.size()) {
    return invalid("a chain of " + std::to_string(options.names.size()) + " blocks with " +
                   std::to_string(options.costs.size()) + " costs: give at least one block, and a cost for each");
  }
  if (options.prefetch < 0) {
    return invalid("prefetch is " + std::to_string(options.prefetch) + "; it must be 0 (off) or above");
  }
  std::unique_ptr<BlockSchedule> opened(new BlockSchedule(source, std::move(options)));
  if (Status status = opened->check_budget(opened->budget_bytes_); !status.ok()) return status;
  *schedule = std::move(opened);
  return Status();
}

BlockSchedule::~BlockSchedule() {
  Lock lock(mutex_);
  stopping_ = true;
  changed_.notify_all();
  lock.unlock();
  if (thread_.joinable()) thread_.join();
  lock.lock();
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (blocks_[i].state == State::kLoaded || blocks_[i].state == State::kLeaving) unload_now(i, &lock);
  }
}

// ---- what fits

std::vector<BlockCost> BlockSchedule::costs() const {
  std::vector<BlockCost> costs;
  for (const Block& block : blocks_) costs.push_back(block.stats.cost);
  return costs;
}

Status BlockSchedule::check_budget(int64_t budget) const {
  return check_fits(costs(), options_.names, activations_, budget);
}

int64_t BlockSchedule::reserve() const { return activations_.with(measuring_ ? BlockPlan() : plan_); }

int64_t BlockSchedule::room() const { return budget_bytes_ - reserve(); }

bool BlockSchedule::fits(int64_t bytes) const { return bytes <= room() && used_bytes_ <= room() - bytes; }

// Whether a block is on its way in or out.
bool BlockSchedule::moving() const {
  return std::any_of(blocks_.begin(), blocks_.end(), [](const Block& block) {
    return block.state == State::kLoading || block.state == State::kUnloading || block.state == State::kLeaving;
  });
}

// Marks loaded blocks to leave, the one that is needed last first, until `bytes` more would fit.
void BlockSchedule::evict(int64_t bytes, size_t needed) {
  int64_t staying = used_bytes_;
  for (const Block& block : blocks_) {
    if (block.state == State::kLeaving || block.state == State::kUnloading) staying -= block.stats.cost.loaded_bytes;
  }
  const size_t count = blocks_.size();
  for (size_t offset = count - 1; offset > 0 && staying > room() - bytes; --offset) {
    Block& block = blocks_[(needed + offset) % count];
    if (block.state != State::kLoaded) continue;
    block.state = State::kLeaving;
    staying -= block.stats.cost.loaded_bytes;
  }
  changed_.notify_all();
}

// Brings plan and memory in line with the budget as it is now.
void BlockSchedule::refresh() {
  plan_ = plan_blocks(costs(), options_.prefetch, activations_, budget_bytes_, again_);
  if (!fits(0)) evict(0, position_);
}

void BlockSchedule::note_peak() { pass_.peak_bytes = std::max(pass_.peak_bytes, used_bytes_ + reserve()); }

// ---- loading

Status BlockSchedule::load_now(size_t index, LoadMode mode, Lock* lock) {
  Block& block = blocks_[index];
  const BlockCost assumed = block.stats.cost;
  BlockCost cost = assumed;
  block.state = State::kLoading;
  used_bytes_ += assumed.loading_bytes;
  note_peak();
  mode.stays = !measuring_ && more_follow_ && index < plan_.resident && plan_.resident < blocks_.size();
  const double begin_ms = now_ms();
  Status status;
  {
    const Unlocked unlocked(lock);
    status = guarded(options_.names[index], [&] { return source_->load(index, mode, &cost); });
  }
  const double spent_ms = now_ms() - begin_ms;
  used_bytes_ -= assumed.loading_bytes;
  if (status.ok()) {
    cost.loading_bytes = std::max(cost.loading_bytes, cost.loaded_bytes);
    block.stats.cost = cost;
    block.stats.measured = block.stats.measured || mode.alone;
    used_bytes_ += cost.loaded_bytes;
    note_peak();
    ++block.stats.loads;
    block.stats.load_ms += spent_ms;
    ++pass_.loads;
    pass_.load_ms += spent_ms;
    block.state = State::kLoaded;
  } else {
    block.state = State::kFailed;
    block.failure = status;
  }
  changed_.notify_all();
  return status;
}

void BlockSchedule::unload_now(size_t index, Lock* lock) {
  Block& block = blocks_[index];
  block.state = State::kUnloading;
  const double begin_ms = now_ms();
  {
    const Unlocked unlocked(lock);
    source_->unload(index);
  }
  const double spent_ms = now_ms() - begin_ms;
  block.state = State::kAbsent;
  used_bytes_ -= block.stats.cost.loaded_bytes;
  block.stats.unload_ms += spent_ms;
  pass_.unload_ms += spent_ms;
  changed_.notify_all();
}

void BlockSchedule::unload_leaving(Lock* lock) {
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (blocks_[i].state == State::kLeaving) unload_now(i, lock);
  }
}

// The thread gives a block's memory back where there is one: the pass need not wait for that.
void BlockSchedule::leave(size_t index, Lock* lock) {
  if (thread_lives_) {
    blocks_[index].state = State::kLeaving;
    changed_.notify_all();
  } else {
    unload_now(index, lock);
  }
}

// What the thread loads next: the first absent block in the order of use, if it may be loaded already.
bool BlockSchedule::find_next(size_t* next) const {
  if (!wanted_ || measuring_) return false;
  const size_t count = blocks_.size(), last = more_follow_ ? count : count - position_;
  int64_t ahead = 0;
  for (size_t offset = 0; offset < last; ++offset) {
    const size_t index = (position_ + offset) % count;
    const State state = blocks_[index].state;
    const bool is_current = offset == 0 && running_;
    if (is_current && executing_) continue;
    if (!is_current && !(index < plan_.resident && state == State::kLoaded) && ++ahead > plan_.prefetch) return false;
    if (state == State::kLoaded || state == State::kLoading) continue;
    if (state != State::kAbsent || !fits(blocks_[index].stats.cost.loading_bytes)) return false;
    *next = index;
    return true;
  }
  return false;
}

Status BlockSchedule::start_thread() {
  if (thread_lives_) return Status();
  if (thread_.joinable()) thread_.join();  // one that ended early; it holds no lock any more
  if (std::exchange(lost_, false)) {
    return Status(StatusCode::kInternal, "the thread that loads ahead was ended from outside: run again");
  }
  thread_lives_ = true;
  const SignalsHeld held;
  try {
    thread_ = options_.start_thread([this, open = held.before()] { loading_thread(open); });
    return Status();
  } catch (const std::exception& error) {  // std::system_error, std::bad_alloc
    thread_lives_ = false;
    return Status(StatusCode::kInternal, std::string("no thread can be started to load blocks ahead (") + error.what() +
                                             "): end other work, or set prefetch to 0");
  }
}

// Nobody waits for a thread that ended: what it was loading has failed.
void BlockSchedule::end_of_thread() {
  const Lock lock(mutex_);
  lost_ = !stopping_;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    Block& block = blocks_[i];
    if (block.state == State::kLoading) {
      used_bytes_ -= block.stats.cost.loading_bytes;
      block.state = State::kFailed;
      block.failure = Status(StatusCode::kInternal, "the thread that loads ahead ended while it loaded block '" +
                                                        options_.names[i] + "': run again");
      lost_ = false;  // told at the block
    } else if (block.state == State::kUnloading) {
      used_bytes_ -= block.stats.cost.loaded_bytes;
      block.state = State::kAbsent;
    }
  }
  thread_lives_ = false;
  changed_.notify_all();
}

// The thread can be ended from outside, by a signal whose handler calls pthread_exit. It takes signals between two
// loads only: within one, a lock of malloc's or a frame that cannot be unwound would let the process hang or end.
//
// What a load calls may end the thread too. glibc then unwinds the stack as for an exception: a load gives back what it
// holds, but for what XNNPACK's C code was making, up to one block's packed weights; where a frame must not throw, as a
// destructor, the process ends with "terminate called without an active exception". Frames without unwind tables end
// the unwinding, and other C libraries (bionic, musl, Darwin's) do not unwind: the load is lost to the process, perhaps
// with a lock of XNNPACK's, so that only a new process is sure to run again. But whoever waits is told: a thread's own
// objects are destroyed in any case, and the end is one of them. (Not unwound in the moment before or after a wait, it
// would keep mutex_ to itself.)
void BlockSchedule::loading_thread(const sigset_t& open) {
  struct Ending {
    BlockSchedule* schedule = nullptr;
    ~Ending() {
      if (schedule != nullptr) schedule->end_of_thread();
    }
  };
  thread_local Ending ending;
  ending.schedule = this;
  name_thread("edgerun-loader");
  Lock lock(mutex_);
  while (true) {
    let_signals_in(open, &lock);
    if (stopping_) return;
    size_t next = kNone;
    for (size_t i = 0; i < blocks_.size() && next == kNone; ++i) {
      if (blocks_[i].state == State::kLeaving) next = i;
    }
    if (next != kNone) {
      unload_now(next, &lock);
    } else if (find_next(&next)) {
      (void)load_now(next, {.ahead = plan_.prefetch}, &lock);  // the pass finds the failure at the block
    } else {
      wait_with_signals(open, &changed_, &lock);
    }
  }
}

// ---- passes

// Returns when the block is loaded.
Status BlockSchedule::acquire(size_t index, Lock* lock) {
  Block& block = blocks_[index];
  while (block.state != State::kLoaded) {
    if (cancelled_) return Status(StatusCode::kCancelled, "cancelled");
    if (block.state == State::kLeaving) {
      block.state = State::kLoaded;
      continue;
    }
    if (block.state == State::kFailed) {
      block.state = State::kAbsent;
      return std::exchange(block.failure, Status());
    }
    if (block.state == State::kAbsent) {
      const int64_t bytes = block.stats.cost.loading_bytes;
      if (!fits(bytes)) evict(bytes, index);
      const bool threaded = plan_.prefetch > 0 && !measuring_;
      if (threaded) {
        if (Status status = start_thread(); !status.ok()) return status;
      } else if (!thread_lives_) {
        unload_leaving(lock);
      }
      const bool idle = !moving();
      if (!fits(bytes) && idle) {  // everything else is out: the block itself is too large
        Status status = check_budget(budget_bytes_);
        return !status.ok() ? status
                            : Status(StatusCode::kInternal, "block '" + options_.names[index] + "' finds no room");
      }
      if (!threaded && idle) {
        (void)load_now(index, {.alone = !block.stats.measured},
                       lock);  // measured once: later, others may share the process
        continue;
      }
    }
    changed_.notify_all();
    changed_.wait(*lock);
  }
  return Status();
}

Status BlockSchedule::run_blocks(Lock* lock) {
  for (size_t index = 0; index < blocks_.size(); ++index) {
    Block& block = blocks_[index];
    position_ = index;
    refresh();
    if (!thread_lives_) unload_leaving(lock);
    while (thread_lives_ && !fits(0) && moving()) changed_.wait(*lock);  // a lower budget holds from here on
    bool going = !cancelled_;
    if (going && options_.keep_going) {
      const Unlocked unlocked(lock);
      going = options_.keep_going();
    }
    if (!going || cancelled_) return Status(StatusCode::kCancelled, "cancelled");
    if (Status status = check_budget(budget_bytes_); !status.ok()) return status;
    const double wait_begin_ms = now_ms();
    if (Status status = acquire(index, lock); !status.ok()) return status;
    const double begin_ms = now_ms();
    block.stats.wait_ms += begin_ms - wait_begin_ms;
    pass_.wait_ms += begin_ms - wait_begin_ms;
    executing_ = true;
    changed_.notify_all();
    Status status;
    Activations activations;
    {
      const Unlocked unlocked(lock);
      status = guarded(options_.names[index], [&] { return source_->execute(index, measuring_); });
      activations = source_->activations();
    }
    executing_ = false;
    activations_ = activations;
    refresh();
    note_peak();
    if (!status.ok()) return status;
    const double spent_ms = now_ms() - begin_ms;
    ++block.stats.executions;
    block.stats.execute_ms += spent_ms;
    pass_.execute_ms += spent_ms;
    position_ = (index + 1) % blocks_.size();
    if (!more_follow_ || measuring_ || index >= plan_.resident) leave(index, lock);
  }
  return Status();
}

Status BlockSchedule::run(bool more_follow) {
  Lock lock(mutex_);
  if (running_) return invalid("the chain is running in another call: wait for it, or cancel it");
  running_ = true;
  cancelled_ = false;
  activations_ = source_->activations();
  // Where nothing is loaded from the pass before, the last of several is one of its own.
  again_ = more_follow || std::any_of(blocks_.begin(), blocks_.end(),
                                      [](const Block& block) { return block.state != State::kAbsent; });
  plan_ = plan_blocks(costs(), options_.prefetch, activations_, budget_bytes_, again_);
  more_follow_ = more_follow;
  measuring_ = more_follow && !measured_ && budget_bytes_ != kUnlimitedBytes;
  wanted_ = true;
  pass_ = PassStats();
  pass_.measuring = measuring_;
  note_peak();
  const double begin_ms = now_ms();
  Status status = run_blocks(&lock);
  wanted_ = status.ok() && more_follow;
  position_ = 0;
  // Without a pass to come, the memory is given back before the call returns.
  while (status.ok() && !more_follow && thread_lives_ && used_bytes_ > 0) changed_.wait(lock);
  if (!thread_lives_) unload_leaving(&lock);
  pass_.wall_ms = now_ms() - begin_ms;
  if (status.ok()) {
    measured_ = measured_ || measuring_;
    refresh();
    pass_.resident_blocks = static_cast<int64_t>(plan_.resident);
    pass_.prefetch = plan_.prefetch;
    pass_.budget_bytes = budget_bytes_;
    for (size_t i = plan_.resident; i < blocks_.size(); ++i) {
      pass_.early_loads += blocks_[i].state == State::kLoading || blocks_[i].state == State::kLoaded;
    }
    passes_.push_back(pass_);
  }
  measuring_ = false;
  running_ = false;
  changed_.notify_all();
  return status;
}

// ---- from other threads

Status BlockSchedule::set_budget(int64_t bytes) {
  Lock lock(mutex_);
  if (Status status = check_budget(bytes); !status.ok()) return status;
  budget_bytes_ = bytes;
  refresh();
  if (!thread_lives_ && !running_) unload_leaving(&lock);
  return Status();
}

void BlockSchedule::cancel() {
  const Lock lock(mutex_);
  cancelled_ = true;
  changed_.notify_all();
}

Status BlockSchedule::clear() {
  Lock lock(mutex_);
  if (running_) return invalid("the chain is running: cancel it before its blocks are unloaded");
  wanted_ = false;
  while (thread_lives_ && moving()) changed_.wait(lock);
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (blocks_[i].state == State::kLoaded || blocks_[i].state == State::kLeaving) unload_now(i, &lock);
    blocks_[i].state = State::kAbsent;
  }
  return Status();
}

int64_t BlockSchedule::used_bytes() const {
  const Lock lock(mutex_);
  return used_bytes_;
}

int64_t BlockSchedule::budget_bytes() const {
  const Lock lock(mutex_);
  return budget_bytes_;
}

std::vector<BlockStats> BlockSchedule::block_stats() const {
  const Lock lock(mutex_);
  std::vector<BlockStats> stats;
  for (const Block& block : blocks_) stats.push_back(block.stats);
  return stats;
}

std::vector<PassStats> BlockSchedule::pass_stats() const {
  const Lock lock(mutex_);
  return passes_;
}

}  // namespace edgerun
