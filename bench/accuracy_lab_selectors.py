"""What stage 1 of the accuracy lab says of selectors: against chance, against what ships, and how chunks are cut."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from edgerun.commands import eval_selectors
from edgerun.evaluation import selector_fidelity
from edgerun.evaluation.selector_fidelity import Measurement
from edgerun.report import Cell, Column, Estimate, Table
from edgerun.selectors import registry

CHANCE = "shuffled"
MOST_UNLIKE = 1.5  # mean chunk lengths that are compared, longer to shorter


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


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Paired differences of two selectors over the prompts of one length, each with Student's 95 %; None: not measured.

    held: in points of what the oracle holds, by kind; kl: in nats.
    """

    found: Sequence[Measurement]

    @functools.cached_property
    def _by_key(self) -> dict[tuple[object, ...], Measurement]:
        return {(o.kind, o.selector, o.budget, o.job): o for o in self.found}

    @functools.cached_property
    def _share(self) -> eval_selectors.Shares:
        return eval_selectors.Shares(self.found)

    def _pairs(self, kind: str, a: str, b: str, budget: int, length: int) -> list[tuple[Measurement, Measurement]]:
        jobs = dict.fromkeys(o.job for o in self.found if o.job.length == length)
        both = [tuple(self._by_key.get((kind, name, budget, job)) for name in (a, b)) for job in jobs]
        return [(one, other) for one, other in both if one is not None and other is not None]

    def held(self, kind: str, a: str, b: str, budget: int, length: int) -> Estimate | None:
        """a less b."""
        pairs = [(x, y) for x, y in self._pairs(kind, a, b, budget, length) if x.held and y.held]
        return eval_selectors.spread([self._share(x) - self._share(y) for x, y in pairs])

    def kl(self, a: str, b: str, budget: int, length: int) -> Estimate | None:
        """a less b."""
        pairs = self._pairs(selector_fidelity.DIVERGENCE, a, b, budget, length)
        return eval_selectors.spread([eval_selectors.divergence(x) - eval_selectors.divergence(y) for x, y in pairs])

    def all_of(
        self, a: str, b: str, budget: int, length: int
    ) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
        """Prefill, decode, KL; where only one of them decodes densely, nothing but prefill is alike."""
        alike = eval_selectors.decode_rule(a) == eval_selectors.decode_rule(b)
        prefill = self.held(selector_fidelity.PREFILL, a, b, budget, length)
        decode = self.held(selector_fidelity.DECODE, a, b, budget, length)
        return prefill, decode, self.kl(a, b, budget, length) if alike else None


def is_above(gaps: Sequence[Estimate | None]) -> bool:
    """Whether held differences, and one of KL that comes last, are all in favour beyond their intervals."""
    *held, kl = gaps
    more = all(gap is None or (gap.low is not None and gap.low > 0) for gap in held)
    return more and (kl is None or (kl.high is not None and kl.high < 0))


def rivals_table(found: Sequence[Measurement]) -> tuple[Table, str]:
    """Every rule against chance, against what ships and against its single ranking, and what is no better than chance.

    At the longest length and smallest budget; the sentence is of all lengths and budgets. A rule whose authors decode
    densely has no KL to compare, and one without a budget no part in the sentence: chance would attend less.
    """
    length = max(o.job.length for o in found)
    budget = min(o.budget for o in found if o.job.length == length)
    pairs = Pairs(found)
    names = [n for n in dict.fromkeys(o.selector for o in found) if "/" not in n and n != CHANCE]
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        own = eval_selectors.decode_rule(name) == "own"
        against = [pairs.kl(name, other, budget, length) if own else None for other in ("shipped", "moments")]
        mine = [o for o in found if (o.selector, o.budget, o.job.length) == (name, budget, length)]
        densities = [o.density for o in mine if o.density is not None]
        density = 100 * eval_selectors.average(densities) if densities else None
        gaps = pairs.all_of(name, CHANCE, budget, length)
        rows.append((name, eval_selectors.decode_rule(name), density, *gaps, *against))
    rows.sort(key=lambda row: row[6].value if isinstance(row[6], Estimate) else math.inf)
    exceptions = []
    compared = 0
    for of in sorted({o.job.length for o in found}):
        for within in sorted({o.budget for o in found if o.job.length == of}):
            for name in (each for each in names if registry.parse(each)[0].has_budget):
                gaps = pairs.all_of(name, CHANCE, within, of)
                if any(gaps):
                    compared += 1
                    if not is_above(gaps):
                        exceptions.append(f"{name} at {of:,}/{within:,}")
    columns = (
        Column("selector"),
        Column("decode"),
        Column("density", "%", 1),
        Column("prefill − chance", "points", 1),
        Column("decode − chance", "points", 1),
        Column("KL − chance", "nats", 3),
        Column("KL − shipped", "nats", 3),
        Column("KL − moments", "nats", 3),
    )
    note = (
        "Paired differences over the same prompts, Student's 95 %. Points: of attention held, of the oracle's. shipped "
        "ranks twice in decode; moments is the same with one ranking, as the other rules have it. Chance: shuffled. "
        "blasst has no budget: its density is its own."
    )
    title = f"Every rule against chance and against DHSA: {length:,} tokens, budget {budget:,}"
    said = f"Of {compared} selectors by length and budget, {compared - len(exceptions)} are better than chance"
    said += " in everything that was measured, beyond the interval"
    said += f"; not so: {', '.join(exceptions)}." if exceptions else "."
    return Table(title, columns, tuple(rows), note), said


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
        Column("KL: difference", "nats", 3),
        Column("n"),
    )
    rows: list[tuple[Cell, ...]] = []
    pairs = Pairs(found)
    for length in sorted({o.job.length for o in found}):
        rules = chunk_rules(found, length)
        for budget in sorted({o.budget for o in found if o.job.length == length}):
            for family, others in (("cosine", "fixed"), ("learned", "fixed"), ("learned", "cosine")):
                for rule in (r for r in rules if r.family == family):
                    size = rule.chunk_tokens
                    rivals = [r for r in rules if r.family == others and _alike(r.chunk_tokens, size)]
                    if not rivals:
                        continue
                    rival = min(rivals, key=lambda r: abs(math.log(r.chunk_tokens / size)))
                    gaps = pairs.all_of(rule.selector, rival.selector, budget, length)
                    if any(gaps):
                        count = max(gap.n or 0 for gap in gaps if gap is not None)
                        names = (rule.selector, size, rival.selector, rival.chunk_tokens)
                        rows.append((length, budget, *names, *gaps, count))
    note = (
        "Chunk rules under one scoring (moments, one ranking in decode) at one budget, each against the rule of the "
        f"other kind with the nearest mean chunk length, at most {MOST_UNLIKE:g} times as long or as short. Points: of "
        "attention held, of the oracle's; KL at the answer, where more is worse. moments: cosine cuts at 0.25, as "
        "shipped; @T: another threshold; fixed@N: every N tokens; learned: the paper's predictor by the local rule. "
        "Student's 95 % of the paired differences."
    )
    return Table("Boundaries: fixed, cosine, learned", columns, tuple(rows), note)


def _alike(a: float, b: float) -> bool:
    """Whether two mean chunk lengths are near enough to compare what cuts them."""
    return max(a, b) <= MOST_UNLIKE * min(a, b)


def boundary_verdict(table: Table) -> str:
    """What learned cuts gain at the longest length, by attention held and by KL; "" without them."""
    learned = [row for row in table.rows if str(row[2]).startswith("moments-learned")]
    if not learned:
        return ""
    length = max(int(row[0]) for row in learned)  # type: ignore[arg-type]
    mine = [row for row in learned if row[0] == length]
    budgets = sorted({int(row[1]) for row in mine})  # type: ignore[arg-type]
    held: dict[str, list[Estimate]] = {"fixed chunks": [], "cosine cuts": []}
    kl: dict[str, list[Estimate]] = {"fixed chunks": [], "cosine cuts": []}
    parts = []
    for row in mine:
        family = "fixed chunks" if "fixed" in str(row[4]) else "cosine cuts"
        held[family] += [cell for cell in row[6:8] if isinstance(cell, Estimate) and cell.low is not None]
        kl[family] += [_negative(row[8])] if isinstance(row[8], Estimate) and row[8].low is not None else []
        if row[1] == budgets[0]:
            figures = [
                f"{cell.value:+.{column.digits or 0}f} [{cell.low:.{column.digits or 0}f}, "
                f"{cell.high:.{column.digits or 0}f}]"
                for cell, column in zip(row[6:9], table.columns[6:9], strict=True)
                if isinstance(cell, Estimate) and cell.low is not None and cell.high is not None
            ]
            parts.append(f"{row[2]} less {row[4]} {', '.join(figures)}")

    def compared(gaps: dict[str, list[Estimate]]) -> str:
        return " and ".join(f"{_compared(of)} against {family}" for family, of in gaps.items() if of) or "nothing"

    among = ", ".join(f"{budget:,}" for budget in budgets)
    decided = [
        gap for gaps in (*held.values(), *kl.values()) for gap in gaps if (gap.low or 0) > 0 or (gap.high or 0) < 0
    ]
    wins = sum((gap.low or 0) > 0 for gap in decided)
    lead = "are a gain" if wins > len(decided) - wins else "lose" if wins < len(decided) - wins else "are no gain"
    text = (
        f"Learned boundaries {lead}: at {length:,} tokens and budgets {among}, against chunks of about their length, "
    )
    text += f"by attention held, {compared(held)}; by KL at the answer, {compared(kl)}"
    return f"{text}. At {budgets[0]:,} (prefill, decode in points, KL in nats): {'; '.join(parts)}."


def _negative(one: Estimate) -> Estimate:
    """The same seen from the other side: of KL less is better."""
    low, high = (None if end is None else -end for end in (one.high, one.low))
    return dataclasses.replace(one, value=-one.value, low=low, high=high)


def _compared(gaps: Sequence[Estimate]) -> str:
    """How many differences their intervals decide, and how."""
    wins = sum(gap.low is not None and gap.low > 0 for gap in gaps)
    losses = sum(gap.high is not None and gap.high < 0 for gap in gaps)
    return f"{wins} won, {losses} lost and {len(gaps) - wins - losses} undecided of {len(gaps)}"
