// The order, the budget and the ends of BlockSchedule, with blocks that are made up: each case by its name, or all.
// A case that hangs is ended by the alarm. Status 0 when all of it holds.
#include "csrc/runtime/block_schedule.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>

namespace {

using edgerun::BlockCost;
using edgerun::BlockSchedule;
using edgerun::PassStats;
using edgerun::ScheduleOptions;
using edgerun::Status;
using edgerun::StatusCode;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

// Only glibc unwinds the stack of a thread that calls pthread_exit; the thread sanitizer holds signals back itself, and
// what is not unwound is a leak, which the other one reports.
#if defined(__GLIBC__) && !defined(__SANITIZE_THREAD__)
#define UNWINDS 1
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define NO_CALLER asm volatile(".cfi_undefined rip")
#elif defined(__aarch64__) && !defined(__SANITIZE_ADDRESS__)
#define NO_CALLER asm volatile(".cfi_undefined x30")
#endif
#endif

#if defined(NO_CALLER)
// A frame like one without unwind tables: whoever unwinds the stack finds its end here.
[[gnu::noinline]] void exit_without_unwinding() {
  NO_CALLER;
  pthread_exit(nullptr);
}
#else
[[gnu::noinline]] void exit_without_unwinding() { pthread_exit(nullptr); }
#endif

void sleep_ms(double milliseconds) {
  std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(milliseconds));
}

// In a destructor, which cannot be unwound.
struct SignalsItself {
  SignalsItself(size_t block, std::atomic<size_t>* at) : now(at->compare_exchange_strong(block, ~size_t{0})) {}
  ~SignalsItself() {
    if (now) pthread_kill(pthread_self(), SIGUSR1);
  }
  const bool now;
};

// Blocks that keep their own books: what is loaded when it must be, in order, and never more than `limit`.
class Blocks : public edgerun::BlockSource {
 public:
  explicit Blocks(std::vector<BlockCost> real) : real_(std::move(real)), loaded_(real_.size(), 0) {}

  Status load(size_t block, const edgerun::LoadMode& mode, BlockCost* cost) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      CHECK(!loaded_[block]);
      ++loads[block % 64];
      order_of_loads.push_back(block);
      take(real_[block].loading_bytes);
    }
    const SignalsItself signals(block, &load_signals_at);
    if (load_ms > 0) sleep_ms(load_ms);
    if (block == throws_at) throw std::bad_alloc();
    if (block == exits_at) pthread_exit(nullptr);
    if (block == vanishes_at) exit_without_unwinding();
    const std::lock_guard<std::mutex> lock(mutex_);
    take(-real_[block].loading_bytes);
    if (block == fails_at) return Status(StatusCode::kNotFound, "block file is gone");
    take(real_[block].loaded_bytes);
    loaded_[block] = 1;
    if (mode.alone) *cost = real_[block];
    return Status();
  }
  Status execute(size_t block, bool) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      CHECK(loaded_[block]);
      executed.push_back(block);
    }
    if (on_execute) on_execute(block);
    if (execute_ms > 0) sleep_ms(execute_ms);
    const std::lock_guard<std::mutex> lock(mutex_);
    CHECK(loaded_[block]);
    return Status();
  }
  void unload(size_t block) override {
    const SignalsItself signals(block, &unload_signals_at);
    const std::lock_guard<std::mutex> lock(mutex_);
    CHECK(loaded_[block]);
    loaded_[block] = 0;
    take(-real_[block].loaded_bytes);
  }
  edgerun::Activations activations() override { return {activation_bytes, ahead_bytes, growing_bytes}; }

  int64_t used() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return used_;
  }
  int64_t take_peak() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(peak_, used_);
  }

  static constexpr size_t kNobody = ~size_t{0};
  double load_ms = 0, execute_ms = 0;
  std::atomic<size_t> fails_at{kNobody}, throws_at{kNobody}, exits_at{kNobody}, vanishes_at{kNobody};
  std::atomic<size_t> load_signals_at{kNobody}, unload_signals_at{kNobody};  // once
  std::function<void(size_t)> on_execute;
  std::atomic<int64_t> activation_bytes{0}, ahead_bytes{0}, growing_bytes{0};
  int loads[64] = {};
  std::vector<size_t> order_of_loads, executed;

 private:
  void take(int64_t bytes) {
    used_ += bytes;
    peak_ = std::max(peak_, used_);
  }
  std::mutex mutex_;
  std::vector<BlockCost> real_;
  std::vector<char> loaded_;
  int64_t used_ = 0, peak_ = 0;
};

std::vector<BlockCost> costs(size_t count, int64_t loaded = 10, int64_t loading = 15) {
  return std::vector<BlockCost>(count, BlockCost{loaded, loading});
}

std::unique_ptr<BlockSchedule> open(Blocks* blocks, std::vector<BlockCost> estimates, int64_t prefetch,
                                    int64_t budget) {
  ScheduleOptions options;
  options.prefetch = prefetch;
  options.budget_bytes = budget;
  for (size_t i = 0; i < estimates.size(); ++i) options.names.push_back("block_" + std::to_string(i));
  options.costs = std::move(estimates);
  std::unique_ptr<BlockSchedule> schedule;
  const Status status = BlockSchedule::open(blocks, std::move(options), &schedule);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
  CHECK(status.ok());
  return schedule;
}

void check_order(const std::vector<size_t>& executed, size_t count, size_t passes) {
  CHECK(executed.size() == count * passes);
  for (size_t i = 0; i < executed.size(); ++i) CHECK(executed[i] == i % count);
}

void every_depth_and_budget() {
  for (size_t count : {1, 2, 3, 7}) {
    for (int64_t prefetch : {0, 1, 2, 5}) {
      for (int64_t budget : {15, 24, 25, 26, 35, 45, 60, 75, 1000}) {
        Blocks blocks(costs(count));
        const auto schedule = open(&blocks, costs(count), prefetch, budget);
        for (int pass = 0; pass < 5; ++pass) CHECK(schedule->run(pass < 4).ok());
        check_order(blocks.executed, count, 5);
        CHECK(blocks.take_peak() <= budget);
        CHECK(blocks.used() == 0 && schedule->used_bytes() == 0);
        CHECK(schedule->pass_stats().size() == 5);
        for (const PassStats& pass : schedule->pass_stats()) CHECK(pass.peak_bytes <= budget);
      }
    }
  }
}

void residents_are_loaded_once_after_measuring() {
  Blocks blocks(costs(6));
  const auto schedule = open(&blocks, costs(6), 1, 45);  // two resident, one executing, one loading
  for (int pass = 0; pass < 6; ++pass) CHECK(schedule->run(true).ok());
  CHECK(schedule->pass_stats().back().resident_blocks == 2);
  CHECK(blocks.loads[0] == 2 && blocks.loads[1] == 2);  // the measuring pass keeps nothing
  CHECK(blocks.loads[3] >= 6);
}

void measured_costs_correct_estimates() {
  Blocks blocks(costs(6, 10, 15));
  const auto schedule = open(&blocks, costs(6, 30, 40), 1, 95);
  CHECK(schedule->run(true).ok() && schedule->run(true).ok());
  CHECK(schedule->pass_stats()[0].measuring && !schedule->pass_stats()[1].measuring);
  CHECK(schedule->pass_stats()[1].resident_blocks == 6);
  for (const auto& stats : schedule->block_stats()) CHECK(stats.measured && stats.cost.loaded_bytes == 10);
}

void the_end_of_a_pass_loads_the_next() {
  Blocks blocks(costs(5));
  blocks.load_ms = 1;
  blocks.execute_ms = 3;
  const auto schedule = open(&blocks, costs(5), 1, 25);
  for (int pass = 0; pass < 4; ++pass) CHECK(schedule->run(pass < 3).ok());
  const auto passes = schedule->pass_stats();
  CHECK(passes[1].early_loads == 1 && passes[2].early_loads == 1);
  CHECK(passes[3].early_loads == 0 && passes[3].loads == 4);
}

void without_prefetch_nothing_is_ahead() {
  Blocks blocks(costs(5));
  blocks.load_ms = 2;
  blocks.execute_ms = 2;
  const auto schedule = open(&blocks, costs(5), 0, 15);
  for (int pass = 0; pass < 3; ++pass) CHECK(schedule->run(pass < 2).ok());
  for (const PassStats& pass : schedule->pass_stats()) {
    CHECK(pass.early_loads == 0 && pass.loads == 5);
    CHECK(pass.load_ms + pass.execute_ms <= pass.wall_ms);  // nothing overlaps
  }
}

void prefetch_hides_loads() {
  Blocks blocks(costs(8));
  blocks.load_ms = blocks.execute_ms = 10;
  const auto schedule = open(&blocks, costs(8), 1, 25);
  for (int pass = 0; pass < 4; ++pass) CHECK(schedule->run(pass < 3).ok());
  const PassStats pass = schedule->pass_stats()[2];
  CHECK(pass.wall_ms < 0.85 * (pass.load_ms + pass.execute_ms));  // sleeps: no contention, wide margin
}

void shrinking_takes_effect_at_the_next_block() {
  for (int64_t prefetch : {0, 1, 2}) {
    Blocks blocks(costs(6));
    const auto schedule = open(&blocks, costs(6), prefetch, 1000);
    CHECK(schedule->run(true).ok() && schedule->run(true).ok());
    CHECK(blocks.used() == 60);
    blocks.execute_ms = 1;
    blocks.on_execute = [&](size_t block) {
      if (block == 2) {
        std::thread([&] { CHECK(schedule->set_budget(30).ok()); }).join();
      } else if (block == 3) {
        blocks.take_peak();
      }
    };
    CHECK(schedule->run(true).ok());
    CHECK(blocks.take_peak() <= 30 && blocks.used() <= 30);
    blocks.on_execute = nullptr;
    CHECK(schedule->run(false).ok());
    CHECK(blocks.take_peak() <= 30);
    CHECK(!schedule->set_budget(14).ok());
    check_order(blocks.executed, 6, 4);
  }
}

void a_budget_below_one_block_is_refused() {
  Blocks blocks(costs(3));
  ScheduleOptions options;
  options.names = {"a", "b", "c"};
  options.costs = {{10, 15}, {10, 21}, {10, 15}};
  blocks.activation_bytes = 5;
  options.budget_bytes = 25;
  std::unique_ptr<BlockSchedule> schedule;
  const Status status = BlockSchedule::open(&blocks, options, &schedule);
  CHECK(status.code() == StatusCode::kOutOfMemory && schedule == nullptr);
  CHECK(status.message().find("25 bytes is below the 26 that block 'b'") != std::string::npos);
}

void activations_count() {
  Blocks blocks(costs(6));
  blocks.activation_bytes = 20;
  const auto schedule = open(&blocks, costs(6), 1, 45);
  for (int pass = 0; pass < 3; ++pass) CHECK(schedule->run(true).ok());
  CHECK(schedule->pass_stats().back().resident_blocks == 0);
  CHECK(blocks.take_peak() <= 25);
  blocks.activation_bytes = 60;  // more than there is
  Status status = schedule->run(true);
  CHECK(status.code() == StatusCode::kOutOfMemory);
  CHECK(status.message().find("60 for activations") != std::string::npos);
}

void what_loading_ahead_costs_counts() {
  Blocks blocks(costs(6));
  blocks.activation_bytes = 5;
  blocks.ahead_bytes = 10;
  const auto schedule = open(&blocks, costs(6), 2, 45);  // two ahead would take 20 and 35
  for (int pass = 0; pass < 3; ++pass) CHECK(schedule->run(true).ok());
  CHECK(schedule->pass_stats().back().prefetch == 1 && schedule->pass_stats().back().resident_blocks == 0);
  CHECK(blocks.take_peak() <= 30);
}

void what_a_block_that_stays_costs_counts() {
  for (const auto& [extra, resident] : {std::pair(0, 2), std::pair(9, 1), std::pair(30, 0)}) {
    Blocks blocks(costs(6));
    blocks.activation_bytes = 5;
    blocks.growing_bytes = extra;
    const auto schedule = open(&blocks, costs(6), 1, 52);  // 5, two residents of 10, one that executes, one that loads
    for (int pass = 0; pass < 3; ++pass) CHECK(schedule->run(true).ok());
    CHECK(schedule->pass_stats().back().prefetch == 1);
    CHECK(schedule->pass_stats().back().resident_blocks == resident);
    CHECK(blocks.take_peak() <= 47 - (resident > 0 ? extra : 0));
  }
}

void all_blocks_stay_rather_than_some_and_one_ahead() {
  Blocks blocks(costs(6));
  blocks.activation_bytes = 5;
  blocks.ahead_bytes = 20;
  const auto schedule = open(&blocks, costs(6), 1, 75);
  for (int pass = 0; pass < 3; ++pass) CHECK(schedule->run(true).ok());
  CHECK(schedule->pass_stats().back().prefetch == 0 && schedule->pass_stats().back().resident_blocks == 6);
  CHECK(blocks.loads[5] == 2 && blocks.take_peak() <= 70);
  Blocks twice(costs(6));  // the first pass measures and keeps nothing, the second is the last
  twice.activation_bytes = 5;
  twice.ahead_bytes = 20;
  const auto pair = open(&twice, costs(6), 1, 75);
  CHECK(pair->run(true).ok() && pair->run(false).ok());
  CHECK(pair->pass_stats().back().prefetch == 1 && twice.take_peak() <= 50);
  Blocks once(costs(6));
  once.activation_bytes = 5;
  once.ahead_bytes = 20;
  const auto single = open(&once, costs(6), 1, 75);  // nothing is worth keeping
  CHECK(single->run(false).ok());
  CHECK(single->pass_stats().back().prefetch == 1 && once.take_peak() <= 50);
}

void a_load_that_fails_ends_the_pass() {
  for (int64_t prefetch : {0, 1, 3}) {
    Blocks blocks(costs(6));
    const auto schedule = open(&blocks, costs(6), prefetch, 60);
    CHECK(schedule->run(true).ok());
    blocks.fails_at = 4;
    const Status status = schedule->run(true);
    CHECK(status.code() == StatusCode::kNotFound && status.message() == "block file is gone");
    CHECK(blocks.executed.size() == 6 + 4);
    blocks.fails_at = Blocks::kNobody;
    blocks.throws_at = 5;
    Status thrown = schedule->run(true);
    CHECK(thrown.code() == StatusCode::kOutOfMemory);
    CHECK(thrown.message().find("'block_5'") != std::string::npos);
    blocks.throws_at = Blocks::kNobody;
    (void)schedule->clear();
  }
}

void a_thread_that_dies_is_reported() {
  Blocks blocks(costs(6));
  const auto schedule = open(&blocks, costs(6), 1, 25);
  CHECK(schedule->run(true).ok());
  blocks.exits_at = 3;
  const Status status = schedule->run(true);
  CHECK(status.code() == StatusCode::kInternal);
  CHECK(status.message().find("ended while it loaded block 'block_3'") != std::string::npos);
  blocks.exits_at = Blocks::kNobody;
  blocks.executed.clear();
  CHECK(schedule->run(false).ok());  // another thread takes its place
  check_order(blocks.executed, 6, 1);
}

#if defined(NO_CALLER)
void a_thread_that_ends_without_unwinding_is_reported() {
  Blocks blocks(costs(6));
  const auto schedule = open(&blocks, costs(6), 1, 25);
  CHECK(schedule->run(true).ok());
  blocks.vanishes_at = 3;
  const Status status = schedule->run(true);
  CHECK(status.code() == StatusCode::kInternal);
  CHECK(status.message().find("ended while it loaded block 'block_3'") != std::string::npos);
  blocks.vanishes_at = Blocks::kNobody;
  blocks.executed.clear();
  CHECK(schedule->run(false).ok());
  check_order(blocks.executed, 6, 1);
}
#endif

#if defined(UNWINDS)
void a_signal_that_ends_the_thread_waits_for_loads_and_unloads() {
  for (int i = 0; i < 4; ++i) {
    const bool loading = i % 2 == 1, unwinds = i < 2;
    signal(SIGUSR1, unwinds ? [](int) { pthread_exit(nullptr); } : [](int) { exit_without_unwinding(); });
    Blocks blocks(costs(6));
    const auto schedule = open(&blocks, costs(6), 1, 25);
    CHECK(schedule->run(true).ok());
    (loading ? blocks.load_signals_at : blocks.unload_signals_at) = 2;
    const Status status = schedule->run(true);
    CHECK(status.code() == StatusCode::kInternal);
    CHECK(status.message() == "the thread that loads ahead was ended from outside: run again");
    blocks.executed.clear();
    CHECK(schedule->run(true).ok() && schedule->run(false).ok());  // another thread takes its place
    check_order(blocks.executed, 6, 2);
    CHECK(blocks.used() == 0 && schedule->used_bytes() == 0);
  }
}
#endif

void a_thread_that_cannot_start_is_reported() {
  Blocks blocks(costs(4));
  ScheduleOptions options;
  options.names = {"a", "b", "c", "d"};
  options.costs = costs(4);
  options.start_thread = [](std::function<void()>) -> std::thread {
    throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again));
  };
  std::unique_ptr<BlockSchedule> schedule;
  CHECK(BlockSchedule::open(&blocks, options, &schedule).ok());
  const Status status = schedule->run(true);
  CHECK(status.code() == StatusCode::kInternal);
  CHECK(status.message().find("prefetch to 0") != std::string::npos);
}

void cancel_from_another_thread() {
  for (int64_t prefetch : {0, 1}) {
    Blocks blocks(costs(4));
    blocks.execute_ms = blocks.load_ms = 1;
    const auto schedule = open(&blocks, costs(4), prefetch, 25);
    std::atomic<bool> ended{false};
    std::thread canceller([&] {
      for (sleep_ms(10); !ended; sleep_ms(0.1)) schedule->cancel();  // one between two passes has no effect
    });
    Status status;
    while (status.ok()) status = schedule->run(true);
    ended = true;
    canceller.join();
    CHECK(status.code() == StatusCode::kCancelled);
    CHECK(schedule->run(true).ok());
  }
}

void a_wait_for_a_load_can_be_cancelled() {
  Blocks blocks(costs(4));
  const auto schedule = open(&blocks, costs(4), 1, 25);
  CHECK(schedule->run(true).ok());
  blocks.load_ms = 300;
  std::thread canceller([&] {
    sleep_ms(30);
    schedule->cancel();
  });
  const auto begin = std::chrono::steady_clock::now();
  CHECK(schedule->run(true).code() == StatusCode::kCancelled);
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(250));
  canceller.join();
}

void two_runs_at_once_are_refused() {
  Blocks blocks(costs(4));
  const auto schedule = open(&blocks, costs(4), 1, 25);
  blocks.on_execute = [&](size_t block) {
    if (block != 1) return;
    CHECK(schedule->run(true).code() == StatusCode::kInvalidArgument);
    CHECK(schedule->clear().code() == StatusCode::kInvalidArgument);
  };
  CHECK(schedule->run(true).ok());
}

void many_hands() {
  Blocks blocks(costs(9));
  blocks.load_ms = blocks.execute_ms = 0.2;
  const auto schedule = open(&blocks, costs(9), 2, 200);
  std::atomic<bool> done{false};
  std::thread squeezer([&] {
    for (int64_t i = 0; !done; ++i) {
      CHECK(schedule->set_budget(15 + (i * 37) % 150).ok());
      (void)schedule->used_bytes();
      (void)schedule->block_stats();
      sleep_ms(0.3);
    }
  });
  for (int pass = 0; pass < 40; ++pass) CHECK(schedule->run(pass % 7 != 6).ok());
  done = true;
  squeezer.join();
  check_order(blocks.executed, 9, 40);
}

void closing_while_loading() {
  for (int i = 0; i < 20; ++i) {
    Blocks blocks(costs(5));
    blocks.load_ms = 0.5;
    {
      const auto schedule = open(&blocks, costs(5), 2, 45);
      CHECK(schedule->run(true).ok() && schedule->run(true).ok());
    }
    CHECK(blocks.used() == 0);
  }
}

struct Case {
  const char* name;
  void (*run)();
};
#define CASE(name) {#name, name}
constexpr Case kCases[] = {CASE(every_depth_and_budget),
                           CASE(residents_are_loaded_once_after_measuring),
                           CASE(measured_costs_correct_estimates),
                           CASE(the_end_of_a_pass_loads_the_next),
                           CASE(without_prefetch_nothing_is_ahead),
                           CASE(prefetch_hides_loads),
                           CASE(shrinking_takes_effect_at_the_next_block),
                           CASE(a_budget_below_one_block_is_refused),
                           CASE(activations_count),
                           CASE(what_loading_ahead_costs_counts),
                           CASE(what_a_block_that_stays_costs_counts),
                           CASE(all_blocks_stay_rather_than_some_and_one_ahead),
                           CASE(a_load_that_fails_ends_the_pass),
                           CASE(a_thread_that_dies_is_reported),
#if defined(NO_CALLER)
                           CASE(a_thread_that_ends_without_unwinding_is_reported),
#endif
#if defined(UNWINDS)
                           CASE(a_signal_that_ends_the_thread_waits_for_loads_and_unloads),
#endif
                           CASE(a_thread_that_cannot_start_is_reported),
                           CASE(cancel_from_another_thread),
                           CASE(a_wait_for_a_load_can_be_cancelled),
                           CASE(two_runs_at_once_are_refused),
                           CASE(many_hands),
                           CASE(closing_while_loading)};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {  // the names
    for (const Case& one : kCases) std::printf("%s\n", one.name);
    return 0;
  }
  alarm(50);
  for (const Case& one : kCases) {
    if (std::strcmp(argv[1], "all") == 0 || std::strcmp(argv[1], one.name) == 0) one.run();
  }
  return 0;
}
