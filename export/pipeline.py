"""The pipeline: `export_bundle` is the whole way from a checkpoint to a published bundle, read top to bottom."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

import torch

from edgerun.bundle import Bundle, BundleWriter, GoldenCase, existing_build
from edgerun.calibration import Calibration
from edgerun.checkpoint import Checkpoint, Progress
from edgerun.evaluation.fidelity import Noise, own_noise
from edgerun.export.golden import golden_cases
from edgerun.export.lower.executorch import LoweredProgram, lower
from edgerun.export.manifest import PROGRAM_FILE, constant_methods, manifest
from edgerun.export.program import export_program
from edgerun.export.verify import verify
from edgerun.memory_plan import MemoryPlan, plan_memory
from edgerun.models.causal_lm import CausalLM, load, resolve
from edgerun.recipe import Recipe


def export_bundle(
    checkpoint: pathlib.Path,
    recipe: Recipe,
    out: pathlib.Path,
    *,
    calibration: Calibration | None = None,
    memory_limit_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Make the bundle `out` of a checkpoint folder and return it, verified on this host.

    A bundle of this very build at `out` is returned as it is. progress(stage, fraction) is called as stages advance.
    calibration: where the recipe's choices for layers come from; the manifest records it, another checkpoint's is
    refused. Raises CheckpointError, ExportError, BundleError, ParityError or, for a calibration, EdgerunError; then and
    after Ctrl-C, nothing is left at `out`.
    """
    source = Checkpoint.open(checkpoint)
    recipe = resolve(source.config, recipe)
    if calibration is not None:
        calibration.require(source.sha256(progress))
    origin = {} if calibration is None else {"calibration": calibration.manifest_entry()}
    memory = plan(source, recipe)
    if memory_limit_bytes is not None:
        memory.require(memory_limit_bytes)
    build = recipe.hash(source.sha256(progress))
    existing = existing_build(out, build)
    if existing is not None and existing.manifest.get("calibration") == origin.get("calibration"):
        return existing
    with BundleWriter(out, overwrite) as writer:
        model = load(source, recipe, progress, arithmetic=torch.float32)
        golden, noise = _golden(source, model, recipe, writer, progress)
        if recipe.dtype != "fp32":
            del model  # before the other is read
            model = load(source, recipe, progress)
        lowered = _lower(source, model, recipe, build, writer, progress)
        memory = memory.with_planned_bytes(lowered.planned_bytes)
        if memory_limit_bytes is not None:
            memory.require(memory_limit_bytes)  # again: the program may plan more than was foreseen
        _copy_tokenizer(source, writer)
        facts = manifest(source, model, recipe, build, lowered, golden, noise) | origin
        facts |= {"memory_plan": dataclasses.asdict(memory)}
        del model
        parity = verify(writer.write_manifest(facts), progress)
        return writer.publish(facts | {"parity": parity})


def plan(checkpoint: Checkpoint | pathlib.Path, recipe: Recipe) -> MemoryPlan:
    """Memory that a bundle of this recipe needs to run at its longest context. Reads no weights."""
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    return plan_memory(source, resolve(source.config, recipe))


def _golden(
    source: Checkpoint, truth: CausalLM, recipe: Recipe, writer: BundleWriter, progress: Progress | None
) -> tuple[list[tuple[str, GoldenCase]], Noise | None]:
    if progress is not None:
        progress("golden cases", 0.0)
    cases: list[tuple[str, GoldenCase]] = golden_cases(truth, recipe, source)
    for name, case in cases:
        case.save(writer.subfolder("golden") / f"{name}.safetensors")
    noise = None
    if recipe.quantize != "none":
        first = cases[0][1]
        noise = own_noise(truth, first.prompt.tolist(), first.forced.tolist(), recipe.prefill_slice, first.logits)
    if progress is not None:
        progress("golden cases", 1.0)
    return cases, noise


def _lower(
    source: Checkpoint,
    model: CausalLM,
    recipe: Recipe,
    build: str,
    writer: BundleWriter,
    progress: Progress | None,
) -> LoweredProgram:
    if progress is not None:
        progress("export program", 0.0)
    program = export_program(model, recipe.prefill_slice)
    if progress is not None:
        progress("export program", 1.0)
        progress("lower to ExecuTorch", 0.0)
    writer.subfolder("programs")
    lowered = lower(program, writer.folder / PROGRAM_FILE, constant_methods(source, model, recipe, build))
    if progress is not None:
        progress("lower to ExecuTorch", 1.0)
    return lowered


def _copy_tokenizer(source: Checkpoint, writer: BundleWriter) -> None:
    folder = writer.subfolder("tokenizer")
    for file in source.tokenizer_files:
        shutil.copyfile(file, folder / file.name)
