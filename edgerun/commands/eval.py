"""Measure how often a model answers generated retrieval tasks right, or how well it predicts text, at given lengths.

MODEL is a bundle, answered by the native session, or a checkpoint (zoo:text), answered by edgerun's torch model with
the same op; --engine eager answers for a bundle with its checkpoint, after a check that both agree. All contenders get
the same samples: intervals are Wilson's, differences paired. With --output, a stopped run goes on where it was.

suites
  needle       one needle at depths 0 to 100 %; also a table of depth by length
  ruler        RULER's synthetic tasks; qa_1 and qa_2 need data to download and are left out; generated sentences stand
               in for the essays of niah_single_2, niah_single_3, niah_multikey_1, niah_multivalue and niah_multiquery
  threads      Needle Threading: keys and values, threads forward, backward, branched, several at once
  multi-turn   a second question about another part of the document, behind the model's own answer to the first
  perplexity   bits per token of the last tokens of windows of held-out text (--text)

examples
  edgerun eval text.edgerun ruler --tasks niah_single_1,niah_multikey_2 --lengths 4096,8192 --samples 100
  edgerun eval sparse.edgerun needle --against dense.edgerun --lengths 8192 --samples 20
  edgerun eval zoo:text perplexity --lengths 2048,8192 --budgets 1098,2048
  edgerun eval llama/ multi-turn --against dense --ray 10.0.0.5:6379 --output answers.jsonl
  edgerun eval zoo:text ruler --calibration text.calibration --against dense --lengths 4096
  edgerun eval zoo:text ruler --budgets 529,1098,2048 --selectors chunk,block-topk,window-sink --output answers.jsonl
  edgerun eval zoo:text selectors --budgets 529,2048 --lengths 8192 --html selectors.html --output measured.jsonl

`selectors` holds every way of choosing blocks against dense attention: the attention that its blocks hold, of the best
blocks' (prefill and decode), and the KL at the answer. --selectors takes names of edgerun/selectors/registry.py, and
PREFILL/DECODE for a mixture; ruler and the others take them too. Those that are not chunk, block-topk or window-sink
run in torch around the same kernel: their answers count, not their times.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Sequence

from edgerun.commands import eval_tables
from edgerun.commands.common import (
    Tools,
    add_calibration_option,
    add_output_options,
    add_recipe_options,
    begin_report,
    checkpoint_path,
    emit,
    positive,
    positive_list,
)
from edgerun.commands.eval_contenders import contenders_of
from edgerun.errors import EdgerunError
from edgerun.evaluation import held_out_text, perplexity
from edgerun.evaluation.answers import SUITES, Contender, Job, answer_all
from edgerun.machine import available_cores
from edgerun.report import Axis, Estimate, Plot, Report, Series

SUMMARY = "how often does it answer retrieval tasks right?"
_DEPTHS = (0, 25, 50, 75, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun eval`."""
    parser.add_argument("model", metavar="MODEL", help="a bundle, a checkpoint's folder, or zoo:text")
    parser.add_argument("suite", choices=(*SUITES, "selectors"))
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
    what.add_argument(
        "--text",
        type=pathlib.Path,
        nargs="+",
        metavar="FILE",
        help="perplexity: text that the model was not trained on; default for zoo:text: the standard library's sources "
        "that its training held out",
    )
    what.add_argument(
        "--last",
        type=positive,
        metavar="N",
        help=f"perplexity: tokens scored of each window, fed one by one; default: {perplexity.LAST}",
    )
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
        "--selectors",
        type=_names,
        metavar="A,B",
        help="with --budgets: chunk (default), block-topk, window-sink, or others (edgerun/selectors/registry.py)",
    )
    who.add_argument(
        "--predictor",
        type=pathlib.Path,
        metavar="FILE",
        help="a calibration whose boundary predictor the selectors *-learned and paper-v1 take",
    )
    who.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help=f"default: one a core ({available_cores()}), or a CPU with --ray",
    )
    who.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="answer on a Ray cluster (HOST:PORT; auto: the one of this machine; local: a new one). Its machines need "
        "edgerun, and the model and --text under the same paths; where it asks for a token, set RAY_AUTH_MODE=token",
    )
    parser.add_argument(
        "-o", "--output", type=pathlib.Path, metavar="FILE.jsonl", help="keep every answer; go on from there"
    )
    add_output_options(parser)
    add_recipe_options(parser)
    add_calibration_option(parser)


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """`edgerun eval`."""
    if arguments.suite == "selectors":
        from edgerun.commands import eval_selectors

        return eval_selectors.run(arguments, tools)
    contenders, checks = contenders_of(arguments)
    report = evaluate(
        contenders,
        _jobs(arguments),
        processes=arguments.processes,
        ray=arguments.ray,
        record=arguments.output,
        command=tools.command,
    )
    plots = budget_plots(contenders, report) if arguments.budgets and arguments.suite != "perplexity" else ()
    return emit(dataclasses.replace(report, checks=checks, plots=plots), arguments)


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    if arguments.suite != "perplexity":
        return make_jobs(arguments.suite, arguments.tasks, arguments.lengths, arguments.samples, arguments.seed)
    files = tuple(arguments.text or held_out_files(arguments.model))
    task = perplexity.task_name(arguments.last or perplexity.LAST, perplexity.read_text(files))
    windows = [(length, index) for length in arguments.lengths for index in range(arguments.samples)]
    return [Job("perplexity", task, length, arguments.seed, index, files) for length, index in windows]


def held_out_files(model: str) -> list[pathlib.Path]:
    """Text that MODEL's training held out. Raises EdgerunError for another model than zoo:text or a bundle of it."""
    from edgerun.bundle import MANIFEST, Bundle
    from edgerun.checkpoint import Checkpoint

    path, shipped = checkpoint_path(model), checkpoint_path("zoo:text")
    if path.resolve() != shipped.resolve():
        source = Bundle.open(path, kind="text").manifest["source"]["sha256"] if (path / MANIFEST).is_file() else None
        if source is None or source != Checkpoint.open(shipped).sha256():
            raise EdgerunError(f"no text is known that {model} was not trained on: pass --text FILE…")
    return held_out_text.held_out_sources()


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
    from edgerun.evaluation import multi_turn, ruler, threads

    return {
        "needle": tuple(f"depth_{d}" for d in _DEPTHS),
        "ruler": ruler.TASKS,
        "threads": threads.TASKS,
        "multi-turn": multi_turn.TASKS,
    }[suite]


def evaluate(
    contenders: Sequence[Contender],
    jobs: Sequence[Job],
    *,
    processes: int | None = None,
    ray: str | None = None,
    record: pathlib.Path | None = None,
    command: str = "",
) -> Report:
    """Ask every contender every sample; the first is what the others are compared with, sample by sample.

    An answer is right when it holds every expected string. The other arguments and what is raised: as in `answer_all`.
    """
    import tqdm

    with tqdm.tqdm(total=len(contenders) * len(jobs), desc="answers", leave=False, disable=None) as bar:

        def on_answer(done: int, _: int) -> None:
            bar.update(done - bar.n)

        answers = answer_all(contenders, jobs, processes=processes, ray=ray, record=record, on_answer=on_answer)
    report = begin_report("eval", f"edgerun eval: {jobs[0].suite}, {len(jobs)} samples", command)
    facts = tuple((f"build of {c.name}", c.build) for c in contenders)
    shown = eval_tables.tables(answers, contenders, jobs)
    maps = eval_tables.needle_maps(answers, contenders, jobs)
    return dataclasses.replace(report, facts=facts, tables=shown, heat_maps=maps, notes=eval_tables.notes(jobs))


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
                own = {"chunk": "DHSA", "block-topk": "block top-k", "window-sink": "window + sink"}[dhsa.selector]
                name = contender.selector or own
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


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
