"""The accuracy lab's page: what the records of its stages say, as one report (bench/accuracy_lab.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.accuracy_lab_plans import (
    BUDGETS,
    DEFAULT,
    LENGTH,
    PAPER,
    SOLVED,
    TITLES,
    Lab,
    Plan,
    needle_grid,
    other_tasks,
    selector_jobs,
    stage_1,
    stage_2,
    stage_3,
)
from bench.accuracy_lab_selectors import boundary_table, boundary_verdict, rivals_table
from bench.harness import commit
from edgerun.commands import eval_selectors
from edgerun.commands.common import begin_report
from edgerun.commands.eval_tables import mean_density, needle_maps, percent, right
from edgerun.evaluation import selector_fidelity
from edgerun.evaluation.answers import Answer, Contender, Job, read_record
from edgerun.evaluation.selector_fidelity import Measurement
from edgerun.evaluation.statistics import Interval, paired_shares, wilson_interval
from edgerun.report import Axis, Cell, Column, Estimate, HeatMap, Picture, Plot, Report, Series, Table

Answers = dict[tuple[str, Job], Answer]
SOLVED_SHARE = 0.9  # of dense answers: below it a task says little of what sparse attention loses
MOST_LOST = 0.01  # share of answers that the default may lose, and twice that at the interval's end


def answered(answers: Answers, plan: Plan) -> list[Job]:
    """Jobs that every contender of a plan has answered."""
    return [job for job in plan.jobs if all((c.build, job) in answers for c in plan.contenders)]


def density_of(answers: Answers, contender: Contender, jobs: Sequence[Job]) -> float:
    """Mean causal density, %."""
    found = mean_density([answers[contender.build, job] for job in jobs])
    assert found is not None, "an eager answer knows its density"
    return found


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
                        difference = percent(paired_shares(mine, dense), len(jobs))
                    share = percent(wilson_interval(sum(mine), len(mine)), len(mine))
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
        share = percent(wilson_interval(sum(mine), len(mine)), len(mine))
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


def planned(lab: Lab, samples: int) -> list[Measurement]:
    """The measurements of stage 1 as it is planned now, without what earlier plans or predictors left."""
    wanted = set()
    parts = stage_1(lab)
    base = lab.base([name for names, _, _ in parts for name in names])
    for names, lengths, budgets in parts:
        builds = {(selector_fidelity.build_of(base, name), name) for name in names}
        wanted |= {(*b, budget, job) for b in builds for budget in budgets for job in selector_jobs(lengths, samples)}
    found = selector_fidelity.read_record(lab.measurements).values()
    return [o for o in found if o.density is not None and (o.build, o.selector, o.budget, o.job) in wanted]


def lab_report(lab: Lab, samples: dict[str, int], command: str) -> Report:
    """The whole page, from what the records have."""
    answers = read_record(lab.answers)
    found = planned(lab, samples["1"])
    second, third = stage_2(lab, samples["2"]), stage_3(lab, samples["3"])
    needles = needle_grid(lab, samples["needle"])
    report = begin_report("eval", "Which sparse attention keeps the answer", command)
    tables: list[Table] = []
    plots: list[Plot] = []
    notes: list[str] = []
    if any(answered(answers, plan) for plan in third):
        note = "Paired samples; right: every expected string found, Wilson 95 %; difference: Newcombe's paired 95 %."
        tables.append(answers_table(answers, third, "The default against dense", note))
    if answered(answers, second[0]):
        note = f"The same samples for all, {LENGTH:,} tokens; {solved_by_dense(answers, second[0])}"
        note += " paper-v1 has 32 tokens more than the others where single tokens are attended, to its advantage."
        tables.append(answers_table(answers, second, "Finalists", note))
        plots += [p for task in ("all", *SOLVED) if (p := accuracy_plot(answers, second[0], task)) is not None]
    others = other_tasks(lab, samples["others"])
    if answered(answers, others[0]):
        note = f"{LENGTH:,} tokens, the same samples for all; {solved_by_dense(answers, others[0])}"
        tables.append(answers_table(answers, others, "RULER's other tasks", note))
    if found:
        table, said_of_chance = rivals_table(found)
        tables.append(table)
        notes.append(said_of_chance)
        boundaries = boundary_table(found)
        if boundaries.rows:
            tables.append(boundaries)
            notes.append(boundary_verdict(boundaries))
        of_stage = eval_selectors.selectors_report(found, lab.base(), command, everyone=True)
        tables += of_stage.tables
        plots += of_stage.plots
    maps = maps_of_needles(answers, needles)
    pictures: tuple[Picture, ...] = ()
    if found:
        job = max((o.job for o in found), key=lambda job: (job.length, job.task == "niah_multikey_2"))
        picture, densities = eval_selectors.picture_of(lab.base(), job, "shipped", BUDGETS[job.length][0])
        pictures = (picture,)
        maps = (*maps, *eval_selectors.recall_maps(found, "shipped"), densities)
    if lab.predictor is None:
        notes.append(
            "Without --predictor: the paper's v1 mode and learned boundaries are left out, and not beaten here."
        )
    return dataclasses.replace(
        report,
        facts=(("model", lab.base().build), ("commit", commit())),
        verdict=verdict(answers, second[0], third[0], needs_paper=lab.predictor is not None),
        notes=tuple(note for note in notes if note),
        tables=tuple(tables),
        plots=tuple(plots),
        heat_maps=maps,
        pictures=pictures,
    )


def solved_by_dense(answers: Answers, plan: Plan) -> str:
    """Which of a plan's tasks dense attention answers well enough to say what another loses, as a sentence."""
    done = answered(answers, plan)
    shares = {}
    for task in dict.fromkeys(job.task for job in done):
        mine = right(answers, plan.contenders[0], [job for job in done if job.task == task])
        shares[task] = sum(mine) / len(mine)
    parts = []
    for solved, words in ((True, "dense attention solves"), (False, "dense attention does not solve")):
        some = [f"{task} ({100 * share:.0f} %)" for task, share in shares.items() if (share >= SOLVED_SHARE) == solved]
        parts += [f"{words} {', '.join(some)}"] if some else []
    return "; ".join(parts) + f". Solved: {100 * SOLVED_SHARE:.0f} % right or more."


def verdict(answers: Answers, second: Plan, third: Plan, *, needs_paper: bool = False) -> str:
    """What to use, from the figures: the default against dense, then against every finalist on the same samples.

    It is recommended when it loses at most MOST_LOST to dense, twice that at the interval's end, and is better than the
    paper's v1 beyond the interval of the same samples; needs_paper: also when that was not measured, it is not.
    """
    jobs = answered(answers, third)
    if not jobs:
        return ""
    dense, default = third.contenders[0], third.contenders[1]
    mine, base = right(answers, default, jobs), right(answers, dense, jobs)
    gap = paired_shares(mine, base)
    kept = gap.estimate >= -MOST_LOST and gap.low >= -2 * MOST_LOST
    others: dict[str, Interval] = {}
    done = answered(answers, second)
    budget = default.name.rpartition(" ")[2]
    rivals = [c for c in second.contenders if c.name.endswith(f" {budget}") and c.build != default.build]
    if done and default.build in {contender.build for contender in second.contenders}:
        ours = right(answers, default, done)
        others = {c.name.rpartition(" ")[0]: paired_shares(ours, right(answers, c, done)) for c in rivals}
    better = others[PAPER].low > 0 if PAPER in others else not needs_paper
    advice = "Use DHSA as it ships" if kept and better else "DHSA as it ships loses more than is asked"
    if kept and not better:
        advice = "DHSA as it ships keeps dense attention's answers, but is not shown to be better than the paper's v1"
    text = (
        f"{advice}: at {density_of(answers, default, jobs):.0f} % of all pairs it answers "
        f"{100 * sum(mine) / len(mine):.1f} % right where dense attention answers {100 * sum(base) / len(base):.1f} % "
        f"({said(gap)}, {len(jobs):,} paired samples)"
    )
    if not others:
        return f"{text}."
    parts = [f"{TITLES[name]}: {said(found)}" for name, found in others.items()]
    return f"{text}. DHSA less the others at the same budget, {len(done):,} samples: {'; '.join(parts)}."


def said(gap: Interval) -> str:
    """A difference of shares in words."""
    return f"{100 * gap.estimate:+.1f} points [{100 * gap.low:.1f}, {100 * gap.high:.1f}]"
