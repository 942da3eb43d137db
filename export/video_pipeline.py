"""The way from a video checkpoint to a published bundle: every block of its four chains becomes a program of its own,
is loaded again and held against its module, and only then is the next one made. Of the text encoder and of the denoiser
one block is in memory at a time. What the modules made on their way is the bundle's golden case.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import pathlib
import platform
import shutil
from collections.abc import Iterator
from typing import Any

import torch

import edgerun
from edgerun.bundle import Bundle, BundleWriter, check_target, existing_build
from edgerun.checkpoint import Progress
from edgerun.errors import ExportError
from edgerun.export.decoder_process import DECODERS, DecoderProcess, Exported, ProcessEndedError, export_decoders
from edgerun.export.video_blocks import Block, Geometry, denoiser_chain, frame_size, merge_of, text_chain
from edgerun.export.video_chain import export_chain, fewer_objects_to_collect, run_chain
from edgerun.export.video_golden import GoldenPass
from edgerun.machine import available_cores
from edgerun.models.text_to_video import VideoCheckpoint, check_size
from edgerun.ops.native import native_module
from edgerun.video_recipe import VideoRecipe

_TOOLS = ("torch", "executorch", "transformers", "diffusers")
_SMALL_BYTES = 1 << 28  # of weights: what two processes hold of them is little beside what they hold of libraries


def export_video_bundle(
    checkpoint: pathlib.Path,
    recipe: VideoRecipe,
    out: pathlib.Path,
    *,
    overwrite: bool = False,
    parallel: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Make the bundle `out` of a video checkpoint folder and return it; every program is verified on this host.

    A bundle of this very build at `out` is returned as it is. progress(stage, fraction) is called as blocks are done.
    parallel: export a small model in two processes, to the same programs; their parity is that of other values.
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
    with BundleWriter(out, overwrite) as writer, contextlib.ExitStack() as stack:
        writer.subfolder("programs")
        beside: DecoderProcess | None = None
        if parallel and _is_small(source):
            process = DecoderProcess(source.path, recipe.to_json(), build, writer.folder)
            beside = stack.enter_context(process)
        stack.enter_context(fewer_objects_to_collect())
        exported: Exported = {}
        golden = GoldenPass(source, geometry, recipe)
        for chain, (blocks, values) in _chains(source, geometry, recipe):
            golden.begin(chain, values)
            if beside is not None and chain in DECODERS:
                run_chain(blocks, values)
            else:
                made = export_chain(blocks, values, geometry, recipe, build, writer.folder, chain, progress)
                exported[chain] = list(made)
            golden.end(chain, values)
            if beside is not None:
                beside.check()
        if beside is not None:
            if progress is not None:
                progress("export decoders", 0.5)
            try:
                exported |= beside.wait()
            except ProcessEndedError:  # there may be memory for one process
                exported |= export_decoders(source, geometry, recipe, build, writer.folder)
            if progress is not None:
                progress("export decoders", 1.0)
        _copy_tokenizer(source, writer)
        more = {**_errors(exported, recipe), "golden": golden.save(writer)}
        return writer.publish(_manifest(source, digest, geometry, recipe, build, exported) | more)


def _is_small(source: VideoCheckpoint) -> bool:
    """Whether two processes may work at it, each with memory of its own."""
    return available_cores() > 1 and sum(file.stat().st_size for file in source.files()) <= _SMALL_BYTES


def _chains(
    source: VideoCheckpoint, geometry: Geometry, recipe: VideoRecipe
) -> Iterator[tuple[str, tuple[Iterator[Block], dict[str, torch.Tensor]]]]:
    """One block of the text encoder or the denoiser in memory at a time; the decoder as a whole."""
    yield "text_encoder", text_chain(*source.outline_text_encoder(), geometry)
    gc.collect()
    yield "denoiser", denoiser_chain(*source.outline_denoiser(), geometry, recipe)
    gc.collect()
    autoencoder = source.load_autoencoder()
    for chain, make in DECODERS.items():
        yield chain, make(autoencoder, geometry)


def _errors(exported: Exported, recipe: VideoRecipe) -> dict[str, dict[str, float]]:
    """The manifest's "parity" and, of a quantised model, its "quantization": each program's error."""
    measures = ("parity",) if recipe.quantize == "none" else ("parity", "quantization")
    every = [(facts["name"], errors) for chain in exported.values() for facts, errors in chain]
    return {measure: {name: errors[measure] for name, errors in every if measure in errors} for measure in measures}


def _manifest(
    source: VideoCheckpoint,
    digest: str,
    geometry: Geometry,
    recipe: VideoRecipe,
    build: str,
    exported: Exported,
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
        "solver": recipe.solver,
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
        "programs": [facts for chain in exported.values() for facts, _ in chain],
        "chains": {chain: [facts["name"] for facts, _ in made] for chain, made in exported.items()},
        "video": video,
        "tokens": {"max_prompt_tokens": geometry.max_tokens},
    }


def _copy_tokenizer(source: VideoCheckpoint, writer: BundleWriter) -> None:
    shutil.copyfile(source.path / "text_encoder" / "tokenizer.json", writer.subfolder("tokenizer") / "tokenizer.json")
