"""How far a sparse model decodes from the dense one: teacher-forced KL on windows of text, measured once each.

The window's beginning is prefilled, its last tokens are fed one by one: a tile of a prompt shares one selection, which
its later queries influence, and decode alone is free of that. Every measurement is a line of a record, named by the
build (recipe and checkpoint) and by the window, so that a run that was stopped measures nothing twice. The dense logits
of every window stay in memory: windows * (decoded tokens + 1) * vocabulary * 4 bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgerun import compare
from edgerun.calibration import Achieved
from edgerun.checkpoint import Checkpoint
from edgerun.evaluation import fidelity, record_lines
from edgerun.evaluation.calibration_text import Window
from edgerun.evaluation.statistics import mean_interval
from edgerun.recipe import DhsaOptions, Recipe

if TYPE_CHECKING:
    from edgerun.models.causal_lm import CausalLM


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One build on one window. Pairs are of query and key token, over all layers and KV heads."""

    build: str
    text: str  # sha256 of the window and of how it is fed
    mean_kl_nats: float
    attended_pairs: int
    causal_pairs: int


def read_record(path: pathlib.Path | None) -> list[Measurement]:
    """The measurements of a JSONL file, none for no file. Raises EdgerunError for a damaged one."""
    return [] if path is None else record_lines.read(path, lambda line: Measurement(**line), "a measurement")


class DivergenceMeter:
    """Measures recipes of one checkpoint on windows; the model is loaded when something is not yet on record."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_context: int,
        prefill_slice: int,
        decode_tokens: int,
        known: Sequence[Measurement] = (),
        append: record_lines.Append | None = None,
    ) -> None:
        """known: what is not measured again, as `read_record` gives it; append: takes what is new, as JSON."""
        self.checkpoint = checkpoint
        self.dense = Recipe(attention="dense", max_context=max_context, prefill_slice=prefill_slice)
        self._decode_tokens = decode_tokens
        self._append = append
        self._known = {(one.build, one.text): one for one in known}
        self._model: CausalLM | None = None
        self._dense_logits: dict[str, npt.NDArray[np.float32]] = {}

    @property
    def model(self) -> CausalLM:
        """The eager model, attending as it was last asked to."""
        if self._model is None:
            from edgerun.models import causal_lm

            self._model = causal_lm.load(self.checkpoint, self.dense)
        return self._model

    def measure(self, dhsa: DhsaOptions | None, windows: Sequence[Window]) -> list[Measurement]:
        """The model with these options (None: dense) on every window. Raises ExportError where they do not fit it."""
        recipe = self.dense if dhsa is None else dataclasses.replace(self.dense, attention="dhsa", dhsa=dhsa)
        build = recipe.hash(self.checkpoint.sha256())
        texts = [self._name(window) for window in windows]
        for text, window in zip(texts, windows, strict=True):
            if (build, text) not in self._known:
                self._keep(self._measure_one(recipe, build, text, window))
        return [self._known[build, text] for text in texts]

    def achieved(self, dhsa: DhsaOptions, windows: Sequence[Window]) -> Achieved:
        """The options' divergence on windows of one length, as a calibration states it. Needs at least 2 windows."""
        found = self.measure(dhsa, windows)
        interval = mean_interval([one.mean_kl_nats for one in found])
        return Achieved(
            length=len(windows[0]),
            texts=len(windows),
            mean_kl_nats=interval.estimate,
            low=max(0.0, interval.low),
            high=interval.high,
            density=sum(one.attended_pairs for one in found) / sum(one.causal_pairs for one in found),
        )

    def _measure_one(self, recipe: Recipe, build: str, text: str, window: Window) -> Measurement:
        from edgerun.ops.dhsa_attention import count_attention

        reference = None
        if recipe != self.dense and (reference := self._dense_logits.get(text)) is None:
            reference = self._logits(self.dense, window)
            self._dense_logits[text] = reference
        with count_attention() as counters:
            logits = self._logits(recipe, window)
        if reference is None:
            reference = self._dense_logits.setdefault(text, logits)
        kl = compare.kl_divergence(logits.astype(np.float64), reference.astype(np.float64))
        return Measurement(build, text, float(kl.mean()), counters.attended_pairs, counters.causal_pairs)

    def _logits(self, recipe: Recipe, window: Window) -> npt.NDArray[np.float32]:
        self.model.attend_as(recipe)
        prompt, forced = window[: -self._decode_tokens], window[-self._decode_tokens :]
        return fidelity.eager_logits(self.model, prompt, forced, recipe.prefill_slice)

    def _keep(self, measurement: Measurement) -> None:
        self._known[measurement.build, measurement.text] = measurement
        if self._append is not None:
            self._append(dataclasses.asdict(measurement))

    def _name(self, window: Window) -> str:
        return hashlib.sha256(json.dumps([self._decode_tokens, window]).encode()).hexdigest()
