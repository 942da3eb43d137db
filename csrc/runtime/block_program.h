// block_program: one ExecuTorch program of a chain, loaded and unloaded many times. What programs of a chain have in
// common is theirs to share: the planned memory (one of them executes at a time) and XNNPACK's workspaces.
//
// XNNPACK's delegates of one workspace lock each other out, also while one is only being loaded. ExecuTorch shares one
// among all programs unless told otherwise, and nothing could be loaded while anything executes. Its mode "per model"
// tells models apart by the address of their allocator: so a chain has a few allocators, one for each workspace that
// may be in use at once, and every program is loaded with one of them.
#pragma once

#include <executorch/runtime/core/memory_allocator.h>
#include <executorch/runtime/executor/method.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "csrc/base/status.h"
#include "csrc/runtime/block_file.h"
#include "csrc/runtime/mapped_data_loader.h"
#include "csrc/runtime/process_memory.h"

namespace edgerun {

enum class ElementType { kFloat32, kInt64, kBool };

int64_t element_bytes(ElementType type);

// A tensor of a chain's table.
struct Value {
  ElementType type = ElementType::kFloat32;
  std::vector<int64_t> sizes;
  std::unique_ptr<uint8_t[]> data;
  int64_t capacity = 0;  // bytes at data

  int64_t bytes() const;
  const float* floats() const { return reinterpret_cast<const float*>(data.get()); }
  // Makes room for `type` and `sizes`; what stood there is lost.
  void resize(ElementType new_type, std::vector<int64_t> new_sizes);
};

using Values = std::map<std::string, Value>;

struct ChainProgram {
  std::string name;  // for messages
  std::string path;
  int64_t bytes = -1;                        // of the file; -1: any
  std::vector<std::string> inputs, outputs;  // names of its values, in the order of method "forward"
  std::vector<std::string> operators;        // that must be there, as "namespace::name"
  int64_t arena_bytes = 0;                   // most that XNNPACK takes while it executes; 0: not known
  int64_t table_bytes = 0;                   // that XNNPACK keeps of it from its first execution on
  // Of the file when it was first inspected, which a session does as soon as the hashes are compared. Copies share it:
  // each chain that a session opens afterwards holds the file against what it was then.
  std::shared_ptr<FileStamp> stamp = std::make_shared<FileStamp>();
};

// The allocator that names a workspace. What it gives comes from the program that the calling thread is loading.
class WorkspaceKey final : public executorch::runtime::MemoryAllocator {
 public:
  WorkspaceKey() : MemoryAllocator(0, nullptr) {}
  void* allocate(size_t size, size_t alignment) override;
};

// What can be known without loading the weights.
struct ProgramFacts {
  std::vector<int64_t> planned_bytes;  // of each memory-planned buffer
  int64_t file_bytes = 0;
};

// kNotFound, kCorrupt: the file is missing, damaged or not as it was first inspected, or takes or gives another number
// of values.
Status inspect_program(const ChainProgram& program, ProgramFacts* facts);

class BlockProgram {
 public:
  // planned: memory of at least the program's planned bytes, which nothing else uses while this executes.
  // kNotFound, kCorrupt as for inspect_program.
  static Status load(const ChainProgram& program, WorkspaceKey* key, LazyMemory* planned,
                     std::unique_ptr<BlockProgram>* loaded);
  ~BlockProgram();

  Status execute(Values* values);
  int64_t mapped_bytes() const { return loader_->mapped_bytes(); }

 private:
  explicit BlockProgram(const ChainProgram& program);

  const ChainProgram& facts_;
  // Order matters: the method goes first.
  std::unique_ptr<MappedDataLoader> loader_;
  struct Memory;
  std::unique_ptr<Memory> memory_;
  std::unique_ptr<executorch::runtime::Program> program_;
  std::unique_ptr<executorch::runtime::Method> method_;
};

}  // namespace edgerun
