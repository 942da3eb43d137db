"""The accuracy lab's page: what the records of its stages say, as one report (bench/accuracy_lab.py)."""

from __future__ import annotations

import dataclasses
import math
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
    selector_jobs,
    stage_1,
    stage_2,
    stage_3,
)
from edgerun.commands import eval_selectors
from edgerun.commands.common import begin_report
from edgerun.commands.eval_tables import mean_density, needle_maps, percent, right
from edgerun.evaluation import selector_fidelity
from edgerun.evaluation.answers import Answer, Contender, Job, read_record
from edgerun.evaluation.selector_fidelity import Measurement
from edgerun.evaluation.statistics import Interval, paired_shares, wilson_interval
from edgerun.report import Axis, Cell, Column, Estimate, HeatMap, Plot, Report, Series, Table

Answers = dict[tuple[str, Job], Answer]
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


@dataclasses.dataclass(frozen=True)
class ChunkRule:
    """A way to cut chunks, and how long they are on the prompts of one length."""

    selector: str
    family: str
    chunk_tokens: float


def chunk_rules(found: Sequence[Measurement], length: int) -> list[ChunkRule]:
    """Every chunk rule under moments pooling that was measured at a length."""
    rules = []
    for name in dict.fromkeys(one.selector for one in found):
        stem = name.partition("@")[0]
        family = {
            "moments": "cosine",
            "moments-cosine": "cosine",
            "moments-fixed": "fixed",
            "moments-learned": "learned",
        }
        sizes = [o.chunk_tokens for o in found if (o.selector, o.job.length) == (name, length)]
        known = [size for size in sizes if size is not None]
        if stem in family and known:
            rules.append(ChunkRule(name, family[stem], eval_selectors.average(known)))
    return rules


def boundary_table(found: Sequence[Measurement]) -> Table:
    """Cosine and learned cuts against fixed ones, learned ones against cosine, each with the nearest chunk length."""
    columns = (
        Column("length", "tokens"),
        Column("budget", "tokens"),
        Column("cuts"),
        Column("mean chunk", "tokens", 0),
        Column("against"),
        Column("mean chunk", "tokens", 0),
        Column("prefill: difference", "points", 2),
        Column("decode: difference", "points", 2),
        Column("n"),
    )
    rows: list[tuple[Cell, ...]] = []
    share = eval_selectors.Shares(found)
    by_key = {(o.kind, o.selector, o.budget, o.job): o for o in found if o.held}
    for length in sorted({o.job.length for o in found}):
        jobs = list(dict.fromkeys(o.job for o in found if o.job.length == length))
        rules = chunk_rules(found, length)
        for budget in sorted({o.budget for o in found if o.job.length == length}):
            for family, others in (("cosine", "fixed"), ("learned", "fixed"), ("learned", "cosine")):
                for rule in (r for r in rules if r.family == family):
                    rivals = [r for r in rules if r.family == others]
                    if not rivals:
                        continue
                    size = rule.chunk_tokens
                    rival = min(rivals, key=lambda r: abs(math.log(r.chunk_tokens / size)))
                    gaps: list[list[float]] = []
                    for kind in ("prefill", "decode"):
                        pairs = [
                            (
                                by_key.get((kind, rule.selector, budget, j)),
                                by_key.get((kind, rival.selector, budget, j)),
                            )
                            for j in jobs
                        ]
                        gaps.append([share(a) - share(b) for a, b in pairs if a is not None and b is not None])
                    if any(gaps):
                        rows.append(
                            (
                                length,
                                budget,
                                rule.selector,
                                rule.chunk_tokens,
                                rival.selector,
                                rival.chunk_tokens,
                                *(eval_selectors.spread(gap) for gap in gaps),
                                max(map(len, gaps)),
                            )
                        )
    note = (
        "Attention held, of the oracle's, in points: chunk rules under one scoring (moments, one ranking in decode) at "
        "one budget, each against the rule of the other kind with the nearest mean chunk length. moments: cosine cuts "
        "at 0.25, as shipped; @T: another threshold; fixed@N: every N tokens; learned: the paper's predictor by the "
        "local rule. Student's 95 % of the paired differences."
    )
    return Table("Boundaries: fixed, cosine, learned", columns, tuple(rows), note)


def boundary_verdict(table: Table) -> str:
    """What learned cuts gain at the longest length and smallest budget, in two sentences; "" without them."""
    learned = [row for row in table.rows if str(row[2]).startswith("moments-learned")]
    if not learned:
        return ""
    length = max(int(row[0]) for row in learned)  # type: ignore[arg-type]
    budget = min(int(row[1]) for row in learned if row[0] == length)  # type: ignore[arg-type]
    families: dict[str, list[Estimate]] = {"fixed chunks": [], "cosine cuts": []}
    parts = []
    for row in learned:
        if row[:2] == (length, budget):
            gaps = [cell for cell in row[6:8] if isinstance(cell, Estimate) and cell.low is not None]
            families["fixed chunks" if "fixed" in str(row[4]) else "cosine cuts"] += gaps
            figures = " and ".join(f"{g.value:+.2f} [{g.low:.2f}, {g.high:.2f}]" for g in gaps)
            parts.append(f"{row[2]} against {row[4]} {figures}")
    verdicts = [f"{_compared(gaps)} {family}" for family, gaps in families.items() if gaps]
    return (
        f"Learned boundaries {' and '.join(verdicts)} of the nearest length. At {length:,} tokens and budget "
        f"{budget:,}, attention held of the oracle's in prefill and decode, differences in points: {'; '.join(parts)}."
    )


def _compared(gaps: Sequence[Estimate]) -> str:
    """Differences in favour of something, as a verb: what no interval leaves out is not said."""
    wins = any(gap.low is not None and gap.low > 0 for gap in gaps)
    losses = any(gap.high is not None and gap.high < 0 for gap in gaps)
    if wins and losses:
        return "beat at one threshold and lose at another to"
    return "beat" if wins else "lose to" if losses else "cannot be told from"


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
        note = f"The same samples for all; dense solves these tasks. {LENGTH:,} tokens."
        tables.append(answers_table(answers, second, "Finalists", note))
        plots += [p for task in ("all", *SOLVED) if (p := accuracy_plot(answers, second[0], task)) is not None]
    if found:
        boundaries = boundary_table(found)
        if boundaries.rows:
            tables.append(boundaries)
            notes.append(boundary_verdict(boundaries))
        of_stage = eval_selectors.selectors_report(found, lab.base(), command)
        tables += of_stage.tables
        plots += of_stage.plots
    maps = maps_of_needles(answers, needles)
    pictures = ()
    if found:
        job = max((o.job for o in found), key=lambda job: (job.length, job.task == "niah_multikey_2"))
        pictures = (eval_selectors.picture_of(lab.base(), job, "shipped", BUDGETS[job.length][0]),)
    return dataclasses.replace(
        report,
        verdict=verdict(answers, second[0], third[0]),
        notes=tuple(note for note in notes if note),
        tables=tuple(tables),
        plots=tuple(plots),
        heat_maps=(*maps, *(eval_selectors.recall_maps(found, "shipped") if found else ())),
        pictures=pictures,
    )


def verdict(answers: Answers, second: Plan, third: Plan) -> str:
    """What to use, from the figures: the default against dense, then against every finalist on the same samples."""
    jobs = answered(answers, third)
    if not jobs:
        return ""
    dense, default = third.contenders[0], third.contenders[1]
    mine, base = right(answers, default, jobs), right(answers, dense, jobs)
    gap = paired_shares(mine, base)
    kept = gap.estimate >= -MOST_LOST and gap.low >= -2 * MOST_LOST
    text = (
        f"{'Use DHSA as it ships' if kept else 'DHSA as it ships loses more than is asked'}: at "
        f"{density_of(answers, default, jobs):.0f} % of all pairs it answers {100 * sum(mine) / len(mine):.1f} % right "
        f"where dense attention answers {100 * sum(base) / len(base):.1f} % ({said(gap)}, {len(jobs):,} paired samples)"
    )
    others = []
    done = answered(answers, second)
    budget = default.name.rpartition(" ")[2]
    rivals = [c for c in second.contenders if c.name.endswith(f" {budget}") and c.build != default.build]
    if done and default.build in {contender.build for contender in second.contenders}:
        ours = right(answers, default, done)
        for rival in rivals:
            others.append(
                f"{TITLES[rival.name.rpartition(' ')[0]]}: {said(paired_shares(ours, right(answers, rival, done)))}"
            )
    if not others:
        return f"{text}."
    return f"{text}. DHSA less the others at the same budget, {len(done):,} samples: {'; '.join(others)}."


def said(gap: Interval) -> str:
    """A difference of shares in words."""
    return f"{100 * gap.estimate:+.1f} points [{100 * gap.low:.1f}, {100 * gap.high:.1f}]"
