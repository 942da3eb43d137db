// The embedding kernels for Python: tensors arrive as addresses and sizes, checked by edgerun/ops/embedding_*.py.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "csrc/bindings/python_threads.h"
#include "csrc/ops/embedding_logits/embedding_logits.h"
#include "csrc/ops/embedding_lookup/embedding_lookup.h"

namespace py = pybind11;

namespace {

using edgerun::embedding::Table;
using edgerun::embedding::TableType;

Table table_at(uintptr_t data, uintptr_t scales, int type, int64_t vocab, int64_t hidden) {
  return Table{reinterpret_cast<const void*>(data), reinterpret_cast<const float*>(scales),
               static_cast<TableType>(type), vocab, hidden};
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
}
