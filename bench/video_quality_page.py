"""What the measures of workloads/video_quality.py say: a table, a verdict, and clips side by side.

Limits on evaluations, loss and caption hold for means, which are printed with their intervals; a rival is beaten where
the interval of the paired difference leaves no doubt.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Sequence

from bench.harness import Row
from edgerun.commands.common import begin_report
from edgerun.evaluation.statistics import Interval, paired_difference, paired_shares, wilson_interval
from edgerun.report import Axis, Cell, Column, Estimate, MovingPicture, Plot, Report, Series, Table

PLAIN = "plain"
MEASURES = ("psnr", "ssim", "flicker", "dynamic")
MOST_LOSS_DB, MOST_POINTS, LEAST_DYNAMIC = 0.5, 1.0, 0.9
RIVALS = ("Euler", "step caching")
LESS, MORE = 0.25, 1.0  # evaluations, by which a rival of a rule may differ from it
_RESAMPLES = 4000


def quality_report(
    rows: Sequence[Row],
    evaluations: int,
    merge_steps: Sequence[int],
    pictures: Sequence[MovingPicture],
    command: str,
) -> Report:
    """rows: of the result file, "plain" among them. evaluations: that a rule may take on average."""
    methods = {row["method"]: row for row in rows if row["kind"] == "method"}
    report = begin_report("eval", "Ways to sample a clip: evaluations and quality", command)
    return dataclasses.replace(
        report,
        verdict=leap_verdict(methods, evaluations),
        notes=(default_verdict(methods, evaluations), *merge_verdicts(methods)),
        tables=(methods_table(methods),),
        plots=tuple(merge_curves(methods, merge_steps)),
        clips=tuple(pictures),
    )


def methods_table(methods: dict[str, Row]) -> Table:
    """A row for each method; differences are paired with plain sampling."""
    columns = (
        Column("method"),
        Column("evaluations", digits=1),
        Column("PSNR", "dB", 2),
        Column("loss", "dB", 2),
        Column("SSIM", digits=3),
        Column("as the caption says", "%", 1),
        Column("less plain", "points", 1),
        Column("flicker", "levels", 2),
        Column("dynamic degree", "px/frame", 2),
        Column("of plain", digits=2),
        Column("does not keep"),
    )
    plain = methods[PLAIN]
    rows: list[tuple[Cell, ...]] = []
    for name, row in methods.items():
        mean = {key: statistics.fmean(row[key]) for key in ("evaluations", *MEASURES)}
        right = [bool(one) for one in row["right"]]
        agreed = _estimate(wilson_interval(sum(right), len(right)), len(right), 100)
        loss = points = dynamic = broken = None
        if row is not plain:
            broken = ", ".join(gates_broken(plain, row))
            loss = _estimate(paired_difference(plain["psnr"], row["psnr"]), len(right))
            points = _estimate(paired_shares(right, [bool(one) for one in plain["right"]]), len(right), 100)
            dynamic = _estimate(ratio_of_means(row["dynamic"], plain["dynamic"]), len(right))
        quality = (mean["psnr"], loss, mean["ssim"], agreed, points)
        rows.append((name, mean["evaluations"], *quality, mean["flicker"], mean["dynamic"], dynamic, broken))
    note = (
        "The same noise and prompt for all; PSNR and SSIM against the reference's clip. loss: PSNR of plain less the "
        "method's; 95 % over prompts: bootstrap, Newcombe's for shares. does not keep: which means are beyond "
        f"{MOST_LOSS_DB:g} dB of loss, {MOST_POINTS:g} point of caption, {LEAST_DYNAMIC:g} of plain's motion."
    )
    return Table(f"{len(plain['right'])} prompts", columns, tuple(rows), note)


def gates_broken(plain: Row, row: Row) -> list[str]:
    """Which limits of quality the means of a method are beyond, of loss, caption and motion."""
    loss = paired_difference(plain["psnr"], row["psnr"]).estimate
    points = 100 * (statistics.fmean(row["right"]) - statistics.fmean(plain["right"]))
    moves = ratio_of_means(row["dynamic"], plain["dynamic"]).estimate
    beyond = {"loss": loss > MOST_LOSS_DB, "caption": points < -MOST_POINTS, "motion": not moves >= LEAST_DYNAMIC}
    return [name for name, is_beyond in beyond.items() if is_beyond]


def default_verdict(methods: dict[str, Row], evaluations: int) -> str:
    """Which way to sample should be the default: of those that keep every limit the one with fewest evaluations."""
    plain = methods[PLAIN]
    kept = {name: row for name, row in methods.items() if not gates_broken(plain, row)}
    means = {name: statistics.fmean(row["evaluations"]) for name, row in kept.items()}
    few = {name: mean for name, mean in means.items() if mean < means[PLAIN]}
    if not few:
        nearest = max(
            (name for name, row in methods.items() if statistics.fmean(row["evaluations"]) <= evaluations + 0.5),
            key=lambda name: statistics.fmean(methods[name]["psnr"]),
            default=None,
        )
        text = "Nothing with fewer evaluations than plain sampling keeps every limit, so plain sampling is the default"
        return text + (f"; nearest of the others is {nearest}." if nearest is not None else ".")
    ranked = sorted(few, key=lambda name: (round(few[name]), -statistics.fmean(methods[name]["psnr"])))
    listed = "; ".join(f"{name} ({few[name]:.1f})" for name in ranked)
    return f"Every limit is kept with fewer evaluations than plain sampling by: {listed}. The first is one to choose."


def merge_curves(methods: dict[str, Row], merge_steps: Sequence[int]) -> list[Plot]:
    """Motion and loss by how many of the first steps merge."""
    plain = methods[PLAIN]
    rows = {count: methods.get(f"TDTM, {count} steps") for count in sorted(merge_steps)}
    count = len(plain["right"])
    moves = [(0.0, Estimate(1.0))]
    losses = [(0.0, Estimate(0.0))]
    for steps, row in rows.items():
        if row is None:
            continue
        moves.append((float(steps), _estimate(ratio_of_means(row["dynamic"], plain["dynamic"]), count)))
        losses.append((float(steps), _estimate(paired_difference(plain["psnr"], row["psnr"]), count)))
    if len(moves) == 1:
        return []
    ends = moves[0][0], moves[-1][0]
    steps_axis = Axis("first steps whose frames merge", low=0.0)

    def limit(value: float) -> Series:
        return Series("limit", tuple((end, Estimate(value)) for end in ends), dashed=True)

    degree, loss = Axis("dynamic degree, of plain", low=0.0), Axis("loss", "dB")
    note = f"{count} prompts, 95 % intervals."
    moving, losing = (Series("TDTM", tuple(points)) for points in (moves, losses))
    return [
        Plot("TDTM: how much still moves", steps_axis, degree, (moving, limit(LEAST_DYNAMIC)), note),
        Plot("TDTM: loss", steps_axis, loss, (losing, limit(MOST_LOSS_DB)), note),
    ]


def leap_verdict(methods: dict[str, Row], evaluations: int) -> str:
    """Whether a leap keeps the quality in so many evaluations and beats its rivals at equal ones, with the figures."""
    plain = methods[PLAIN]
    leaps = {name: row for name, row in methods.items() if name.startswith("LPL") and "TDTM" not in name}
    good, parts = [], []
    for name, row in leaps.items():
        count = statistics.fmean(row["evaluations"])
        loss = paired_difference(plain["psnr"], row["psnr"])
        points = 100 * (statistics.fmean(row["right"]) - statistics.fmean(plain["right"]))
        rivals = [equal_rival(methods, family, count) for family in RIVALS]
        gains = {each: paired_difference(row["psnr"], methods[each]["psnr"]) for each in rivals if each is not None}
        keeps = count <= evaluations and loss.estimate <= MOST_LOSS_DB and points >= -MOST_POINTS
        if keeps and len(gains) == len(RIVALS) and all(gain.low > 0 for gain in gains.values()):
            good.append(name)
        text = f"{name}: {count:.1f} evaluations, loss {_said(loss)} dB, caption {points:+.1f} points"
        text += "".join(f", PSNR less {each} {_said(gain)} dB" for each, gain in gains.items())
        missing = [family for family, each in zip(RIVALS, rivals, strict=True) if each is None]
        text += f", no {' and no '.join(missing)} of as many to compare" if missing else ""
        parts.append(text + ("" if keeps else " (not within the limits)"))
    few = [name for name, row in methods.items() if statistics.fmean(row["evaluations"]) <= evaluations + 0.5]
    few = [name for name in few if "TDTM" not in name]
    best = max(few, key=lambda name: statistics.fmean(methods[name]["psnr"]), default=None)
    limits = (
        f"at most {evaluations} evaluations, {MOST_LOSS_DB:g} dB and {MOST_POINTS:g} point of caption agreement lost"
    )
    if good:
        head = f"{good[0]} keeps the quality ({limits}) and beats re-spaced Euler and step caching at equal evaluations"
    else:
        head = f"No leap keeps the quality ({limits}) and beats both rivals at equal evaluations"
        head += f"; nearest to the reference with as few is {best}" if best is not None else ""
    return f"{head}. {'; '.join(parts)}."


def equal_rival(methods: dict[str, Row], family: str, count: float) -> str | None:
    """The method of a family that takes about `count` evaluations on average; None: none does."""
    means = {
        name: statistics.fmean(row["evaluations"])
        for name, row in methods.items()
        if name.startswith(family) and "TDTM" not in name
    }
    alike = {name: mean for name, mean in means.items() if count - LESS <= mean <= count + MORE}
    return min(alike, key=lambda name: abs(alike[name] - count), default=None)


def merge_verdicts(methods: dict[str, Row]) -> list[str]:
    """What merging frames does to motion and caption, one sentence a setting."""
    plain, found = methods[PLAIN], []
    for name, row in methods.items():
        if "TDTM" not in name:
            continue
        moves = ratio_of_means(row["dynamic"], plain["dynamic"])
        right = [bool(one) for one in row["right"]]
        points = paired_shares(right, [bool(one) for one in plain["right"]])
        loss = paired_difference(plain["psnr"], row["psnr"])
        verb = "keeps" if moves.estimate >= LEAST_DYNAMIC else "does not keep"
        similar = row.get("similar_frames")
        merged = f" ({statistics.fmean(similar):.1f} frames computed in a merged step)" if similar else ""
        found.append(
            f"{name}{merged} {verb} {LEAST_DYNAMIC:g} of the plain run's dynamic degree: {_said(moves, '.2f')}; loss "
            f"{_said(loss)} dB, caption {100 * points.estimate:+.1f} [{100 * points.low:+.1f}, "
            f"{100 * points.high:+.1f}] points."
        )
    return found


def ratio_of_means(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Interval:
    """mean(a) / mean(b) over paired samples with a 95 % percentile bootstrap interval; one seed, one result."""
    rng = random.Random(f"ratio_of_means/{seed}")
    ratios = []
    for _ in range(_RESAMPLES):
        chosen = rng.choices(range(len(a)), k=len(a))
        below = sum(b[i] for i in chosen)
        if below > 0:
            ratios.append(sum(a[i] for i in chosen) / below)
    ratios.sort()
    whole = sum(a) / sum(b) if sum(b) > 0 else float("nan")
    if not ratios:
        return Interval(whole, whole, whole)
    return Interval(whole, ratios[int(0.025 * len(ratios))], ratios[int(0.975 * len(ratios)) - 1])


def _estimate(found: Interval, n: int, times: float = 1.0) -> Estimate:
    return Estimate(times * found.estimate, times * found.low, times * found.high, n=n)


def _said(found: Interval, form: str = "+.2f") -> str:
    return f"{found.estimate:{form}} [{found.low:{form}}, {found.high:{form}}]"
