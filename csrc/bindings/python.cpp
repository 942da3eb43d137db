// edgerun._native: what Python calls in C++. Each python_*.cpp registers its own part.
#include <pybind11/pybind11.h>

void register_block_loader(pybind11::module_& module);
void register_embedding(pybind11::module_& module);
void register_ops(pybind11::module_& module);
void register_rms_norm(pybind11::module_& module);
void register_sessions(pybind11::module_& module);
void register_video(pybind11::module_& module);

PYBIND11_MODULE(_native, module) {
  module.doc() = "edgerun's native part";
  register_block_loader(module);
  register_embedding(module);
  register_ops(module);
  register_rms_norm(module);
  register_sessions(module);
  register_video(module);
}
