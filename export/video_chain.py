"""A chain of a video model becomes programs: each block is written, loaded again and held against its module."""

from __future__ import annotations

import contextlib
import functools
import gc
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from edgerun import compare
from edgerun.checkpoint import Progress
from edgerun.errors import ParityError
from edgerun.export.lower.executorch import TARGET
from edgerun.export.lower.program_templates import ProgramTemplates
from edgerun.export.video_blocks import Block, Geometry, open_dimensions
from edgerun.ops.native import native_module
from edgerun.video_recipe import VideoRecipe

_TOLERANCE = "logits_fp32"  # a block is tens of layers deep
_QUANTIZED_TOLERANCE = "quantized_parity_logits"


@contextlib.contextmanager
def fewer_objects_to_collect() -> Iterator[None]:
    """Garbage is looked for after every block, among the objects of the export alone: not in all that was imported."""
    import executorch.backends.xnnpack
    import executorch.exir  # noqa: F401

    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def export_chain(
    blocks: Iterator[Block],
    values: dict[str, torch.Tensor],
    geometry: Geometry,
    recipe: VideoRecipe,
    build: str,
    folder: pathlib.Path,
    chain: str,
    progress: Progress | None = None,
) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """Each block's entry in the manifest and its errors; `values` go through the chain as they would on a device.

    Errors are relative L2. parity: of the program against its module. quantization: of a module that was quantised
    against the same module in float32.
    """
    templates = ProgramTemplates()
    for index, block in enumerate(blocks):
        if progress is not None:
            progress(f"export {chain.replace('_', ' ')}: {block.name}", 1.0 - 0.85**index)
        file = f"programs/{block.name}.pte"
        arguments = tuple(values[name].contiguous() for name in block.inputs)
        with torch.no_grad():
            results = results_of(block, arguments)
            errors: dict[str, float] = {}
            if recipe.quantize != "none" and block.quantize():
                exact, results = results, results_of(block, arguments)
                errors["quantization"] = worst_error(results, exact)
            dynamic = _dynamic_shapes(block, arguments, geometry)
            make_program = functools.partial(
                torch.export.export, block.module, arguments, dynamic_shapes=dynamic, strict=False
            )
            shapes = f"{[(value.dtype, value.shape, value.stride()) for value in arguments]} {dynamic}"
            lowered = templates.lower(make_program, folder / file, {"edgerun_build": build}, block.module, shapes)
        errors["parity"] = worst_error(_run_program(folder / file, arguments, len(results)), results)
        if (short := _last_part(block, arguments, geometry)) is not None:
            with torch.no_grad():
                expected = results_of(block, short)
            given = _run_program(folder / file, short, len(expected))
            errors["parity"] = max(errors["parity"], worst_error(given, expected))
        check(block, errors)
        values |= dict(zip(block.outputs, results, strict=True))
        facts = {
            "name": block.name,
            "file": file,
            "target": TARGET,
            "inputs": [
                _value_facts(name, values_of, geometry) for name, values_of in zip(block.inputs, arguments, strict=True)
            ],
            "outputs": [
                _value_facts(name, value, geometry) for name, value in zip(block.outputs, results, strict=True)
            ],
            "operators": list(lowered.operators),
            "planned_bytes": lowered.planned_bytes,
            "arena_bytes": lowered.arena_bytes,
            "table_bytes": lowered.table_bytes,
        }
        yield facts, errors
        del block, make_program, lowered
        gc.collect()
    if progress is not None:
        progress(f"export {chain.replace('_', ' ')}", 1.0)


def run_chain(blocks: Iterable[Block], values: dict[str, torch.Tensor], *, quantize: bool = False) -> None:
    """Only run the modules: `values` go through the chain. quantize: in int8, where a block can be."""
    for block in blocks:
        if quantize:
            block.quantize()
        with torch.no_grad():
            results = results_of(block, tuple(values[name].contiguous() for name in block.inputs))
        values |= dict(zip(block.outputs, results, strict=True))


def _dynamic_shapes(block: Block, arguments: tuple[torch.Tensor, ...], geometry: Geometry) -> tuple[Any, ...]:
    """torch.export's description of the open dimensions of a block's inputs."""
    known: dict[str, Any] = {}

    def shape(name: str, example: torch.Tensor) -> dict[int, Any] | None:
        found = {}
        for dimension, symbol in open_dimensions(name).items():
            least, most = geometry.limits(symbol, example.shape[dimension])
            if least < most:
                found[dimension] = known.setdefault(symbol, torch.export.Dim(symbol, min=least, max=most))
        return found or None

    shapes = [shape(name, argument) for name, argument in zip(block.inputs, arguments, strict=True)]
    fixed = 3 if "merge" in block.inputs else len(shapes)  # what comes after is the module's *more
    return (*shapes[:fixed], tuple(shapes[fixed:])) if fixed < len(shapes) else tuple(shapes)


def _last_part(
    block: Block, arguments: tuple[torch.Tensor, ...], geometry: Geometry
) -> tuple[torch.Tensor, ...] | None:
    """The inputs of a block of the decoders for the clip's last chunk or call; None: it is as long as the others."""
    short = []
    for name, argument in zip(block.inputs, arguments, strict=True):
        for dimension, symbol in open_dimensions(name).items():
            if symbol in ("t", "f", "p"):
                argument = argument.narrow(dimension, 0, geometry.limits(symbol, argument.shape[dimension])[0])
        short.append(argument.contiguous())
    same = all(one.shape == other.shape for one, other in zip(short, arguments, strict=True))
    return None if same else tuple(short)


def results_of(block: Block, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What a block's module gives."""
    results = block.module(*arguments)
    return results if isinstance(results, tuple) else (results,)


def _run_program(path: pathlib.Path, arguments: tuple[torch.Tensor, ...], outputs: int) -> list[torch.Tensor]:
    """What the written program gives in the runtime that sessions use."""
    takes, gives = (
        [f"{kind} {i}" for i in range(count)] for kind, count in (("input", len(arguments)), ("output", outputs))
    )
    loader = native_module().BlockLoader([(path.stem, str(path), -1, takes, gives)], 0, None)
    for name, argument in zip(takes, arguments, strict=True):
        loader.set(name, argument.numpy())
    loader.run(False)
    return [torch.from_numpy(loader.get(name)) for name in gives]


def worst_error(measured: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Relative L2 of the worst of a block's outputs."""
    return max(compare.relative_l2(one, other) for one, other in zip(measured, expected, strict=True))


def check(block: Block, errors: dict[str, float]) -> None:
    """Raises ParityError when a block is not what it must be."""
    limit = compare.tolerance(_QUANTIZED_TOLERANCE if "quantization" in errors else _TOLERANCE)
    if not errors["parity"] <= limit:
        raise ParityError(
            f"the program {block.name} is not its module: relative L2 {errors['parity']:.3g}, its limit is "
            f"{limit:.3g}; nothing was published. Report it with the model's config.json"
        )
    limit = compare.tolerance("quantized_block")
    if not errors.get("quantization", 0.0) <= limit:
        raise ParityError(
            f"{block.name} in int8 is too far from float32: relative L2 {errors['quantization']:.3g}, its limit is "
            f"{limit:.3g}; nothing was published. Export with --quantize none"
        )


def _value_facts(name: str, value: torch.Tensor, geometry: Geometry) -> dict[str, Any]:
    dimensions = open_dimensions(name)
    shape: list[int | str] = [dimensions.get(i, size) for i, size in enumerate(value.shape)]
    facts = {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
    limits = {symbol: list(geometry.limits(symbol, value.shape[i])) for i, symbol in dimensions.items()}
    return {**facts, "limits": limits} if limits else facts
