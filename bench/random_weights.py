"""Random weights as a safetensors file, written a few rows at a time: gigabytes of them take no memory to speak of."""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import IO

import torch

_ROWS_AT_ONCE = 4096
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Shape = tuple[int, ...]
# Mean and standard deviation of a tensor, by its name and shape; or the tensor itself.
Filling = Callable[[str, Shape], tuple[float, float] | torch.Tensor]


def write_random_weights(
    path: pathlib.Path, tensors: Mapping[str, Shape], filling: Filling, dtype: torch.dtype, seed: int = 0
) -> int:
    """Write the tensors to `path` in their order, whole or not at all; returns the file's bytes."""
    generator = torch.Generator().manual_seed(seed)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        _write_header(file, tensors, dtype)
        for name, shape in tensors.items():
            filled = filling(name, shape)
            for start in range(0, shape[0], _ROWS_AT_ONCE):
                rows = (min(_ROWS_AT_ONCE, shape[0] - start), *shape[1:])
                if isinstance(filled, torch.Tensor):
                    values = filled[start : start + rows[0]]
                else:
                    mean, deviation = filled
                    values = torch.full(rows, mean)
                    if deviation > 0:
                        values += torch.randn(rows, generator=generator) * deviation
                file.write(values.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
    unfinished.rename(path)
    return path.stat().st_size


def _write_header(file: IO[bytes], tensors: Mapping[str, Shape], dtype: torch.dtype) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in tensors.items():
        end = start + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
