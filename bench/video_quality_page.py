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
from edgerun.report import Cell, Column, Estimate, MovingPicture, Report, Table

PLAIN = "plain"
MEASURES = ("psnr", "ssim", "flicker", "dynamic")
MOST_LOSS_DB, MOST_POINTS, LEAST_DYNAMIC = 0.5, 1.0, 0.9
RIVALS = ("Euler", "step caching")
LESS, MORE = 0.25, 1.0  # evaluations, by which a rival of a rule may differ from it
_RESAMPLES = 4000


def quality_report(rows: Sequence[Row], evaluations: int, pictures: Sequence[MovingPicture], command: str) -> Report:
    """rows: of the result file, "plain" among them. evaluations: that a rule may take on average."""
    methods = {row["method"]: row for row in rows if row["kind"] == "method"}
    report = begin_report("eval", "Ways to sample a clip: evaluations and quality", command)
    return dataclasses.replace(
        report,
        verdict=leap_verdict(methods, evaluations),
        notes=tuple(merge_verdicts(methods)),
        tables=(methods_table(methods),),
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
    )
    plain = methods[PLAIN]
    rows: list[tuple[Cell, ...]] = []
    for name, row in methods.items():
        mean = {key: statistics.fmean(row[key]) for key in ("evaluations", *MEASURES)}
        right = [bool(one) for one in row["right"]]
        agreed = _estimate(wilson_interval(sum(right), len(right)), len(right), 100)
        loss = points = dynamic = None
        if row is not plain:
            loss = _estimate(paired_difference(plain["psnr"], row["psnr"]), len(right))
            points = _estimate(paired_shares(right, [bool(one) for one in plain["right"]]), len(right), 100)
            dynamic = _estimate(ratio_of_means(row["dynamic"], plain["dynamic"]), len(right))
        quality = (mean["psnr"], loss, mean["ssim"], agreed, points)
        rows.append((name, mean["evaluations"], *quality, mean["flicker"], mean["dynamic"], dynamic))
    note = (
        "The same noise and prompt for all; PSNR and SSIM against the reference's clip. loss: PSNR of plain less the "
        "method's; 95 % over prompts: bootstrap, Newcombe's for shares."
    )
    return Table(f"{len(plain['right'])} prompts", columns, tuple(rows), note)


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
    means = {name: statistics.fmean(row["evaluations"]) for name, row in methods.items() if name.startswith(family)}
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
        found.append(
            f"{name} {verb} {LEAST_DYNAMIC:g} of the plain run's dynamic degree: {_said(moves, '.2f')}; loss "
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
