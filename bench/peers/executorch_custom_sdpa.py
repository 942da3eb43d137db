"""ExecuTorch's own attention op, torch.ops.llama.custom_sdpa, float32: what its llama export puts into a .pte.

Keys and values lie as in its cache, [1, S, Hkv, D], and so does the query; grouped heads are native. It runs on
ExecuTorch's thread pool, which is set for the whole process.
"""

from __future__ import annotations

import warnings
from typing import cast

import torch

from bench.peers.interface import AttentionCase, Prepared

NAME = "ExecuTorch custom_sdpa"


def prepare(case: AttentionCase, threads: int) -> Prepared:
    """The op over a cache that holds exactly the case's tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "experimental", at every import
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the op)
        from executorch.extension.pybindings import portable_lib
    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    query, key, value = (tensor.transpose(1, 2).contiguous() for tensor in (case.query, case.key, case.value))

    def run() -> torch.Tensor:
        result: torch.Tensor = torch.ops.llama.custom_sdpa(query, key, value, 0, None, 0.0, True, case.scale)
        return result

    return Prepared(run, lambda result: cast(torch.Tensor, result))
