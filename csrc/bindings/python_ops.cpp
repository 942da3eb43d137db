// dhsa_attention for Python: tensors arrive as addresses and sizes, checked by edgerun/ops/dhsa_attention.py, whose
// _Native gives the order of the arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "csrc/bindings/python_threads.h"
#include "csrc/ops/dhsa_attention/dhsa_attention.h"
#include "csrc/ops/dhsa_attention/kernels.h"

namespace py = pybind11;

namespace {

using edgerun::dhsa::Counters;
using edgerun::dhsa::Lists;
using edgerun::dhsa::Params;
using edgerun::dhsa::Tensors;

using NestedLists = std::vector<std::vector<std::vector<int64_t>>>;  // [KV head][group] -> micro-blocks

struct Call {
  Params params;
  Tensors tensors;
  edgerun::Parallel parallel;
};

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate_scratch(const Call& call) {
  const size_t bytes = edgerun::dhsa::scratch_bytes(call.params, call.parallel.threads);
  return Memory(::operator new(bytes, std::align_val_t{64}));
}

template <typename Type>
Type as(const py::args& arguments, size_t index) {
  return arguments[index].cast<Type>();
}

// The 33 arguments that the three functions share. Raises ValueError for what dhsa::check refuses.
Call parse_call(const py::args& arguments) {
  constexpr size_t kCount = 33;
  if (arguments.size() < kCount) {
    throw py::value_error("dhsa_attention takes " + std::to_string(kCount) + " arguments, not " +
                          std::to_string(arguments.size()));
  }
  const auto address = [&](size_t index) { return reinterpret_cast<void*>(as<uintptr_t>(arguments, index)); };
  Call call;
  size_t i = 0;
  call.tensors.query = address(i++);
  call.tensors.key = address(i++);
  call.tensors.value = address(i++);
  call.tensors.out = address(i++);
  call.tensors.key_cache = address(i++);
  call.tensors.value_cache = address(i++);
  call.tensors.summaries = address(i++);
  call.tensors.boundaries = static_cast<uint8_t*>(address(i++));
  call.tensors.selection = static_cast<int32_t*>(address(i++));
  Params& params = call.params;
  for (int64_t* field : {&params.tokens, &params.query_heads, &params.kv_heads, &params.head_dim,
                         &params.capacity_blocks, &params.input_pos}) {
    *field = as<int64_t>(arguments, i++);
  }
  params.dtype = static_cast<edgerun::dhsa::Dtype>(as<int>(arguments, i++));
  params.cache_dtype = static_cast<edgerun::dhsa::Dtype>(as<int>(arguments, i++));
  params.scale = as<float>(arguments, i++);
  params.softcap = as<float>(arguments, i++);
  for (int64_t* field : {&params.window, &params.budget, &params.tile, &params.sink, &params.dense_tail}) {
    *field = as<int64_t>(arguments, i++);
  }
  params.chunking = static_cast<edgerun::dhsa::Chunking>(as<int>(arguments, i++));
  params.boundary_threshold = as<float>(arguments, i++);
  params.finds_boundaries = as<bool>(arguments, i++);
  params.pooling = static_cast<edgerun::dhsa::Pooling>(as<int>(arguments, i++));
  params.query_pooling = static_cast<edgerun::dhsa::QueryPooling>(as<int>(arguments, i++));
  params.selector = static_cast<edgerun::dhsa::Selector>(as<int>(arguments, i++));
  params.refine = as<int64_t>(arguments, i++);
  params.reselect = as<int64_t>(arguments, i++);
  call.parallel = edgerun::python_threads(as<int64_t>(arguments, i++));
  return call;
}

// A stage that does not append reads no key and no value: the query stands in for them in the check of the others.
void require_valid(const Call& call, bool appends) {
  Tensors tensors = call.tensors;
  if (!appends) {
    for (const void** pointer : {&tensors.key, &tensors.value}) *pointer = tensors.query;
    if (!tensors.out) tensors.out = const_cast<void*>(tensors.query);
  }
  if (const char* wrong = edgerun::dhsa::check(call.params, tensors)) throw py::value_error(wrong);
}

std::pair<int64_t, int64_t> dhsa_attention(const py::args& arguments) {
  const Call call = parse_call(arguments);
  require_valid(call, true);
  Counters counters;
  {
    const py::gil_scoped_release release;
    const Memory scratch = allocate_scratch(call);
    edgerun::dhsa::run(call.params, call.tensors, scratch.get(), call.parallel, &counters);
  }
  return {counters.attended_pairs, counters.causal_pairs};
}

NestedLists dhsa_select(const py::args& arguments) {
  const Call call = parse_call(arguments);
  require_valid(call, false);
  const int64_t groups = edgerun::dhsa::group_count(call.params);
  const int64_t blocks = call.params.capacity_blocks;
  std::vector<uint16_t> ids(static_cast<size_t>(call.params.kv_heads * groups * blocks));
  std::vector<int32_t> counts(static_cast<size_t>(call.params.kv_heads * groups));
  {
    const py::gil_scoped_release release;
    const Memory scratch = allocate_scratch(call);
    edgerun::dhsa::select(call.params, call.tensors, Lists{ids.data(), counts.data()}, scratch.get(), call.parallel);
  }
  NestedLists result(static_cast<size_t>(call.params.kv_heads));
  for (int64_t list = 0; list < call.params.kv_heads * groups; ++list) {
    const uint16_t* first = ids.data() + list * blocks;
    result[static_cast<size_t>(list / groups)].emplace_back(first, first + counts[static_cast<size_t>(list)]);
  }
  return result;
}

std::pair<int64_t, int64_t> dhsa_attend(const py::args& arguments) {
  constexpr size_t kLists = 33;
  if (arguments.size() != kLists + 1) throw py::value_error("dhsa_attend takes the op's 33 arguments and the lists");
  const Call call = parse_call(arguments);
  require_valid(call, false);
  if (!call.tensors.out) throw py::value_error("dhsa_attend needs out");
  const NestedLists lists = as<NestedLists>(arguments, kLists);
  const int64_t groups = edgerun::dhsa::group_count(call.params);
  const int64_t used = (call.params.input_pos + call.params.tokens + 15) / 16;
  std::vector<uint16_t> ids(static_cast<size_t>(call.params.kv_heads * groups * call.params.capacity_blocks));
  std::vector<int32_t> counts;
  if (static_cast<int64_t>(lists.size()) != call.params.kv_heads) throw py::value_error("one row of lists per KV head");
  for (const auto& head : lists) {
    if (static_cast<int64_t>(head.size()) != groups) throw py::value_error("one list per group of the call");
    for (const auto& list : head) {
      for (size_t i = 0; i < list.size(); ++i) {
        if (list[i] < 0 || list[i] >= used || (i > 0 && list[i] <= list[i - 1])) {
          throw py::value_error("a list must ascend strictly within the micro-blocks in use");
        }
      }
      std::copy(list.begin(), list.end(),
                ids.begin() + static_cast<int64_t>(counts.size()) * call.params.capacity_blocks);
      counts.push_back(static_cast<int32_t>(list.size()));
    }
  }
  Counters counters;
  {
    const py::gil_scoped_release release;
    const Memory scratch = allocate_scratch(call);
    edgerun::dhsa::attend(call.params, call.tensors, Lists{ids.data(), counts.data()}, scratch.get(), call.parallel,
                          &counters);
  }
  return {counters.attended_pairs, counters.causal_pairs};
}

std::vector<std::string> dhsa_variants() {
  std::vector<std::string> names;
  for (int64_t i = 0; i < edgerun::dhsa::kernel_count(); ++i) names.emplace_back(edgerun::dhsa::kernel_at(i).name);
  return names;
}

void dhsa_use_variant(const std::string& name) {
  if (!edgerun::dhsa::use_kernels(name.c_str())) throw py::value_error("no variant '" + name + "' on this CPU");
}

}  // namespace

void register_ops(py::module_& module) {
  module.def("dhsa_attention", dhsa_attention, "Appends, selects and attends; returns (attended_pairs, causal_pairs).");
  module.def("dhsa_select", dhsa_select, "The lists of a call whose tokens are stored: [KV head][group][...].");
  module.def("dhsa_attend", dhsa_attend, "Attends given lists; returns (attended_pairs, causal_pairs).");
  module.def("dhsa_variants", dhsa_variants, "Kernel variants that this CPU runs, the fastest first.");
  module.def("dhsa_use_variant", dhsa_use_variant, "Makes every later call use one variant: for tests and benchmarks.");
}
