// block_loader: a chain of ExecuTorch programs in a budget of bytes. The programs run one after another on a table of
// named tensors: each takes its inputs from it by name and puts its outputs there by name, and a name can be bound anew
// ("x" → "x"). BlockSchedule decides which programs are in memory; this makes them real, and measures them.
//
// A loaded program costs what XNNPACK packed, which is anonymous memory, what of its file stays mapped, and the tables
// that it makes when it is first executed; while it loads, the file's pages come on top. Packing is measured, by what
// the process grows by, on the chain's first pass when more follow, and so are values, planned memory and workspaces.
// Until then, and where it is more, what the programs state counts. What the C library would keep of an unloaded
// program is given back at once, for which the first chain of a process changes its allocator's thresholds.
//
// Every load holds the program's file against what it was when it was first looked at, by what the system says of it:
// bytes that rot in place and leave its times alone are not noticed (block_file.h).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "csrc/base/status.h"
#include "csrc/runtime/block_program.h"
#include "csrc/runtime/block_schedule.h"

namespace edgerun {

struct BlockLoaderOptions {
  int64_t prefetch = 1;                    // programs to load ahead; 0: none, and no thread
  int64_t budget_bytes = kUnlimitedBytes;  // for programs, values, planned memory and workspaces together
  int64_t value_bytes = 0;                 // most that all values take at once; 0: not known
  std::function<bool()> keep_going;        // as in ScheduleOptions
};

class BlockLoader {
 public:
  // Looks at every file, loads none. kNotFound, kCorrupt: a program is missing, damaged, or not the one that `programs`
  // was first opened with; `run` can end so too. kOutOfMemory: the budget is below what one program needs.
  static Status open(std::vector<ChainProgram> programs, const BlockLoaderOptions& options,
                     std::unique_ptr<BlockLoader>* loader);
  ~BlockLoader();

  // Not while the chain runs.
  Values* values() { return &values_; }
  Status set(const std::string& name, ElementType type, std::vector<int64_t> sizes, const void* data);

  // As BlockSchedule's.
  Status run(bool more_follow) { return schedule_->run(more_follow); }
  Status set_budget(int64_t bytes) { return schedule_->set_budget(bytes); }
  void cancel() { schedule_->cancel(); }
  Status clear() { return schedule_->clear(); }

  const std::vector<ChainProgram>& programs() const { return programs_; }
  const BlockSchedule& schedule() const { return *schedule_; }
  int64_t activation_bytes();  // values, planned memory and workspaces

 private:
  class Source;
  BlockLoader() = default;

  std::vector<ChainProgram> programs_;
  Values values_;
  std::unique_ptr<Source> source_;
  std::unique_ptr<BlockSchedule> schedule_;  // goes first: it unloads
};

}  // namespace edgerun
