// The rms_norm kernel for Python: tensors arrive as addresses and sizes, checked by edgerun/ops/rms_norm.py.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "csrc/bindings/python_threads.h"
#include "csrc/ops/rms_norm/rms_norm.h"

namespace py = pybind11;

void register_rms_norm(py::module_& module) {
  module.def(
      "rms_norm",
      [](uintptr_t x, uintptr_t weight, int dtype, int64_t rows, int64_t size, float eps, uintptr_t out,
         int64_t threads) {
        const edgerun::rms_norm::Params params{rows, size, eps, static_cast<edgerun::rms_norm::Dtype>(dtype)};
        edgerun::rms_norm::normalize(params, reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(weight),
                                     reinterpret_cast<void*>(out), edgerun::python_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>(), "Writes the normalised rows, shared out over `threads`.");
}
