"""The tables of `edgerun eval`: right answers by task and length, needles by depth and length, and bits per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgerun.evaluation import ruler
from edgerun.evaluation.answers import Answer, Contender, Job
from edgerun.evaluation.perplexity import Loss
from edgerun.evaluation.statistics import Interval, bootstrap_mean, paired_difference, paired_shares, wilson_interval
from edgerun.report import Categories, Cell, Column, Estimate, HeatMap, Table

Answers = Mapping[tuple[str, Job], Answer]
Grid = tuple[tuple[int, ...], tuple[float, ...], tuple[tuple[float | None, ...], ...]]

_ANSWERS_NOTE = (
    "right: every expected string found, Wilson 95 %; score: strings found; difference: Newcombe's paired 95 %"
)


def tables(answers: Answers, contenders: Sequence[Contender], jobs: Sequence[Job]) -> tuple[Table, ...]:
    """What a report of these jobs, all of one suite, shows; the first contender is compared with."""
    if jobs[0].suite == "perplexity":
        return (loss_table(answers, contenders, jobs),)
    return (answer_table(answers, contenders, jobs),)


def notes(jobs: Sequence[Job]) -> tuple[str, ...]:
    """What a reader of these jobs' figures must know of their suite."""
    if jobs[0].suite == "perplexity":
        names = [path.name for path in jobs[0].files]
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return (f"Text: {listed}; its SHA-256 begins with {jobs[0].task.rpartition('_')[2]}.",)
    if jobs[0].suite != "ruler":
        return ()
    left_out = "RULER's qa_1 and qa_2 need data to download (SQuAD, HotpotQA) and are left out."
    substitute = sorted({job.task for job in jobs} & ruler.SUBSTITUTE_HAYSTACK)
    if not substitute:
        return (left_out,)
    haystack = "Generated sentences stand in for RULER's essays, so figures are not comparable with published ones, in "
    return (f"{haystack}{', '.join(substitute)}.", left_out)


def answer_table(answers: Answers, contenders: Sequence[Contender], jobs: Sequence[Job]) -> Table:
    """One row for each task, length and contender."""
    two_turns = jobs[0].suite == "multi-turn"
    rows = []
    for task, length in dict.fromkeys((job.task, job.length) for job in jobs):
        mine = [job for job in jobs if (job.task, job.length) == (task, length)]
        baseline = right(answers, contenders[0], mine)
        for contender in contenders:
            row = _cell_row(answers, contender, mine, None if contender is contenders[0] else baseline)
            first = (_first_turn(answers, contender, mine),) if two_turns else ()
            rows.append((task, length, *row, *first))
    columns = (
        Column("task"),
        Column("length", "tokens"),
        Column("contender"),
        Column("n"),
        Column("right", "%", 1),
        Column("score", "%", 1),
        Column(f"right − {contenders[0].name}", "points", 1),
        Column("density", "%", 1),
        Column("prefill", "s", 2),
        *((Column("first turn right", "%", 1),) if two_turns else ()),
    )
    note = _ANSWERS_NOTE
    if two_turns:
        note += "; all of the second question but the last column; prefill: the document with the first"
    return Table("Answers", columns, tuple(rows), note)


def right(answers: Answers, contender: Contender, jobs: Sequence[Job]) -> list[bool]:
    """Whether every expected string stands in each answer."""
    return [answers[contender.build, job].score == 1.0 for job in jobs]


def _first_turn(answers: Answers, contender: Contender, jobs: Sequence[Job]) -> Cell:
    """The share of first questions that were answered right; None where the record does not have them all."""
    turns = [answers[contender.build, job].first_turn for job in jobs]
    right = [turn.score == 1.0 for turn in turns if turn is not None]
    return percent(wilson_interval(sum(right), len(right)), len(right)) if len(right) == len(turns) else None


def _cell_row(
    answers: Answers, contender: Contender, jobs: Sequence[Job], baseline: list[bool] | None
) -> tuple[Cell, ...]:
    found = right(answers, contender, jobs)
    mine = [answers[contender.build, job] for job in jobs]
    return (
        contender.name,
        len(found),
        percent(wilson_interval(sum(found), len(found)), len(found)),
        100 * sum(answer.score for answer in mine) / len(mine),
        None if baseline is None else percent(paired_shares(found, baseline), len(found)),
        mean_density(mine),
        sum(answer.prefill_s for answer in mine) / len(mine),
    )


def mean_density(answers: Sequence[Answer]) -> float | None:
    """Of those that know theirs, %; None where none does."""
    densities = [answer.density for answer in answers if answer.density is not None]
    return 100 * sum(densities) / len(densities) if densities else None


def percent(share: Interval, n: int) -> Estimate:
    """An interval of shares, in %."""
    return Estimate(100 * share.estimate, 100 * share.low, 100 * share.high, n=n)


def needle_grid(answers: Answers, contender: Contender, jobs: Sequence[Job]) -> Grid:
    """(lengths, depths, values): values[depth][length] is the percentage of needles found there; None: none was asked.

    Lengths and depths ascend; jobs of other suites are passed over.
    """
    scores: dict[tuple[float, int], list[bool]] = {}
    for job in jobs:
        if job.suite == "needle":
            depth = float(job.task.removeprefix("depth_"))
            scores.setdefault((depth, job.length), []).append(answers[contender.build, job].score == 1.0)
    depths = tuple(sorted({depth for depth, _ in scores}))
    lengths = tuple(sorted({length for _, length in scores}))

    def percent(right: list[bool] | None) -> float | None:
        return None if right is None else 100 * sum(right) / len(right)

    values = tuple(tuple(percent(scores.get((depth, length))) for length in lengths) for depth in depths)
    return lengths, depths, values


def needle_maps(answers: Answers, contenders: Sequence[Contender], jobs: Sequence[Job]) -> tuple[HeatMap, ...]:
    """Depth by length, one map a contender, side by side; none for another suite."""
    if jobs[0].suite != "needle":
        return ()
    maps = []
    for contender in contenders:
        lengths, depths, values = needle_grid(answers, contender, jobs)
        maps.append(
            HeatMap(
                contender.name,
                Categories("length", "tokens", tuple(f"{length:,}" for length in lengths)),
                Categories("depth", "%", tuple(f"{depth:g}" for depth in depths)),
                values,
                "%",
                0.0,
                100.0,
                "depth 0: the haystack's first line, 100: its last",
                group="Needles found, by depth and length",
                digits=0,
            )
        )
    return tuple(maps)


def loss_table(answers: Answers, contenders: Sequence[Contender], jobs: Sequence[Job]) -> Table:
    """One row for each length and contender: bits per token and per byte, over windows."""
    rows = []
    for length in dict.fromkeys(job.length for job in jobs):
        mine = [job for job in jobs if job.length == length]
        baseline = _bits_per_token(answers, contenders[0], mine)
        for contender in contenders:
            bits = _bits_per_token(answers, contender, mine)
            found = [answers[contender.build, job] for job in mine]
            losses = [_loss(answer) for answer in found]
            difference = None if contender is contenders[0] else _estimate(paired_difference(bits, baseline), len(bits))
            rows.append(
                (
                    length,
                    contender.name,
                    len(bits),
                    _estimate(bootstrap_mean(bits), len(bits)),
                    sum(loss.bits for loss in losses) / max(1, sum(loss.text_bytes for loss in losses)),
                    difference,
                    mean_density(found),
                    sum(answer.prefill_s for answer in found) / len(found),
                )
            )
    columns = (
        Column("length", "tokens"),
        Column("contender"),
        Column("windows"),
        Column("bits per token", "", 4),
        Column("bits per byte", "", 4),
        Column(f"bits per token − {contenders[0].name}", "", 4),
        Column("density", "%", 1),
        Column("prefill", "s", 2),
    )
    last = _loss(answers[contenders[0].build, jobs[0]]).tokens
    note = f"of each window's last {last} tokens, fed one by one behind the prefilled rest; bootstrap 95 % over windows"
    return Table("Perplexity", columns, tuple(rows), note)


def _bits_per_token(answers: Answers, contender: Contender, jobs: Sequence[Job]) -> list[float]:
    losses = [_loss(answers[contender.build, job]) for job in jobs]
    return [loss.bits / loss.tokens for loss in losses]


def _loss(answer: Answer) -> Loss:
    assert answer.loss is not None, "an answer of the suite perplexity has a loss"
    return answer.loss


def _estimate(interval: Interval, n: int) -> Estimate:
    return Estimate(interval.estimate, interval.low, interval.high, n=n)
