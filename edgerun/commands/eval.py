"""Measure how often a model answers generated retrieval tasks right: needle, ruler or threads, at given lengths.

MODEL is a bundle, answered by the native session, or a checkpoint (zoo:text), answered by edgerun's torch model with
the same op; --engine eager answers for a bundle with its checkpoint, after a check that both agree. All contenders get
the same samples: intervals are Wilson's, differences paired. With --output, a stopped run goes on where it was.

examples
  edgerun eval text.edgerun ruler --tasks niah_single_1,niah_multikey_2 --lengths 4096,8192 --samples 100
  edgerun eval sparse.edgerun needle --against dense.edgerun --lengths 8192 --samples 20
  edgerun eval zoo:text ruler --calibration text.calibration --against dense --lengths 4096
  edgerun eval zoo:text ruler --budgets 529,1098,2048 --selectors chunk,block-topk,window-sink --output answers.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from edgerun.commands.common import (
    Tools,
    add_calibration_option,
    add_output_options,
    add_recipe_options,
    begin_report,
    calibrated_recipe,
    checkpoint_path,
    emit,
    positive,
    positive_list,
    recipe_from,
)
from edgerun.errors import EdgerunError
from edgerun.evaluation.answers import SUITES, Answer, Contender, Job, answer_all
from edgerun.evaluation.statistics import paired_difference, wilson_interval
from edgerun.machine import available_cores
from edgerun.recipe import Recipe
from edgerun.report import Axis, Cell, Check, Column, Estimate, Plot, Report, Series, Table

if TYPE_CHECKING:
    from edgerun.bundle import Bundle

SUMMARY = "how often does it answer retrieval tasks right?"
_SELECTORS = ("chunk", "block-topk", "window-sink")
_DEPTHS = (0, 25, 50, 75, 100)

Answers = dict[tuple[str, Job], Answer]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun eval`."""
    parser.add_argument("model", metavar="MODEL", help="a bundle, a checkpoint's folder, or zoo:text")
    parser.add_argument("suite", choices=SUITES)
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--tasks", type=_names, metavar="A,B", help="default: all of the suite; needle: its depths, as depth_50"
    )
    what.add_argument(
        "--lengths",
        type=positive_list,
        default=(2048, 4096, 8192),
        metavar="N,N",
        help="tokens of prompt and answer; default: 2048,4096,8192",
    )
    what.add_argument(
        "--samples", type=positive, default=20, metavar="N", help="of every task and length; default: %(default)s"
    )
    what.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    who = parser.add_argument_group("who answers")
    who.add_argument(
        "--engine", choices=("eager", "bundle"), help="default: bundle for a bundle, eager for a checkpoint"
    )
    who.add_argument("--checkpoint", metavar="CHECKPOINT", help="of the bundle, for --engine eager")
    who.add_argument(
        "--against", metavar="OTHER", help="also ask this bundle (or `dense`, eager), and give paired differences"
    )
    who.add_argument(
        "--budgets", type=positive_list, metavar="N,N", help="eager: ask at each of these budgets, and densely"
    )
    who.add_argument(
        "--selectors", type=_names, default=("chunk",), metavar="A,B", help=f"with --budgets: of {','.join(_SELECTORS)}"
    )
    who.add_argument(
        "--processes", type=positive, default=available_cores(), metavar="N", help="default: one a core (%(default)s)"
    )
    parser.add_argument(
        "-o", "--output", type=pathlib.Path, metavar="FILE.jsonl", help="keep every answer; go on from there"
    )
    add_output_options(parser)
    add_recipe_options(parser)
    add_calibration_option(parser)


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """`edgerun eval`."""
    contenders, checks = _contenders(arguments)
    report = evaluate(
        contenders,
        make_jobs(arguments.suite, arguments.tasks, arguments.lengths, arguments.samples, arguments.seed),
        processes=arguments.processes,
        record=arguments.output,
        command=tools.command,
    )
    plots = budget_plots(contenders, report) if arguments.budgets else ()
    return emit(dataclasses.replace(report, checks=checks, plots=plots), arguments)


def make_jobs(suite: str, tasks: Sequence[str] | None, lengths: Sequence[int], samples: int, seed: int) -> list[Job]:
    """Every sample of every task and length. Raises EdgerunError for a task that the suite does not have."""
    known = suite_tasks(suite)
    for task in tasks or ():
        if task not in known and not (suite == "needle" and re.fullmatch(r"depth_\d+(\.\d+)?", task)):
            raise EdgerunError(f"{suite} has no task {task!r}; it has {', '.join(known)}")
    chosen = tuple(tasks) if tasks else known
    return [Job(suite, task, n, seed, index) for task in chosen for n in lengths for index in range(samples)]


def suite_tasks(suite: str) -> tuple[str, ...]:
    """The tasks of a suite."""
    from edgerun.evaluation import ruler, threads

    return {"needle": tuple(f"depth_{d}" for d in _DEPTHS), "ruler": ruler.TASKS, "threads": threads.TASKS}[suite]


def evaluate(
    contenders: Sequence[Contender],
    jobs: Sequence[Job],
    *,
    processes: int,
    record: pathlib.Path | None = None,
    command: str = "",
) -> Report:
    """Ask every contender every sample; the first is what the others are compared with, sample by sample.

    An answer is right when it holds every expected string. Raises what `answer_all` raises.
    """
    import tqdm

    with tqdm.tqdm(total=len(contenders) * len(jobs), desc="answers", leave=False, disable=None) as bar:

        def on_answer(done: int, _: int) -> None:
            bar.update(done - bar.n)

        answers = answer_all(contenders, jobs, processes=processes, record=record, on_answer=on_answer)
    cells = list(dict.fromkeys((job.task, job.length) for job in jobs))
    rows = []
    for task, length in cells:
        mine = [job for job in jobs if (job.task, job.length) == (task, length)]
        baseline = _right(answers, contenders[0], mine)
        for contender in contenders:
            rows.append((task, length, *_cell_row(answers, contender, mine, baseline, contender is contenders[0])))
    first = contenders[0].name
    columns = (
        Column("task"),
        Column("length", "tokens"),
        Column("contender"),
        Column("n"),
        Column("right", "%", 1),
        Column("score", "%", 1),
        Column(f"right − {first}", "points", 1),
        Column("density", "%", 1),
        Column("prefill", "s", 2),
    )
    note = "right: every expected string found, Wilson 95 %; score: strings found; difference: paired bootstrap 95 %"
    report = begin_report("eval", f"edgerun eval: {jobs[0].suite}, {len(jobs)} samples", command)
    facts = tuple((f"build of {c.name}", c.build) for c in contenders)
    return dataclasses.replace(report, facts=facts, tables=(Table("Answers", columns, tuple(rows), note),))


def _right(answers: Answers, contender: Contender, jobs: Sequence[Job]) -> list[float]:
    return [float(answers[contender.build, job].score == 1.0) for job in jobs]


def _cell_row(
    answers: Answers, contender: Contender, jobs: Sequence[Job], baseline: list[float], is_first: bool
) -> tuple[Cell, ...]:
    right = _right(answers, contender, jobs)
    mine = [answers[contender.build, job] for job in jobs]
    share = wilson_interval(round(sum(right)), len(right))
    difference = None if is_first else paired_difference(right, baseline)
    densities = [answer.density for answer in mine if answer.density is not None]
    return (
        contender.name,
        len(right),
        _percent(share.estimate, share.low, share.high, len(right)),
        100 * sum(answer.score for answer in mine) / len(mine),
        None if difference is None else _percent(difference.estimate, difference.low, difference.high, len(right)),
        100 * sum(densities) / len(densities) if densities else None,
        sum(answer.prefill_s for answer in mine) / len(mine),
    )


def _percent(value: float, low: float, high: float, n: int) -> Estimate:
    return Estimate(100 * value, 100 * low, 100 * high, n=n)


def budget_plots(contenders: Sequence[Contender], report: Report) -> tuple[Plot, ...]:
    """Right answers against budget, one plot a task and length, one line a selector, dense as the reference."""
    rows = report.tables[0].rows
    plots = []
    for task, length in dict.fromkeys((row[0], row[1]) for row in rows):
        found = {row[2]: row[4] for row in rows if (row[0], row[1]) == (task, length)}
        budgets = sorted({c.recipe.dhsa.budget for c in contenders if c.recipe and c.recipe.attention == "dhsa"})
        lines: dict[str, list[tuple[float, Estimate]]] = {}
        for contender in contenders:
            right = found[contender.name]
            assert isinstance(right, Estimate) and contender.recipe is not None
            if contender.recipe.attention == "dense":
                lines["dense"] = [(float(budget), right) for budget in budgets]
            else:
                dhsa = contender.recipe.dhsa
                name = {"chunk": "DHSA", "block-topk": "block top-k", "window-sink": "window + sink"}[dhsa.selector]
                lines.setdefault(name, []).append((float(dhsa.budget), right))
        series = tuple(Series(name, tuple(points), dashed=name == "dense") for name, points in lines.items())
        plots.append(
            Plot(
                f"Right answers against budget: {task}, {length:,} tokens",
                Axis("budget", "tokens", log=True),
                Axis("right answers", "%", low=0, high=100),
                series,
                "Wilson 95 % intervals; every line answers the same samples.",
            )
        )
    return tuple(plots)


def budget_contenders(
    checkpoint: pathlib.Path, base: Recipe, budgets: Sequence[int], selectors: Sequence[str]
) -> list[Contender]:
    """Eager contenders: dense first, then every selector at every budget.

    Raises EdgerunError for an unknown selector, ExportError for a budget below its minimum, CheckpointError.
    """
    recipes = {"dense": dataclasses.replace(base, attention="dense")}
    for selector in selectors:
        if selector not in _SELECTORS:
            raise EdgerunError(f"--selectors has {selector!r}; there are {', '.join(_SELECTORS)}")
        for budget in budgets:
            dhsa = dataclasses.replace(base.dhsa, selector=cast(Any, selector), budget=budget)
            recipes[f"{selector} {budget}"] = dataclasses.replace(base, attention="dhsa", dhsa=dhsa)
    return [eager_contender(name, checkpoint, recipe) for name, recipe in recipes.items()]


def eager_contender(name: str, checkpoint: pathlib.Path, recipe: Recipe) -> Contender:
    """An eager contender with its identity. Raises CheckpointError or ExportError when it cannot be served."""
    from edgerun.checkpoint import Checkpoint
    from edgerun.models.causal_lm import resolve

    opened = Checkpoint.open(checkpoint)
    resolved = resolve(opened.config, recipe)
    return Contender(name, checkpoint, resolved, resolved.hash(opened.sha256()))


def _contenders(arguments: argparse.Namespace) -> tuple[list[Contender], tuple[Check, ...]]:
    """Who answers, and for a bundle answered by its checkpoint the checks that both agree."""
    from edgerun.bundle import MANIFEST, Bundle
    from edgerun.checkpoint import Checkpoint

    path = checkpoint_path(arguments.model)
    is_bundle = (path / MANIFEST).is_file() or path.suffix == ".edgerun"
    engine = arguments.engine or ("bundle" if is_bundle else "eager")
    _refuse_unused(arguments, is_bundle, engine)
    if engine == "bundle":
        if not is_bundle:
            raise EdgerunError(f"{path} is not a bundle: export it first, or pass --engine eager")
        if arguments.budgets:
            raise EdgerunError("--budgets needs --engine eager: a bundle has the one budget it was exported with")
        others = [] if arguments.against is None else [pathlib.Path(arguments.against)]
        # An eager answer has the build of its recipe too: without the word a record would hand it to the bundle.
        return [Contender(p.stem, p, None, f"bundle {Bundle.open(p, kind='text').build}") for p in (*others, path)], ()
    checks: tuple[Check, ...] = ()
    calibration = None
    if is_bundle:
        if arguments.checkpoint is None:
            raise EdgerunError(
                "--engine eager needs the weights: pass --checkpoint with the folder the bundle was made of"
            )
        bundle, path = Bundle.open(path, kind="text"), checkpoint_path(arguments.checkpoint)
        recipe, checks = bundle.recipe, agreement(bundle, path)
    else:
        recipe, calibration = calibrated_recipe(arguments)
    if arguments.budgets:
        return budget_contenders(path, recipe, arguments.budgets, arguments.selectors), checks
    if calibration is not None:
        calibration.require(Checkpoint.open(path).sha256())
    mine = eager_contender("calibrated" if calibration is not None else recipe.attention, path, recipe)
    if arguments.against is None:
        return [mine], checks
    if arguments.against != "dense":
        raise EdgerunError(f"--against is {arguments.against!r}; with --engine eager it is `dense`")
    return [eager_contender("dense", path, dataclasses.replace(recipe, attention="dense")), mine], checks


def _refuse_unused(arguments: argparse.Namespace, is_bundle: bool, engine: str) -> None:
    """Raise EdgerunError for an option that would change nothing."""
    unused = (
        (
            arguments.checkpoint and not (is_bundle and engine == "eager"),
            "--checkpoint is for a bundle's eager answers",
        ),
        (
            arguments.against and arguments.budgets,
            "--against and --budgets exclude each other: --budgets asks dense too",
        ),
        (arguments.selectors != ("chunk",) and not arguments.budgets, "--selectors is for --budgets"),
        (arguments.calibration and arguments.budgets, "--budgets and --calibration exclude each other"),
        (
            is_bundle and (arguments.calibration or recipe_from(arguments) != Recipe()),
            "a bundle computes what it was exported for",
        ),
    )
    for given, reason in unused:
        if given:
            raise EdgerunError(f"{reason}: leave out what does not apply (`edgerun eval --help`)")


def agreement(bundle: Bundle, checkpoint: pathlib.Path) -> tuple[Check, ...]:
    """Gates of a bundle on this machine against the eager model of its checkpoint, on the bundle's golden cases.

    Raises BundleError when the checkpoint is not the one that the bundle was made of.
    """
    from edgerun.checkpoint import Checkpoint
    from edgerun.commands.measure import force_on
    from edgerun.devices import open_device
    from edgerun.errors import BundleError
    from edgerun.evaluation import fidelity
    from edgerun.models import causal_lm

    opened = Checkpoint.open(checkpoint)
    if opened.sha256() != bundle.manifest["source"]["sha256"]:
        raise BundleError(f"{bundle.path} was not made of {checkpoint}: pass the checkpoint that it was made of")
    model = causal_lm.load(opened, bundle.recipe)
    host = open_device("host")
    noise = fidelity.Noise.from_manifest(bundle.manifest)
    checks: list[Check] = []
    for case in bundle.golden_cases():
        prompt, forced = case.prompt.tolist(), case.forced.tolist()
        measured, logits = force_on(host, bundle.path, prompt, forced)
        eager = fidelity.eager_logits(model, prompt, forced, bundle.recipe.prefill_slice)
        found = fidelity.measure(logits, eager)
        checks += fidelity.checks(found, bundle.recipe, sparse=measured.sparse, noise=noise, label="bundle and eager: ")
    return tuple(checks)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
