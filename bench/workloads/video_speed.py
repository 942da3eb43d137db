"""How fast each way of sampling denoises a small text-to-video checkpoint, and whether what is fast keeps the quality.

    python bench/workloads/video_speed.py --checkpoint FOLDER --work FOLDER [--repeats 7]

Exports two bundles, one that cannot merge frames and one that can. Every method runs once in each round, in a process
of its own, with the same caption and noise; the baseline is plain sampling of the bundle that cannot merge. Its
denoising time over a method's, in the same round, is the method's speed; what is said of it is the median over the
rounds. Quality is not measured here: which limits a method keeps is read from video_quality.json (video_quality.py) of
the same checkpoint. Ends with status 1 where no method that keeps every limit is as fast as the goal.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import statistics
import sys
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.harness import RESULTS, ResultFile
from bench.video_quality_page import PLAIN, gates_broken
from bench.workloads.video_quality import add_method_options, check_step_counts, merged_share
from edgerun.bundle import Bundle
from edgerun.commands.common import begin_report
from edgerun.commands.video import prompt_tokenizer, prompt_tokens
from edgerun.devices import VideoRunRequest, open_device
from edgerun.errors import EdgerunError
from edgerun.evaluation import clips
from edgerun.library_noise import quiet_libraries
from edgerun.models.solvers import Solver, respaced
from edgerun.report import Cell, Check, Column, Estimate, Report, Table, to_text
from edgerun.sessions.video import Leap
from edgerun.video_recipe import VideoRecipe

GOAL = 1.8  # times as fast as plain sampling, with every limit of quality kept
CAN_MERGE, CANNOT = "video_that_merges.edgerun", "video.edgerun"
PLAIN_THAT_CAN = "plain, of programs that can merge"
SEED = 2026


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: the settings that a result file belongs to."""

    checkpoint: str  # sha256
    steps: int
    evaluations: int  # of the fixed leap and of re-spaced Euler
    solver_steps: tuple[int, ...]  # of the second-order sampler; `evaluations` beside them
    merged_solver_steps: int  # of it with TDTM
    merge_steps: tuple[int, ...]
    repeats: int
    threads: int


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to run one of the bundles. The name is the one of video_quality.py."""

    name: str
    bundle: str
    steps: int
    leap: Leap
    merge_steps: int = 0
    solver: Solver = "euler"


def methods(plan: Plan) -> list[Method]:
    """The baseline first."""
    none, leap, few = Leap("none"), Leap("fixed", plan.evaluations), plan.evaluations
    found = [
        Method(PLAIN, CANNOT, plan.steps, none),
        Method(PLAIN_THAT_CAN, CAN_MERGE, plan.steps, none),
        Method(f"LPL after {few}", CANNOT, plan.steps, leap),
        Method(f"Euler, {few} steps", CANNOT, few, none),
    ]
    found += [
        Method(f"ab2, {count} steps", CANNOT, count, none, solver="ab2")
        for count in sorted({few, *plan.solver_steps}, reverse=True)
    ]
    for count in plan.merge_steps:
        found += [
            Method(f"TDTM, {count} steps", CAN_MERGE, plan.steps, none, count),
            Method(f"LPL after {few} and TDTM, {count} steps", CAN_MERGE, plan.steps, leap, count),
        ]
    fewer = plan.merged_solver_steps
    for share in sorted({merged_share(count, plan.steps, fewer) for count in plan.merge_steps}):
        found.append(Method(f"ab2, {fewer} steps and TDTM, {share} steps", CAN_MERGE, fewer, none, share, "ab2"))
    return found


def make_bundles(checkpoint: pathlib.Path, work: pathlib.Path) -> dict[str, Bundle]:
    """The two bundles, exported where they are not there."""
    from edgerun.export.video_pipeline import export_video_bundle

    found = {}
    for name, recipe in ((CANNOT, VideoRecipe()), (CAN_MERGE, VideoRecipe(merge_possible=True))):
        path = work / name
        print(f"exporting {name}, unless it is there", flush=True)
        export_video_bundle(checkpoint, recipe, path, overwrite=True, parallel=True)
        found[name] = Bundle.open(path, kind="video")
    return found


def measure(bundles: dict[str, Bundle], plan: Plan) -> list[dict[str, Any]]:
    """A row for each method, with a sample for each round after one that is not counted."""
    caption = clips.prompts(1, SEED)[0].caption()
    device, ways = open_device("host"), methods(plan)
    samples: dict[str, list[dict[str, Any]]] = {way.name: [] for way in ways}
    for turn in tqdm(range(plan.repeats + 1), desc="rounds", disable=None):
        for way in ways:
            bundle = bundles[way.bundle]
            tokens = prompt_tokens(prompt_tokenizer(bundle), caption)
            own = tuple(bundle.manifest["video"]["times"])
            request = VideoRunRequest(
                tokens=tokens,
                seed=SEED,
                times=own if way.steps == len(own) else tuple(respaced(own, way.steps)),
                solver=way.solver,
                leap=way.leap,
                merge_steps=way.merge_steps,
                threads=plan.threads,
            )
            if turn:
                samples[way.name].append(device.run(bundle.path, request).clip.report)
            else:
                device.run(bundle.path, request)
    rows = []
    for name, runs in samples.items():
        chains = [run["stages"]["denoise"] for run in runs]
        rows.append(
            {
                "kind": "method",
                "method": name,
                "denoise_ms": [chain["wall_ms"] for chain in chains],
                "execute_ms": [chain["chain"]["passes"]["execute_ms"] for chain in chains],
                "wall_ms": [sum(run["stages"][stage]["wall_ms"] for stage in run["stages"]) for run in runs],
                "evaluations": runs[0]["evaluations"],
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
            }
        )
    return rows


def quality_of(path: pathlib.Path, checkpoint: str) -> dict[str, list[str]]:
    """For each method of a quality file of the same checkpoint, which limits it does not keep. Raises EdgerunError."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["method"]: row for row in whole["rows"] if row["kind"] == "method"}
        of = whole["settings"]["checkpoint"]
    except (OSError, ValueError, KeyError) as error:
        raise EdgerunError(f"{path} has no quality to read ({error}): run bench/workloads/video_quality.py") from None
    if of != checkpoint or PLAIN not in rows:
        raise EdgerunError(f"{path} is of another checkpoint: run bench/workloads/video_quality.py on this one first")
    return {name: [] if name == PLAIN else gates_broken(rows[PLAIN], row) for name, row in rows.items()}


def speed_report(rows: list[dict[str, Any]], broken: dict[str, list[str]], command: str) -> Report:
    """The table, and whether the fastest of those that keep every limit is as fast as the goal."""
    base = next(row for row in rows if row["method"] == PLAIN)
    table: list[tuple[Cell, ...]] = []
    kept: dict[str, float] = {}
    for row in rows:
        pairs = zip(base["denoise_ms"], row["denoise_ms"], strict=True)
        speed = _spread([plain / own for plain, own in pairs])
        name = row["method"]
        lost = broken.get(PLAIN if name == PLAIN_THAT_CAN else name)
        if lost == []:
            kept[name] = speed.value
        seconds = _spread([value / 1e3 for value in row["denoise_ms"]])
        peak = row["peak_rss_bytes"] / 2**20
        quality = "not measured" if lost is None else ", ".join(lost) or "keeps all"
        table.append((name, row["evaluations"], seconds, speed, peak, quality))
    best = max(kept, key=lambda name: kept[name])
    fastest = max(table, key=lambda row: row[3].value if isinstance(row[3], Estimate) else 0.0)
    assert isinstance(fastest[3], Estimate)
    verdict = (
        f"Of what keeps every limit of quality the fastest is {best}: {kept[best]:.2f} times plain sampling; "
        f"the fastest of all is {fastest[0]} with {fastest[3].value:.2f} ({fastest[5]})."
    )
    columns = (
        Column("method"),
        Column("evaluations"),
        Column("denoising", "s", 2),
        Column("speed", "times plain", 2),
        Column("peak RSS", "MiB", 0),
        Column("quality"),
    )
    note = "Medians over the rounds with their range; speeds are of pairs of one round. Limits: video_quality.html."
    report = begin_report("bench", "Ways to sample a clip: speed", command)
    return dataclasses.replace(
        report,
        verdict=verdict,
        tables=(Table(f"{len(base['denoise_ms'])} rounds", columns, tuple(table), note),),
        checks=(Check("speed with every limit kept, times plain", kept[best], GOAL, True, kept[best] >= GOAL),),
    )


def _spread(values: list[float]) -> Estimate:
    return Estimate(statistics.median(values), min(values), max(values), n=len(values))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="a text-to-video folder")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="where the bundles are kept")
    parser.add_argument("--evaluations", type=int, default=19, help="of leap and Euler; default: %(default)s")
    add_method_options(parser)
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--quality", type=pathlib.Path, default=RESULTS / "video_quality.json")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "video_speed.json")
    given = parser.parse_args(arguments)
    quiet_libraries()
    try:
        from edgerun.models.text_to_video import VideoCheckpoint

        checkpoint = VideoCheckpoint.open(given.checkpoint)
        steps = checkpoint.settings.steps
        check_step_counts(parser, given, steps)
        if min(given.repeats, given.threads) < 1:
            parser.error(f"--repeats is {given.repeats} and --threads {given.threads}; both are at least 1")
        whole = checkpoint.sha256()
        broken = quality_of(given.quality, whole)
        plan = Plan(
            whole,
            steps,
            given.evaluations,
            tuple(given.solver_steps),
            given.merged_solver_steps,
            tuple(given.merge_steps),
            given.repeats,
            given.threads,
        )
        words = sys.argv[1:] if arguments is None else arguments
        command = " ".join(["python", "bench/workloads/video_speed.py", *words])
        results = ResultFile(given.output, command, dataclasses.asdict(plan), fresh=True)
        work = given.work / hashlib.sha256(repr((whole, plan.steps)).encode()).hexdigest()[:16]
        work.mkdir(parents=True, exist_ok=True)
        for row in measure(make_bundles(given.checkpoint, work), plan):
            results.add(row)
        report = speed_report(results.rows, broken, command)
        print(to_text(report, colour=sys.stdout.isatty()), end="", flush=True)
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    print(f"\nwrote {given.output}")
    if not all(check.passed for check in report.checks):
        sys.exit(1)


if __name__ == "__main__":
    main()
