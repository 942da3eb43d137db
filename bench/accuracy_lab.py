"""The accuracy lab: which sparse attention keeps the shipped model's answers, in stages, and the page that says so.

    python bench/accuracy_lab.py 1 --work FOLDER        # every selector: attention held, KL at the answer
    python bench/accuracy_lab.py 2 --work FOLDER        # finalists answer RULER's tasks at 8,192 tokens
    python bench/accuracy_lab.py 3 --work FOLDER        # the default against dense, many samples, three lengths
    python bench/accuracy_lab.py others --work FOLDER   # RULER's other tasks: what dense does not solve either
    python bench/accuracy_lab.py needle --work FOLDER   # depth by length, dense and sparse
    python bench/accuracy_lab.py report --work FOLDER   # bench/results/accuracy_lab.html, .json and the raw records
    python bench/accuracy_lab.py sample --work FOLDER   # two minutes of it, as CI runs it, into an empty FOLDER

Each stage prints its cost before it starts, and goes on where it was after a stop. Every contender answers the same
samples under the same sink and tail. Budgets give 12.5, 25 and 44 % causal density, (B / L)(2 - B / L), but in stage 1
they are those of 8,192 tokens at every length, so more of a shorter prompt is attended. --predictor names the file of
`edgerun calibrate` that has the paper's trained boundary predictor; without it what needs one is left out.
"""

from __future__ import annotations

import argparse
import lzma
import math
import pathlib
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from bench.accuracy_lab_page import lab_report
from bench.accuracy_lab_plans import (
    SOLVED,
    Lab,
    Plan,
    needle_grid,
    other_tasks,
    ruler_jobs,
    selector_jobs,
    stage_1,
    stage_2,
    stage_3,
)
from bench.harness import RESULTS
from edgerun.commands import eval_selectors
from edgerun.commands.common import checkpoint_path
from edgerun.errors import EdgerunError
from edgerun.evaluation import selector_fidelity
from edgerun.evaluation.answerers import EagerAnswerer
from edgerun.evaluation.answers import Job, answer_all, read_record
from edgerun.library_noise import quiet_libraries
from edgerun.machine import available_cores
from edgerun.report import Report, write_json
from edgerun.report_html import write_html

ROUND = 20  # samples of each task


def run_answers(lab: Lab, plans: Sequence[Plan], title: str) -> None:
    """Print the cost, then have everyone answer everything that the record lacks."""
    known = read_record(lab.answers)
    lacking = [(c, job) for plan in plans for job in plan.jobs for c in plan.contenders if (c.build, job) not in known]
    total = sum(len(plan.contenders) * len(plan.jobs) for plan in plans)
    pilots = {length: pilot_seconds(lab, length) for length in sorted({job.length for _, job in lacking})}
    cost = sum(pilots[job.length] for _, job in lacking)
    say_cost(title, total, len(lacking), cost / lab.processes, "answers")
    offset = 0
    with tqdm(total=total, desc=title, disable=None) as bar:
        for plan in plans:
            # In rounds of samples, so that a stop leaves every contender as many answers as the others.
            rounds = sorted({job.index for job in plan.jobs})
            for first in range(0, len(rounds), ROUND):
                some = set(rounds[first : first + ROUND])
                part = [job for job in plan.jobs if job.index in some]

                def on_answer(done: int, _: int, offset: int = offset) -> None:
                    bar.update(offset + done - bar.n)

                answer_all(plan.contenders, part, processes=lab.processes, record=lab.answers, on_answer=on_answer)
                offset += len(plan.contenders) * len(part)


def pilot_seconds(lab: Lab, length: int) -> float:
    """What one dense answer of this length takes on one core; a sparse one takes from half of that to as much."""
    answerer = EagerAnswerer(lab.contender("dense"))
    times = []
    for _ in range(2):  # the first one also warms up
        begin = time.monotonic()
        answerer.answer(Job("ruler", "niah_single_1", length, 1, 0))
        times.append(time.monotonic() - begin)
    return min(times)


def say_cost(title: str, total: int, missing: int, seconds: float, what: str) -> None:
    """One line, before the work begins."""
    known = "" if missing == total else f", {total - missing:,} of them on record"
    print(f"{title}: {total:,} {what}{known}; about {math.ceil(seconds / 60):,} min on these cores", flush=True)


def run_selectors(lab: Lab, names: Sequence[str], jobs: Sequence[Job], budgets: Sequence[int], title: str) -> None:
    """Stage 1: print the cost, then measure what the record lacks."""
    contender = lab.base(names)
    known = selector_fidelity.read_record(lab.measurements)
    total = missing = 0
    cost = 0.0
    for length in sorted({job.length for job in jobs}):
        fitting = [b for b in budgets if b < length]
        mine = [job for job in jobs if job.length == length]
        keys = [
            (selector_fidelity.build_of(contender, n), "divergence", n, b, j)
            for n in names
            for b in fitting
            for j in mine
        ]
        lacking = sum(key not in known for key in keys)
        total, missing = total + len(keys), missing + lacking
        cost += lacking * pilot_seconds(lab, length) if lacking else 0.0
    say_cost(title, total, missing, cost / lab.processes, "selector runs")
    with tqdm(desc=title, disable=None) as bar:

        def on_done(done: int, all_of_them: int) -> None:
            bar.total = all_of_them
            bar.update(done - bar.n)

        selector_fidelity.measure_all(
            contender, jobs, names, budgets, processes=lab.processes, record=lab.measurements, on_done=on_done
        )


def write_results(lab: Lab, report: Report, folder: pathlib.Path) -> None:
    """The page, its JSON, and the raw records, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for record, name in ((lab.measurements, "selectors"), (lab.answers, "answers")):
        if record.exists():
            packed = folder / f"accuracy_lab_{name}.jsonl.xz"
            packed.with_suffix(".new").write_bytes(lzma.compress(record.read_bytes(), preset=9))
            packed.with_suffix(".new").replace(packed)
    write_json(report, folder / "accuracy_lab.json")
    write_html(report, folder / "accuracy_lab.html")


def sample(lab: Lab) -> Report:
    """A little of every stage, whose results are checked for what must hold."""
    names = ("shipped", "recent", "shuffled", "oracle", "recent/shipped")
    run_selectors(lab, names, selector_jobs((2048,), 4), (274,), "sample of stage 1")
    third = [
        Plan(plan.contenders[:2], ruler_jobs(SOLVED[-1:], plan.jobs[0].length, 6)) for plan in stage_3(lab, 6)[-1:]
    ]
    run_answers(lab, third, "sample of stage 3")
    found = [o for o in selector_fidelity.read_record(lab.measurements).values() if o.held]
    share = eval_selectors.Shares(found)
    for kind in ("prefill", "decode"):
        means = {
            name: eval_selectors.average([share(o) for o in found if (o.kind, o.selector) == (kind, name)])
            for name in names[:4]
        }
        if not means["oracle"] >= max(means["shipped"], means["recent"]):
            raise EdgerunError(f"{kind}: {means}; nothing can hold more than the oracle")
        if not min(means["shipped"], means["recent"]) > means["shuffled"]:
            raise EdgerunError(f"{kind}: {means}; a real rule must hold more than chance")
    return lab_report(lab, {"1": 4, "2": 0, "3": 6, "others": 0, "needle": 0}, " ".join(sys.argv))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("1", "2", "3", "others", "needle", "report", "sample"))
    parser.add_argument("--model", default="zoo:text", help="a checkpoint's folder; default: %(default)s")
    parser.add_argument("--work", type=pathlib.Path, required=True, metavar="FOLDER", help="where the records are kept")
    parser.add_argument("--predictor", type=pathlib.Path, metavar="FILE", help="with the trained boundary predictor")
    parser.add_argument("--processes", type=int, default=available_cores(), help="default: one a core (%(default)s)")
    parser.add_argument("--samples", type=int, help="of each task (1: prompts a length); default: 20, 100, 400, 30, 10")
    parser.add_argument(
        "--results", type=pathlib.Path, default=RESULTS, help="folder of the page; default: bench/results"
    )
    given = parser.parse_args()
    quiet_libraries()
    lab = Lab(checkpoint_path(given.model), given.work, given.processes, given.predictor)
    lab.work.mkdir(parents=True, exist_ok=True)
    samples = {"1": 20, "2": 100, "3": 400, "others": 30, "needle": 10}
    if given.samples is not None and given.stage in samples:
        samples[given.stage] = given.samples
    try:
        if given.stage == "1":
            for part, (names, lengths, budgets) in zip("abc", stage_1(lab), strict=True):
                run_selectors(lab, names, selector_jobs(lengths, samples["1"]), budgets, f"stage 1{part}")
        elif given.stage == "2":
            run_answers(lab, stage_2(lab, samples["2"]), "stage 2")
        elif given.stage == "3":
            run_answers(lab, stage_3(lab, samples["3"]), "stage 3")
        elif given.stage == "others":
            run_answers(lab, other_tasks(lab, samples["others"]), "other tasks")
        elif given.stage == "needle":
            run_answers(lab, needle_grid(lab, samples["needle"]), "needles")
        elif given.stage == "sample":
            if any(lab.work.iterdir()):
                raise EdgerunError(f"{lab.work} is not empty: the sample measures afresh, so give it a new folder")
            write_results(lab, sample(lab), lab.work)
        else:
            write_results(lab, lab_report(lab, samples, " ".join(sys.argv)), given.results)
    except (EdgerunError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None


if __name__ == "__main__":
    main()
