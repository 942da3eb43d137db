// edgerun._native.BlockLoader: a chain of programs for tests and benchmarks. What users hold runs chains itself.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "csrc/bindings/python_errors.h"
#include "csrc/runtime/block_loader.h"
#include "csrc/runtime/executorch_log.h"
#include "csrc/runtime/process_memory.h"
#include "csrc/runtime/thread_pool.h"

namespace py = pybind11;

namespace {

using edgerun::ElementType;
using edgerun::Status;

void raise_for(const Status& status) {
  edgerun::raise_for(static_cast<edgerun_status>(status.code()), status.message().c_str());
}

// (name, path, bytes or -1, inputs, outputs)
using Program = std::tuple<std::string, std::string, int64_t, std::vector<std::string>, std::vector<std::string>>;

class Loader {
 public:
  Loader(const std::vector<Program>& programs, int64_t prefetch, std::optional<int64_t> budget_bytes, int64_t threads) {
    const edgerun::ExecutorchLog quiet;  // the pool is made or changed, which is no error to report
    raise_for(threads_.acquire(threads));
    std::vector<edgerun::ChainProgram> chain;
    for (const auto& [name, path, bytes, inputs, outputs] : programs) {
      chain.push_back({name, path, bytes, inputs, outputs, {}});
    }
    edgerun::BlockLoaderOptions options;
    options.prefetch = prefetch;
    options.budget_bytes = budget_bytes.value_or(edgerun::kUnlimitedBytes);
    raise_for(released([&] { return edgerun::BlockLoader::open(std::move(chain), options, &loader_); }));
  }

  void set(const std::string& name, const py::array& array) {
    const bool floats = py::isinstance<py::array_t<float>>(array);
    if (!floats && !py::isinstance<py::array_t<int64_t>>(array)) throw py::type_error("give float32 or int64");
    const py::array whole = py::array::ensure(array, py::array::c_style);
    const std::vector<int64_t> sizes(whole.shape(), whole.shape() + whole.ndim());
    raise_for(loader_->set(name, floats ? ElementType::kFloat32 : ElementType::kInt64, sizes, whole.data()));
  }

  py::array get(const std::string& name) {
    const auto found = loader_->values()->find(name);
    if (found == loader_->values()->end()) throw py::key_error(name);
    const edgerun::Value& value = found->second;
    const py::dtype type = value.type == ElementType::kFloat32 ? py::dtype::of<float>()
                           : value.type == ElementType::kInt64 ? py::dtype::of<int64_t>()
                                                               : py::dtype::of<bool>();
    py::array array(type, value.sizes);
    std::memcpy(array.mutable_data(), value.data.get(), static_cast<size_t>(value.bytes()));
    return array;
  }

  void run(bool more_follow) {
    raise_for(released([&] { return loader_->run(more_follow); }));
  }
  void set_budget(int64_t bytes) {
    raise_for(released([&] { return loader_->set_budget(bytes); }));
  }
  void clear() {
    raise_for(released([&] { return loader_->clear(); }));
  }
  void cancel() { loader_->cancel(); }
  int64_t used_bytes() const { return loader_->schedule().used_bytes(); }
  int64_t activation_bytes() const { return loader_->activation_bytes(); }

  py::list blocks() const {
    py::list rows;
    for (const edgerun::BlockStats& stats : loader_->schedule().block_stats()) {
      py::dict row;
      row["loads"] = stats.loads;
      row["executions"] = stats.executions;
      row["load_ms"] = stats.load_ms;
      row["unload_ms"] = stats.unload_ms;
      row["execute_ms"] = stats.execute_ms;
      row["wait_ms"] = stats.wait_ms;
      row["loaded_bytes"] = stats.cost.loaded_bytes;
      row["loading_bytes"] = stats.cost.loading_bytes;
      row["measured"] = stats.measured;
      rows.append(row);
    }
    return rows;
  }

  py::list passes() const {
    py::list rows;
    for (const edgerun::PassStats& stats : loader_->schedule().pass_stats()) {
      py::dict row;
      row["wall_ms"] = stats.wall_ms;
      row["load_ms"] = stats.load_ms;
      row["unload_ms"] = stats.unload_ms;
      row["execute_ms"] = stats.execute_ms;
      row["wait_ms"] = stats.wait_ms;
      row["loads"] = stats.loads;
      row["early_loads"] = stats.early_loads;
      row["resident_blocks"] = stats.resident_blocks;
      row["prefetch"] = stats.prefetch;
      row["peak_bytes"] = stats.peak_bytes;
      row["budget_bytes"] = stats.budget_bytes;
      row["measuring"] = stats.measuring;
      rows.append(row);
    }
    return rows;
  }

 private:
  template <typename Call>
  static Status released(const Call& call) {
    const py::gil_scoped_release unlocked;
    return call();
  }

  edgerun::ThreadPoolHold threads_;
  std::unique_ptr<edgerun::BlockLoader> loader_;
};

}  // namespace

void register_block_loader(py::module_& module) {
  module.def(
      "resident_bytes",
      [] {
        const edgerun::ResidentBytes bytes = edgerun::resident_bytes();
        return std::pair(bytes.anonymous, bytes.file);
      },
      "Anonymous and file-backed bytes of this process in RAM; -1: unknown.");
  module.def("return_large_memory", edgerun::return_large_memory,
             "From now on, memory of a MiB or more goes back to the system as soon as it is freed.");
  py::class_<Loader>(module, "BlockLoader")
      .def(py::init<const std::vector<Program>&, int64_t, std::optional<int64_t>, int64_t>(), py::arg("programs"),
           py::arg("prefetch") = 1, py::arg("budget_bytes") = py::none(), py::arg("threads") = 0)
      .def("set", &Loader::set, py::arg("name"), py::arg("array"))
      .def("get", &Loader::get, py::arg("name"))
      .def("run", &Loader::run, py::arg("more_follow"))
      .def("set_budget", &Loader::set_budget, py::arg("bytes"))
      .def("clear", &Loader::clear)
      .def("cancel", &Loader::cancel)
      .def_property_readonly("used_bytes", &Loader::used_bytes)
      .def_property_readonly("activation_bytes", &Loader::activation_bytes)
      .def("blocks", &Loader::blocks)
      .def("passes", &Loader::passes);
}
