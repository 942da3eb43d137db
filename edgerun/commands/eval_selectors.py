"""`edgerun eval MODEL selectors`: how near every way of choosing blocks stays to dense attention, as a report."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgerun.commands.common import Tools, begin_report, checkpoint_path, emit, recipe_from
from edgerun.errors import EdgerunError
from edgerun.evaluation.answers import Contender, Job
from edgerun.evaluation.statistics import mean_interval
from edgerun.recipe import Recipe
from edgerun.report import Axis, Categories, Cell, Column, Estimate, HeatMap, Picture, Plot, Report, Series, Table

if TYPE_CHECKING:
    from edgerun.evaluation.selector_fidelity import Measurement

_MOST_LINES = 9  # of a plot
DEFAULT = ("shipped", "moments-fixed", "mean", "minmax", "block-mean", "recent", "antidiagonal", "oracle", "shuffled")
TASKS = ("niah_single_1", "niah_multikey_2", "niah_single_2", "vt")
LEAST_KL = 1e-4  # nats, where a plot of KL begins


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """Measure and report. Raises EdgerunError for what cannot be measured."""
    import tqdm

    from edgerun.evaluation.selector_fidelity import measure_all

    _refuse_unused(arguments)
    names = selector_names(DEFAULT if arguments.selectors is None else arguments.selectors)
    recipe = dataclasses.replace(recipe_from(arguments), attention="dhsa")
    contender = base_contender(checkpoint_path(arguments.model), recipe, names, arguments.predictor)
    budgets = arguments.budgets or (recipe.dhsa.budget,)
    jobs = selector_jobs(arguments.tasks or TASKS, arguments.lengths, arguments.samples, arguments.seed)
    with tqdm.tqdm(total=0, desc="measurements", leave=False, disable=None) as bar:

        def on_done(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = measure_all(
            contender,
            jobs,
            names,
            budgets,
            processes=arguments.processes,
            ray=arguments.ray,
            record=arguments.output,
            on_done=on_done,
        )
    report = selectors_report(found, contender, tools.command)
    drawn = next((name for name in names if lists_blocks(name)), None)
    if drawn is not None:
        picture, densities = picture_of(contender, jobs[-1], drawn, min(budgets))
        report = dataclasses.replace(report, pictures=(picture,), heat_maps=(*report.heat_maps, densities))
    return emit(report, arguments)


def base_contender(
    checkpoint: pathlib.Path, recipe: Recipe, names: Sequence[str], predictor: pathlib.Path | None
) -> Contender:
    """The model in which the selectors are tried. Raises EdgerunError without a predictor of it where one is needed."""
    from edgerun.checkpoint import Checkpoint
    from edgerun.commands.eval_contenders import eager_contender, predictor_identity
    from edgerun.selectors.registry import needs_predictor

    if any(needs_predictor(name) for name in names):
        predictor_identity(predictor, Checkpoint.open(checkpoint).sha256())
    return eager_contender("dhsa", checkpoint, recipe, predictor=predictor)


def lists_blocks(name: str) -> bool:
    """Whether a selector can be drawn: it is no mixture, and lists blocks, not tokens."""
    return "/" not in name and not name.startswith("paper-v1")


def _refuse_unused(arguments: argparse.Namespace) -> None:
    unused = {
        "--engine bundle": arguments.engine == "bundle",
        "--checkpoint": arguments.checkpoint,
        "--against": arguments.against,
        "--calibration": arguments.calibration,
        "--text": arguments.text,
        "--last": arguments.last,
    }
    for option, given in unused.items():
        if given:
            raise EdgerunError(f"{option} says nothing of selectors: leave it out (`edgerun eval --help`)")


def selector_names(asked: Sequence[str]) -> tuple[str, ...]:
    """The lab's names of the selectors asked for; the op's own are there under another name. Raises EdgerunError."""
    from edgerun.selectors.registry import split

    own = {"chunk": "shipped", "block-topk": "block-mean", "window-sink": "recent"}
    names = tuple(own.get(name, name) for name in asked)
    for name in names:
        split(name)
    return tuple(dict.fromkeys(names))


def selector_jobs(tasks: Sequence[str], lengths: Sequence[int], samples: int, seed: int) -> list[Job]:
    """`samples` prompts of each length, the tasks in turns. Raises EdgerunError for a task that RULER does not have."""
    from edgerun.commands.eval import suite_tasks

    for task in tasks:
        if task not in suite_tasks("ruler"):
            raise EdgerunError(f"ruler has no task {task!r}; it has {', '.join(suite_tasks('ruler'))}")
    rounds = [(tasks[i % len(tasks)], i // len(tasks)) for i in range(samples)]
    return [Job("ruler", task, length, seed, index) for length in lengths for task, index in rounds]


def selectors_report(
    found: Sequence[Measurement], contender: Contender, command: str, *, everyone: bool = False
) -> Report:
    """A table for each length and one by task, plots against density, the first selector's recall by layer.

    everyone: at the longest length the plots of KL have every selector with a decode of its own.
    """
    found = [one for one in found if one.density is not None]
    lengths = sorted({one.job.length for one in found})
    prompts = len({one.job for one in found})
    report = begin_report("eval", f"edgerun eval: selectors, {prompts} prompts", command)
    if not found:
        return report
    held = Shares(found)
    tables = [length_table([one for one in found if one.job.length == n], n, held) for n in lengths]
    return dataclasses.replace(
        report,
        facts=(("build", contender.build),),
        tables=(*tables, task_table(found)),
        plots=tuple(
            plot
            for n in lengths
            for plot in density_plots(
                [o for o in found if o.job.length == n], n, held, all_of_them=everyone and n == max(lengths)
            )
        ),
        heat_maps=recall_maps(found, found[0].selector),
    )


class Shares:
    """What a measurement holds, of what the oracle holds at the same prompt and budget, in %.

    Where the oracle was not measured: of the best blocks of the same number, which its lists come within 0.2 % of.
    """

    def __init__(self, found: Sequence[Measurement]) -> None:
        self._oracle = {(o.kind, o.budget, o.job): mean(o.held) for o in found if o.selector == "oracle" and o.held}

    def __call__(self, one: Measurement) -> float:
        return 100 * mean(one.held) / self._oracle.get((one.kind, one.budget, one.job), mean(one.best))


def decode_rule(name: str) -> str:
    """How a selector attends single tokens, in a word."""
    from edgerun.selectors.registry import SELECTORS

    prefill, _, decode = name.partition("/")
    if decode:
        return decode
    return "dense" if SELECTORS[prefill.partition("@")[0]].dense_decode else "own"


def length_table(found: Sequence[Measurement], length: int, share: Shares) -> Table:
    """A row for each selector and budget."""
    columns = (
        Column("selector"),
        Column("decode"),
        Column("budget", "tokens"),
        Column("density", "%", 1),
        Column("KL to dense", "nats", 4),
        Column("held in prefill", "%", 1),
        Column("held in decode", "%", 1),
        Column("top-1", "%", 1),
        Column("n"),
    )
    rows: list[tuple[Cell, ...]] = []
    for budget in sorted({one.budget for one in found}):
        for name in dict.fromkeys(one.selector for one in found):
            mine = [one for one in found if (one.selector, one.budget) == (name, budget)]
            if not mine:
                continue
            parts = {kind: [one for one in mine if one.kind == kind] for kind in ("prefill", "decode", "divergence")}
            densities = [o.density for o in parts["divergence"] or parts["prefill"] if o.density is not None]
            tops = [o.top1 for o in parts["divergence"] if o.top1 is not None]
            rows.append(
                (
                    name,
                    decode_rule(name),
                    budget,
                    100 * average(densities) if densities else None,
                    spread([divergence(one) for one in parts["divergence"]]),
                    *(spread([share(one) for one in parts[kind]]) for kind in ("prefill", "decode")),
                    100 * average(tops) if tops else None,
                    max(len(part) for part in parts.values()),
                )
            )
    note = (
        "KL, top-1: at the answer's positions, teacher-forced. Held: the exact attention in the listed blocks, of what "
        "the oracle's hold, over tiles beyond the budget and over single tokens of the answer. Student's 95 % over "
        "prompts. Density: prompt and answer. Decode: a rule's own, dense where its authors have none, or another's, "
        "as PREFILL/DECODE; shipped ranks twice in decode (--refine), the others once. blasst has no budget: its "
        "density is its own."
    )
    rows.sort(key=lambda row: (row[2], row[4].value if isinstance(row[4], Estimate) else math.inf))
    return Table(f"{length:,} tokens", columns, tuple(rows), note)


def task_table(found: Sequence[Measurement]) -> Table:
    """KL at the smallest budget of the longest length, task by task: a mean over all hides where it is lost."""
    length, budget = max(one.job.length for one in found), min(one.budget for one in found)
    mine = [o for o in found if (o.kind, o.budget, o.job.length) == ("divergence", budget, length)]
    tasks = list(dict.fromkeys(one.job.task for one in mine))
    rows = [
        (
            name,
            *(spread([divergence(o) for o in mine if (o.selector, o.job.task) == (name, task)]) for task in tasks),
        )
        for name in dict.fromkeys(one.selector for one in mine)
    ]
    columns = (Column("selector"), *(Column(task, "nats", 4) for task in tasks))
    title = f"KL to dense by task: {length:,} tokens, budget {budget:,}"
    return Table(title, columns, tuple(rows), "Mean over prompts, Student's 95 %.")


def density_plots(found: Sequence[Measurement], length: int, share: Shares, *, all_of_them: bool = False) -> list[Plot]:
    """The oracle's share and the divergence against causal density: the best selectors and the baselines.

    all_of_them: the divergence of the others too, a plot for every few.
    """
    plots = []
    for kind, title, unit, value in (
        ("prefill", "Prefill: attention held, of the oracle's", "%", share),
        ("decode", "Decode: attention held, of the oracle's", "%", share),
        ("divergence", "KL to dense at the answer", "nats", divergence),
    ):
        mine = [one for one in found if one.kind == kind]
        if kind == "divergence":  # neither a rule that decodes densely nor a mixture is a rival to a whole rule
            mine = [one for one in mine if decode_rule(one.selector) == "own"]
        names = list(dict.fromkeys(one.selector for one in mine))
        averages = {n: average([value(one) for one in mine if one.selector == n]) for n in names}
        ranked = sorted(names, key=averages.__getitem__, reverse=kind != "divergence")
        baselines = [n for n in ("recent", "shuffled") if n in names]
        size = _MOST_LINES - 2
        others = [n for n in ranked[size:] if n not in baselines]
        parts = [ranked[:size]]
        if all_of_them and kind == "divergence":
            parts += [others[i : i + size] for i in range(0, len(others), size)]
        for place, part in enumerate(parts):
            kept = [*part, *(n for n in baselines if n not in part)]
            note = "The best on average, and the baselines" if place == 0 else "Others, and the baselines"
            plot = _density_plot(mine, kept, value, kind, f"{title}: {length:,} tokens", unit, note)
            plots += [] if plot is None else [plot]
    return plots


def _density_plot(
    mine: Sequence[Measurement],
    names: Sequence[str],
    value: Callable[[Measurement], float],
    kind: str,
    title: str,
    unit: str,
    note: str,
) -> Plot | None:
    """One line a selector; None without a point."""
    series = []
    for name in names:
        points = []
        for budget in sorted({one.budget for one in mine}):
            some = [o for o in mine if (o.selector, o.budget) == (name, budget)]
            estimate = spread([value(o) for o in some])
            if estimate is not None and kind == "divergence":
                estimate = at_least(estimate, LEAST_KL)
            densities = [o.density for o in some if o.density is not None]
            if estimate is not None and densities:
                points.append((100 * sum(densities) / len(densities), estimate))
        if points:
            series.append(Series(name, tuple(sorted(points, key=lambda point: point[0]))))
    if not series:
        return None
    lowest = min(estimate.low or 0.0 for one in series for _, estimate in one.points)
    low, high = (10 * (lowest // 10), 100.0) if unit == "%" else (None, None)
    label = title.rpartition(": ")[0].split(": ")[-1]
    return Plot(
        title,
        Axis("causal density", "%", log=True, base=10),
        Axis(label, unit, log=kind == "divergence", low=low, high=high, base=10),
        tuple(series),
        f"{note}; Student's 95 % over prompts."
        + (f" Below {LEAST_KL:g}: drawn there." if kind == "divergence" else ""),
    )


def recall_maps(found: Sequence[Measurement], name: str) -> tuple[HeatMap, ...]:
    """A selector's share of the best blocks by layer and KV head, at the longest length and smallest budget."""
    maps = []
    length, budget = max(one.job.length for one in found), min(one.budget for one in found)
    for kind in ("prefill", "decode"):
        mine = [
            o for o in found if (o.kind, o.selector, o.budget, o.job.length) == (kind, name, budget, length) and o.held
        ]
        if not mine:
            continue
        layers, heads = len(mine[0].held), len(mine[0].held[0])
        values = tuple(
            tuple(100 * sum(o.held[i][h] / o.best[i][h] for o in mine) / len(mine) for h in range(heads))
            for i in range(layers)
        )
        maps.append(
            HeatMap(
                kind,
                Categories("KV head", "", tuple(str(h) for h in range(heads))),
                Categories("layer", "", tuple(map(str, mine[0].layers))),
                values,
                "%",
                min(90.0, *(v for row in values for v in row)),
                100.0,
                f"{name}, budget {budget:,}, {length:,} tokens, {len(mine)} prompts",
                group="Attention held, of the best blocks of the same number",
                digits=1,
            )
        )
    return tuple(maps)


def picture_of(contender: Contender, job: Job, name: str, budget: int) -> tuple[Picture, HeatMap]:
    """The blocks that a selector chooses for one prompt, over its exact attention, in the KV head that looks farthest.

    And the density of what it chooses in every layer and KV head.
    """
    import numpy as np

    from edgerun.attention_picture import attention_picture
    from edgerun.evaluation.selector_picture import attention_and_choice

    seen = attention_and_choice(contender, job, name, budget)
    width, tile = seen.attention.shape[1], seen.tile
    tokens = (0.0, float(16 * width))
    note = f"{name}, budget {budget:,}; {job.task}, sample {job.index} of seed {job.seed}"
    picture = attention_picture(
        f"Blocks chosen over exact attention: layer {seen.layer}, {job.length:,} tokens",
        np.asarray(seen.attention),
        np.asarray(seen.chosen),
        x=Axis("key", "token", low=tokens[0], high=tokens[1]),
        y=Axis("query", "token", low=0.0, high=float(tile * seen.attention.shape[0])),
        scale=Axis("attention of a tile's row to a block", "%", log=True, low=0.01, high=100.0),
        threshold=1.0,
        note=f"{note}; KV head {seen.head}, of all the one with most attention beyond sink and local blocks",
    )
    values = tuple(tuple(100 * one for one in row) for row in seen.densities)
    highest = max(one for row in values for one in row)
    densities = HeatMap(
        "density",
        Categories("KV head", "", tuple(map(str, range(len(values[0]))))),
        Categories("layer", "", tuple(map(str, seen.layers))),
        values,
        "%",
        0.0,
        max(1.0, highest),
        f"{note}; prefill, attended of all causal pairs; a budget is that of every layer and head",
        group="Density by layer and KV head",
        digits=1,
    )
    return picture, densities


def divergence(one: Measurement) -> float:
    """KL to dense, nats."""
    assert one.kl_nats is not None
    return one.kl_nats


def mean(grid: Sequence[Sequence[float]]) -> float:
    """Over layers and heads."""
    values = [value for row in grid for value in row]
    return sum(values) / len(values)


def average(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def at_least(estimate: Estimate, least: float) -> Estimate:
    """The same for a logarithmic axis that begins at `least`."""
    low, high = (None if end is None else max(least, end) for end in (estimate.low, estimate.high))
    return dataclasses.replace(estimate, value=max(least, estimate.value), low=low, high=high)


def spread(values: Sequence[float]) -> Estimate | None:
    """Mean with Student's interval of 95 %; None of nothing."""
    if not values:
        return None
    if len(values) == 1:
        return Estimate(values[0], n=1)
    found = mean_interval(values)
    return Estimate(found.estimate, found.low, found.high, n=len(values))
