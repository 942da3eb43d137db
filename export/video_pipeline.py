"""The way from a video checkpoint to a published bundle: every block of its four chains becomes a program of its own,
is loaded again and held against its module, and only then is the next one made. Of the text encoder and of the denoiser
one block is in memory at a time. What the modules made on their way is the bundle's golden case.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import pathlib
import platform
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import edgerun
from edgerun import compare
from edgerun.bundle import Bundle, BundleWriter, check_target, existing_build
from edgerun.checkpoint import Progress
from edgerun.errors import ExportError, ParityError
from edgerun.export.lower.executorch import TARGET
from edgerun.export.lower.program_templates import ProgramTemplates
from edgerun.export.video_blocks import (
    Block,
    Geometry,
    denoiser_chain,
    frame_decoder_chain,
    frame_size,
    merge_of,
    open_dimensions,
    text_chain,
    time_decoder_chain,
)
from edgerun.export.video_golden import GoldenPass
from edgerun.models.text_to_video import VideoCheckpoint, check_size
from edgerun.ops.native import native_module
from edgerun.video_recipe import VideoRecipe

_TOOLS = ("torch", "executorch", "transformers", "diffusers")
_TOLERANCE = "logits_fp32"  # a block is tens of layers deep
_QUANTIZED_TOLERANCE = "quantized_parity_logits"


def export_video_bundle(
    checkpoint: pathlib.Path,
    recipe: VideoRecipe,
    out: pathlib.Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Make the bundle `out` of a video checkpoint folder and return it; every program is verified on this host.

    A bundle of this very build at `out` is returned as it is. progress(stage, fraction) is called as blocks are done.
    Raises CheckpointError, ExportError, BundleError or ParityError; then, and after Ctrl-C, nothing is left at `out`.
    """
    source = VideoCheckpoint.open(checkpoint)
    check_size(source, *frame_size(source, recipe))
    geometry = Geometry.of(source, recipe)
    if geometry.max_tokens > source.denoiser.model_max_length:
        raise ExportError(
            f"max_prompt_tokens is {geometry.max_tokens}; the denoiser's null caption has "
            f"{source.denoiser.model_max_length} tokens: give at most that"
        )
    check_target(pathlib.Path(out).absolute(), overwrite=True)  # before minutes of work; another build is refused below
    digest = source.sha256(progress)
    build = recipe.hash(digest)
    if (existing := existing_build(out, build)) is not None:
        return existing
    native_module().return_large_memory()  # or each block's would leave holes in the heap: 4.6 GB for XL/2, not 1.6
    with BundleWriter(out, overwrite) as writer:
        writer.subfolder("programs")
        programs: list[dict[str, Any]] = []
        chains: dict[str, list[str]] = {}
        errors: dict[str, dict[str, float]] = {"parity": {}}
        if recipe.quantize != "none":
            errors["quantization"] = {}
        golden = GoldenPass(source, geometry, recipe)
        for chain, (blocks, values) in _chains(source, geometry, recipe):
            golden.begin(chain, values)
            chains[chain] = []
            for facts, found in _export_chain(blocks, values, geometry, recipe, build, writer, chain, progress):
                programs.append(facts)
                chains[chain].append(facts["name"])
                for measure, error in found.items():
                    errors[measure][facts["name"]] = error
            golden.end(chain, values)
        _copy_tokenizer(source, writer)
        more = errors | {"golden": golden.save(writer)}
        return writer.publish(_manifest(source, digest, geometry, recipe, build, programs, chains) | more)


def _chains(
    source: VideoCheckpoint, geometry: Geometry, recipe: VideoRecipe
) -> Iterator[tuple[str, tuple[Iterator[Block], dict[str, torch.Tensor]]]]:
    """One block of the text encoder or the denoiser in memory at a time; the decoder as a whole."""
    yield "text_encoder", text_chain(*source.outline_text_encoder(), geometry)
    gc.collect()
    yield "denoiser", denoiser_chain(*source.outline_denoiser(), geometry, recipe)
    gc.collect()
    autoencoder = source.load_autoencoder()
    yield "time_decoder", time_decoder_chain(autoencoder, geometry)
    yield "frame_decoder", frame_decoder_chain(autoencoder, geometry)


def _export_chain(
    blocks: Iterator[Block],
    values: dict[str, torch.Tensor],
    geometry: Geometry,
    recipe: VideoRecipe,
    build: str,
    writer: BundleWriter,
    chain: str,
    progress: Progress | None,
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
            results = _results(block, arguments)
            errors: dict[str, float] = {}
            if recipe.quantize != "none" and block.quantize():
                exact, results = results, _results(block, arguments)
                errors["quantization"] = _worst_error(results, exact)
            dynamic = _dynamic_shapes(block, arguments, geometry)
            make_program = functools.partial(
                torch.export.export, block.module, arguments, dynamic_shapes=dynamic, strict=False
            )
            shapes = f"{[(value.dtype, value.shape, value.stride()) for value in arguments]} {dynamic}"
            lowered = templates.lower(
                make_program, writer.folder / file, {"edgerun_build": build}, block.module, shapes
            )
        errors["parity"] = _worst_error(_run_program(writer.folder / file, arguments, len(results)), results)
        if (short := _last_part(block, arguments, geometry)) is not None:
            with torch.no_grad():
                expected = _results(block, short)
            given = _run_program(writer.folder / file, short, len(expected))
            errors["parity"] = max(errors["parity"], _worst_error(given, expected))
        _check(block, errors)
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


def _results(block: Block, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
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


def _worst_error(measured: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Relative L2 of the worst of a block's outputs."""
    return max(compare.relative_l2(one, other) for one, other in zip(measured, expected, strict=True))


def _check(block: Block, errors: dict[str, float]) -> None:
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


def _manifest(
    source: VideoCheckpoint,
    digest: str,
    geometry: Geometry,
    recipe: VideoRecipe,
    build: str,
    programs: list[dict[str, Any]],
    chains: dict[str, list[str]],
) -> dict[str, Any]:
    merge = merge_of(geometry, recipe)
    video: dict[str, Any] = {
        "frames": geometry.frames,
        "height": geometry.height,
        "width": geometry.width,
        "fps": geometry.fps,
        "latent": dict(
            zip(("channels", "frames", "height", "width"), (source.denoiser.in_channels, *geometry.latent), strict=True)
        ),
        "steps": geometry.steps,
        "guidance": geometry.guidance,
        "times": geometry.times,
        "leap": {
            "kind": recipe.leap,
            "evaluations": recipe.leap_evaluations,
            "latest_time": recipe.leap_latest_time,
            "tolerance": recipe.leap_tolerance,
            "patience": recipe.leap_patience,
        },
        "decoder": {
            "latents_per_chunk": source.autoencoder.latents_per_chunk,
            "frames_per_chunk": source.autoencoder.frames_per_chunk,
            "frames_per_call": geometry.call_frames[1],
        },
    }
    if merge is not None:
        video["rotary"] = {"frequencies": source.outline_denoiser()[1]["rope.freqs"].float().tolist()}
        video["merge"] = {
            "steps": recipe.merge_steps,
            "matrix": merge.merge.tolist(),
            "unmerge": merge.unmerge.tolist(),
            "positions": merge.positions.tolist(),
        }
    return {
        "kind": "video",
        "edgerun_version": edgerun.__version__,
        "recipe": recipe.to_json(),
        "build": build,
        "source": {"sha256": digest, "model_type": "STDiT3", "architecture": "STDiT3"},
        "tools": {name: importlib.metadata.version(name) for name in _TOOLS} | {"python": platform.python_version()},
        "programs": programs,
        "chains": chains,
        "video": video,
        "tokens": {"max_prompt_tokens": geometry.max_tokens},
    }


def _copy_tokenizer(source: VideoCheckpoint, writer: BundleWriter) -> None:
    shutil.copyfile(source.path / "text_encoder" / "tokenizer.json", writer.subfolder("tokenizer") / "tokenizer.json")
