"""Check that a bundle computes what its model computes: golden cases, on this machine or on a device.

Every golden case of a text bundle holds a prompt, forced tokens and the model's own logits; the device feeds the same
tokens. That of a video bundle holds a prompt, noise, and the latents and frames that the model's modules make of them
in one or two steps. What the device gives is held against the tolerance table (edgerun/compare.py). Exit status 1 when
a gate fails.

examples
  edgerun validate text.edgerun
  edgerun validate text.edgerun --device emulated-arm64
  edgerun validate clip.edgerun --memory-limit 1GB
  edgerun validate text.edgerun --device ssh:raspberrypi.local --html report.html
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

from edgerun.commands.common import (
    Clock,
    Tools,
    add_output_options,
    begin_report,
    byte_size,
    describe_facts,
    emit,
    positive,
)
from edgerun.commands.measure import force_on
from edgerun.commands.video_validate import validate_video_bundle
from edgerun.errors import EdgerunError
from edgerun.report import Cell, Check, Column, Report, Table

SUMMARY = "does a bundle compute what its model computes?"
_COLUMNS = (
    Column("case"),
    Column("prompt", "tokens"),
    Column("forced", "tokens"),
    Column("density", "%", 1),
    Column("relative L2"),
    Column("NMSE"),
    Column("mean KL", "nats"),
    Column("largest KL", "nats"),
    Column("top-1", "%", 2),
    Column("first divergence", "step"),
    Column("margin there"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun validate`."""
    parser.add_argument("bundle", type=pathlib.Path, metavar="BUNDLE")
    parser.add_argument(
        "--device", default="host", metavar="D", help="host, emulated-arm64 or ssh:HOST[:PORT]; default: %(default)s"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="default: one per performance core")
    parser.add_argument(
        "--memory-limit", type=byte_size, metavar="SIZE", help="for all of the process in RAM, as 1GB (video)"
    )
    add_output_options(parser)


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """`edgerun validate`."""
    from edgerun.bundle import kind_of

    limit = arguments.memory_limit
    common = {"threads": arguments.threads, "command": tools.command}
    if kind_of(arguments.bundle) == "video":
        report = validate_video_bundle(arguments.bundle, arguments.device, memory_limit_bytes=limit, **common)
    elif limit is not None:
        raise EdgerunError(f"{arguments.bundle} writes text: --memory-limit is for video bundles")
    else:
        report = validate_bundle(arguments.bundle, arguments.device, **common)
    return emit(report, arguments)


def validate_bundle(
    path: pathlib.Path, device_name: str = "host", *, threads: int | None = None, command: str = ""
) -> Report:
    """Run every golden case of a text bundle on a device and gate its logits.

    Raises BundleError for a damaged bundle or one without golden cases, DeviceError when the device cannot run it.
    """
    from edgerun.bundle import Bundle
    from edgerun.devices import open_device
    from edgerun.errors import BundleError
    from edgerun.evaluation import fidelity

    bundle, clock = Bundle.open(path, kind="text"), Clock()
    cases = bundle.golden_cases()
    if not cases:
        raise BundleError(f"{path} has no golden case, so nothing can be checked: export it again")
    device = open_device(device_name)
    noise = fidelity.Noise.from_manifest(bundle.manifest)
    rows: list[tuple[Cell, ...]] = []
    checks: list[Check] = []
    for entry, case in zip(bundle.manifest["golden"], cases, strict=True):
        name = pathlib.PurePosixPath(entry["file"]).stem
        with clock.step(f"{name} on {device.name}"):
            measured, logits = force_on(device, path, case.prompt.tolist(), case.forced.tolist(), threads=threads)
        found = fidelity.measure(logits, case.logits)
        checks += fidelity.checks(found, bundle.recipe, sparse=measured.sparse, noise=noise, label=f"{name}: ")
        parting = found.divergence
        rows.append(
            (
                name,
                len(case.prompt),
                len(case.forced),
                None if measured.density is None else 100 * measured.density,
                found.relative_l2,
                found.nmse,
                found.mean_kl_nats,
                found.max_kl_nats,
                100 * found.top1,
                "none" if parting is None else str(parting.step),
                None if parting is None else parting.margin,
            )
        )
    report = begin_report("validate", f"edgerun validate: {path} on {device.name}", command)
    facts: tuple[tuple[str, str], ...] = (("build", bundle.build), ("device", describe_facts(device.describe())))
    longest = max(len(case.prompt) + len(case.forced) for case in cases)
    if bundle.recipe.attention == "dhsa" and longest <= (smallest := bundle.recipe.dhsa.budgets()[0]):
        budget = f"every golden case fits the budget of {smallest:,} tokens, where attention is dense"
        facts += (("not exercised", f"sparse selection: {budget} (compare with `edgerun eval --against`)"),)
    note = "Teacher-forced, against the model's own logits; margin: the model's top-2 logit margin at the divergence."
    tables = (Table("Golden cases", _COLUMNS, tuple(rows), note),)
    return dataclasses.replace(report, facts=facts, tables=tables, checks=tuple(checks), steps=tuple(clock.steps))
