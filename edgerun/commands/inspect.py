"""Show what a bundle is: its recipe, source, limits, files, memory and the parity measured when it was made.

examples
  edgerun inspect text.edgerun
  edgerun inspect clip.edgerun --json
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
from typing import Any

from edgerun.bundle import Bundle
from edgerun.commands.common import Tools, add_output_options, begin_report, emit
from edgerun.commands.export import plan_table
from edgerun.commands.video_inspect import video_facts, video_tables
from edgerun.recipe import LayerChoice
from edgerun.report import Cell, Column, Report, Table

SUMMARY = "what a bundle holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun inspect`."""
    parser.add_argument("bundle", type=pathlib.Path, metavar="BUNDLE")
    add_output_options(parser, html=False)


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """`edgerun inspect`."""
    return emit(inspect_bundle(arguments.bundle, tools.command), arguments)


def inspect_bundle(path: pathlib.Path, command: str) -> Report:
    """The bundle's facts as a report. Raises BundleError when it is damaged."""
    manifest = Bundle.open(path).manifest
    report = begin_report("inspect", f"edgerun inspect: {path}", command)
    source = manifest["source"]
    facts: list[tuple[str, Cell]] = [
        ("build", manifest["build"]),
        (
            "model",
            f"{source.get('model_type')} ({source.get('architecture')}), sha256 {str(source.get('sha256'))[:16]}",
        ),
        ("made by", f"edgerun {manifest.get('edgerun_version')}"),
        *(video_facts(manifest) if manifest["kind"] == "video" else _text_facts(manifest)),
    ]
    recipe = manifest["recipe"]
    options = {name: value for name, value in recipe.items() if name != "dhsa"}
    if recipe.get("attention") == "dhsa":
        options |= {f"dhsa.{name}": value for name, value in recipe["dhsa"].items() if name != "layers"}
        choices = (LayerChoice(**one) for one in recipe["dhsa"].get("layers", ()))
        options |= {f"dhsa.layers.{index}": choice.name for index, choice in enumerate(choices)}
    tables = [
        Table(
            "Recipe", (Column("choice"), Column("value")), tuple((name, str(value)) for name, value in options.items())
        ),
        Table(
            "Files",
            (Column("file"), Column("size", "KiB", 1), Column("sha256")),
            tuple((name, facts["bytes"] / 1024, facts["sha256"][:16]) for name, facts in manifest["files"].items()),
        ),
    ]
    if manifest["kind"] == "video":
        return dataclasses.replace(report, facts=tuple(facts), tables=(*video_tables(manifest), *tables))
    if manifest.get("memory_plan"):
        tables.append(plan_table(manifest["memory_plan"]))
    for program in manifest["programs"]:
        facts.append(
            (f"program {program['name']}", f"{program['target']}; ops {', '.join(program['operators']) or 'none'}")
        )
    if calibration := manifest.get("calibration"):
        target = f"a KL to dense of at most {calibration['max_kl_nats']} nats"
        facts.append(("calibrated", f"for {target}; file sha256 {str(calibration['sha256'])[:16]}"))
    facts += [(f"parity {name}", _cell(value)) for name, value in manifest.get("parity", {}).items()]
    facts += [(f"int8 against float32 {name}", value) for name, value in manifest.get("quantization", {}).items()]
    return dataclasses.replace(report, facts=tuple(facts), tables=tuple(tables))


def _text_facts(manifest: dict[str, Any]) -> list[tuple[str, Cell]]:
    context = manifest["context"]
    kinds = collections.Counter(layer["kind"] for layer in manifest["attention"]["layers"])
    return [
        ("context", f"{context['max_context']:,} tokens, at most {context['prefill_slice']:,} a call"),
        ("vocabulary", manifest["tokens"]["vocab_size"]),
        ("layers", ", ".join(f"{count} {kind}" for kind, count in kinds.items())),
    ]


def _cell(value: object) -> Cell:
    return value if isinstance(value, str | int | float | None) else str(value)
