"""Time a bundle. Every run is a fresh process on the device, after one that is not counted.

Text: prefill at several prompt lengths, decode after each, mean ± standard deviation. pp512 is the prefill of 512
tokens, tg64@512 the generation of 64 tokens after them. With --against both bundles take turns, and the ratio is of
paired runs.

Video: whole clips, medians: each stage and each program, loading, executing, how much of both ran at once, and memory.

examples
  edgerun bench text.edgerun
  edgerun bench sparse.edgerun --against dense.edgerun -p 1024,2048,4096,8192 -r 5
  edgerun bench text.edgerun --device ssh:board -p 512 -n 32 --json
  edgerun bench clip.edgerun --memory-limit 1GB --lpl 4 -r 1
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import random
import statistics
from collections.abc import Sequence

from edgerun.commands.common import (
    Tools,
    add_output_options,
    begin_report,
    emit,
    not_negative,
    positive,
    positive_list,
)
from edgerun.commands.measure import Timing, generate_on
from edgerun.commands.video_bench import add_bench_options, bench
from edgerun.errors import EdgerunError
from edgerun.report import Axis, Cell, Column, Estimate, Plot, Report, Series, Table

SUMMARY = "tokens per second, or where a clip's time goes"
_PROMPT_SEED = "edgerun bench"
_PROMPT_TOKENS = (512, 1024, 2048, 4096, 8192)
_NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Workload:
    """prompt_tokens to prefill, then new_tokens to generate (0: prefill alone)."""

    prompt_tokens: int
    new_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun bench`."""
    parser.add_argument("bundle", type=pathlib.Path, metavar="BUNDLE")
    parser.add_argument(
        "--device", default="host", metavar="D", help="host, emulated-arm64 or ssh:HOST[:PORT]; default: %(default)s"
    )
    parser.add_argument("-r", "--repeats", type=positive, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: one per performance core")
    text = parser.add_argument_group("text bundles")
    text.add_argument(
        "-p",
        "--prompt-tokens",
        type=positive_list,
        metavar="N,N",
        help="as 512,2048 or 512..8192, doubling; default: 512..8192, as far as the context goes",
    )
    text.add_argument(
        "-n",
        "--new-tokens",
        type=not_negative,
        metavar="N",
        help=f"tokens to generate; 0: prefill alone; default: {_NEW_TOKENS}",
    )
    text.add_argument(
        "--against", type=pathlib.Path, metavar="OTHER.edgerun", help="also time this bundle, in turns, and give ratios"
    )
    add_bench_options(parser)
    add_output_options(parser)


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """`edgerun bench`."""
    from edgerun.bundle import kind_of

    of_kind = {
        "text": ("prompt_tokens", "new_tokens", "against"),
        "video": ("prompt", "steps", "solver", "lpl", "tdtm", "prefetch", "memory_limit"),
    }
    kind = kind_of(arguments.bundle)
    other = "video" if kind == "text" else "text"
    if given := [name for name in of_kind[other] if getattr(arguments, name) is not None]:
        option = f"--{given[0].replace('_', '-')}"
        raise EdgerunError(f"{arguments.bundle} is a {kind} bundle: {option} is for {other} bundles")
    if kind == "video":
        return emit(bench(arguments, tools.command), arguments)
    paths = [arguments.bundle] + ([] if arguments.against is None else [arguments.against])
    report = bench_bundles(
        paths,
        arguments.prompt_tokens or _PROMPT_TOKENS,
        _NEW_TOKENS if arguments.new_tokens is None else arguments.new_tokens,
        repeats=arguments.repeats,
        device_name=arguments.device,
        threads=arguments.threads,
        command=tools.command,
    )
    return emit(report, arguments)


def bench_bundles(
    paths: Sequence[pathlib.Path],
    prompt_tokens: Sequence[int],
    new_tokens: int,
    *,
    repeats: int = 3,
    device_name: str = "host",
    threads: int | None = None,
    command: str = "",
) -> Report:
    """Time one text bundle, or two in turns (ratios are of the first over the second).

    Raises BundleError or DeviceError, or EdgerunError when no workload fits the context.
    """
    from edgerun.bundle import Bundle

    bundles = [Bundle.open(path, kind="text") for path in paths]
    context = min(int(bundle.manifest["context"]["max_context"]) for bundle in bundles)
    vocabulary = min(int(bundle.manifest["tokens"]["vocab_size"]) for bundle in bundles)
    workloads = workloads_within(context, prompt_tokens, new_tokens)
    runs = _measure(paths, workloads, vocabulary, repeats, device_name, threads)
    names = [path.stem for path in paths]
    report = begin_report("bench", f"edgerun bench: {' against '.join(names)} on {device_name}", command)
    facts: list[tuple[str, Cell]] = [("device", device_name), ("repeats", repeats)]
    facts += [(f"build of {name}", bundle.build) for name, bundle in zip(names, bundles, strict=True)]
    left_out = [n for n in prompt_tokens if n > context]
    notes = (
        (f"Left out, beyond the context of {context:,} tokens: {', '.join(map(str, left_out))}.",) if left_out else ()
    )
    tables = (_speed_table(names, workloads, runs), _cost_table(names, workloads, runs))
    plots = (prefill_plot(names, workloads, runs),)
    return dataclasses.replace(report, facts=tuple(facts), tables=tables, plots=plots, notes=notes)


def workloads_within(context: int, prompt_tokens: Sequence[int], new_tokens: int) -> list[Workload]:
    """The workloads that fit: a prompt that leaves no room to generate is only prefilled, and generation is timed
    once more as deep as it fits. Raises EdgerunError when no prompt fits.
    """
    fitting = sorted({n for n in prompt_tokens if n <= context})
    if not fitting:
        raise EdgerunError(f"no prompt of -p fits the context of {context:,} tokens: pass shorter ones")
    workloads = [Workload(n, new_tokens if n + new_tokens <= context else 0) for n in fitting]
    deepest = context - new_tokens
    if new_tokens and workloads[-1].new_tokens == 0 and deepest > 0 and deepest not in fitting:
        workloads.append(Workload(deepest, new_tokens))
    return workloads


def _measure(
    paths: Sequence[pathlib.Path],
    workloads: Sequence[Workload],
    vocabulary: int,
    repeats: int,
    device_name: str,
    threads: int | None,
) -> dict[tuple[int, Workload], list[Timing]]:
    """Timings by (bundle's index, workload). The shortest workload runs once before, uncounted, for each bundle."""
    import tqdm

    from edgerun.devices import open_device

    device = open_device(device_name)
    ids = random.Random(_PROMPT_SEED).choices(range(vocabulary), k=max(w.prompt_tokens for w in workloads))
    shortest = min(workloads, key=lambda workload: workload.prompt_tokens)
    plan = [(index, shortest, False) for index in range(len(paths))]
    plan += [(index, workload, True) for _ in range(repeats) for workload in workloads for index in range(len(paths))]
    runs: dict[tuple[int, Workload], list[Timing]] = {}
    for index, workload, counts in tqdm.tqdm(plan, desc="bench", leave=False, disable=None):
        measured, _ = generate_on(
            device,
            paths[index],
            ids[: workload.prompt_tokens],
            max_new_tokens=workload.new_tokens,
            threads=threads,
            stop_ids=(),
        )
        if counts:
            runs.setdefault((index, workload), []).append(measured)
    return runs


def prefill_seconds(runs: Sequence[Timing]) -> Estimate:
    """Mean prefill time with its standard deviation and range, in seconds."""
    return estimate([run.prefill_s for run in runs])


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard deviation of repeats; no deviation of one value."""
    return Estimate(statistics.fmean(values), sd=statistics.stdev(values) if len(values) > 1 else None, n=len(values))


def _tests(workload: Workload, runs: Sequence[Timing]) -> list[tuple[str, list[float]]]:
    """(llama-bench's name of a test, tokens per second of each run)."""
    tests = [(f"pp{workload.prompt_tokens}", [run.prompt_tokens / run.prefill_s for run in runs])]
    decode = [1 / run.decode_s_per_token for run in runs if run.decode_s_per_token]
    if decode:
        tests.append((f"tg{workload.new_tokens}@{workload.prompt_tokens}", decode))
    return tests


def _speed_table(
    names: Sequence[str], workloads: Sequence[Workload], runs: dict[tuple[int, Workload], list[Timing]]
) -> Table:
    columns = [Column("test"), *(Column(name, "tokens/s", 1) for name in names)]
    if len(names) == 2:
        columns.append(Column(f"{names[0]} / {names[1]}", "×", 2))
    rows = []
    for workload in workloads:
        sides = [_tests(workload, runs[index, workload]) for index in range(len(names))]
        for tests in zip(*sides, strict=True):
            row: list[Cell] = [tests[0][0], *(estimate(speeds) for _, speeds in tests)]
            if len(names) == 2:
                row.append(estimate([a / b for a, b in zip(tests[0][1], tests[1][1], strict=True)]))
            rows.append(tuple(row))
    return Table(
        "Speed", tuple(columns), tuple(rows), "mean ± standard deviation; pp: prefill, tg: generation after a prompt"
    )


def _cost_table(
    names: Sequence[str], workloads: Sequence[Workload], runs: dict[tuple[int, Workload], list[Timing]]
) -> Table:
    columns = (
        Column("bundle"),
        Column("prompt", "tokens"),
        Column("load", "s", 3),
        Column("prefill", "s", 3),
        Column("decode", "ms/token", 2),
        Column("peak RSS", "MiB", 1),
        Column("density", "%", 1),
    )
    rows = []
    for index, name in enumerate(names):
        for workload in workloads:
            measured = runs[index, workload]
            decode = [1e3 * run.decode_s_per_token for run in measured if run.decode_s_per_token is not None]
            memory = [run.peak_rss_bytes / 2**20 for run in measured if run.peak_rss_bytes is not None]
            density = measured[0].density
            row: tuple[Cell, ...] = (
                name,
                workload.prompt_tokens,
                statistics.fmean(run.load_s for run in measured),
                prefill_seconds(measured),
                estimate(decode) if decode else None,
                max(memory) if memory else None,
                None if density is None else 100 * density,
            )
            rows.append(row)
    return Table("Cost", columns, tuple(rows), "density: attended of all causal pairs, prompt and generation together")


def prefill_plot(
    names: Sequence[str], workloads: Sequence[Workload], runs: dict[tuple[int, Workload], list[Timing]]
) -> Plot:
    """Prefill time against prompt length, one line a bundle, bars from the fastest to the slowest run."""
    series = []
    for index, name in enumerate(names):
        points = []
        for workload in sorted(workloads, key=lambda w: w.prompt_tokens):
            seconds = [run.prefill_s for run in runs[index, workload]]
            points.append(
                (
                    float(workload.prompt_tokens),
                    Estimate(statistics.fmean(seconds), min(seconds), max(seconds), n=len(seconds)),
                )
            )
        series.append(Series(name, tuple(points)))
    return Plot(
        "Prefill time against prompt length",
        Axis("prompt", "tokens", log=True),
        Axis("prefill", "s"),
        tuple(series),
        "Mean; bars from the fastest to the slowest run. Lower is better.",
    )
