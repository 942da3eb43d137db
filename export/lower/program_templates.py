"""Programs that differ in their weights alone: the first is lowered, the others are written from its file.

The blocks of a deep model are the same graph again and again, and to lower a graph takes many times as long as to write
its weights. So the first program of a graph is lowered with random weights, no two alike. Where these bytes, as they
are or with their dimensions in another order, lie in the file is where any program's own weights belong. Weights also
have names there, their SHA-256, which are replaced too. A tensor that is not found is one that lowering computed with:
it stays as the first program has it, and only programs with an equal one share the file.

Two programs are of one graph when torch.export wrote the same code, shapes and names for both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.export.exported_program import ExportedProgram

from edgerun.export.lower.executorch import LoweredProgram, lower, own_storage

_ALIGNMENT = 16  # of every weight in a file, in bytes
_NAME = re.compile(rb"[0-9a-f]{64}")

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in a file a tensor's bytes are, in which order of its dimensions, and where their SHA-256."""

    offsets: tuple[int, ...]
    order: tuple[int, ...]
    names: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Template:
    """A written program. fixed: the tensors that any other program of its file must have too."""

    path: pathlib.Path
    lowered: LoweredProgram
    places: dict[str, _Place]
    fixed: Tensors


class ProgramTemplates:
    """Writes programs, and knows those that it has written, whose files must stay meanwhile."""

    def __init__(self) -> None:
        self._templates: dict[str, _Template] = {}

    def lower(
        self, export: Callable[[], ExportedProgram], path: pathlib.Path, constant_methods: dict[str, Any]
    ) -> LoweredProgram:
        """Write what `export` gives as edgerun.export.lower.executorch.lower does, to the byte. It is called once, and
        once more where weights of the first program of a graph are not found in its file."""
        program = export()
        tensors = _tensors(program)
        graph = _graph_text(program, constant_methods)
        template = self._templates.get(graph)
        if template is None:
            template = self._templates[graph] = _make(program, export, path, constant_methods)
        elif not all(torch.equal(tensors[name], value) for name, value in template.fixed.items()):
            return lower(program, path, constant_methods)
        else:
            shutil.copyfile(template.path, path)
        _fill(path, template.places, tensors)
        return template.lowered


def _make(
    program: ExportedProgram,
    export: Callable[[], ExportedProgram],
    path: pathlib.Path,
    constant_methods: dict[str, Any],
) -> _Template:
    """Write the program to `path`, with random weights that are found there."""
    generator = torch.Generator().manual_seed(0)
    tensors = _tensors(program)
    random = {name: _random(tensor, generator) for name, tensor in tensors.items() if _can_be_told(tensor)}
    while True:
        _put(program, random)
        lowered = lower(program, path, constant_methods)
        places = _places(path, random)
        if len(places) == len(random):
            fixed = {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in places}
            return _Template(path, lowered, places, fixed)
        random = {name: random[name] for name in places}
        program = export()


def _tensors(program: ExportedProgram) -> Tensors:
    """What may be a weight, by name."""
    own_storage(program)
    return {**program.state_dict, **_float_constants(program)}


def _put(program: ExportedProgram, tensors: Tensors) -> None:
    """Give the program these tensors; others it keeps."""
    for own in (program.state_dict, program.constants):
        for name in own.keys() & tensors.keys():
            is_parameter = isinstance(own[name], torch.nn.Parameter)
            own[name] = torch.nn.Parameter(tensors[name], False) if is_parameter else tensors[name]


def _graph_text(program: ExportedProgram, constant_methods: dict[str, Any]) -> str:
    """The same for two programs where they differ in their tensors' values alone."""
    shapes = [
        (node.name, [(str(value.dtype), str(value.shape)) for value in _values(node)]) for node in program.graph.nodes
    ]
    constants = {name: value for name, value in program.constants.items() if name not in _float_constants(program)}
    parts = (program.graph_module.code, program.graph_signature, program.range_constraints, shapes, constant_methods)
    text = "\n".join(str(part) for part in parts) + "\n".join(_exact_text(*item) for item in constants.items())
    return hashlib.sha256(text.encode()).hexdigest()


def _values(node: torch.fx.Node) -> Iterator[torch.Tensor]:
    value = node.meta.get("val")
    yield from (one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, torch.Tensor))


def _exact_text(name: str, constant: Any) -> str:
    return f"{name} {constant.tolist() if isinstance(constant, torch.Tensor) else constant}"


def _float_constants(program: ExportedProgram) -> Tensors:
    """Constants that are weights in all but name; those of integers decide what a graph does."""
    return {
        name: value
        for name, value in program.constants.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def _can_be_told(tensor: torch.Tensor) -> bool:
    """From whatever else is in a file. Integers that are all the same, such as zero points, are no weights."""
    if tensor.nbytes < _ALIGNMENT or not (tensor.is_floating_point() or tensor.dtype == torch.int8):
        return False
    return tensor.is_floating_point() or bool((tensor != tensor.flatten()[0]).any())


def _random(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of the tensor's shape and dtype; positive, as scales must be."""
    if tensor.dtype == torch.int8:
        return torch.randint(-127, 128, tensor.shape, generator=generator, dtype=torch.int8)
    return torch.rand(tensor.shape, generator=generator, dtype=torch.float32).add_(0.5).to(tensor.dtype)


def _places(path: pathlib.Path, tensors: Tensors) -> dict[str, _Place]:
    """Of those tensors whose bytes are found in the file."""
    file = np.memmap(path, np.uint8, "r")
    starts = file[: file.size // _ALIGNMENT * _ALIGNMENT].view(np.uint64)[:: _ALIGNMENT // 8]
    found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        for order in itertools.permutations(range(tensor.ndim)):
            data = _bytes(tensor, order)
            at = np.flatnonzero(starts == data[:8].view(np.uint64)[0]) * _ALIGNMENT
            offsets = tuple(int(one) for one in at if np.array_equal(file[one : one + data.size], data))
            if offsets:
                found[name] = offsets, order
                break
    named = _names(file, [(at, at + tensors[name].nbytes) for name, (offsets, _) in found.items() for at in offsets])
    digests = {
        name: hashlib.sha256(memoryview(_bytes(tensors[name], order))).hexdigest() for name, (_, order) in found.items()
    }
    return {
        name: _Place(offsets, order, tuple(named.get(digests[name], ()))) for name, (offsets, order) in found.items()
    }


def _names(file: np.ndarray, weights: list[tuple[int, int]]) -> dict[str, list[int]]:
    """Where which SHA-256 is written in hexadecimal digits outside the weights' ranges."""
    found: dict[str, list[int]] = {}
    begin = 0
    for first, end in [*sorted(weights), (file.size, file.size)]:
        for match in _NAME.finditer(file[begin:first].tobytes()):
            found.setdefault(match[0].decode(), []).append(begin + match.start())
        begin = max(begin, end)
    return found


def _fill(path: pathlib.Path, places: dict[str, _Place], tensors: Tensors) -> None:
    """Put the tensors and their names in their places."""
    with path.open("r+b") as file:
        for key, place in places.items():
            data = memoryview(_bytes(tensors[key], place.order))
            name = hashlib.sha256(data).hexdigest().encode() if place.names else b""
            for offsets, content in ((place.offsets, data), (place.names, name)):
                for offset in offsets:
                    file.seek(offset)
                    file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: torch.Tensor, order: tuple[int, ...]) -> Any:
    """The tensor's bytes, its dimensions in this order."""
    return tensor.detach().permute(order).contiguous().flatten().view(torch.uint8).numpy()
