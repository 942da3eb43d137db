#include "csrc/runtime/block_loader.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "csrc/runtime/process_memory.h"

namespace edgerun {

class BlockLoader::Source final : public BlockSource {
 public:
  Source(const std::vector<ChainProgram>& programs, const BlockLoaderOptions& options, Values* values)
      : programs_(programs),
        value_bytes_(options.value_bytes),
        values_(values),
        blocks_(programs.size()),
        streams_(programs.size(), 0),
        workspace_of_(programs.size(), 0),
        costs_(programs.size()) {
    // One for the program that executes, one for each that is loaded ahead: what is loaded waits for nobody.
    for (int64_t i = 0; i <= options.prefetch; ++i) workspaces_.push_back(std::make_unique<WorkspaceKey>());
    users_.resize(workspaces_.size());
    // Programs that stay share a workspace. Where one needs more, the larger one is there before the smaller one goes.
    for (const ChainProgram& program : programs) arena_bytes_ = std::max(arena_bytes_, program.arena_bytes);
    for (const ChainProgram& program : programs) {
      if (program.arena_bytes < arena_bytes_) outgrown_bytes_ = std::max(outgrown_bytes_, program.arena_bytes);
    }
  }

  Status inspect() {
    size_t planned = 0;
    for (size_t i = 0; i < programs_.size(); ++i) {
      ProgramFacts facts;
      if (Status status = inspect_program(programs_[i], &facts); !status.ok()) return status;
      size_t bytes = 0;
      for (const int64_t one : facts.planned_bytes) bytes += static_cast<size_t>(one) + 64;
      planned = std::max(planned, bytes);
      const int64_t loaded = facts.file_bytes + programs_[i].table_bytes;
      costs_[i] = {loaded, std::max(loaded, 2 * facts.file_bytes)};
      file_bytes_.push_back(facts.file_bytes);
    }
    if (planned_.allocate(planned)) return Status();
    return Status(StatusCode::kOutOfMemory, "the system refuses " + std::to_string(planned) +
                                                " bytes of address space for activations: export a smaller video");
  }
  const std::vector<BlockCost>& estimates() const { return costs_; }

  Status load(size_t index, const LoadMode& mode, BlockCost* cost) override {
    Attempt attempt{this, index};
    const size_t workspace = choose_workspace(index, mode.stays ? 0 : mode.ahead);
    const ResidentBytes before = mode.alone ? resident_bytes() : ResidentBytes();
    Status status = BlockProgram::load(programs_[index], workspaces_[workspace].get(), &planned_, &blocks_[index]);
    if (!status.ok()) {
      release_free_memory();
      return status;
    }
    attempt.succeeded = true;
    const ResidentBytes after = mode.alone ? resident_bytes() : ResidentBytes();
    if (before.anonymous < 0 || after.anonymous < 0) return Status();
    const int64_t packed = std::max<int64_t>(after.anonymous - before.anonymous, 0);
    // A small program can find room in what the allocator has left: never below its file.
    const int64_t loaded = std::max(packed + blocks_[index]->mapped_bytes(), file_bytes_[index]);
    cost->loaded_bytes = loaded + programs_[index].table_bytes;
    cost->loading_bytes = std::max(cost->loaded_bytes, loaded + file_bytes_[index]);
    costs_[index] = *cost;
    return status;
  }

  Status execute(size_t index, bool alone) override {
    if (alone && index == 0) {
      const int64_t loaded = costs_[0].loaded_bytes - programs_[0].table_bytes;  // which come with the execution
      baseline_bytes_ = resident_bytes().anonymous - loaded - value_bytes();
    }
    Status status = blocks_[index]->execute(values_);
    const ResidentBytes after = alone && baseline_bytes_ >= 0 ? resident_bytes() : ResidentBytes();
    if (after.anonymous >= 0) {
      measured_bytes_ = std::max(measured_bytes_, after.anonymous - baseline_bytes_ - costs_[index].loaded_bytes);
    }
    return status;
  }

  void unload(size_t index) override {
    blocks_[index].reset();
    give_back_workspace(index);
    release_free_memory();
  }

  // A workspace is as large as the largest of its programs needs, and stays for as long as one of them is loaded. Each
  // program that is loaded ahead brings another.
  Activations activations() override {
    const int64_t now = value_bytes(), values = std::max(now, value_bytes_);
    const int64_t stated = values + static_cast<int64_t>(planned_.size()) + arena_bytes_;
    if (arena_bytes_ > 0) return {std::max(stated, measured_bytes_), arena_bytes_, outgrown_bytes_};
    if (measured_bytes_ == 0) return {stated, 0};
    return {std::max(measured_bytes_, values), std::max<int64_t>(measured_bytes_ - now, 0)};
  }

 private:
  // A load that does not come to its end leaves nothing behind, also where an exception ends it, or the end of its
  // thread, which unwinds the stack as an exception does (BlockSchedule::loading_thread).
  struct Attempt {
    Source* source;
    size_t index;
    bool succeeded = false;
    ~Attempt() {
      if (succeeded) return;
      source->blocks_[index].reset();
      source->give_back_workspace(index);
    }
  };

  int64_t value_bytes() const {
    int64_t bytes = 0;
    for (const auto& [name, value] : *values_) bytes += value.capacity;
    return bytes;
  }

  // Resident programs share the first. One that streams gets one of the `ahead` + 1 first that no streaming program
  // has, the very first only at last, since loading it and executing a resident one would wait for each other.
  size_t choose_workspace(size_t index, int64_t ahead) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t chosen = 0;
    for (size_t i = std::min(static_cast<size_t>(ahead), users_.size() - 1); i > 0; --i) {
      if (chosen == 0 || users_[i] < users_[chosen]) chosen = i;
    }
    if (chosen > 0 && users_[0] < users_[chosen]) chosen = 0;
    streams_[index] = ahead > 0;
    users_[chosen] += streams_[index];
    return workspace_of_[index] = chosen;
  }
  void give_back_workspace(size_t index) {
    const std::lock_guard<std::mutex> lock(mutex_);
    users_[workspace_of_[index]] -= streams_[index];
    streams_[index] = false;
  }

  const std::vector<ChainProgram>& programs_;
  const int64_t value_bytes_;
  int64_t arena_bytes_ = 0, outgrown_bytes_ = 0;  // of a workspace, at most, and of one that grows to it
  Values* const values_;
  std::vector<std::unique_ptr<WorkspaceKey>> workspaces_;
  LazyMemory planned_;
  std::vector<std::unique_ptr<BlockProgram>> blocks_;  // they go before what they use
  std::mutex mutex_;
  std::vector<int64_t> users_;  // streaming programs by workspace
  std::vector<char> streams_;
  std::vector<size_t> workspace_of_;
  std::vector<BlockCost> costs_;
  std::vector<int64_t> file_bytes_;
  int64_t baseline_bytes_ = -1;  // of the process, without the chain
  int64_t measured_bytes_ = 0;
};

BlockLoader::~BlockLoader() = default;

Status BlockLoader::open(std::vector<ChainProgram> programs, const BlockLoaderOptions& options,
                         std::unique_ptr<BlockLoader>* loader) {
  if (options.prefetch < 0) {
    return Status(StatusCode::kInvalidArgument,
                  "prefetch is " + std::to_string(options.prefetch) + "; it must be 0 (off) or above");
  }
  return_large_memory();
  std::unique_ptr<BlockLoader> opened(new BlockLoader());
  opened->programs_ = std::move(programs);
  opened->source_ = std::make_unique<Source>(opened->programs_, options, &opened->values_);
  if (Status status = opened->source_->inspect(); !status.ok()) return status;
  ScheduleOptions schedule;
  schedule.prefetch = options.prefetch;
  schedule.budget_bytes = options.budget_bytes;
  schedule.keep_going = options.keep_going;
  schedule.costs = opened->source_->estimates();
  for (const ChainProgram& program : opened->programs_) schedule.names.push_back(program.name);
  Status status = BlockSchedule::open(opened->source_.get(), std::move(schedule), &opened->schedule_);
  if (status.ok()) *loader = std::move(opened);
  return status;
}

Status BlockLoader::set(const std::string& name, ElementType type, std::vector<int64_t> sizes, const void* data) {
  for (const int64_t size : sizes) {
    if (size < 0) {
      return Status(StatusCode::kInvalidArgument,
                    "value '" + name + "' has a size of " + std::to_string(size) + "; sizes are 0 or above");
    }
  }
  Value& value = values_[name];
  value.resize(type, std::move(sizes));
  if (value.bytes() > 0) std::memcpy(value.data.get(), data, static_cast<size_t>(value.bytes()));
  return Status();
}

int64_t BlockLoader::activation_bytes() { return source_->activations().bytes; }

}  // namespace edgerun
