"""The way from a video checkpoint to a published bundle: every block of its four chains becomes a program of its own,
is loaded again and held against its module, and only then is the next one made. One model is in memory at a time, and
of the denoiser one block.
"""

from __future__ import annotations

import gc
import importlib.metadata
import pathlib
import platform
import shutil
from collections.abc import Iterator
from typing import Any

import torch

import edgerun
from edgerun import compare
from edgerun.bundle import Bundle, BundleWriter, check_target, existing_build
from edgerun.checkpoint import Progress
from edgerun.errors import ExportError, ParityError
from edgerun.export.lower.executorch import TARGET, lower
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
from edgerun.models.stdit import Stdit
from edgerun.models.text_to_video import VideoCheckpoint, check_size
from edgerun.video_recipe import VideoRecipe

_TOOLS = ("torch", "executorch", "transformers", "diffusers")
_TOLERANCE = "logits_fp32"  # a block is tens of layers deep


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
    with BundleWriter(out, overwrite) as writer:
        writer.subfolder("programs")
        programs: list[dict[str, Any]] = []
        chains: dict[str, list[str]] = {}
        parity: dict[str, float] = {}
        for chain, (blocks, values) in _chains(source, geometry, recipe):
            chains[chain] = []
            for facts, error in _export_chain(blocks, values, geometry, build, writer, chain, progress):
                programs.append(facts)
                chains[chain].append(facts["name"])
                parity[facts["name"]] = error
        _copy_tokenizer(source, writer)
        return writer.publish(_manifest(source, digest, geometry, recipe, build, programs, chains) | {"parity": parity})


def _chains(
    source: VideoCheckpoint, geometry: Geometry, recipe: VideoRecipe
) -> Iterator[tuple[str, tuple[Iterator[Block], dict[str, torch.Tensor]]]]:
    """One model in memory at a time, and of the denoiser one block."""
    yield "text_encoder", text_chain(source.load_text_encoder(geometry.max_tokens), geometry)
    gc.collect()
    with torch.device("meta"):
        denoiser = Stdit(source.denoiser)
    weights = source.denoiser_weights()
    weights.check({name: tuple(value.shape) for name, value in denoiser.state_dict().items()})
    yield "denoiser", denoiser_chain(denoiser, weights, geometry, recipe)
    gc.collect()
    autoencoder = source.load_autoencoder()
    yield "time_decoder", time_decoder_chain(autoencoder, geometry)
    yield "frame_decoder", frame_decoder_chain(autoencoder, geometry)


def _export_chain(
    blocks: Iterator[Block],
    values: dict[str, torch.Tensor],
    geometry: Geometry,
    build: str,
    writer: BundleWriter,
    chain: str,
    progress: Progress | None,
) -> Iterator[tuple[dict[str, Any], float]]:
    """Each block's entry in the manifest and its error; `values` go through the chain as they would on a device."""
    for index, block in enumerate(blocks):
        if progress is not None:
            progress(f"export {chain.replace('_', ' ')}: {block.name}", 1.0 - 0.85**index)
        file = f"programs/{block.name}.pte"
        arguments = tuple(values[name].contiguous() for name in block.inputs)
        with torch.no_grad():
            results = block.module(*arguments)
            results = results if isinstance(results, tuple) else (results,)
            program = torch.export.export(
                block.module, arguments, dynamic_shapes=_dynamic_shapes(block, arguments, geometry), strict=False
            )
            lowered = lower(program, writer.folder / file, {"edgerun_build": build})
        error = _worst_error(writer.folder / file, arguments, results)
        if (short := _last_part(block, arguments, geometry)) is not None:
            with torch.no_grad():
                error = max(error, _worst_error(writer.folder / file, short, (block.module(*short),)))
        if not error <= compare.tolerance(_TOLERANCE):
            raise ParityError(
                f"the program {block.name} is not its module: relative L2 {error:.3g}, its limit is "
                f"{compare.tolerance(_TOLERANCE):.3g}; nothing was published. Report it with the model's config.json"
            )
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
        yield facts, error
        del block, program, lowered
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


def _worst_error(path: pathlib.Path, arguments: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Relative L2 of what the written program gives, the worst of its outputs."""
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    from edgerun._library import load_op_library

    load_op_library()
    given = _load_for_executorch(str(path)).forward(list(arguments))
    return max(compare.relative_l2(one, other) for one, other in zip(given, expected, strict=True))


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
        video["rotary"] = {"frequencies": source.denoiser_weights()["rope.freqs"].float().tolist()}
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
        "golden": [],
    }


def _copy_tokenizer(source: VideoCheckpoint, writer: BundleWriter) -> None:
    shutil.copyfile(source.path / "text_encoder" / "tokenizer.json", writer.subfolder("tokenizer") / "tokenizer.json")
