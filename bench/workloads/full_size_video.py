"""The largest video models at full size, within a memory limit: made, exported, and run by edgerun-runner.

    python bench/workloads/full_size_video.py --work FOLDER [--models denoiser text_encoder]

`denoiser` is STDiT3-XL/2 (1.2 billion parameters, float32), `text_encoder` a T5 v1.1 encoder of XXL's size (4.8
billion, from bfloat16 to int8), both of full_size_checkpoint.py. Every run is the runner in a memory box
(bench/memory_box.py) of 1.1 times its limit, files evicted from the page cache before; its result must be that of a run
without a limit, bit for bit. Runs that must fail are rows too: half the smallest limit that is feasible, and no limit
in the same box. Rows are kept as they come, good or bad, and the same command goes on after a stop; checkpoints and
bundles are removed when nothing needs them any more.

From the runs follow, computed anew each time, l, e, alpha and r of block streaming, and for the denoiser what all
techniques gain together over one block after another against what they gain one by one (full_size_factors.py). At the
end a table says what must hold; the exit status is 1 where something does not.

What is hidden (h, streaming_formula.py) is of loads alone and of all passes; `hidden_share_with_unload` is the
runner's, with what unloading costs and without the first of several passes, which measures in turn. Neither is given
where a run goes over its files again and the page cache could have kept them: the kernel is asked before and after
the run. In a cgroup the cache is what the box leaves; a chain that goes round finds nothing in so little, since what
it read last is what it needs last.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import shutil
import statistics
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.harness import RESULTS, ResultFile, Row
from bench.memory_box import memory_box
from bench.workloads.checks import Check, bounded, require
from bench.workloads.export_memory import export_in_child
from bench.workloads.full_size_checkpoint import MODELS, Model, make_checkpoint
from bench.workloads.full_size_factors import (
    IN_TURN,
    LEAST_REACHED,
    MERGED_RESIDENT,
    PLAIN_RESIDENT,
    ROOMY,
    STREAMED,
    TOGETHER,
    WholeRun,
    denoiser_rows,
    lines,
    spread,
    text_encoder_rows,
)
from bench.workloads.page_cache import cached_bytes, evict
from bench.workloads.streaming_formula import hidden_share
from edgerun._library import runner_path
from edgerun.bundle import Bundle
from edgerun.errors import EdgerunError

BOX = 1.1  # times the limit
EXPORT_LIMIT_BYTES = 3_000_000_000
HIDDEN_IN_TURN_BELOW = 0.1
# Of the programs' bytes, in the page cache: before a run, and after one that loads a program more than once.
CACHED_BEFORE, CACHED_AFTER = 0.01, 0.1
PLAIN = ("--merge-steps", "0")
EVERYTHING = ("--prefetch", "64")  # a single pass gives a block back once it is executed
SHORT_EVALUATIONS = 3  # of runs whose steps are of interest, the first of which measures
ROOMY_SHARE = 1.25  # of the limit: where XL/2 has room to load a block ahead, which it does not have within 1 GB
SMALL_TOKENS, LONG_TOKENS = 20, 300
PROMPT_TOKENS = 100  # of the denoiser's runs


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run: the settings that a result file belongs to."""

    frames: int = 54  # 16 latent ones
    height: int = 144
    width: int = 256
    limit_bytes: int = 1_000_000_000
    threads: int = 1
    steps: int = 6  # of the denoiser's short run
    evaluations: int = 4  # of it with LPL, all with TDTM in the parts that are the default

    def __post_init__(self) -> None:
        """Raises ValueError for a short run of which there is no second step, or in which LPL leaps over none."""
        if not 2 <= self.evaluations < self.steps:
            raise ValueError(f"{self.evaluations} evaluations of {self.steps} steps: they are 2 at least, and fewer")


# ---------------------------------------------------------------- the runs


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of the runner, and what must come of it."""

    name: str
    options: tuple[str, ...]
    stage: str  # whose figures are of interest
    limited: bool = True  # by the plan's limit, in a box of BOX times that
    limit_share: float = 1.0  # of the plan's limit
    same_as: str = ""  # the case whose result this one must have, bit for bit
    least: float = 0.0  # instead of the plan's limit: so many times the smallest
    box_alone: bool = False  # no limit is given, and the box is as if one were
    fails: bool = False
    in_turn: bool = False  # nothing is loaded ahead
    evaluations: int | None = None  # of the denoiser, where they matter


def cases(name: str, plan: Plan) -> list[Case]:
    """The runs of a model, in order. What is set against each other follows each other."""
    if name == "denoiser":
        # Each run encodes the prompt anew: a saved state would bring its own leap.
        prompt = ("--tokens", ",".join(str(3 + i % 3) for i in range(PROMPT_TOKENS - 1)) + ",1")
        one, two = ((*prompt, "--times", times, *PLAIN) for times in ("1", "1,0.5"))
        times = (*prompt, "--times", ",".join(f"{1 - i / plan.steps:.6g}" for i in range(plan.steps)))
        plain = (*times, *PLAIN)
        together = (*times, "--merge-steps", str(plan.evaluations), "--leap", f"fixed:{plan.evaluations}")
        in_turn = (*plain, "--prefetch", "0")
        short = (*plain, "--leap", f"fixed:{SHORT_EVALUATIONS}")
        return [
            Case("one step, all ahead", (*one, *EVERYTHING), "denoise", limited=False),
            Case("one step", one, "denoise", same_as="one step, all ahead"),
            Case("half the smallest limit", one, "denoise", least=0.5, fails=True),
            Case("two steps, the box alone", two, "denoise", box_alone=True, fails=True),
            Case(PLAIN_RESIDENT, plain, "denoise", limited=False, evaluations=plan.steps),
            Case(MERGED_RESIDENT, together, "denoise", limited=False, evaluations=plan.evaluations),
            Case(TOGETHER, together, "denoise", same_as=MERGED_RESIDENT, evaluations=plan.evaluations),
            Case(
                IN_TURN,
                in_turn,
                "denoise",
                same_as=PLAIN_RESIDENT,
                least=1.05,
                in_turn=True,
                evaluations=plan.steps,
            ),
            Case(STREAMED, short, "denoise", evaluations=SHORT_EVALUATIONS),
            Case(
                ROOMY,
                short,
                "denoise",
                limit_share=ROOMY_SHARE,
                same_as=STREAMED,
                evaluations=SHORT_EVALUATIONS,
            ),
        ]
    found = []
    for count in (SMALL_TOKENS, LONG_TOKENS):
        tokens = ("--tokens", ",".join(str(3 + 17 * i % 60) for i in range(count)))
        free = f"{count} tokens, all ahead"
        found += [
            Case(free, (*tokens, *EVERYTHING), "encode", limited=False),
            Case(f"{count} tokens", tokens, "encode", same_as=free),
            Case(f"{count} tokens, no prefetch", (*tokens, "--prefetch", "0"), "encode", same_as=free, in_turn=True),
        ]
    return [
        *found,
        Case(f"{count} tokens, smallest limit", tokens, "encode", same_as=free, least=1.05),
        Case("half the smallest limit", tokens, "encode", least=0.5, fails=True),
        # Of a single pass so little stays that no limit is needed in the plan's box, but in this one.
        Case(
            f"{count} tokens, the box of the smallest limit alone",
            (*tokens, *EVERYTHING),
            "encode",
            least=1.05,
            box_alone=True,
            fails=True,
        ),
    ]


def smallest_limit_bytes(run: Row) -> int:
    """The smallest memory limit in which every chain of a run fits. run: of the runner's report, of a run with a limit.

    It is what the process takes without a model, the largest program while it is loaded, and activations.
    """
    chains = [
        stage["chain"] for stage in run["stages"].values() if stage and stage["chain"]["budget_bytes"] is not None
    ]
    return max(
        run["memory_limit_bytes"]
        - chain["budget_bytes"]
        + chain["activation_bytes"]
        + max(block["loading_bytes"] for block in chain["blocks"])
        for chain in chains
    )


def limits(case: Case, plan: Plan, least_bytes: int) -> tuple[int | None, int | None]:
    """The memory limit that the runner is given, and that of its box. least_bytes: the smallest that is feasible."""
    if case.box_alone:
        return None, int(BOX * (case.least * least_bytes if case.least > 0.0 else plan.limit_bytes))
    if not case.limited:
        return None, None
    if case.least > 0.0:
        limit = int(case.least * least_bytes)
        # A run that must fail has room to: it is to say no, not to be killed.
        return limit, int(BOX * max(limit, least_bytes))
    limit = int(case.limit_share * plan.limit_bytes)
    return limit, int(BOX * limit)


def run_case(case: Case, bundle: pathlib.Path, plan: Plan, least_bytes: int) -> Row:
    """The row of one case, however the run ends."""
    limit, box_bytes = limits(case, plan, least_bytes)
    result = bundle.with_name("result")
    result.unlink(missing_ok=True)
    command: list[str | pathlib.Path] = [runner_path(), bundle, "--no-verify", "--threads", str(plan.threads)]
    command += case.options
    if case.stage == "encode":
        command += ["--stop-after", "encode", "--state-out", result]
    else:
        command += ["--latent-out", result]
    command += [] if limit is None else ["--memory-limit", str(limit)]
    programs = sorted((bundle / "programs").iterdir())
    evict(programs)
    cache = {"programs_bytes": sum(path.stat().st_size for path in programs), "before_bytes": cached_bytes(programs)}
    with memory_box(box_bytes) as box:
        done = box.run(command)
        cache["after_bytes"] = cached_bytes(programs)
    row: Row = {"case": case.name, "memory_limit_bytes": limit, "box_bytes": box_bytes, "box": box.kind}
    row |= {"status": done.status, "killed": done.killed, "box_peak_bytes": done.peak_bytes, "wall_s": done.wall_s}
    row |= {"wrote_result": result.exists(), "page_cache": cache}
    if done.status != 0 or not result.exists():
        return row | {"message": done.errors.strip().replace(str(bundle), bundle.name)}
    run = json.loads(done.output)["run"]
    row |= {"result_sha256": hashlib.sha256(result.read_bytes()).hexdigest(), **_figures(run, case.stage)}
    if limit is not None:
        row["smallest_limit_bytes"] = smallest_limit_bytes(run)
    if why := withheld(row):
        row |= {"hidden_share": None, "hidden_share_with_unload": None, "hidden_share_withheld": why}
    return row


def withheld(row: Row) -> str:
    """Why a run's hidden share says nothing of loads from the disk; empty where it does."""
    cache = row["page_cache"]
    before, after = (cache[f"{when}_bytes"] / cache["programs_bytes"] for when in ("before", "after"))
    if before > CACHED_BEFORE:
        return f"{before:.2f} of the programs were in the page cache before the run"
    if after > CACHED_AFTER and any(block["loads"] > 1 for block in row["blocks"]):
        return f"{after:.2f} of the programs, which were loaded again, were in the page cache after the run"
    return ""


def _figures(run: Row, stage: str) -> Row:
    """What is of interest in a report. Times in milliseconds."""
    chain = run["stages"][stage]["chain"]
    passes, blocks = chain["passes"], chain["blocks"]
    load, execute = passes["load_ms"], passes["execute_ms"]
    stems = [block["name"].rstrip("0123456789") for block in blocks]
    repeated = [block for block, stem in zip(blocks, stems, strict=True) if stem == statistics.mode(stems)]

    def each(what: str, count: str) -> dict[str, Any]:
        return spread([block[what] / block[count] for block in repeated])

    return {
        "peak_rss_bytes": run["peak_rss_bytes"],
        "stage_wall_ms": run["stages"][stage]["wall_ms"],
        "evaluations": run["evaluations"],
        "steps": [{"wall_ms": step["wall_ms"], "merged": step["merged"]} for step in run["steps"]],
        "passes": passes["count"],
        "load_ms": load,
        "unload_ms": passes["unload_ms"],
        "execute_ms": execute,
        "load_over_execute": load / execute,
        "passes_wall_ms": passes["wall_ms"],
        "hidden_share": hidden_share(load, execute, passes["wall_ms"]),
        "hidden_share_with_unload": chain["hidden_share"],  # of the passes that did not measure
        "resident_blocks": chain["resident_blocks"],
        "prefetch": chain["prefetch"],
        "budget_bytes": chain["budget_bytes"],
        "activation_bytes": chain["activation_bytes"],
        "repeated": {
            "blocks": len(repeated),
            "load": each("load_ms", "loads"),
            "execute": each("execute_ms", "executions"),
            "loaded_bytes": max(block["loaded_bytes"] for block in repeated),
        },
        "blocks": blocks,
    }


# ---------------------------------------------------------------- what must hold


def checks(name: str, plan: Plan, rows: list[Row]) -> list[Check]:
    """What must hold of a model's rows, also where they are missing."""
    export = next((row for row in rows if row["kind"] == "export" and row["model"] == name), {})
    found = [
        bounded(f"{name}, export: peak RSS", export.get("peak_rss_bytes"), "<=", EXPORT_LIMIT_BYTES, _gigabytes),
    ]
    by_case = {row["case"]: row for row in runs_of(name, rows)}
    for case in cases(name, plan):
        found += _checks_of_case(name, case, by_case)
    if name == "denoiser":
        ahead = by_case.get(ROOMY, {}).get("prefetch")
        found.append(bounded(f"denoiser, {ROOMY}: programs loaded ahead", ahead, ">=", 1, "{:.0f}".format))
        share = next((row for row in rows if row["kind"] == "factors"), {}).get("reached_share")
        found.append(bounded("denoiser, all together: reached of the product", share, ">=", LEAST_REACHED))
    return found


def _checks_of_case(name: str, case: Case, by_case: dict[str, Row]) -> list[Check]:
    title, row = f"{name}, {case.name}", by_case.get(case.name)
    if row is None:
        return [Check(title, "not measured", "a row", False)]
    ended = f"killed in {row['box']}" if row["killed"] else f"status {row['status']} in {row['box']}"
    if case.box_alone:
        return [Check(title, ended, "to fail", row["status"] != 0 and not row["wrote_result"])]
    if case.fails:
        message = row.get("message", "")
        clean = row["status"] == 2 and not row["killed"] and not row["wrote_result"]
        told = f"{ended}, {len(message.splitlines())} lines"
        return [Check(title, told, "status 2, one line, no file", clean and len(message.splitlines()) == 1)]
    if "result_sha256" not in row:
        said = row["message"].splitlines()[:1]
        return [Check(title, ": ".join([ended, *said]), "to end well", False)]
    found = [Check(title, ended, "to end well", True)]
    if case.evaluations is not None:
        count = row["evaluations"]
        found.append(Check(f"{title}: evaluations", str(count), str(case.evaluations), count == case.evaluations))
    if row["memory_limit_bytes"] is not None:
        peak = bounded(f"{title}: peak RSS", row["peak_rss_bytes"], "<=", row["memory_limit_bytes"], _gigabytes)
        found.append(peak)
    if case.same_as:
        same = by_case.get(case.same_as, {}).get("result_sha256") == row["result_sha256"]
        found.append(Check(f"{title}: result", "equal" if same else "different", f"that of {case.same_as!r}", same))
    if case.in_turn:
        found.append(bounded(f"{title}: h", row["hidden_share"], "<", HIDDEN_IN_TURN_BELOW))
    return found


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3f} GB"


# ---------------------------------------------------------------- all of it


def runs_of(name: str, rows: list[Row]) -> list[Row]:
    """The runs of a model."""
    return [row for row in rows if row["kind"] == "run" and row["model"] == name]


def measure_model(model: Model, plan: Plan, work: pathlib.Path, results: ResultFile, keep: bool) -> None:
    """Every row of one model that the results lack."""
    planned = cases(model.name, plan)
    kinds = [{"kind": "export", "model": model.name}]
    kinds += [{"kind": "run", "model": model.name, "case": case.name} for case in planned]
    if all(results.find(key) for key in kinds):
        return
    folder, bundle = work / f"{model.name}-checkpoint", work / f"{model.name}.edgerun"
    if results.find(kinds[0]) is None or not bundle.is_dir():
        facts = make_checkpoint(folder, model)
        shutil.rmtree(bundle, ignore_errors=True)
        print("exporting", flush=True)
        options = ["--frames", "17", "--height", "64", "--width", "64"]
        if model.name == "denoiser":
            options = ["--frames", str(plan.frames), "--height", str(plan.height), "--width", str(plan.width)]
            options += ["--tdtm", "0"]  # possible, and asked for by the run
        options += ["--quantize", model.quantize]
        exported = export_in_child(folder, bundle, options)
        manifest = Bundle.open(bundle).manifest
        row = {**kinds[0], "options": options, "dtype": str(model.dtype).removeprefix("torch."), **facts}
        row |= {**exported, "bundle_bytes": sum(file["bytes"] for file in manifest["files"].values())}
        row |= {"worst_parity": max(manifest["parity"].values())}
        row |= {"worst_quantization": max(manifest.get("quantization", {"": None}).values())}
        if results.find(kinds[0]) is None:
            results.add(row)
        print(f"  peak {exported['peak_rss_bytes'] / 1e9:.2f} GB, {exported['seconds']:.0f} s", flush=True)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    for key, case in zip(kinds[1:], planned, strict=True):
        if results.find(key) is None:
            known = (row.get("smallest_limit_bytes") for row in runs_of(model.name, results.rows))
            least = next(filter(None, known), 0)
            if case.least > 0.0 and least == 0:
                print(f"  {case.name}: left out, since no run within a limit ended well", flush=True)
                continue
            results.add({**key, **run_case(case, bundle, plan, least)})
            print(line(results.rows[-1]), flush=True)
    if not keep:
        shutil.rmtree(bundle, ignore_errors=True)


def derive(name: str, whole: WholeRun, results: ResultFile) -> None:
    """Put the rows that are computed from a model's runs in the place of those that were there."""
    kinds = {"denoiser": ("factors", "tdtm", "whole_run"), "text_encoder": ("formula",)}[name]
    results.rows = [row for row in results.rows if row["kind"] not in kinds]
    runs = runs_of(name, results.rows)
    found = denoiser_rows(runs, whole) if name == "denoiser" else text_encoder_rows(runs, (SMALL_TOKENS, LONG_TOKENS))
    for row in found:
        results.add({**row, "model": name})
        print(lines(row), flush=True)


def line(row: Row) -> str:
    """A run in one line."""
    text = f"  {row['case']}: status {row['status']} in {row['box']}, {row['wall_s']:.0f} s"
    if "hidden_share" not in row:
        return f"{text}; {row['message'] or 'nothing is said'}"
    shares = (row["hidden_share"], row["hidden_share_with_unload"])
    hidden, with_unload = ("–" if share is None else f"{share:.2f}" for share in shares)
    each = row["repeated"]
    load, execute = (each[what]["median_ms"] for what in ("load", "execute"))
    return (
        f"{text}; peak {row['peak_rss_bytes'] / 1e6:.0f} MB, {row['resident_blocks']} resident, prefetch "
        f"{row['prefetch']}; {each['blocks']} blocks, each loads in {load:.0f} ms and executes in {execute:.0f} ms; "
        f"h {hidden} ({with_unload} with unloading, without the first pass of several)"
        + (f"; {row['hidden_share_withheld']}" if "hidden_share_withheld" in row else "")
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="a folder on a disk with 15 GB to spare")
    parser.add_argument("--models", nargs="+", choices=("denoiser", "text_encoder"), help="default: both")
    for kind in (Plan, WholeRun):
        group = parser.add_argument_group((kind.__doc__ or "").splitlines()[0].rstrip("."))
        for field in dataclasses.fields(kind):
            of_both = kind is WholeRun and field.name in {one.name for one in dataclasses.fields(Plan)}
            name = f"whole_{field.name}" if of_both else field.name
            group.add_argument(f"--{name.replace('_', '-')}", type=int, default=field.default, help="%(default)s")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "full_size_video.json")
    parser.add_argument("--keep", action="store_true", help="leave checkpoints and bundles in the folder")
    parser.add_argument("--fresh", action="store_true", help="measure every row anew")
    values = vars(parser.parse_args(arguments))
    try:
        plan = Plan(**{field.name: values[field.name] for field in dataclasses.fields(Plan)})
        whole = WholeRun(values["whole_steps"], values["whole_evaluations"], values["merge_steps"])
    except ValueError as error:
        parser.error(str(error))
    chosen = [model for name, model in MODELS.items() if name in (values["models"] or MODELS)]
    for model in chosen:
        print(f"{model.name}: {model.cost}", flush=True)
    work: pathlib.Path = values["work"]
    work.mkdir(parents=True, exist_ok=True)
    given = [argument for argument in arguments or sys.argv[1:] if argument != str(work)]
    command = " ".join(["python", "bench/workloads/full_size_video.py", *given]).replace("--work", "--work FOLDER")
    results = ResultFile(values["output"], command, dataclasses.asdict(plan), fresh=values["fresh"])
    try:
        for model in chosen:
            measure_model(model, plan, work, results, values["keep"])
            derive(model.name, whole, results)
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    print(f"\nwrote {values['output'].name}")
    require([check for model in chosen for check in checks(model.name, plan, results.rows)])


if __name__ == "__main__":
    main()
