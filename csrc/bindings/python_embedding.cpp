// The embedding kernels for Python: tensors arrive as addresses and sizes, checked by edgerun/ops/embedding_*.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/bindings/python_threads.h"
#include "csrc/ops/embedding_logits/embedding_logits.h"
#include "csrc/ops/embedding_logits/kernels.h"
#include "csrc/ops/embedding_lookup/embedding_lookup.h"

namespace py = pybind11;

namespace {

using edgerun::embedding::Table;
using edgerun::embedding::TableType;

Table table_at(uintptr_t data, uintptr_t scales, int type, int64_t vocab, int64_t hidden) {
  return Table{reinterpret_cast<const void*>(data), reinterpret_cast<const float*>(scales),
               static_cast<TableType>(type), vocab, hidden};
}

std::vector<std::string> embedding_logits_variants() {
  std::vector<std::string> names;
  for (int64_t i = 0; i < edgerun::embedding::kernel_count(); ++i) {
    names.emplace_back(edgerun::embedding::kernel_at(i).name);
  }
  return names;
}

void embedding_logits_use_variant(const std::string& name) {
  if (!edgerun::embedding::use_kernels(name.c_str())) throw py::value_error("no variant '" + name + "' on this CPU");
}

}  // namespace

void register_embedding(py::module_& module) {
  module.def(
      "embedding_lookup",
      [](uintptr_t table, uintptr_t scales, int type, int64_t vocab, int64_t hidden, uintptr_t ids, int64_t count,
         uintptr_t out) {
        const Table view = table_at(table, scales, type, vocab, hidden);
        const int64_t* id = reinterpret_cast<const int64_t*>(ids);
        const int64_t invalid = edgerun::embedding::first_invalid_id(view, id, count);
        if (invalid < 0) edgerun::embedding::lookup(view, id, count, reinterpret_cast<float*>(out));
        return invalid;
      },
      py::call_guard<py::gil_scoped_release>(), "Writes rows of the table; -1, or the position of an id outside it.");
  module.def(
      "embedding_logits",
      [](uintptr_t table, uintptr_t scales, int type, int64_t vocab, int64_t hidden, uintptr_t rows, int64_t count,
         uintptr_t out, int64_t threads) {
        edgerun::embedding::logits(table_at(table, scales, type, vocab, hidden), reinterpret_cast<const float*>(rows),
                                   count, reinterpret_cast<float*>(out), edgerun::python_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>(), "Writes hidden . table^T, table rows shared out over `threads`.");
  module.def("embedding_logits_variants", embedding_logits_variants,
             "Kernel variants that this CPU runs, the fastest first.");
  module.def("embedding_logits_use_variant", embedding_logits_use_variant,
             "Makes every later call use one variant: for tests and benchmarks.");
}
