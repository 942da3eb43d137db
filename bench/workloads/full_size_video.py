"""The largest video models at full size, within a memory limit: made, exported, and run by edgerun-runner.

    python bench/workloads/full_size_video.py --work FOLDER [--models denoiser text_encoder]

`denoiser` is STDiT3-XL/2 (1.2 billion parameters, float32), `text_encoder` a T5 v1.1 encoder of XXL's size (4.8
billion, from bfloat16 to int8), both of full_size_checkpoint.py. Every run is the runner in a memory box
(bench/memory_box.py) of 1.1 times its limit, files evicted from the page cache before; its result must be that of a run
without a limit, bit for bit. Runs that must fail are rows too: half the smallest limit that is feasible, and no limit
in the same box. Rows are kept as they come and the same command goes on after a stop; checkpoints and bundles are
removed when nothing needs them any more.

The denoiser's last row, `factors`, sets what all techniques gain together over loading and running one block after
another against what they gain one by one: LPL's evaluations, TDTM's step with all blocks in memory, and block
streaming by the formula of arXiv 2502.04363 section 3.3, r = b min(l, e) + d max(0, l - e) - alpha (1 - d / b). l and e
are those of the run in turn, and alpha, what loading and executing take from each other, of plain steps; so what it
says of merged ones can be wrong. Steps are compared by their last pass: the first one measures the blocks. TDTM makes
no load shorter, so that the product is out of reach where loading takes a good part of a step.
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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.harness import RESULTS, ResultFile, Row
from bench.memory_box import memory_box
from bench.workloads.block_loading import evict
from bench.workloads.export_memory import export_in_child
from bench.workloads.full_size_checkpoint import MODELS, Model, make_checkpoint
from edgerun._library import runner_path
from edgerun.bundle import Bundle
from edgerun.errors import EdgerunError, ParityError

BOX = 1.1  # times the limit
TWO_STEPS, THREE_TIMES = "1,0.5", "1,0.66,0.33"
PLAIN = ("--merge-steps", "0")
TOGETHER = ("--merge-steps", "3", "--leap", "fixed:2")  # TDTM in the parts that are the default, and LPL
STEPS, EVALUATIONS = 3, 2  # of the latter
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


# ---------------------------------------------------------------- the runs


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of the runner, and what must come of it."""

    name: str
    options: tuple[str, ...]
    stage: str  # whose figures are of interest
    limited: bool = True  # by the plan's limit, in a box of BOX times that
    same_as: str = ""  # the case whose result this one must have, bit for bit
    least: float = 0.0  # instead of the plan's limit: so many times the smallest
    box_alone: bool = False  # no limit is given, and the box is the plan's
    fails: bool = False


def cases(name: str) -> list[Case]:
    """The runs of a model, in order."""
    if name == "denoiser":
        one, two = ("--times", "1", *PLAIN), ("--times", TWO_STEPS, *PLAIN)
        together = ("--times", THREE_TIMES, *TOGETHER)
        return [
            Case("one step, no limit", one, "denoise", limited=False),
            Case("one step", one, "denoise", same_as="one step, no limit"),
            Case("two steps, all resident", two, "denoise", limited=False),
            Case("two steps", two, "denoise", same_as="two steps, all resident"),
            Case(
                "two steps, one block after another",
                (*two, "--prefetch", "0"),
                "denoise",
                same_as="two steps, all resident",
                least=1.05,
            ),
            Case("all together, all resident", together, "denoise", limited=False),
            Case("all together", together, "denoise", same_as="all together, all resident"),
            Case("half the smallest limit", one, "denoise", least=0.5, fails=True),
            Case("two steps, the box alone", two, "denoise", box_alone=True, fails=True),
        ]
    found = []
    everything = ("--prefetch", "64")
    for count in (SMALL_TOKENS, LONG_TOKENS):
        tokens = ("--tokens", ",".join(str(3 + 17 * i % 60) for i in range(count)))
        free = f"{count} tokens, all ahead"
        found += [
            Case(free, (*tokens, *everything), "encode", limited=False),
            Case(f"{count} tokens", tokens, "encode", same_as=free),
            Case(f"{count} tokens, no prefetch", (*tokens, "--prefetch", "0"), "encode", same_as=free),
        ]
    return [
        *found,
        Case(f"{count} tokens, smallest limit", tokens, "encode", same_as=free, least=1.05),
        Case("half the smallest limit", tokens, "encode", least=0.5, fails=True),
        Case(f"{count} tokens, the box alone", (*tokens, *everything), "encode", box_alone=True, fails=True),
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


def limits(case: Case, plan: Plan, least_bytes: int | None) -> tuple[int | None, int | None]:
    """The memory limit that the runner is given, and that of its box."""
    if case.box_alone:
        return None, int(BOX * plan.limit_bytes)
    if not case.limited:
        return None, None
    if case.least > 0.0:
        assert least_bytes is not None
        limit = int(case.least * least_bytes)
        # A run that must fail has room to: it is to say no, not to be killed.
        return limit, int(BOX * max(limit, least_bytes))
    return plan.limit_bytes, int(BOX * plan.limit_bytes)


def run_case(case: Case, bundle: pathlib.Path, plan: Plan, encoded: pathlib.Path | None, known: list[Row]) -> Row:
    """The row of one case. Raises ParityError when the run does not end as it must."""
    least = next((row["smallest_limit_bytes"] for row in known if row.get("smallest_limit_bytes")), None)
    limit, box_bytes = limits(case, plan, least)
    result = bundle.with_name("result")
    result.unlink(missing_ok=True)
    command: list[str | pathlib.Path] = [runner_path(), bundle, "--no-verify", "--threads", str(plan.threads)]
    command += case.options
    if case.stage == "encode":
        command += ["--stop-after", "encode", "--state-out", result]
    else:
        assert encoded is not None
        command += ["--state-in", encoded, "--latent-out", result]
    command += [] if limit is None else ["--memory-limit", str(limit)]
    evict(sorted((bundle / "programs").iterdir()))
    with memory_box(box_bytes) as box:
        done = box.run(command)
    row: Row = {"case": case.name, "memory_limit_bytes": limit, "box_bytes": box_bytes, "box": box.kind}
    row |= {"status": done.status, "killed": done.killed, "box_peak_bytes": done.peak_bytes, "wall_s": done.wall_s}
    if case.fails:
        _require(done.status != 0 and not result.exists(), case, f"it must fail, and ended with status {done.status}")
        if not case.box_alone:
            clean = done.status == 2 and not done.killed and done.errors.count("\n") == 1
            _require(clean, case, f"it must say why in one line: {done.errors!r}")
        return row | {"message": done.errors.strip().replace(str(bundle), bundle.name)}
    _require(done.status == 0, case, f"status {done.status}: {done.errors.strip()}")
    run = json.loads(done.output)["run"]
    digest = hashlib.sha256(result.read_bytes()).hexdigest()
    row |= {"result_sha256": digest, **_figures(run, case.stage)}
    if limit is not None:
        _require(row["peak_rss_bytes"] <= limit, case, f"its peak is {row['peak_rss_bytes']} bytes, over {limit}")
        row["smallest_limit_bytes"] = smallest_limit_bytes(run)
    if case.same_as:
        expected = next(one["result_sha256"] for one in known if one["case"] == case.same_as)
        _require(digest == expected, case, f"its result is not that of {case.same_as!r}")
    return row


def _require(holds: bool, case: Case, what: str) -> None:
    if not holds:
        raise ParityError(f"{case.name}: {what}")


def _figures(run: Row, stage: str) -> Row:
    """What is of interest in a report. Times in milliseconds; loads count with what unloading costs."""
    chain = run["stages"][stage]["chain"]
    passes, blocks = chain["passes"], chain["blocks"]
    load, execute = passes["load_ms"] + passes["unload_ms"], passes["execute_ms"]
    middle = max(blocks, key=lambda block: block["loaded_bytes"])["name"].rstrip("0123456789")
    repeated = [block for block in blocks if block["name"].startswith(middle)]

    def each(what: str, count: str) -> dict[str, float]:
        values = [block[what] / block[count] for block in repeated]
        return {"median_ms": statistics.median(values), "minimum_ms": min(values), "maximum_ms": max(values)}

    return {
        "peak_rss_bytes": run["peak_rss_bytes"],
        "stage_wall_ms": run["stages"][stage]["wall_ms"],
        "step_wall_ms": [step["wall_ms"] for step in run["steps"]],
        "load_ms": load,
        "execute_ms": execute,
        "load_over_execute": load / execute,
        "passes_wall_ms": passes["wall_ms"],
        "hidden_share": chain["hidden_share"],  # of the passes that did not measure
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


# ---------------------------------------------------------------- all of it


def measure_model(model: Model, plan: Plan, work: pathlib.Path, results: ResultFile, keep: bool) -> None:
    """Every row of one model that the results lack."""
    planned = cases(model.name)
    kinds = [{"kind": "export", "model": model.name}]
    kinds += [{"kind": "run", "model": model.name, "case": case.name} for case in planned]
    if all(results.find(key) for key in kinds):
        add_factors(model, results)
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
    encoded = None
    if model.name == "denoiser":
        encoded = work / "encoded"
        ids = ",".join(str(3 + i % 3) for i in range(PROMPT_TOKENS - 1)) + ",1"
        tokens = ["--tokens", ids, "--stop-after", "encode", "--state-out", encoded]
        with memory_box(None) as box:
            box.run([runner_path(), bundle, "--no-verify", *tokens])
    for key, case in zip(kinds[1:], planned, strict=True):
        if results.find(key) is None:
            known = [row for row in results.rows if row["kind"] == "run" and row["model"] == model.name]
            results.add({**key, **run_case(case, bundle, plan, encoded, known)})
            print(line(results.rows[-1]), flush=True)
    if not keep:
        shutil.rmtree(bundle, ignore_errors=True)
    add_factors(model, results)


def add_factors(model: Model, results: ResultFile) -> None:
    """The denoiser's last row, when all of its runs are there."""
    if model.name == "denoiser":
        runs = [row for row in results.rows if row["kind"] == "run" and row["model"] == model.name]
        found = results.find({"kind": "factors"})
        if found is None:
            found = factors(runs)
            results.add(found)
        print(factors_line(found), flush=True)


def factors(runs: list[Row]) -> Row:
    """What the techniques gain one by one and together, from the denoiser's runs. Times in milliseconds."""
    by_case = {row["case"]: row for row in runs}
    plain, merged = by_case["two steps, all resident"], by_case["all together, all resident"]
    turn, streamed, together = (
        by_case[name] for name in ("two steps, one block after another", "two steps", "all together")
    )

    def step(row: Row) -> float:
        return float(row["step_wall_ms"][-1])

    blocks, resident = len(turn["blocks"]), together["resident_blocks"]
    tdtm = step(plain) / step(merged)
    loaded = statistics.fmean(block["load_ms"] / block["loads"] for block in turn["blocks"])
    executed = statistics.fmean(block["execute_ms"] / block["executions"] for block in turn["blocks"])
    shorter = executed / tdtm

    def gain(executing: float, kept: int) -> float:
        """Without what loading and executing take from each other."""
        return blocks * min(loaded, executing) + kept * max(0.0, loaded - executing)

    streaming = 1 - streamed["resident_blocks"] / blocks
    alpha = gain(executed, streamed["resident_blocks"]) - (blocks * (loaded + executed) - step(streamed))
    alpha = alpha / streaming if streaming > 0 else 0.0
    in_turn = blocks * (loaded + shorter)
    formula = in_turn / (in_turn - gain(shorter, resident) + alpha * (1 - resident / blocks))
    expected = STEPS / EVALUATIONS * tdtm * formula
    measured = STEPS * step(turn) / (EVALUATIONS * step(together))
    return {
        "kind": "factors",
        "blocks": blocks,
        "resident_blocks": resident,
        "load_of_a_block_ms": loaded,
        "execute_of_a_block_ms": executed,
        "alpha_ms": alpha,
        "evaluations_ratio": STEPS / EVALUATIONS,
        "tdtm_step_ratio": tdtm,
        "streaming_ratio_by_formula": formula,
        "expected_ratio": expected,
        "measured_ratio": measured,
        "reached_share": measured / expected,
    }


def factors_line(row: Row) -> str:
    """The factors in one line."""
    return (
        f"  all together {row['measured_ratio']:.2f} times as fast as {STEPS} steps of one block after another; "
        f"evaluations {row['evaluations_ratio']:.2f} x TDTM {row['tdtm_step_ratio']:.2f} x streaming "
        f"{row['streaming_ratio_by_formula']:.2f} (l {row['load_of_a_block_ms']:.0f} ms, e "
        f"{row['execute_of_a_block_ms']:.0f} ms, alpha {row['alpha_ms']:.0f} ms) = {row['expected_ratio']:.2f}: "
        f"{100 * row['reached_share']:.0f} % of it"
    )


def line(row: Row) -> str:
    """A run in one line."""
    text = f"  {row['case']}: status {row['status']} in {row['box']}, {row['wall_s']:.0f} s"
    if "hidden_share" not in row:
        return f"{text}; {row['message'] or 'killed'}"
    hidden = "–" if row["hidden_share"] is None else f"{row['hidden_share']:.2f}"
    each = row["repeated"]
    load, execute = (each[what]["median_ms"] for what in ("load", "execute"))
    return (
        f"{text}; peak {row['peak_rss_bytes'] / 1e6:.0f} MB, {row['resident_blocks']} resident, prefetch "
        f"{row['prefetch']}; {each['blocks']} blocks, each loads in {load:.0f} ms and executes in {execute:.0f} ms; "
        f"h {hidden}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="a folder on a disk with 15 GB to spare")
    parser.add_argument("--models", nargs="+", choices=("denoiser", "text_encoder"), help="default: both")
    for field in dataclasses.fields(Plan):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "full_size_video.json")
    parser.add_argument("--keep", action="store_true", help="leave checkpoints and bundles in the folder")
    parser.add_argument("--fresh", action="store_true", help="measure every row anew")
    values = vars(parser.parse_args(arguments))
    plan = Plan(**{field.name: values[field.name] for field in dataclasses.fields(Plan)})
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
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    print(f"\nwrote {values['output'].name}")


if __name__ == "__main__":
    main()
