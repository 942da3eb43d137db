"""What `edgerun bench` does for a video bundle: whole runs, and where their time went."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgerun.commands.common import begin_report, byte_size, not_negative, stage_bar
from edgerun.commands.video import add_run_technique_options, parse_leap, prompt_tokenizer, prompt_tokens, run_times
from edgerun.report import Cell, Column, Estimate, Report, Table

if TYPE_CHECKING:
    from edgerun.models.solvers import Solver
    from edgerun.sessions.video import Leap, Progress

PROMPT = "a red circle moves to the left"
_STAGES = ("encode", "denoise", "decode")


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun bench` for a video bundle."""
    video = parser.add_argument_group("video bundles")
    video.add_argument("--prompt", metavar="TEXT", help=f"default: {PROMPT}")
    add_run_technique_options(video)
    video.add_argument("--prefetch", type=not_negative, metavar="N", help="programs to load ahead; default: 1")
    video.add_argument("--memory-limit", type=byte_size, metavar="SIZE", help="for all of the process in RAM, as 1GB")


def bench(arguments: argparse.Namespace, command: str) -> Report:
    """`edgerun bench` of a video bundle."""
    return bench_video_bundle(
        arguments.bundle,
        PROMPT if arguments.prompt is None else arguments.prompt,
        repeats=arguments.repeats,
        device_name=arguments.device,
        threads=arguments.threads,
        steps=arguments.steps,
        solver=arguments.solver,
        leap=None if arguments.lpl is None else parse_leap(arguments.lpl),
        merge_steps=arguments.tdtm,
        prefetch=1 if arguments.prefetch is None else arguments.prefetch,
        memory_limit_bytes=arguments.memory_limit,
        command=command,
    )


def bench_video_bundle(
    path: pathlib.Path,
    prompt: str = PROMPT,
    *,
    repeats: int = 3,
    device_name: str = "host",
    threads: int | None = None,
    steps: int | None = None,
    solver: Solver | None = None,
    leap: Leap | None = None,
    merge_steps: int | None = None,
    prefetch: int = 1,
    memory_limit_bytes: int | None = None,
    command: str = "",
) -> Report:
    """Time whole runs of a video bundle, each in a fresh process, after one that is not counted.

    Raises BundleError, DeviceError, or EdgerunError for a prompt that is empty or over the limit.
    """
    from edgerun.bundle import Bundle
    from edgerun.devices import VideoRunRequest, open_device

    bundle, device = Bundle.open(path, kind="video"), open_device(device_name)
    request = VideoRunRequest(
        tokens=prompt_tokens(prompt_tokenizer(bundle), prompt),
        times=run_times(steps, bundle),
        solver=solver,
        leap=leap,
        merge_steps=merge_steps,
        memory_limit_bytes=memory_limit_bytes,
        prefetch=prefetch,
        threads=threads,
    )
    runs: list[dict[str, Any]] = []
    with stage_bar(f"bench {path.name}") as progress:
        for turn in range(repeats + 1):
            name = f"run {turn} of {repeats}" if turn else "a run that is not counted"

            def tell(told: Progress, name: str = name) -> None:
                progress(name, told.fraction)

            runs.append(device.run(path, dataclasses.replace(request, on_progress=tell)).clip.report)
    del runs[0]
    seconds = spread([sum(_stage(run, name, "wall_ms") or 0.0 for name in _STAGES) / 1e3 for run in runs])
    peak = [run["peak_rss_bytes"] for run in runs if run["peak_rss_bytes"] is not None]
    facts: tuple[tuple[str, Cell], ...] = (
        ("device", device.name),
        ("build", bundle.build),
        ("repeats", repeats),
        ("prompt", f"{len(request.tokens)} tokens"),
        ("steps", "of the bundle" if request.times is None else len(request.times)),
        ("solver", "of the bundle" if solver is None else solver),
        ("prefetch", prefetch),
        ("memory limit", _mebibytes(memory_limit_bytes)),
        ("evaluations", runs[0]["evaluations"]),
        ("whole run, s", seconds),
        ("peak RSS, MiB", max(peak) / 2**20 if peak else None),
    )
    report = begin_report("bench", f"edgerun bench: {path.stem} on {device.name}", command)
    return dataclasses.replace(report, facts=facts, tables=(_stages(runs), _steps(runs), _blocks(runs)))


def spread(values: Sequence[float]) -> Estimate:
    """Median of repeats, from the least to the most; no range of one value."""
    if len(values) == 1:
        return Estimate(values[0], n=1)
    return Estimate(statistics.median(values), min(values), max(values), n=len(values))


def _stages(runs: Sequence[dict[str, Any]]) -> Table:
    columns = (
        Column("stage"),
        Column("wall", "s", 3),
        Column("load", "s", 3),
        Column("execute", "s", 3),
        Column("wait", "s", 3),
        Column("hidden", "%", 0),
        Column("programs"),
        Column("loads"),
        Column("resident"),
        Column("ahead"),
        Column("peak of them", "MiB", 1),
    )
    rows = []
    for stage in _STAGES:

        def median(of: Callable[[dict[str, Any]], float | None], scale: float, stage: str = stage) -> float | None:
            return _median([of(run["stages"][stage]["chain"]) for run in runs], scale)

        chain = runs[-1]["stages"][stage]["chain"]
        row: tuple[Cell, ...] = (
            stage,
            spread([run["stages"][stage]["wall_ms"] / 1e3 for run in runs]),
            median(lambda chain: chain["passes"]["load_ms"] + chain["passes"]["unload_ms"], 1e-3),
            median(lambda chain: chain["passes"]["execute_ms"], 1e-3),
            median(lambda chain: chain["passes"]["wait_ms"], 1e-3),
            median(lambda chain: chain["hidden_share"], 100.0),
            len(chain["blocks"]),
            chain["passes"]["loads"],
            chain["resident_blocks"],
            chain["prefetch"],
            median(lambda chain: chain["peak_bytes"], 2**-20),
        )
        rows.append(row)
    note = (
        "Medians, wall with its range. load: with giving memory back. wait: standing still for a load. hidden: of the "
        "shorter of load and execute, what ran during the other. The files are as a run before left them in the cache."
    )
    return Table("Stages", columns, tuple(rows), note)


def _steps(runs: Sequence[dict[str, Any]]) -> Table:
    kinds: dict[str, list[float]] = {}
    for run in runs:
        for index, step in enumerate(run["steps"]):
            kind = "first" if index == 0 else "merged" if step["merged"] else "plain"
            kinds.setdefault(kind, []).append(step["wall_ms"])
    rows = tuple((kind, len(times) // len(runs), spread(times)) for kind, times in kinds.items())
    note = "Of the denoiser, over all runs. The first loads what stays; merged: with pairs of frames merged."
    return Table("Steps", (Column("kind"), Column("steps"), Column("each", "ms", 1)), rows, note)


def _blocks(runs: Sequence[dict[str, Any]]) -> Table:
    columns = (
        Column("stage"),
        Column("program"),
        Column("loads"),
        Column("each load", "ms", 2),
        Column("executions"),
        Column("each execution", "ms", 2),
        Column("each wait", "ms", 2),
        Column("overlap", "%", 0),
        Column("in memory", "MiB", 2),
    )
    rows = []
    for stage in _STAGES:
        for index, block in enumerate(runs[-1]["stages"][stage]["chain"]["blocks"]):
            repeats = [run["stages"][stage]["chain"]["blocks"][index] for run in runs]
            row: tuple[Cell, ...] = (
                stage,
                block["name"],
                block["loads"],
                _median([one["load_ms"] / one["loads"] if one["loads"] else None for one in repeats]),
                block["executions"],
                _median([one["execute_ms"] / one["executions"] if one["executions"] else None for one in repeats]),
                _median([one["wait_ms"] / one["executions"] if one["executions"] else None for one in repeats]),
                _median([_overlap(one) for one in repeats], 100.0),
                block["loaded_bytes"] / 2**20,
            )
            rows.append(row)
    note = (
        "Medians of each run's mean. wait: before an execution, standing still until the program is loaded. overlap: "
        "of the time of its loads, what went by without such a wait, behind other programs; 0: all was waited for. "
        "in memory: measured where a limit makes the first step measure, else the file."
    )
    return Table("Programs", columns, tuple(rows), note)


def _overlap(block: dict[str, Any]) -> float | None:
    """The share of a program's loads that nothing waited for; None: it was not loaded."""
    load_ms = float(block["load_ms"])
    # A wait also holds what leaves memory first, or is loaded before: it can be longer than the load.
    return max(0.0, 1.0 - block["wait_ms"] / load_ms) if load_ms > 0.0 else None


def _stage(run: dict[str, Any], name: str, value: str) -> float | None:
    stage = run["stages"][name]
    return None if stage is None else float(stage[value])


def _median(values: Sequence[float | None], scale: float = 1.0) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) * scale if known else None


def _mebibytes(count: int | None) -> str:
    return "none" if count is None else f"{count / 2**20:,.0f} MiB"
