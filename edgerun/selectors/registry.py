"""The selectors of the accuracy lab by name: what `edgerun eval --selectors` takes."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import torch

from edgerun.errors import EdgerunError
from edgerun.ops.dhsa_attention_paper import PaperOptions
from edgerun.ops.dhsa_attention_reference import gap_scores
from edgerun.ops.dhsa_attention_types import BOUNDARY_WINDOW
from edgerun.recipe import DhsaOptions
from edgerun.selectors.attention import Engine
from edgerun.selectors.estimates import Antidiagonal, Oracle, Threshold, VerticalSlash
from edgerun.selectors.interface import BlockSelector
from edgerun.selectors.paper import PaperAttention
from edgerun.selectors.pooled import BoundaryLogits, Pooled, Shipped
from edgerun.selectors.simple import Dense, Recent, Shuffled
from edgerun.techniques.boundary_predictor import BoundaryPredictor, boundary_logits

# Those that the native op has itself: a recipe says all of them.
OP_SELECTORS = ("chunk", "block-topk", "window-sink")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a selector is made from: the recipe's options, a number after `@` in its name, a trained predictor."""

    dhsa: DhsaOptions
    value: float | None = None
    logits: BoundaryLogits | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One selector. takes_value: what `name@NUMBER` sets, "" when it takes none."""

    summary: str
    make: Callable[[Setting], BlockSelector | PaperAttention]
    takes_value: str = ""
    needs_predictor: bool = False
    dense_decode: bool = False  # its authors have no rule for single tokens
    has_budget: bool = True  # otherwise its density is measured, whatever the budget
    revision: int = 0  # raised when it computes something else: what was measured before is not it


PAPER_TILE = 128  # tokens


def paper_budget(budget: int, tile: int) -> int:
    """The paper's budget that attends as many pairs as ours of `budget` at `tile`, in tokens."""
    return budget + (PAPER_TILE - tile) // 2


def cosine_logits(keys: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the means of 4 keys on either side of each gap, [n - 1]; 0 where fewer are there."""
    tokens = keys.shape[1]
    found = torch.zeros(max(0, tokens - 1))
    gaps = torch.arange(BOUNDARY_WINDOW, tokens - BOUNDARY_WINDOW + 1)
    if len(gaps):
        found[gaps - 1] = gap_scores(keys, gaps).float()  # the gap before token g is i | i + 1 with i = g - 1
    return found


def _paper(setting: Setting, logits: BoundaryLogits, threshold: float, *, equal: bool) -> PaperAttention:
    """equal: our sink; the paper's own is 128 tokens. Its recent tokens are its tile.

    Of a tile of 128 its rows see half on average, of one of ours less is hidden: the budget is raised by the
    difference, so that as many pairs are attended.
    """
    dhsa = setting.dhsa
    options = PaperOptions(
        scale=1.0,
        budget=paper_budget(dhsa.budget, dhsa.tile),
        sink=dhsa.sink if equal else 128,
        tile=PAPER_TILE,
        recent=PAPER_TILE,
        boundary_logit=threshold,
    )
    return PaperAttention(options, logits)


def _learned(setting: Setting) -> BoundaryLogits:
    if setting.logits is None:
        raise EdgerunError(
            "learned boundaries need a trained predictor: pass --predictor, a file of `edgerun calibrate`"
        )
    return setting.logits


SELECTORS: dict[str, Entry] = {
    "shipped": Entry("DHSA as it ships, lists of the native op", lambda s: Shipped()),
    "moments": Entry("the same arithmetic in torch, without decode's second ranking", lambda s: Pooled()),
    "moments-fixed": Entry(
        "chunks of a fixed size",
        lambda s: Pooled(cuts="fixed", chunk_tokens=64 if s.value is None else int(s.value)),
        takes_value="tokens, 64 unless given",
    ),
    "moments-cosine": Entry(
        "chunks cut where 1 - cosine of the keys on both sides passes a threshold",
        lambda s: Pooled(cuts="gaps", logits=cosine_logits, threshold=0.25 if s.value is None else s.value),
        takes_value="threshold, 0.25 unless given (what ships)",
    ),
    "moments-learned": Entry(
        "chunks cut by the paper's trained predictor, by the local rule",
        lambda s: Pooled(cuts="gaps", logits=_learned(s), threshold=1.1 if s.value is None else s.value),
        takes_value="logit above which a gap cuts, 1.1 unless given",
        needs_predictor=True,
    ),
    "moments-before-rope": Entry("queries and keys before their rotation", lambda s: Pooled(rope="before")),
    "moments-split": Entry("fast and slow rotary channels ranked apart", lambda s: Pooled(bands="split")),
    "moments-all-heads": Entry("one selection for all heads, from averages", lambda s: Pooled(heads="all")),
    "moments-query-mean": Entry("one mean query a tile", lambda s: Pooled(query_pooling="mean")),
    "mean": Entry("means of keys", lambda s: Pooled("mean")),
    "mean-fixed": Entry("means over 64 tokens", lambda s: Pooled("mean", cuts="fixed")),
    "mean-pages": Entry("means over 16 tokens", lambda s: Pooled("mean", cuts="fixed", chunk_tokens=16)),
    "mean-before-rope": Entry("means before rotation", lambda s: Pooled("mean", rope="before")),
    "mean-split": Entry("fast and slow rotary channels ranked apart", lambda s: Pooled("mean", bands="split")),
    "mean-boosted": Entry("each band's lost energy given back", lambda s: Pooled("mean", bands="boosted")),
    "mean-all-heads": Entry("one selection for all heads, from averages", lambda s: Pooled("mean", heads="all")),
    "sqrt": Entry("the paper's sqrt(n) means", lambda s: Pooled("sqrt")),
    "centred": Entry("sqrt(n) means less the mean over all", lambda s: Pooled("centred")),
    "minmax": Entry("bound from lowest and highest, best micro-block of a chunk", lambda s: Pooled("minmax")),
    "quest": Entry(
        "the bound of pages of 16 tokens (Quest)", lambda s: Pooled("minmax", cuts="fixed", chunk_tokens=16)
    ),
    "block-mean": Entry(
        "block top-k: means of 64 tokens, one mean query a tile",
        lambda s: Pooled("mean", cuts="fixed", query_pooling="mean"),
    ),
    "recent": Entry("window and sink", lambda s: Recent()),
    "vertical-slash": Entry(
        "MInference's columns and diagonals; dense decode", lambda s: VerticalSlash(), dense_decode=True
    ),
    "antidiagonal": Entry(
        "XAttention; dense decode",
        lambda s: Antidiagonal(8 if s.value is None else int(s.value)),
        takes_value="stride, 8 unless given",
        dense_decode=True,
    ),
    "blasst": Entry(
        "BLASST: blocks far below the running maximum are skipped; every logit is computed",
        lambda s: Threshold(-4.0 if s.value is None else s.value),
        takes_value="ln lambda, below 0, -4 unless given; there is no budget",
        has_budget=False,
        revision=1,
    ),
    "oracle": Entry("exact attention mass: the best that a list can do", lambda s: Oracle()),
    "dense": Entry("everything, whatever the budget", lambda s: Dense(), has_budget=False),
    "shuffled": Entry("chance", lambda s: Shuffled(), revision=1),
    "paper-v1": Entry(
        "arXiv 2510.24606 v1, trained boundaries; tile 128, recent 128, our sink",
        lambda s: _paper(s, _learned(s), 1.1, equal=True),
        needs_predictor=True,
        revision=1,
    ),
    "paper-v1-own-sink": Entry(
        "the same with its sink of 128 tokens",
        lambda s: _paper(s, _learned(s), 1.1, equal=False),
        needs_predictor=True,
        revision=1,
    ),
    "paper-v1-cosine": Entry(
        "the same as paper-v1 with cosine boundaries",
        lambda s: _paper(s, cosine_logits, 0.25, equal=True),
        revision=1,
    ),
}


def parse(name: str) -> tuple[Entry, float | None]:
    """The entry that a name, perhaps with `@NUMBER`, stands for. Raises EdgerunError for an unknown one."""
    stem, at, number = name.partition("@")
    entry = SELECTORS.get(stem)
    if entry is None:
        raise EdgerunError(f"there is no selector {stem!r}; there are {', '.join([*OP_SELECTORS, *SELECTORS])}")
    if not at:
        return entry, None
    try:
        value = float(number)
    except ValueError:
        raise EdgerunError(f"{name!r}: {number!r} is not a number") from None
    if not entry.takes_value:
        raise EdgerunError(f"the selector {stem!r} takes no number: leave out @{number}")
    return entry, value


def make(name: str, dhsa: DhsaOptions, predictor: BoundaryLogits | pathlib.Path | None = None) -> Engine:
    """The selector of a name under a recipe's options; predictor: boundary logits, or the calibration that holds them.

    Raises EdgerunError for a name or a setting that cannot be.
    """
    if isinstance(predictor, pathlib.Path):
        predictor = _logits_of(predictor) if needs_predictor(name) else None
    made = []
    for part in split(name):
        entry, value = parse(part)
        made.append(entry.make(Setting(dhsa, value, predictor)))
    return Engine(made[0], made[-1])


@dataclasses.dataclass(frozen=True)
class _TrainedLogits:
    """A trained predictor's logits of gaps, and the layer whose keys it takes."""

    predictor: BoundaryPredictor

    @property
    def layer(self) -> int | None:
        return self.predictor.layer

    def __call__(self, keys: torch.Tensor) -> torch.Tensor:
        return boundary_logits(self.predictor, keys)


def _logits_of(calibration: pathlib.Path) -> BoundaryLogits:
    from edgerun.calibration import load_predictor

    return _TrainedLogits(load_predictor(calibration))


def revision(name: str) -> str:
    """What a selector's measurements carry beside its name: "" as long as it computes what it always did."""
    if name in OP_SELECTORS:
        return ""
    revisions = [parse(part)[0].revision for part in split(name)]
    return f"revision {'/'.join(map(str, revisions))}" if any(revisions) else ""


def needs_predictor(name: str) -> bool:
    """Whether a selector is made from a trained boundary predictor. Raises EdgerunError for an unknown one."""
    return name not in OP_SELECTORS and any(parse(part)[0].needs_predictor for part in split(name))


def split(name: str) -> list[str]:
    """PREFILL or PREFILL/DECODE. Raises EdgerunError for more parts, or an unknown one."""
    parts = name.split("/")
    if len(parts) > 2:
        raise EdgerunError(f"{name!r} has {len(parts)} parts; a selector is NAME, or PREFILL/DECODE")
    for part in parts:
        parse(part)
    return parts
