"""One program, one prompt, one fresh process: time to the first token, time per token after it, peak memory.

    python bench/workloads/first_token_child.py REQUEST.json       writes the request's `answer` and `logits` files

Both sides import the same libraries and go through the same loop: slices of the prompt one after the other, the largest
logit, then one token at a time. So what differs is the program and the runtime under it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

Forward = Callable[[list[int], int], np.ndarray]  # (tokens, input_pos) -> logits of the last, float32 [vocab]


@dataclasses.dataclass(frozen=True)
class Request:
    """What one child does."""

    side: str  # "edgerun": program is a bundle's folder; "peer": a .pte on ExecuTorch's own ops
    program: str
    prompt: tuple[int, ...]
    prefill_slice: int
    new_tokens: int
    threads: int
    logits: str  # .npy, of the prompt's last token


def measure(request: Request) -> dict[str, Any]:
    """Load, prefill and decode once."""
    _import_everything()
    start_bytes = _reset_peak()
    begin = time.perf_counter()
    forward, threads = _OPENERS[request.side](request)
    forward([request.prompt[0]], 0)  # what a runtime leaves to its first call belongs to loading; position 0 drops it
    loaded, cpu_loaded = time.perf_counter(), time.process_time()
    logits = np.zeros(0, dtype=np.float32)
    for position in range(0, len(request.prompt), request.prefill_slice):
        logits = forward(list(request.prompt[position : position + request.prefill_slice]), position)
    token = int(logits.argmax())
    first = time.perf_counter()
    cpu_first = time.process_time() - cpu_loaded
    kept = logits.copy()
    steps = []
    for step in range(request.new_tokens - 1):
        before = time.perf_counter()
        token = int(forward([token], len(request.prompt) + step).argmax())
        steps.append((time.perf_counter() - before) * 1e3)
    peak_bytes = _status_bytes("VmHWM")
    np.save(request.logits, kept)
    return {
        "load_seconds": loaded - begin,
        "first_token_seconds": first - loaded,
        "first_token_cpu_seconds": cpu_first,
        "decode_ms_per_token": statistics.median(steps) if steps else None,
        "decode_ms": steps,
        "rss_before_load_bytes": start_bytes,
        "peak_rss_bytes": peak_bytes,
        "peak_over_start_bytes": peak_bytes - start_bytes,
        "threads": threads,
        "load_average": os.getloadavg()[0],
    }


def _import_everything() -> None:
    """What either side needs, in both: then neither's memory holds a library that the other's does not."""
    warnings.simplefilter("ignore")
    import executorch.extension.llm
    import torch
    from executorch.extension.pybindings import portable_lib  # noqa: F401

    import edgerun.sessions.text  # noqa: F401
    from edgerun.ops.native import native_module

    native_module()
    import executorch.kernels.quantized

    folder = pathlib.Path(executorch.extension.llm.__path__[0]) / "custom_ops"
    torch.ops.load_library(str(next(folder.glob("libcustom_ops_aot_lib.*"))))
    torch.set_num_threads(1)  # it only wraps tensors here


def _open_edgerun(request: Request) -> tuple[Forward, int]:
    from edgerun.sessions.text import TextSession

    session = TextSession(pathlib.Path(request.program), threads=request.threads, verify=False)
    return session.forward, session.threads


def _open_peer(request: Request) -> tuple[Forward, int]:
    import torch
    from executorch.extension.pybindings import portable_lib

    if portable_lib._threadpool_get_thread_count() != request.threads:
        portable_lib._unsafe_reset_threadpool(request.threads)
    module = portable_lib._load_for_executorch(request.program)

    def forward(tokens: list[int], input_pos: int) -> np.ndarray:
        logits = module.forward((torch.tensor([tokens]), torch.tensor([input_pos])), clone_outputs=False)[0]
        values: np.ndarray = logits[0].numpy()
        return values

    return forward, portable_lib._threadpool_get_thread_count()


_OPENERS: dict[str, Callable[[Request], tuple[Forward, int]]] = {"edgerun": _open_edgerun, "peer": _open_peer}


def _reset_peak() -> int:
    """Start VmHWM anew from what is resident now, and return that: bytes."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def main() -> None:
    values = json.loads(pathlib.Path(sys.argv[1]).read_text())
    answer = pathlib.Path(values.pop("answer"))
    measured = measure(Request(**{**values, "prompt": tuple(values["prompt"])}))
    answer.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
