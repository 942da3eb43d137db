"""The accuracy lab's page: what the records of its stages say, as one report (bench/accuracy_lab.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.accuracy_lab_plans import (
    BUDGETS,
    DEFAULT,
    LENGTH,
    SOLVED,
    TITLES,
    Lab,
    Plan,
    needle_grid,
    stage_2,
    stage_3,
)
from edgerun.commands import eval_selectors
from edgerun.commands.common import begin_report
from edgerun.commands.eval_tables import needle_maps
from edgerun.evaluation import selector_fidelity
from edgerun.evaluation.answers import Answer, Contender, Job, read_record
from edgerun.evaluation.selector_fidelity import Measurement
from edgerun.evaluation.statistics import Interval, paired_difference, wilson_interval
from edgerun.report import Axis, Cell, Column, Estimate, HeatMap, Plot, Report, Series, Table

Answers = dict[tuple[str, Job], Answer]


def right(answers: Answers, contender: Contender, jobs: Sequence[Job]) -> list[float]:
    """1 for each right answer."""
    return [float(answers[contender.build, job].score == 1.0) for job in jobs]


def answered(answers: Answers, plan: Plan) -> list[Job]:
    """Jobs that every contender of a plan has answered."""
    return [job for job in plan.jobs if all((c.build, job) in answers for c in plan.contenders)]


def percent(interval: Interval, n: int) -> Estimate:
    """An interval of shares, in %."""
    return Estimate(100 * interval.estimate, 100 * interval.low, 100 * interval.high, n=n)


def density_of(answers: Answers, contender: Contender, jobs: Sequence[Job]) -> float:
    """Mean causal density, %."""
    found = [answers[contender.build, job].density or 0.0 for job in jobs]
    return 100 * sum(found) / len(found)


def answers_table(answers: Answers, plans: Sequence[Plan], title: str, note: str) -> Table:
    """A row for each length, task and contender; "all" pools the tasks, sample by sample."""
    columns = (
        Column("length", "tokens"),
        Column("task"),
        Column("contender"),
        Column("density", "%", 1),
        Column("n"),
        Column("right", "%", 1),
        Column("right − dense", "points", 1),
    )
    rows: list[tuple[Cell, ...]] = []
    for plan in plans:
        done = answered(answers, plan)
        tasks = list(dict.fromkeys(job.task for job in done))
        for length in dict.fromkeys(job.length for job in done):
            for task in [*tasks, *(["all"] if len(tasks) > 1 else [])]:
                jobs = [j for j in done if j.length == length and task in (j.task, "all")]
                dense = right(answers, plan.contenders[0], jobs)
                for contender in plan.contenders:
                    mine = right(answers, contender, jobs)
                    difference = None
                    if contender is not plan.contenders[0]:
                        difference = percent(paired_difference(mine, dense), len(jobs))
                    share = percent(wilson_interval(round(sum(mine)), len(mine)), len(mine))
                    density = density_of(answers, contender, jobs)
                    rows.append((length, task, contender.name, density, len(jobs), share, difference))
    return Table(title, columns, tuple(rows), note)


def accuracy_plot(answers: Answers, plan: Plan, task: str) -> Plot | None:
    """Right answers against causal density, one line a selector, dense as the reference."""
    jobs = [job for job in answered(answers, plan) if task in (job.task, "all")]
    if not jobs:
        return None
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    dense = None
    for contender in plan.contenders:
        mine = right(answers, contender, jobs)
        share = percent(wilson_interval(round(sum(mine)), len(mine)), len(mine))
        if contender is plan.contenders[0]:
            dense = share
            continue
        name = TITLES.get(contender.name.rpartition(" ")[0], contender.name.rpartition(" ")[0])
        lines.setdefault(name, []).append((density_of(answers, contender, jobs), share))
    assert dense is not None
    ends = [x for points in lines.values() for x, _ in points]
    series = [Series("dense", ((min(ends), dense), (max(ends), dense)), dashed=True)]
    series += [Series(name, tuple(sorted(points, key=lambda p: p[0]))) for name, points in lines.items()]
    return Plot(
        f"Right answers, {'five tasks' if task == 'all' else task}: {jobs[0].length:,} tokens",
        Axis("causal density", "%", log=True, base=10),
        Axis("right answers", "%", low=0, high=100),
        tuple(series),
        f"{len(jobs)} samples each, the same for all; Wilson 95 %.",
    )


def maps_of_needles(answers: Answers, plans: Sequence[Plan]) -> tuple[HeatMap, ...]:
    """Depth by length for dense, the default and window + sink, side by side; budgets differ by length."""
    maps = []
    for place, name in enumerate(("dense", DEFAULT, "window-sink")):
        # A contender has one build a length, so its answers are looked up by those of the first.
        merged: dict[tuple[str, Job], Answer] = {}
        jobs: list[Job] = []
        first = plans[0].contenders[place]
        for plan in plans:
            done = answered(answers, plan)
            jobs += done
            merged |= {(first.build, job): answers[plan.contenders[place].build, job] for job in done}
        if jobs:
            (one,) = needle_maps(merged, [first], jobs)
            budgets = ", ".join(str(plan.contenders[place].name.split()[-1]) for plan in plans)
            note = one.note if name == "dense" else f"{one.note}; budgets {budgets}"
            maps.append(dataclasses.replace(one, title=TITLES[name], note=note))
    return tuple(maps)


def boundary_table(found: Sequence[Measurement]) -> Table:
    """Chunk rules at equal density, differences from the rule that ships, prompt by prompt."""
    rules = ("shipped", "moments-fixed@32", "moments-fixed", "moments-cosine@0.4", "moments-cosine@0.5")
    rules += tuple(dict.fromkeys(o.selector for o in found if o.selector.startswith("moments-learned")))
    columns = (
        Column("length", "tokens"),
        Column("budget", "tokens"),
        Column("chunks"),
        Column("mean chunk", "tokens", 0),
        Column("prefill: of the oracle's − moments", "points", 2),
        Column("decode: of the oracle's − moments", "points", 2),
        Column("n"),
    )
    rows: list[tuple[Cell, ...]] = []
    by_key = {(o.kind, o.selector, o.budget, o.job): o for o in found}
    for length in sorted({o.job.length for o in found}):
        jobs = list(dict.fromkeys(o.job for o in found if o.job.length == length))
        for budget in sorted({o.budget for o in found if o.job.length == length}):
            for rule in rules:
                differences: list[Cell] = []
                count = 0
                for kind in ("prefill", "decode"):
                    # In decode the shipped rule ranks twice; its first ranking alone is "moments".
                    pairs = [
                        (by_key.get((kind, rule, budget, j)), by_key.get((kind, "moments", budget, j))) for j in jobs
                    ]
                    both = [(a, b) for a, b in pairs if a is not None and b is not None]
                    count = max(count, len(both))
                    if not both:
                        differences.append(None)
                        continue
                    mine, base = zip(
                        *((eval_selectors.share_of_oracle(a), eval_selectors.share_of_oracle(b)) for a, b in both),
                        strict=True,
                    )
                    gap = paired_difference(mine, base)
                    differences.append(Estimate(gap.estimate, gap.low, gap.high, n=len(both)))
                if count:
                    sizes = [o.chunk_tokens for o in found if o.selector == rule and o.job.length == length]
                    known = [size for size in sizes if size is not None]
                    rows.append((length, budget, rule, sum(known) / len(known) if known else None, *differences, count))
    note = (
        "Chunk rules under one scoring (moments) at the same budget. shipped: cosine cuts at 0.25 (in decode with its "
        "second ranking); fixed@N: every N tokens; cosine@T: fewer, longer chunks; learned: the paper's predictor by "
        "the local rule. Paired bootstrap 95 % over prompts."
    )
    return Table("Boundaries: fixed, cosine, learned", columns, tuple(rows), note)


def lab_report(lab: Lab, samples: dict[str, int], command: str) -> Report:
    """The whole page, from what the records have."""
    answers = read_record(lab.answers)
    found = list(selector_fidelity.read_record(lab.measurements).values())
    second, third = stage_2(lab, samples["2"]), stage_3(lab, samples["3"])
    needles = needle_grid(lab, samples["needle"])
    report = begin_report("eval", "Which sparse attention keeps the answer", command)
    tables: list[Table] = []
    plots: list[Plot] = []
    if any(answered(answers, plan) for plan in third):
        note = "Paired samples; right: every expected string found, Wilson 95 %; difference: bootstrap 95 %."
        tables.append(answers_table(answers, third, "The default against dense", note))
    if answered(answers, second[0]):
        note = f"The same samples for all; dense solves these tasks. {LENGTH:,} tokens."
        tables.append(answers_table(answers, second, "Finalists", note))
        plots += [p for task in ("all", *SOLVED) if (p := accuracy_plot(answers, second[0], task)) is not None]
    if found:
        boundaries = boundary_table(found)
        tables += [boundaries] if boundaries.rows else []
        of_stage = eval_selectors.selectors_report(found, lab.base(), command)
        tables += of_stage.tables
        plots += of_stage.plots
    maps = maps_of_needles(answers, needles)
    pictures = ()
    if found:
        job = max((o.job for o in found if o.job.task == "niah_multikey_2"), key=lambda job: job.length)
        pictures = (eval_selectors.picture_of(lab.base(), job, "shipped", BUDGETS[job.length][0]),)
    return dataclasses.replace(
        report,
        verdict=verdict(answers, second[0], third[0]),
        tables=tuple(tables),
        plots=tuple(plots),
        heat_maps=(*maps, *(eval_selectors.recall_maps(found) if found else ())),
        pictures=pictures,
    )


def verdict(answers: Answers, second: Plan, third: Plan) -> str:
    """What to use, in one or two sentences, from the figures."""
    jobs = answered(answers, third)
    if not jobs:
        return ""
    dense, default = third.contenders[0], third.contenders[1]
    mine, base = right(answers, default, jobs), right(answers, dense, jobs)
    gap = paired_difference(mine, base)
    text = (
        f"Use DHSA as it ships: at {density_of(answers, default, jobs):.0f} % of all pairs it answers "
        f"{100 * sum(mine) / len(mine):.1f} % right where dense attention answers {100 * sum(base) / len(base):.1f} % "
        f"({100 * gap.estimate:+.1f} points [{100 * gap.low:.1f}, {100 * gap.high:.1f}], {len(jobs):,} paired samples)"
    )
    others = []
    done = answered(answers, second)
    for contender in second.contenders:
        name, _, budget = contender.name.rpartition(" ")
        if done and name in TITLES and name != DEFAULT and budget == str(BUDGETS[LENGTH][0]):
            share = right(answers, contender, done)
            others.append(f"{TITLES[name]} {100 * sum(share) / len(share):.0f} %")
    return f"{text}; at the same density {', '.join(others)}." if others else f"{text}."
