// Errors for Python: a status that is not good becomes the exception of edgerun/errors.py that fits it.
#pragma once

#include <pybind11/pybind11.h>

#include "csrc/bindings/c_api.h"

namespace edgerun {

inline void raise_for(edgerun_status status, const char* message) {
  namespace py = pybind11;
  if (status == EDGERUN_OK) return;
  const bool of_bundle = status == EDGERUN_NOT_FOUND || status == EDGERUN_CORRUPT;
  const py::object kind = py::module_::import("edgerun.errors").attr(of_bundle ? "BundleError" : "EdgerunError");
  PyErr_SetString(kind.ptr(), message);
  throw py::error_already_set();
}

}  // namespace edgerun
