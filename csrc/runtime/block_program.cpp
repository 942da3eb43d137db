#include "csrc/runtime/block_program.h"

#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/executor/memory_manager.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "csrc/runtime/executorch_errors.h"
#include "csrc/runtime/executorch_log.h"

namespace edgerun {

namespace {

using executorch::aten::ScalarType;
using executorch::extension::MallocMemoryAllocator;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::Method;
using executorch::runtime::Program;
using executorch::runtime::Span;

constexpr size_t kPlannedAlignment = 64;
constexpr int kWorkspacePerModel = 1;  // of XNNPACK's option workspace_sharing_mode

thread_local MallocMemoryAllocator* loading = nullptr;

struct LoadingScope {
  explicit LoadingScope(MallocMemoryAllocator* allocator) { loading = allocator; }
  ~LoadingScope() { loading = nullptr; }
};

size_t rounded(int64_t bytes) {
  return (static_cast<size_t>(bytes) + kPlannedAlignment - 1) / kPlannedAlignment * kPlannedAlignment;
}

bool known_type(ScalarType scalar, ElementType* type) {
  switch (scalar) {
    case ScalarType::Float:
      *type = ElementType::kFloat32;
      return true;
    case ScalarType::Long:
      *type = ElementType::kInt64;
      return true;
    case ScalarType::Bool:
      *type = ElementType::kBool;
      return true;
    default:
      return false;
  }
}

ScalarType scalar_type(ElementType type) {
  return type == ElementType::kFloat32 ? ScalarType::Float
         : type == ElementType::kInt64 ? ScalarType::Long
                                       : ScalarType::Bool;
}

std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

std::string cannot_load(const ChainProgram& program) { return "'" + program.path + "' cannot be loaded"; }

// Holds the file against what it was when it was first looked at, before and after it is read. By its path: a file that
// is put in the place of the open one is another block, too. One that is missing is looked at anew once it is there:
// whoever was told that has put it back.
Status check_unchanged(const ChainProgram& program) {
  FileStamp now;
  if (Status status = read_stamp(program.path, &now); !status.ok()) {
    *program.stamp = FileStamp();
    return status;
  }
  if (!program.stamp->taken()) *program.stamp = now;
  if (now == *program.stamp) return Status();
  return Status(StatusCode::kCorrupt, "block '" + program.name + "' ('" + program.path +
                                          "') changed since it was checked: copy the bundle again, and open it anew");
}

// ExecuTorch's checks are the strict ones: what check_unchanged does not notice must fail, not crash. They read the
// program's description only, not its weights.
Status open_program(const ChainProgram& program, std::unique_ptr<MappedDataLoader>* loader,
                    std::unique_ptr<Program>* opened) {
  static std::once_flag once;
  std::call_once(once, [] { executorch::runtime::runtime_init(); });
  const ExecutorchLog log;
  if (Status status = check_unchanged(program); !status.ok()) return status;
  if (Status status = MappedDataLoader::open(program.path, program.bytes, loader); !status.ok()) return status;
  auto result = Program::load(loader->get(), Program::Verification::InternalConsistency);
  if (!result.ok()) {
    Status status = executorch_failed(cannot_load(program), result.error(), log);
    return Status(StatusCode::kCorrupt, status.message() + ": copy or export the bundle again");
  }
  *opened = std::make_unique<Program>(std::move(*result));
  return Status();
}

Status planned_bytes(const ChainProgram& facts, const Program& program, std::vector<int64_t>* bytes) {
  const ExecutorchLog log;
  const auto meta = program.method_meta("forward");
  if (!meta.ok()) return executorch_failed(cannot_load(facts), meta.error(), log);
  if (meta->num_inputs() != facts.inputs.size() || meta->num_outputs() != facts.outputs.size()) {
    return Status(StatusCode::kCorrupt, "'" + facts.path + "' has " + std::to_string(meta->num_inputs()) +
                                            " inputs and " + std::to_string(meta->num_outputs()) +
                                            " outputs, the manifest names " + std::to_string(facts.inputs.size()) +
                                            " and " + std::to_string(facts.outputs.size()) +
                                            ": export the bundle again");
  }
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const auto size = meta->memory_planned_buffer_size(i);
    if (!size.ok()) return executorch_failed(cannot_load(facts), size.error(), log);
    bytes->push_back(*size);
  }
  return Status();
}

}  // namespace

int64_t element_bytes(ElementType type) {
  return type == ElementType::kFloat32 ? 4 : type == ElementType::kInt64 ? 8 : 1;
}

int64_t Value::bytes() const {
  int64_t count = element_bytes(type);
  for (const int64_t size : sizes) count *= size;
  return count;
}

void Value::resize(ElementType new_type, std::vector<int64_t> new_sizes) {
  type = new_type;
  sizes = std::move(new_sizes);
  if (bytes() <= capacity) return;
  data.reset();
  data.reset(new uint8_t[static_cast<size_t>(bytes())]);
  capacity = bytes();
}

void* WorkspaceKey::allocate(size_t size, size_t alignment) {
  return loading == nullptr ? nullptr : loading->allocate(size, alignment);
}

Status inspect_program(const ChainProgram& program, ProgramFacts* facts) {
  std::unique_ptr<MappedDataLoader> loader;
  std::unique_ptr<Program> opened;
  if (Status status = check_operators(program.operators); !status.ok()) return status;
  if (Status status = open_program(program, &loader, &opened); !status.ok()) return status;
  facts->file_bytes = static_cast<int64_t>(*loader->size());
  if (Status status = planned_bytes(program, *opened, &facts->planned_bytes); !status.ok()) return status;
  return check_unchanged(program);
}

struct BlockProgram::Memory {
  MallocMemoryAllocator method, temporary;
  std::vector<Span<uint8_t>> spans;
  std::unique_ptr<HierarchicalAllocator> planned;
  std::unique_ptr<executorch::runtime::MemoryManager> manager;
};

BlockProgram::BlockProgram(const ChainProgram& program) : facts_(program) {}
BlockProgram::~BlockProgram() = default;

Status BlockProgram::load(const ChainProgram& facts, WorkspaceKey* key, LazyMemory* planned,
                          std::unique_ptr<BlockProgram>* loaded) {
  std::unique_ptr<BlockProgram> block(new BlockProgram(facts));
  if (Status status = open_program(facts, &block->loader_, &block->program_); !status.ok()) return status;
  block->loader_->read_ahead();
  std::vector<int64_t> sizes;
  if (Status status = planned_bytes(facts, *block->program_, &sizes); !status.ok()) return status;
  block->memory_ = std::make_unique<Memory>();
  Memory& memory = *block->memory_;
  size_t used = 0;
  for (const int64_t size : sizes) {
    memory.spans.emplace_back(planned->data() + used, static_cast<size_t>(size));
    used += rounded(size);
  }
  if (used > planned->size()) {
    return Status(StatusCode::kCorrupt, "'" + facts.path +
                                            "' is not the file that was there when the chain was opened: "
                                            "copy the bundle again");
  }
  memory.planned =
      std::make_unique<HierarchicalAllocator>(Span<Span<uint8_t>>(memory.spans.data(), memory.spans.size()));
  memory.manager = std::make_unique<executorch::runtime::MemoryManager>(key, memory.planned.get(), &memory.temporary);
  executorch::runtime::BackendOptions<2> options;
  executorch::runtime::LoadBackendOptionsMap backends;
  // The cache of packed weights has one lock for all programs, loading and executing: off.
  if (options.set_option("workspace_sharing_mode", kWorkspacePerModel) != Error::Ok ||
      options.set_option("weight_cache_enabled", false) != Error::Ok ||
      backends.set_options("XnnpackBackend", options.view()) != Error::Ok) {
    return Status(StatusCode::kInternal, "ExecuTorch does not take the options of its XNNPACK backend");
  }
  const ExecutorchLog log;
  const LoadingScope scope(&memory.method);
  auto method = block->program_->load_method("forward", memory.manager.get(), nullptr, nullptr, &backends);
  if (!method.ok()) return executorch_failed(cannot_load(facts), method.error(), log);
  block->method_ = std::make_unique<Method>(std::move(*method));
  if (Status status = check_unchanged(facts); !status.ok()) return status;
  block->loader_->drop_pages();
  *loaded = std::move(block);
  return Status();
}

Status BlockProgram::execute(Values* values) {
  const ExecutorchLog log;
  const std::string where = "block '" + facts_.name + "' (" + facts_.path + ")";
  if (loader_->mapped_bytes() > 0 && loader_->cut_short()) {
    return Status(StatusCode::kCorrupt,
                  "'" + facts_.path + "' was cut short while it was in use: copy the bundle again");
  }
  for (size_t i = 0; i < facts_.inputs.size(); ++i) {
    const auto found = values->find(facts_.inputs[i]);
    if (found == values->end()) {
      return Status(StatusCode::kInvalidArgument,
                    where + " takes '" + facts_.inputs[i] + "', which no block before it gives and nobody set");
    }
    const Value& value = found->second;
    std::vector<executorch::aten::SizesType> sizes(value.sizes.begin(), value.sizes.end());
    std::vector<executorch::aten::DimOrderType> order(sizes.size());
    std::vector<executorch::aten::StridesType> strides(sizes.size());
    for (size_t dimension = sizes.size(), stride = 1; dimension-- > 0;
         stride *= static_cast<size_t>(sizes[dimension])) {
      order[dimension] = static_cast<executorch::aten::DimOrderType>(dimension);
      strides[dimension] = static_cast<executorch::aten::StridesType>(stride);
    }
    executorch::aten::TensorImpl tensor(scalar_type(value.type), static_cast<ssize_t>(sizes.size()), sizes.data(),
                                        value.data.get(), order.data(), strides.data());
    if (const Error error = method_->set_input(EValue(executorch::aten::Tensor(&tensor)), i); error != Error::Ok) {
      Status status = executorch_failed(
          where + " does not take '" + facts_.inputs[i] + "' of shape " + shape_text(value.sizes), error, log);
      return Status(StatusCode::kInvalidArgument, status.message());
    }
  }
  if (const Error error = method_->execute(); error != Error::Ok) {
    return executorch_failed(where + " failed", error, log);
  }
  if (loader_->mapped_bytes() > 0) {  // what is mapped was read now, perhaps for the first time
    if (Status status = check_unchanged(facts_); !status.ok()) return status;
  }
  for (size_t i = 0; i < facts_.outputs.size(); ++i) {
    const EValue& output = method_->get_output(i);
    ElementType type = ElementType::kFloat32;
    if (!output.isTensor() || !known_type(output.toTensor().scalar_type(), &type)) {
      return Status(StatusCode::kCorrupt,
                    where + " gives '" + facts_.outputs[i] +
                        "' as something else than a tensor of float32, int64 or bool: export again");
    }
    const auto tensor = output.toTensor();
    Value& value = (*values)[facts_.outputs[i]];
    value.resize(type, std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end()));
    std::memcpy(value.data.get(), tensor.const_data_ptr(), static_cast<size_t>(value.bytes()));
  }
  return Status();
}

}  // namespace edgerun
