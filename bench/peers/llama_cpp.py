"""llama.cpp's attention on the CPU (ggml), as its graphs build it: micro-batches of 512 over a growing float32 cache.

`NAME` is the path without flash attention: two matrix products with a masked softmax between them, values kept
transposed. llama_cpp_flash.py is the other. The library comes from a wheel of PyPI that others build for AVX2
(llama-cpp-cffi; of April 2025) and is called through ggml's C functions. Not a dependency: install it to measure it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator

import torch

from bench.peers.interface import AttentionCase, Prepared
from edgerun.errors import EdgerunError

NAME = "llama.cpp"
MICRO_BATCH = 512  # llama.cpp's n_ubatch
_FLOAT, _HALF = 0, 1  # enum ggml_type
_MASK_ROWS = 64  # ggml wants masks of a multiple of these
_OVERHEAD_BYTES = 1 << 22  # of a ggml context: tensors' headers and graphs


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


Function = Callable[..., int]  # a C function; pointers are integers


@functools.cache
def library() -> ctypes.CDLL:
    """ggml. Raises EdgerunError, with the way to get it, where it is not installed."""
    found = importlib.util.find_spec("llama")
    folders = list(found.submodule_search_locations or []) if found is not None else []
    files = [file for folder in folders for file in pathlib.Path(folder).glob("_llama_cpp_cpu*.so")]
    if not files:
        raise EdgerunError("llama.cpp is not here: `pip install --no-deps llama-cpp-cffi==0.4.42`, or drop the peer")
    # Bound lazily, which ctypes itself cannot: the wheel names a function of a newer C++ library that is never called.
    open_library = ctypes.CDLL(None).dlopen
    open_library.restype, open_library.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
    handle = open_library(str(files[0]).encode(), os.RTLD_LAZY | os.RTLD_LOCAL)
    if not handle:
        raise EdgerunError(f"{files[0]} does not load on this system: leave the peer out")
    return ctypes.CDLL(str(files[0]), handle=handle)


def function(name: str, result: type | None, *arguments: type) -> Function:
    """A C function of ggml with its types."""
    found = getattr(library(), name)
    found.restype, found.argtypes = result, list(arguments)
    typed: Function = found
    return typed


class Graphs:
    """A case inside a ggml context: its tensors, and one graph per micro-batch."""

    def __init__(self, case: AttentionCase, threads: int, *, flash: bool) -> None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        self._case, self._flash = case, flash
        self._new = function("ggml_new_tensor_3d", pointer, pointer, ctypes.c_int, number, number, number)
        self._view = function("ggml_view_3d", pointer, pointer, pointer, number, number, number, size, size, size)
        self._data = function("ggml_get_data", pointer, pointer)
        parts = list(self._parts())
        floats = sum(t.numel() for t in (case.query, case.key, case.value)) + 2 * case.query.numel()
        scores = 0 if flash else 2 * sum((stop - start) * stop for start, stop in parts) * case.query_heads
        masks = sum((stop - start + _MASK_ROWS) * stop for start, stop in parts)
        memory = 4 * (floats + scores) + 2 * masks + _OVERHEAD_BYTES * (len(parts) + 1)
        self._context = function("ggml_init", pointer, _InitParams)(_InitParams(memory, None, False))
        if not self._context:
            raise EdgerunError(f"ggml gets no {memory / 2**30:.1f} GiB for {case.length} tokens: shorten the sequence")
        self._query = self._filled(case.query[0])
        # Flash attention takes half-precision caches only, llama.cpp's default for both.
        self._key = self._filled(case.key[0].half() if flash else case.key[0])
        self._value = self._filled(case.value[0].half() if flash else case.value[0].transpose(1, 2))
        self._outputs: list[tuple[int, int, int]] = []  # (first row, rows, tensor)
        self._graphs = [self._graph(start, stop) for start, stop in parts]
        self._backend = function("ggml_backend_cpu_init", pointer)()
        function("ggml_backend_cpu_set_n_threads", None, pointer, ctypes.c_int)(self._backend, threads)
        self._compute = function("ggml_backend_graph_compute", ctypes.c_int, pointer, pointer)

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            function("ggml_free", None, ctypes.c_void_p)(self._context)
        if getattr(self, "_backend", None):
            function("ggml_backend_free", None, ctypes.c_void_p)(self._backend)

    def run(self) -> Graphs:
        """All micro-batches, in order."""
        for graph in self._graphs:
            if status := self._compute(self._backend, graph):
                raise EdgerunError(f"ggml ended with status {status}")
        return self

    def answer(self) -> torch.Tensor:
        """[1, S, Hq, D]."""
        heads, depth = self._case.query_heads, self._case.head_dim
        out = torch.empty(1, self._case.length, heads, depth)
        for start, rows, tensor in self._outputs:
            ctypes.memmove(out[0, start].data_ptr(), self._data(tensor), 4 * rows * heads * depth)
        return out

    def _parts(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self._case.length, MICRO_BATCH):
            yield start, min(start + MICRO_BATCH, self._case.length)

    def _filled(self, tensor: torch.Tensor) -> int:
        """A new ggml tensor, sizes innermost first, with the values of a torch tensor of three dimensions."""
        tensor = tensor.contiguous()
        kind = _HALF if tensor.dtype == torch.float16 else _FLOAT
        made = self._new(self._context, kind, *reversed(tensor.shape))
        ctypes.memmove(self._data(made), tensor.data_ptr(), tensor.numel() * tensor.element_size())
        return made

    def _graph(self, start: int, stop: int) -> int:
        """The graph of one micro-batch: rows [start, stop) over keys [0, stop)."""
        pointer, real = ctypes.c_void_p, ctypes.c_float
        case, context, depth, rows = self._case, self._context, self._case.head_dim, stop - start
        whole, row = 4 * depth * case.length, 4 * depth
        query = self._view(context, self._query, depth, rows, case.query_heads, row, whole, row * start)
        if self._flash:
            whole, row = whole // 2, row // 2
        key = self._view(context, self._key, depth, stop, case.kv_heads, row, whole, 0)
        visible = torch.arange(stop)[None, :] <= torch.arange(start, stop)[:, None]
        mask = torch.zeros(1, -(-rows // _MASK_ROWS) * _MASK_ROWS, stop, dtype=torch.float16)
        mask[0, :rows].masked_fill_(~visible, float("-inf"))
        mask_tensor = self._filled(mask)
        product = function("ggml_mul_mat", pointer, pointer, pointer, pointer)
        if self._flash:
            value = self._view(context, self._value, depth, stop, case.kv_heads, row, whole, 0)
            attention = function("ggml_flash_attn_ext", pointer, *(pointer,) * 5, real, real, real)
            result = attention(context, query, key, value, mask_tensor, case.scale, 0.0, 0.0)
        else:
            value = self._view(context, self._value, stop, depth, case.kv_heads, 4 * case.length, whole, 0)
            soften = function("ggml_soft_max_ext", pointer, *(pointer,) * 3, real, real)
            weights = soften(context, product(context, key, query), mask_tensor, case.scale, 0.0)
            permute = function("ggml_permute", pointer, pointer, pointer, *(ctypes.c_int,) * 4)
            turned = permute(context, product(context, value, weights), 0, 2, 1, 3)
            result = function("ggml_cont", pointer, pointer, pointer)(context, turned)
        self._outputs.append((start, rows, result))
        graph = function("ggml_new_graph", pointer, pointer)(context)
        function("ggml_build_forward_expand", None, pointer, pointer)(graph, result)
        return graph


def prepare(case: AttentionCase, threads: int) -> Prepared:
    """Without flash attention."""
    return prepared(case, threads, flash=False)


def prepared(case: AttentionCase, threads: int, *, flash: bool) -> Prepared:
    """Either path. Raises EdgerunError where the library is not installed."""
    graphs = Graphs(case, threads, flash=flash)
    return Prepared(graphs.run, lambda _: graphs.answer())
