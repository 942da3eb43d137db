"""TensorFiles: the tensors of a folder's safetensors files, one file or shards, each read when it is asked for.

Opening reads the headers, never the weights.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch

from edgerun.errors import CheckpointError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_COMPARED_BYTES = 1 << 23


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: file, dtype, shape and its bytes within the file."""

    file: pathlib.Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the file's beginning
    end: int


class TensorFiles:
    """The tensors of one folder by name."""

    def __init__(self, folder: pathlib.Path, entries: Mapping[str, TensorEntry]) -> None:
        self.folder = folder
        self.entries = entries

    @staticmethod
    def open(folder: pathlib.Path) -> TensorFiles:
        """model.safetensors of `folder`, or the shards that model.safetensors.index.json names.

        Raises CheckpointError when a file is missing or damaged.
        """
        return TensorFiles(folder, tensor_entries(folder))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError unless every tensor of `shapes` is there with its shape."""
        for name, shape in shapes.items():
            entry = self.entries.get(name)
            if entry is None:
                raise CheckpointError(f"tensor {name!r} is missing from {self.folder}: fetch the checkpoint again")
            if entry.shape != shape:
                raise CheckpointError(
                    f"tensor {name!r} of {entry.file} has shape {list(entry.shape)}, its config.json says {list(shape)}"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        """Tensor `name` in its stored dtype, in memory of its own. Raises CheckpointError for a file that was cut."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        bytes_of_it = tensor.reshape(-1).view(torch.uint8).numpy().data
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < len(bytes_of_it):
                count = file.readinto(bytes_of_it[done:])
                if not count:
                    raise CheckpointError(f"{entry.file} ends inside of tensor {name!r}: fetch the checkpoint again")
                done += count
        return tensor

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are stored alike, to the bit."""
        one, other = self.entries[first], self.entries[second]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        with one.file.open("rb") as left, other.file.open("rb") as right:
            left.seek(one.start)
            right.seek(other.start)
            for start in range(one.start, one.end, _COMPARED_BYTES):
                count = min(_COMPARED_BYTES, one.end - start)
                if left.read(count) != right.read(count):
                    return False
        return True


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when it is missing or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: pass a local Hugging Face checkpoint folder"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): fetch the checkpoint again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, not a JSON object: fetch the checkpoint again")
    return values


def tensor_entries(folder: pathlib.Path) -> dict[str, TensorEntry]:
    """Where every tensor of `folder` lies, by name. Raises CheckpointError when a file is missing or damaged."""
    index_file = folder / _INDEX
    if not index_file.is_file():
        if not (folder / _SINGLE).is_file():
            raise CheckpointError(
                f"{folder} has neither {_SINGLE} nor {_INDEX}: edgerun reads safetensors only; "
                "convert with model.save_pretrained(folder)"
            )
        return _read_header(folder / _SINGLE)
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file} has no weight_map: fetch the checkpoint again")
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if pathlib.PurePath(shard).name != shard:
            raise CheckpointError(f"{index_file} names {shard!r}, which is not a file of the folder itself")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{shard} is missing from {folder}, though {_INDEX} names it: fetch it again")
        entries |= _read_header(folder / shard)
    missing = sorted(set(weight_map) - set(entries))
    if missing:
        raise CheckpointError(
            f"{index_file.name} names tensor {missing[0]!r}, which {weight_map[missing[0]]} does not hold "
            f"({len(missing)} in all): fetch the checkpoint again"
        )
    return entries


def _read_header(path: pathlib.Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file: 8 bytes of header length, the header as JSON, then the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path} is truncated: {size} bytes cannot hold its header of {length} bytes; fetch it again"
            )
        try:
            header = json.loads(file.read(length))
            entries = {
                name: TensorEntry(
                    file=path,
                    dtype=_DTYPES[value["dtype"]],
                    shape=tuple(value["shape"]),
                    start=8 + length + value["data_offsets"][0],
                    end=8 + length + value["data_offsets"][1],
                )
                for name, value in header.items()
                if name != "__metadata__"
            }
        except KeyError as error:
            raise CheckpointError(
                f"{path} has a header without, or with an unsupported value for, {error}: edgerun reads "
                f"tensors of {', '.join(_DTYPES)}"
            ) from None
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} has a damaged header ({error}): fetch it again") from None
    needed = max((entry.end for entry in entries.values()), default=8 + length)
    if size < needed:
        raise CheckpointError(f"{path} is truncated: it has {size} of {needed} bytes; fetch it again")
    for name, entry in entries.items():
        elements = torch.Size(entry.shape).numel()
        if entry.start < 8 + length or entry.end - entry.start != elements * entry.dtype.itemsize:
            raise CheckpointError(
                f"{path} has a damaged header: tensor {name!r} does not fit its bytes; fetch it again"
            )
    return entries
