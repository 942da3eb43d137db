"""Turn a checkpoint into a bundle, verified against the model before it gets its name.

CHECKPOINT is a folder with config.json, safetensors and tokenizer files of a decoder-only model, or one with denoiser/,
vae/ and text_encoder/ of a text-to-video model (Open-Sora v1.2's parts); "zoo:text" is the model that ships with it.

examples
  edgerun export zoo:text -o text.edgerun
  edgerun export ./Llama-3.2-1B -o llama.edgerun --quantize 8da4w --max-context 16384
  edgerun export ./Llama-3.2-1B -o llama.edgerun --dry-run --memory-limit 2GiB      what would it need?
  edgerun export zoo:text -o text.edgerun --calibration text.calibration      every layer as `calibrate` chose
  edgerun export ./Open-Sora -o clip.edgerun --frames 51 --height 144 --width 256 --lpl 18 --tdtm 15 --quantize int8
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

from edgerun.commands import video
from edgerun.commands.common import (
    GOOD,
    Tools,
    add_calibration_option,
    add_output_options,
    add_recipe_options,
    begin_report,
    byte_size,
    calibrated_recipe,
    checkpoint_path,
    emit,
    recipe_from,
    stage_bar,
)
from edgerun.errors import ExportError
from edgerun.recipe import Recipe
from edgerun.report import Column, Table

SUMMARY = "a checkpoint becomes a bundle"
_PARTS = {
    "weights_bytes": "weights, as the runtime packs them",
    "cache_bytes": "key/value cache and summaries, context full",
    "activation_bytes": "activations of one prefill slice",
    "runtime_bytes": "runtime: code, the program, allocators",
    "peak_rss_bytes": "peak of the process",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun export`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the checkpoint, or zoo:text")
    parser.add_argument("-o", "--output", type=pathlib.Path, metavar="NAME.edgerun", help="the bundle to make")
    parser.add_argument(
        "--kind", choices=("auto", "text", "video"), default="auto", help="of the checkpoint; auto: by its folders"
    )
    add_recipe_options(parser)
    add_calibration_option(parser)
    video.add_export_options(parser)
    place = parser.add_argument_group("where and how")
    place.add_argument("--memory-limit", type=byte_size, metavar="SIZE", help="refuse what needs more to run, as 4GiB")
    place.add_argument("--dry-run", action="store_true", help="print the memory plan and stop")
    place.add_argument("--overwrite", action="store_true", help="replace another build of the same name")
    add_output_options(parser, html=False)


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """`edgerun export`."""
    checkpoint = checkpoint_path(arguments.checkpoint)
    if arguments.output is None and not arguments.dry_run:
        raise ExportError("no --output is given: pass -o NAME.edgerun, or --dry-run for the memory plan alone")
    if _kind(arguments, checkpoint) == "video":
        # --quantize is of both kinds.
        if recipe_from(arguments) != Recipe(quantize=arguments.quantize) or arguments.calibration is not None:
            raise ExportError("a text model's options are given for a video model: leave them out (--help has both)")
        return video.export(arguments, tools, checkpoint)
    of_video = ("frames", "height", "width", "steps", "guidance", "solver", "lpl", "tdtm", "blocks")
    if given := [name for name in of_video if getattr(arguments, name) is not None]:
        raise ExportError(f"--{given[0]} is for video models; {arguments.checkpoint} is a text model: leave it out")
    recipe, calibration = calibrated_recipe(arguments)
    exporter = tools.exporter()
    report = begin_report("export", f"edgerun export: {arguments.checkpoint}", tools.command)
    if arguments.dry_run:
        if calibration is not None:
            from edgerun.checkpoint import Checkpoint

            calibration.require(Checkpoint.open(checkpoint).sha256())
        plan = exporter.plan(checkpoint, recipe)
        plan.require(arguments.memory_limit) if arguments.memory_limit is not None else None
        return emit(dataclasses.replace(report, tables=(plan_table(dataclasses.asdict(plan)),)), arguments)
    with stage_bar(f"export {arguments.output.name}") as progress:
        bundle = exporter.export_bundle(
            checkpoint,
            recipe,
            arguments.output,
            calibration=calibration,
            memory_limit_bytes=arguments.memory_limit,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    manifest = bundle.manifest
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    facts = (
        ("bundle", str(arguments.output)),
        ("build", manifest["build"][:16]),
        ("size", f"{size / 2**20:.1f} MiB"),
        ("max context", f"{manifest['context']['max_context']:,} tokens"),
    )
    plan_or_none = manifest.get("memory_plan")
    tables = (plan_table(plan_or_none),) if plan_or_none else ()
    emit(dataclasses.replace(report, facts=facts, tables=tables), arguments)
    return GOOD


def _kind(arguments: argparse.Namespace, checkpoint: pathlib.Path) -> str:
    if arguments.kind != "auto":
        return str(arguments.kind)
    return "video" if video.is_video_checkpoint(checkpoint) else "text"


def plan_table(plan: dict[str, int | None]) -> Table:
    """The memory plan as a table in MiB; parts that the plan does not know are dashes."""
    values = ((text, plan.get(name)) for name, text in _PARTS.items())
    rows = tuple((text, None if value is None else value / 2**20) for text, value in values)
    return Table("Memory to run it, at the longest context", (Column("part"), Column("size", "MiB", 1)), rows)
