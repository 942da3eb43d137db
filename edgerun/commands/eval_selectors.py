"""`edgerun eval MODEL selectors`: how near every way of choosing blocks stays to dense attention, as a report."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgerun.commands.common import Tools, begin_report, checkpoint_path, emit, recipe_from
from edgerun.errors import EdgerunError
from edgerun.evaluation.answers import Contender, Job
from edgerun.evaluation.statistics import bootstrap_mean
from edgerun.report import Axis, Categories, Cell, Column, Estimate, HeatMap, Picture, Plot, Report, Series, Table

if TYPE_CHECKING:
    from edgerun.evaluation.selector_fidelity import Measurement

_MOST_LINES = 9  # of a plot
DEFAULT = ("shipped", "moments-fixed", "mean", "minmax", "block-mean", "recent", "antidiagonal", "oracle", "shuffled")
TASKS = ("niah_single_1", "niah_multikey_2", "niah_single_2", "vt")
PICTURE_LAYER_SHARE = 0.5  # of the depth, at which a picture is taken


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """Measure and report. Raises EdgerunError for what cannot be measured."""
    import tqdm

    from edgerun.commands.eval_contenders import eager_contender
    from edgerun.evaluation.selector_fidelity import measure_all

    path = checkpoint_path(arguments.model)
    recipe = dataclasses.replace(recipe_from(arguments), attention="dhsa")
    contender = eager_contender("dhsa", path, recipe, predictor=arguments.predictor)
    budgets = arguments.budgets or (contender.recipe.dhsa.budget,)  # type: ignore[union-attr]
    names = selector_names(DEFAULT if arguments.selectors == ("chunk",) else arguments.selectors)
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
    pictures = (picture_of(contender, jobs[-1], names[0], min(budgets)),)
    report = selectors_report(found, contender, tools.command)
    return emit(dataclasses.replace(report, pictures=pictures), arguments)


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


def selectors_report(found: Sequence[Measurement], contender: Contender, command: str) -> Report:
    """One table a length, plots against density, and the first selector's recall by layer and head."""
    lengths = sorted({one.job.length for one in found})
    prompts = len({one.job for one in found})
    report = begin_report("eval", f"edgerun eval: selectors, {prompts} prompts", command)
    if not found:
        return report
    return dataclasses.replace(
        report,
        facts=(("build", contender.build),),
        tables=tuple(length_table([one for one in found if one.job.length == n], n) for n in lengths),
        plots=tuple(plot for n in lengths for plot in density_plots([o for o in found if o.job.length == n], n)),
        heat_maps=recall_maps(found),
    )


def length_table(found: Sequence[Measurement], length: int) -> Table:
    """A row for each selector and budget."""
    columns = (
        Column("selector"),
        Column("budget", "tokens"),
        Column("density", "%", 1),
        Column("prefill: held", "%", 1),
        Column("of the oracle's", "%", 1),
        Column("decode: held", "%", 1),
        Column("of the oracle's", "%", 1),
        Column("KL to dense", "nats", 4),
        Column("top-1", "%", 1),
        Column("n"),
    )
    rows: list[tuple[Cell, ...]] = []
    for budget in sorted({one.budget for one in found}):
        for name in dict.fromkeys(one.selector for one in found):
            mine = [one for one in found if (one.selector, one.budget) == (name, budget)]
            parts = {kind: [one for one in mine if one.kind == kind] for kind in ("prefill", "decode", "divergence")}
            if not mine:
                continue
            recalls: list[Cell] = []
            for kind in ("prefill", "decode"):
                held, best = ([100 * mean(getattr(o, part)) for o in parts[kind]] for part in ("held", "best"))
                recalls += [
                    sum(held) / len(held) if held else None,
                    spread([100 * a / b for a, b in zip(held, best, strict=True)]),
                ]
            densities = [o.density for o in parts["divergence"] or parts["prefill"] if o.density is not None]
            tops = [o.top1 for o in parts["divergence"] if o.top1 is not None]
            rows.append(
                (
                    name,
                    budget,
                    100 * sum(densities) / len(densities) if densities else None,
                    *recalls,
                    spread([o.kl_nats for o in parts["divergence"] if o.kl_nats is not None]),
                    100 * sum(tops) / len(tops) if tops else None,
                    max(len(part) for part in parts.values()),
                )
            )
    note = (
        "Held: mean share of a row's attention in the listed blocks, over tiles beyond the budget (prefill) and single "
        "tokens of the answer (decode); the oracle's: in the best blocks of the same number. KL, top-1: at the "
        "answer's positions, teacher-forced. Intervals: bootstrap 95 % over prompts. Density: prompt and answer."
    )
    return Table(f"{length:,} tokens", columns, tuple(rows), note)


def density_plots(found: Sequence[Measurement], length: int) -> list[Plot]:
    """The oracle's share and the divergence against causal density: the best selectors and the baselines."""
    plots = []
    for kind, title, unit, value in (
        ("prefill", "Prefill: attention held, of the oracle's", "%", share_of_oracle),
        ("decode", "Decode: attention held, of the oracle's", "%", share_of_oracle),
        ("divergence", "KL to dense at the answer", "nats", divergence),
    ):
        mine = [one for one in found if one.kind == kind]
        names = list(dict.fromkeys(one.selector for one in mine))
        averages = {n: _average([value(one) for one in mine if one.selector == n]) for n in names}
        kept = sorted(names, key=averages.__getitem__, reverse=kind != "divergence")[: _MOST_LINES - 2]
        kept += [n for n in ("recent", "shuffled") if n in names and n not in kept]
        series = []
        for name in kept:
            points = []
            for budget in sorted({one.budget for one in mine}):
                some = [o for o in mine if (o.selector, o.budget) == (name, budget)]
                estimate = spread([value(o) for o in some])
                densities = [o.density for o in some if o.density is not None]
                if estimate is not None and densities:
                    points.append((100 * sum(densities) / len(densities), estimate))
            if points:
                series.append(Series(name, tuple(sorted(points, key=lambda point: point[0]))))
        if series:
            lowest = min(estimate.low or 0.0 for one in series for _, estimate in one.points)
            share = unit == "%"
            low, high = (10 * (lowest // 10), 100.0) if share else (None, None)
            plots.append(
                Plot(
                    f"{title}: {length:,} tokens",
                    Axis("causal density", "%", log=True, base=10),
                    Axis(title.split(": ")[-1], unit, low=low, high=high),
                    tuple(series),
                    "The best on average, and the baselines; bootstrap 95 % over prompts.",
                )
            )
    return plots


def recall_maps(found: Sequence[Measurement]) -> tuple[HeatMap, ...]:
    """The first selector's share of the oracle by layer and KV head, at the longest length and smallest budget."""
    maps = []
    length, budget = max(one.job.length for one in found), min(one.budget for one in found)
    name = found[0].selector
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
                Categories("layer", "", tuple(str(i) for i in range(layers))),
                values,
                "%",
                min(90.0, *(v for row in values for v in row)),
                100.0,
                f"{name}, budget {budget:,}, {length:,} tokens, {len(mine)} prompts",
                group="Attention held, of the oracle's",
                digits=1,
            )
        )
    return tuple(maps)


def picture_of(contender: Contender, job: Job, name: str, budget: int) -> Picture:
    """The blocks that a selector chooses for one prompt, over its exact attention, in one KV head of a middle layer."""
    import numpy as np

    from edgerun.attention_picture import attention_picture
    from edgerun.evaluation.selector_fidelity import attention_and_choice

    seen = attention_and_choice(contender, job, name, budget, PICTURE_LAYER_SHARE)
    width, tile = seen.attention.shape[1], seen.tile
    tokens = (0.0, float(16 * width))
    note = f"{name}, budget {budget:,}; {job.task}, sample {job.index} of seed {job.seed}; KV head {seen.head}"
    return attention_picture(
        f"Blocks chosen over exact attention: layer {seen.layer}, {job.length:,} tokens",
        np.asarray(seen.attention),
        np.asarray(seen.chosen),
        x=Axis("key", "token", low=tokens[0], high=tokens[1]),
        y=Axis("query", "token", low=0.0, high=float(tile * seen.attention.shape[0])),
        scale=Axis("attention of a tile's row to a block", "%", log=True, low=0.01, high=100.0),
        threshold=1.0,
        note=note,
    )


def share_of_oracle(one: Measurement) -> float:
    """Attention held, of what the best blocks of the same number hold, in %: mean over layers and heads."""
    return 100 * mean(one.held) / mean(one.best)


def divergence(one: Measurement) -> float:
    """KL to dense, nats."""
    assert one.kl_nats is not None
    return one.kl_nats


def mean(grid: Sequence[Sequence[float]]) -> float:
    """Over layers and heads."""
    values = [value for row in grid for value in row]
    return sum(values) / len(values)


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float]) -> Estimate | None:
    """Mean with its bootstrap interval of 95 %; None of nothing."""
    if not values:
        return None
    found = bootstrap_mean(values)
    return Estimate(found.estimate, found.low, found.high, n=len(values))


def load_record(path: pathlib.Path) -> list[Measurement]:
    """The measurements of a record, in its order."""
    from edgerun.evaluation.selector_fidelity import read_record

    return list(read_record(path).values())
