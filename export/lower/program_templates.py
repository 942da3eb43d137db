"""Programs that differ in their weights alone: the first is lowered, the others are written from its file.

The blocks of a deep model are the same graph again and again, and to lower a graph takes many times as long as to write
its weights. So the first program of a graph is lowered with random weights, no two alike. Where these bytes, as they
are or with their dimensions in another order, lie in the file is where any program's own weights belong. Weights also
have names there, their SHA-256, which are replaced too. A tensor that is not found is one that lowering computed with:
it stays as the first program has it, and only programs with an equal one share the file. A name that is no tensor's is
that of something computed: such a graph's programs are all lowered.

Two programs are of one graph when torch.export wrote the same code, shapes, strides and names for both, and the same of
their weights are equal to each other, which a file holds once. A module that differs from an earlier one only in its
tensors' values is not traced again.
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
from edgerun.export.lower.module_fingerprint import fingerprint

_ALIGNMENT = 16  # of every weight in a file, in bytes
_NAME = re.compile(rb"[0-9a-f]{64}")

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in a file a tensor's bytes are, in which order of its dimensions, and where their SHA-256."""

    tensor: str
    offsets: tuple[int, ...]
    order: tuple[int, ...]
    names: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Template:
    """A written program. fixed: the tensors that any other program of its file must have too."""

    path: pathlib.Path
    lowered: LoweredProgram
    places: list[_Place]
    fixed: Tensors


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A program of a module. tensors: its weights' names; of those that stand in the module's code, themselves."""

    template: _Template
    tensors: dict[str, torch.Tensor | None]
    equal: list[list[str]]  # see _equal_names


class ProgramTemplates:
    """Writes programs, and knows those that it has written, whose files must stay meanwhile."""

    def __init__(self) -> None:
        self._templates: dict[str, _Template | None] = {}  # None: all programs of the graph are lowered
        self._traced: dict[str, _Traced] = {}

    def lower(
        self,
        make_program: Callable[[], ExportedProgram],
        path: pathlib.Path,
        constant_methods: dict[str, Any],
        module: torch.nn.Module | None = None,
        traced_with: str = "",
    ) -> LoweredProgram:
        """Write a program as edgerun.export.lower.executorch.lower does, to the byte.

        make_program: the same program every time; called again where lowering it has to be repeated.
        module, traced_with: what it is traced from, and the text of all else that decides what the trace gives, such as
        the arguments' shapes. They may save the trace: a module's code cannot see the values of its tensors then.
        """
        known = None
        if module is not None and (own := fingerprint(module)) is not None:
            tensors = _module_tensors(module)
            integers = [_exact_text(name, tensors[name]) for name in sorted(_integer_constants(module, tensors))]
            known = _sha256(own, traced_with, str(constant_methods), *integers)
            if (traced := self._traced.get(known)) is not None:
                wanted = {name: tensors[name] if value is None else value for name, value in traced.tensors.items()}
                if _equal_names(wanted) == traced.equal and _fits(traced.template, wanted):
                    shutil.copyfile(traced.template.path, path)
                    _fill(path, traced.template.places, wanted)
                    return traced.template.lowered
        return self._lower(make_program, path, constant_methods, known, module)

    def _lower(
        self,
        make_program: Callable[[], ExportedProgram],
        path: pathlib.Path,
        constant_methods: dict[str, Any],
        known: str | None,
        module: torch.nn.Module | None,
    ) -> LoweredProgram:
        program = make_program()
        tensors = _tensors(program)
        graph = _graph_text(program, tensors, constant_methods)
        if graph not in self._templates:
            template = self._templates[graph] = _make(program, tensors, make_program, path, constant_methods)
            program = make_program() if template is None else program
        else:
            template = self._templates[graph]
            if template is not None and not _fits(template, tensors):
                template = None
            if template is not None:
                shutil.copyfile(template.path, path)
        if template is None:
            return lower(program, path, constant_methods)
        _fill(path, template.places, tensors)
        if known is not None and module is not None:
            own, written = _module_tensors(module), program.constants.keys() - program.state_dict.keys()
            if tensors.keys() <= own.keys() | written:
                kept = {name: None if name in own else tensor for name, tensor in tensors.items()}
                self._traced[known] = _Traced(template, kept, _equal_names(tensors))
        return template.lowered


def _module_tensors(module: torch.nn.Module) -> Tensors:
    """By the names that torch.export has for them."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def _integer_constants(module: torch.nn.Module, tensors: Tensors) -> set[str]:
    """The names of what torch.export holds for a constant, not a weight, and decides by: see _float_constants."""
    kept = module.state_dict().keys()
    return {name for name, tensor in tensors.items() if name not in kept and not tensor.is_floating_point()}


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _fits(template: _Template, tensors: Tensors) -> bool:
    return all(torch.equal(tensors[name], value) for name, value in template.fixed.items())


def _make(
    program: ExportedProgram,
    tensors: Tensors,
    make_program: Callable[[], ExportedProgram],
    path: pathlib.Path,
    constant_methods: dict[str, Any],
) -> _Template | None:
    """Write the program to `path`, with random weights that are found there. None: it has what was computed."""
    random = _random({name: tensor for name, tensor in tensors.items() if _can_be_told(tensor)})
    while True:
        _put(program, random)
        lowered = lower(program, path, constant_methods)
        places, unknown = _places(path, random, tensors)
        found = {place.tensor for place in places}
        if len(found) == len(random):
            fixed = {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in found}
            stated = _NAME.findall(str(constant_methods).encode())  # the build is one of that form
            computed = unknown - {name.decode() for name in stated}
            return None if computed else _Template(path, lowered, places, fixed)
        random = {name: random[name] for name in found}
        program = make_program()


def _tensors(program: ExportedProgram) -> Tensors:
    """What may be a weight and is used, by name."""
    own_storage(program)
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    named |= signature.inputs_to_lifted_tensor_constants
    placeholders = program.graph.find_nodes(op="placeholder")
    used = {named[node.name] for node in placeholders if node.name in named and node.users}
    every = {**program.state_dict, **_float_constants(program)}
    return {name: tensor for name, tensor in every.items() if name in used}


def _put(program: ExportedProgram, tensors: Tensors) -> None:
    """Give the program these tensors; others it keeps."""
    for own in (program.state_dict, program.constants):
        for name in own.keys() & tensors.keys():
            is_parameter = isinstance(own[name], torch.nn.Parameter)
            own[name] = torch.nn.Parameter(tensors[name], False) if is_parameter else tensors[name]


def _graph_text(program: ExportedProgram, tensors: Tensors, constant_methods: dict[str, Any]) -> str:
    """The same for two programs where they differ in their tensors' values alone."""
    modules = [one for one in program.graph_module.modules() if isinstance(one, torch.fx.GraphModule)]
    code = [module.code for module in modules]
    shapes = [
        (node.name, [(str(value.dtype), str(value.shape), str(value.stride())) for value in _values(node)])
        for module in modules
        for node in module.graph.nodes
    ]
    constants = {name: value for name, value in program.constants.items() if name not in _float_constants(program)}
    equal = _equal_names(tensors)
    parts = (code, program.graph_signature, program.range_constraints, shapes, equal, constant_methods)
    return _sha256(*map(str, parts), *(_exact_text(*item) for item in constants.items()))


def _equal_names(tensors: Tensors) -> list[list[str]]:
    """The names of those that are equal to each other."""
    return sorted(names for names in _equal_groups(tensors).values() if len(names) > 1)


def _equal_groups(tensors: Tensors) -> dict[str, list[str]]:
    """Names of tensors with the same bytes."""
    groups: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(_digest(tensor), []).append(name)
    return groups


def _digest(tensor: torch.Tensor, order: tuple[int, ...] | None = None) -> str:
    return hashlib.sha256(memoryview(_bytes(tensor, order or tuple(range(tensor.ndim))))).hexdigest()


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


def _random(tensors: Tensors) -> Tensors:
    """Of the tensors' shapes, strides and dtypes, positive as scales must be; equal where the tensors are equal."""
    generator = torch.Generator().manual_seed(0)
    found: Tensors = {}
    for names in _equal_groups(tensors).values():
        first = tensors[names[0]]
        if first.dtype == torch.int8:
            values = torch.randint(-127, 128, (first.numel(),), generator=generator, dtype=torch.int8)
        else:
            values = torch.rand(first.numel(), generator=generator).add_(0.5).to(first.dtype)
        for name in names:
            other = torch.empty_strided(tensors[name].shape, tensors[name].stride(), dtype=tensors[name].dtype)
            data = values.view(torch.uint8).view(tensors[name].dtype)
            found[name] = other.copy_(data.view(tensors[name].shape))
    return found


def _places(path: pathlib.Path, random: Tensors, tensors: Tensors) -> tuple[list[_Place], set[str]]:
    """Where the random tensors are in the file, and the names in it of what is neither these nor another tensor."""
    file = np.memmap(path, np.uint8, "r")
    starts = file[: file.size // _ALIGNMENT * _ALIGNMENT].view(np.uint64)[:: _ALIGNMENT // 8]
    found: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for name, tensor in random.items():
        known: set[int] = set()  # other orders that are the same bytes
        for order in itertools.permutations(range(tensor.ndim)):
            data = _bytes(tensor, order)
            at = np.flatnonzero(starts == data[:8].view(np.uint64)[0]) * _ALIGNMENT
            offsets = tuple(int(one) for one in at if np.array_equal(file[one : one + data.size], data))
            if known.isdisjoint(offsets) and offsets:
                found.append((name, offsets, order))
            known.update(offsets)
    named = _names(file, [(at, at + random[name].nbytes) for name, offsets, _ in found for at in offsets])
    digests = {(name, order): _digest(random[name], order) for name, _, order in found}
    fixed = {
        _digest(tensor, order)
        for name, tensor in tensors.items()
        if name not in random
        for order in itertools.permutations(range(tensor.ndim))
    }
    places = [
        _Place(name, offsets, order, tuple(named.get(digests[name, order], ()))) for name, offsets, order in found
    ]
    return places, named.keys() - set(digests.values()) - fixed


def _names(file: np.ndarray, weights: list[tuple[int, int]]) -> dict[str, list[int]]:
    """Where which SHA-256 is written in hexadecimal digits outside the weights' ranges."""
    found: dict[str, list[int]] = {}
    begin = 0
    for first, end in [*sorted(weights), (file.size, file.size)]:
        for match in _NAME.finditer(file[begin:first].tobytes()):
            found.setdefault(match[0].decode(), []).append(begin + match.start())
        begin = max(begin, end)
    return found


def _fill(path: pathlib.Path, places: list[_Place], tensors: Tensors) -> None:
    """Put the tensors and their names in their places."""
    with path.open("r+b") as file:
        for place in places:
            data = memoryview(_bytes(tensors[place.tensor], place.order))
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
