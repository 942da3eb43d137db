"""Choose for every layer how it attends, at the least cost that keeps a stated quality; then see whether it holds.

1. Each layer alone is made sparse in every way and budget, the others dense: its divergence, and the pairs it attends.
2. A knapsack (edgerun/techniques/layer_budgets.py) proposes one option a layer, taking divergences as additive. They
   are not quite: the proposal is measured as a whole, and the allowance widened or narrowed until the cheapest proposal
   that keeps the target is found.
3. That one is measured on held-out text. Where it misses there, the allowance is narrowed until a proposal holds; when
   only the dense model is left, nothing is chosen. The held-out text has chosen then, too.
4. So what is left is measured once on a third part of the text, by which nothing was chosen. That is the figure that is
   stored. Where it misses there, nothing is chosen: to try another would be to choose by this text as well.
"Keeps the target": the upper end of the 95 % interval of the mean KL over texts, at every length, is not above it.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from edgerun.calibration import Achieved, Calibration, ModelShape
from edgerun.checkpoint import Checkpoint, Progress
from edgerun.errors import EdgerunError
from edgerun.evaluation import record_lines
from edgerun.evaluation.activations import layer_activations
from edgerun.evaluation.calibration_text import CalibrationText, Window, make_text
from edgerun.evaluation.divergence import DivergenceMeter, read_record
from edgerun.recipe import Chunks, DhsaOptions, LayerChoice, Selector
from edgerun.techniques.boundary_predictor import (
    BoundaryPredictor,
    BoundaryText,
    PredictorMetrics,
    boundary_labels,
    gap_masses,
    joined_heads,
    measure_predictor,
    train_predictor,
)
from edgerun.techniques.layer_budgets import DENSE, Option, cheapest

# On zoo:text at 8,192 bytes, DHSA answered as many retrieval tasks as dense attention with a KL of up to 0.023 nats and
# lost most of them at 0.09 (bench/workloads/decode_selection.py; CHANGELOG.md has the figures).
DEFAULT_MAX_KL_NATS = 0.02
DEFAULT_BUDGETS = (256, 512, 1024, 2048)
Way = tuple[Selector, Chunks]
WAYS: tuple[Way, ...] = (
    ("chunk", "cosine"),
    ("chunk", "fixed"),
    ("block-topk", "fixed"),
    ("window-sink", "fixed"),
)
_ROUNDS = 8  # allowances that the search tries; a proposal that comes again costs nothing
_NARROWER = 0.7  # of the allowance, after a proposal that held-out text refuses
_NOTHING = 1e-6  # of the target: an allowance below it proposes nothing new
_FAR_BEHIND = 3.0  # times the best way's divergence
_TOO_SMALL_TO_TELL = 0.02  # of the target: divergences below it say nothing about which way is better
# Shares of the progress bar at whose end each stage is.
_ALONE, _TOGETHER, _HELD_OUT, _PROOF = 0.8, 0.87, 0.9, 0.92


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a calibration is asked for."""

    lengths: tuple[int, ...] = (4096,)  # tokens
    samples: int = 6  # texts to choose by, as many to narrow by, and as many to prove on
    seed: int = 0
    decode_tokens: int = 64  # of every text, fed one by one
    max_kl_nats: float = DEFAULT_MAX_KL_NATS
    budgets: tuple[int, ...] = DEFAULT_BUDGETS
    dhsa: DhsaOptions = dataclasses.field(default_factory=DhsaOptions)  # what layers share: tile, sink, pooling
    max_context: int | None = None  # tokens; None: the longest length
    prefill_slice: int = 512
    predictor: bool = True
    predictor_steps: int = 600

    def __post_init__(self) -> None:
        if not self.max_kl_nats > 0:
            raise EdgerunError(
                f"the target is {self.max_kl_nats} nats; it must be above 0, where only dense attention is"
            )
        if self.samples < 2:
            raise EdgerunError(f"samples is {self.samples}; an interval needs at least 2: raise --samples")
        if self.decode_tokens < 1 or min(self.lengths) < 2 * self.decode_tokens:
            raise EdgerunError(
                f"{self.decode_tokens} tokens are to be decoded of texts of {min(self.lengths)}: decode at least 1 and "
                "at most half of the shortest length"
            )
        if self.context() < max(self.lengths):
            raise EdgerunError(
                f"max_context is {self.max_context} tokens, below the longest length of {max(self.lengths)}: raise "
                "--max-context, or lower --lengths"
            )
        if not self.useful_budgets():
            raise EdgerunError(
                f"no budget is below the longest length of {max(self.lengths)} tokens, so nothing would be sparse: "
                "lower --budgets, or raise --lengths"
            )
        for budget in self.budgets:
            dataclasses.replace(self.dhsa, budget=budget)  # raises ExportError below the minimum

    def useful_budgets(self) -> tuple[int, ...]:
        """The budgets that are sparse at the longest length, largest first."""
        return tuple(sorted({budget for budget in self.budgets if budget < max(self.lengths)}, reverse=True))

    def context(self) -> int:
        """Tokens that the model is loaded for."""
        return self.max_context or max(self.lengths)


Part = Literal["chosen by", "held out", "proof"]  # of the text


@dataclasses.dataclass(frozen=True)
class Outcome:
    """calibration: None when the target is not kept; `closest` is what the last choice reached, `part` where.

    In the parts "chosen by" and "held out" that choice is the most careful one; in "proof" it is the only one that was
    measured there.
    """

    calibration: Calibration | None
    predictor: BoundaryPredictor | None
    alone: tuple[tuple[Option, ...], ...]  # every option that was measured, by layer, the dense one first
    dense_pairs: float  # attended by the dense model, summed over what costs are summed over
    closest: tuple[Achieved, ...] = ()
    part: Part = "chosen by"


def calibrate(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    settings: Settings,
    *,
    record: pathlib.Path | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Choose for every layer of the model, on `texts`. record: JSON lines, to go on where another run stopped.

    Raises EdgerunError for too little text or a record that is damaged or in use, ExportError for a model or budgets
    that do not fit.
    """
    report = progress or (lambda stage, fraction: None)
    checkpoint.sha256(progress)
    text = make_text(checkpoint, texts, max(settings.lengths), settings.samples, settings.seed)
    with record_lines.writer(record) as append:
        meter = DivergenceMeter(
            checkpoint,
            max_context=settings.context(),
            prefill_slice=min(settings.prefill_slice, settings.context()),
            decode_tokens=settings.decode_tokens,
            known=read_record(record),
            append=append,
        )
        return _calibrate(meter, text, settings, report)


def _calibrate(
    meter: DivergenceMeter, text: CalibrationText, settings: Settings, report: Callable[[str, float], None]
) -> Outcome:
    chooser = _Chooser(meter, text, settings, report)
    alone = chooser.each_alone()
    proposal, allowance = chooser.widest_that_holds(alone)
    report("held-out text", _TOGETHER)
    narrowed: tuple[Achieved, ...] = ()
    while proposal is not None and not chooser.keeps(narrowed := chooser.achieved(proposal, text.held_out)):
        proposal, allowance = chooser.next_narrower(alone, proposal, allowance)
    dense_pairs = chooser.dense_pairs()
    if proposal is None:
        if narrowed:
            return Outcome(None, None, alone, dense_pairs, narrowed, "held out")
        return Outcome(None, None, alone, dense_pairs, chooser.most_careful)
    report("proof text", _HELD_OUT)
    achieved = chooser.achieved(proposal, text.proof)
    if not chooser.keeps(achieved):
        return Outcome(None, None, alone, dense_pairs, achieved, "proof")
    dhsa = settings.dhsa.with_layers(proposal)
    predictor, metrics = _predictor(meter, text, dhsa, settings, report) if settings.predictor else (None, None)
    report("done", 1.0)
    site = meter.model.sites[0]
    calibration = Calibration(
        checkpoint_sha256=meter.checkpoint.sha256(),
        model=ModelShape(
            meter.checkpoint.config.model_type, len(proposal), site.query_heads, site.kv_heads, site.head_dim
        ),
        dhsa=dhsa,
        max_kl_nats=settings.max_kl_nats,
        achieved=achieved,
        text_sha256=text.sha256,
        samples=settings.samples,
        decode_tokens=settings.decode_tokens,
        seed=settings.seed,
        predictor=metrics,
    )
    return Outcome(calibration, predictor, alone, dense_pairs, achieved, "proof")


def measure_calibration(
    calibration: Calibration,
    checkpoint: Checkpoint,
    texts: Sequence[str],
    *,
    lengths: Sequence[int] | None = None,
    samples: int = 6,
    seed: int = 1,
    max_context: int | None = None,
    prefill_slice: int = 512,
    progress: Progress | None = None,
) -> tuple[Achieved, ...]:
    """What a calibration's choices reach on other text, a length each (None: those it was made for), 3 * samples texts.

    Raises EdgerunError for another checkpoint or too little text.
    """
    calibration.require(checkpoint.sha256(progress))
    wanted = tuple(lengths) if lengths is not None else tuple(one.length for one in calibration.achieved)
    text = make_text(checkpoint, texts, max(wanted), samples, seed)
    context = max_context or max(wanted)
    meter = DivergenceMeter(
        checkpoint,
        max_context=context,
        prefill_slice=min(prefill_slice, context),
        decode_tokens=calibration.decode_tokens,
    )
    windows = text.chosen_by + text.held_out + text.proof
    found = []
    for done, length in enumerate(wanted):
        if progress is not None:
            progress(f"{length} tokens", done / len(wanted))
        found.append(meter.achieved(calibration.dhsa, [text.shortened(window, length) for window in windows]))
    return tuple(found)


Proposal = tuple[LayerChoice, ...]
Alone = tuple[tuple[Option, ...], ...]


class _Chooser:
    """The search of one calibration."""

    def __init__(
        self, meter: DivergenceMeter, text: CalibrationText, settings: Settings, report: Callable[[str, float], None]
    ) -> None:
        self._meter = meter
        self._text = text
        self._settings = settings
        self._report = report
        self.most_careful: tuple[Achieved, ...] = ()  # what the last refused proposal reached, the narrowest

    def each_alone(self) -> Alone:
        """The options of every layer, dense first; a way's smaller budgets only where they may be worth choosing."""
        settings, sites = self._settings, self._meter.model.sites
        # A window that no text here can leave is no window, as in the model itself.
        free = [not 0 < site.asks.window < settings.context() for site in sites]
        if not any(free):
            raise EdgerunError("every layer of the model has a window already: there is nothing to calibrate")
        dense = self.dense_pairs()
        options: list[list[Option]] = [[Option(DENSE, 0.0, 0.0)] for _ in sites]
        budgets = settings.useful_budgets()
        layers = [layer for layer, may_be_sparse in enumerate(free) if may_be_sparse]
        for done, layer in enumerate(layers):
            ways = list(WAYS)
            for index, budget in enumerate(budgets):
                self._report(
                    f"layer {layer + 1} of {len(sites)} alone",
                    _ALONE * (done + index / len(budgets)) / len(layers),
                )
                found = {}
                for way in ways:
                    choice = LayerChoice(budget, *way)
                    divergence, pairs = self._divergence([choice if i == layer else DENSE for i in range(len(sites))])
                    options[layer].append(Option(choice, divergence, pairs - dense))
                    found[way] = divergence
                ways = _worth_narrowing(found, settings.max_kl_nats)
        return tuple(tuple(one) for one in options)

    def widest_that_holds(self, alone: Alone) -> tuple[Proposal | None, float]:
        """The cheapest proposal that keeps the target on the text it is chosen by, and its allowance. None: none."""
        best: tuple[Proposal | None, float] = (None, 0.0)
        low, high = 0.0, math.inf  # allowances: low holds, high does not
        allowance = self._settings.max_kl_nats
        for round_ in range(_ROUNDS):
            self._report("all layers together", _ALONE + (_TOGETHER - _ALONE) * round_ / _ROUNDS)
            proposal = self._propose(alone, allowance)
            if proposal is not None and not self._holds(proposal):
                high = allowance
            else:
                best, low = (proposal, allowance), allowance
            allowance = 2 * low if math.isinf(high) else math.sqrt(low * high) if low > 0 else high / 2
        return best

    def next_narrower(self, alone: Alone, refused: Proposal, allowance: float) -> tuple[Proposal | None, float]:
        """The next other proposal of a smaller allowance than `refused` had; None: only the dense model is left."""
        while allowance > _NOTHING * self._settings.max_kl_nats:
            allowance *= _NARROWER
            proposal = self._propose(alone, allowance)
            if proposal != refused:
                return proposal, allowance
        return None, 0.0

    def achieved(self, proposal: Proposal, windows: Sequence[Window]) -> tuple[Achieved, ...]:
        """What a proposal reaches as a whole, a length each."""
        dhsa = self._settings.dhsa.with_layers(proposal)
        return tuple(self._meter.achieved(dhsa, self._at(windows, length)) for length in self._settings.lengths)

    def keeps(self, achieved: Sequence[Achieved]) -> bool:
        """Whether the target is kept at every length."""
        return all(one.holds(self._settings.max_kl_nats) for one in achieved)

    def dense_pairs(self) -> float:
        """What the dense model attends, over the lengths and the windows to choose by, a window's mean."""
        return self._divergence(None)[1]

    def _propose(self, alone: Alone, allowance: float) -> Proposal | None:
        chosen = tuple(option.choice for option in cheapest(alone, allowance))
        return None if all(choice == DENSE for choice in chosen) else chosen

    def _holds(self, proposal: Proposal) -> bool:
        found = self.achieved(proposal, self._text.chosen_by)
        held = self.keeps(found)
        if not held:
            self.most_careful = found
        return held

    def _divergence(self, choices: Sequence[LayerChoice] | None) -> tuple[float, float]:
        """Mean KL, the largest of all lengths, and attended pairs, summed over lengths; of the windows to choose by."""
        dhsa = None if choices is None else self._settings.dhsa.with_layers(choices)
        largest = pairs = 0.0
        for length in self._settings.lengths:
            found = self._meter.measure(dhsa, self._at(self._text.chosen_by, length))
            largest = max(largest, sum(one.mean_kl_nats for one in found) / len(found))
            pairs += sum(one.attended_pairs for one in found) / len(found)
        return largest, pairs

    def _at(self, windows: Sequence[Window], length: int) -> list[Window]:
        return [self._text.shortened(window, length) for window in windows]


def _worth_narrowing(found: Mapping[Way, float], target: float) -> list[Way]:
    """The ways whose smaller budgets are worth a measurement, by their divergence at this one.

    All attend as many pairs at one budget, so only the best of them is ever chosen there. A way that is past the target
    gets no better with less, and one that is far behind the best does not overtake it.
    """
    behind = max(_FAR_BEHIND * min(found.values()), _TOO_SMALL_TO_TELL * target) if found else 0.0
    return [way for way, divergence in found.items() if divergence <= min(behind, target)]


def _predictor(
    meter: DivergenceMeter,
    text: CalibrationText,
    dhsa: DhsaOptions,
    settings: Settings,
    report: Callable[[str, float], None],
) -> tuple[BoundaryPredictor, PredictorMetrics]:
    """A predictor for the first sparse layer, from the dense model's keys and attention there, and how good it is.

    Trained on the text to choose by, measured on that of the proof.
    """
    report("boundary predictor", _PROOF)
    meter.model.attend_as(meter.dense)
    first = next(layer for layer in range(len(meter.model.sites)) if dhsa.of_layer(layer) is not None)
    seen = []
    for done, window in enumerate(text.chosen_by + text.proof):
        (layer,) = layer_activations(meter.model, window, [first], meter.dense.prefill_slice)
        labels = boundary_labels(*gap_masses(layer.query, layer.key, layer.scale, layer.softcap))
        seen.append(BoundaryText(joined_heads(layer.key), labels))
        report("boundary predictor", _PROOF + 0.03 * (done + 1) / (2 * settings.samples))
    site = meter.model.sites[first]
    predictor = train_predictor(
        seen[: settings.samples],
        site.kv_heads,
        site.head_dim,
        layer=first,
        steps=settings.predictor_steps,
        seed=settings.seed,
        on_step=lambda done, steps: report("boundary predictor", 0.95 + 0.05 * done / steps),
    )
    return predictor, measure_predictor(predictor, seen[settings.samples :])
