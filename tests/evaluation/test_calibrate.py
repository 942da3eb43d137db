"""A whole calibration of a tiny model: it keeps its target on other text, goes on where it stopped, and says no."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random

import numpy as np
import pytest

from edgerun.checkpoint import Checkpoint
from edgerun.commands import calibrate as command
from edgerun.errors import EdgerunError, ExportError
from edgerun.evaluation import calibrate as module
from edgerun.evaluation import record_lines
from edgerun.evaluation.calibrate import (
    DEFAULT_BUDGETS,
    DEFAULT_MAX_KL_NATS,
    WAYS,
    Outcome,
    Settings,
    calibrate,
    measure_calibration,
)
from edgerun.evaluation.divergence import DivergenceMeter
from edgerun.evaluation.fidelity import eager_logits
from edgerun.models.causal_lm import load
from edgerun.recipe import DhsaOptions, LayerChoice, Recipe
from edgerun.techniques.boundary_predictor import boundary_logits
from edgerun.techniques.layer_budgets import DENSE
from tests.models.tiny_checkpoints import save_tiny_checkpoint

BUDGETS = (112, 160, 208)
SETTINGS = Settings(
    lengths=(256,),
    samples=3,
    decode_tokens=16,
    max_kl_nats=0.05,
    budgets=BUDGETS,
    dhsa=DhsaOptions(budget=208, tile=16),
    prefill_slice=64,
    predictor=False,
    predictor_steps=5,
)


def prose(seed: int, length: int = 2600) -> str:
    """Words of a small vocabulary, in another order and of another vocabulary for each seed."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(60)]
    return " ".join(rng.choices(words, k=length))[:length]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=3))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("record") / "a.jsonl"


@pytest.fixture(scope="module")
def outcome(checkpoint: Checkpoint, record: pathlib.Path) -> Outcome:
    return calibrate(checkpoint, [prose(0)], dataclasses.replace(SETTINGS, predictor=True), record=record)


def test_a_choice_keeps_its_target_and_saves_something(outcome: Outcome, checkpoint: Checkpoint) -> None:
    made = outcome.calibration
    assert made is not None and len(made.dhsa.layers) == 3 and made.dhsa.tile == 16
    assert made.checkpoint_sha256 == checkpoint.sha256()
    assert outcome.part == "proof"
    (achieved,) = made.achieved
    assert achieved.texts == 3 and achieved.low <= achieved.mean_kl_nats <= achieved.high <= 0.05
    assert achieved.density < 1.0


def test_it_holds_on_other_text_and_another_seed(outcome: Outcome, checkpoint: Checkpoint) -> None:
    assert outcome.calibration is not None
    (found,) = measure_calibration(outcome.calibration, checkpoint, [prose(5), prose(6)], samples=4, seed=3)
    assert found.texts == 12 and found.length == 256 and found.holds(0.05)


def test_divergence_is_that_of_two_models_run_apart(outcome: Outcome, checkpoint: Checkpoint) -> None:
    window = (256, *prose(9, 255).encode())
    dhsa = SETTINGS.dhsa.with_layers([LayerChoice(112), DENSE, LayerChoice(160, "window-sink")])
    meter = DivergenceMeter(checkpoint, max_context=256, prefill_slice=64, decode_tokens=16)
    (found,) = meter.measure(dhsa, [window])
    dense = Recipe(attention="dense", max_context=256, prefill_slice=64)
    sparse = dataclasses.replace(dense, attention="dhsa", dhsa=dhsa)
    p, q = (
        np.exp(rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)))
        for rows in (
            eager_logits(load(checkpoint, recipe), window[:240], window[240:], 64).astype(np.float64)
            for recipe in (dense, sparse)
        )
    )
    assert len(p) == 17
    assert found.mean_kl_nats == pytest.approx(float((p * np.log(p / q)).sum(axis=1).mean()), rel=1e-4)
    (reference,) = meter.measure(None, [window])
    assert reference.mean_kl_nats == 0.0
    assert reference.attended_pairs == reference.causal_pairs == found.causal_pairs == 3 * 2 * 256 * 257 // 2
    assert found.attended_pairs < found.causal_pairs


def test_ways_attend_as_many_pairs_at_one_budget(outcome: Outcome) -> None:
    for layer in outcome.alone:
        assert layer[0].choice == DENSE and layer[0].cost == layer[0].divergence == 0.0
        for budget in BUDGETS:
            costs = {option.cost for option in layer if option.choice.budget == budget}
            assert len(costs) <= 1 and all(cost < 0 for cost in costs)
        largest = [option.choice for option in layer if option.choice.budget == max(BUDGETS)]
        assert [(choice.selector, choice.chunking) for choice in largest] == list(WAYS)


def test_the_predictor_is_for_the_first_sparse_layer(outcome: Outcome) -> None:
    made, predictor = outcome.calibration, outcome.predictor
    assert made is not None and made.predictor is not None and predictor is not None
    assert made.predictor.parameters == predictor.parameters_count == sum(p.numel() for p in predictor.parameters())
    first = next(layer for layer, choice in enumerate(made.dhsa.layers) if choice != DENSE)
    assert made.predictor.layer == predictor.layer == first
    assert made.predictor.gaps == 3 * (256 - 7) and 0.0 < made.predictor.positives < 1.0
    assert len(boundary_logits(predictor, np_keys())) == 39


def np_keys() -> object:
    import torch

    return torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))


def test_a_stopped_run_measures_nothing_twice(
    outcome: Outcome,
    checkpoint: Checkpoint,
    record: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = record.read_text().splitlines(keepends=True)
    assert len({(json.loads(line)["build"], json.loads(line)["text"]) for line in lines}) == len(lines)
    again = tmp_path / "again.jsonl"
    again.write_text("".join(lines[:20]) + lines[20][:30])  # killed while it wrote
    measured = []
    original = DivergenceMeter._measure_one

    def interrupted(self: DivergenceMeter, *arguments: object) -> object:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(arguments)
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DivergenceMeter, "_measure_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, [prose(0)], SETTINGS, record=again)
    assert again.read_text() == "".join(lines[:25])
    monkeypatch.setattr(DivergenceMeter, "_measure_one", original)
    resumed = calibrate(checkpoint, [prose(0)], SETTINGS, record=again)
    assert resumed.calibration is not None and outcome.calibration is not None
    assert resumed.calibration.dhsa == outcome.calibration.dhsa
    assert resumed.calibration.achieved == outcome.calibration.achieved
    assert sorted(again.read_text().splitlines()) == sorted(record.read_text().splitlines())


def test_a_wider_target_is_cheaper(outcome: Outcome, checkpoint: Checkpoint, record: pathlib.Path) -> None:
    wide = calibrate(checkpoint, [prose(0)], dataclasses.replace(SETTINGS, max_kl_nats=0.5), record=record)
    assert wide.calibration is not None and outcome.calibration is not None
    assert wide.calibration.achieved[0].density < outcome.calibration.achieved[0].density


def test_a_target_that_nothing_sparse_keeps_gives_no_choice(checkpoint: Checkpoint, record: pathlib.Path) -> None:
    found = calibrate(checkpoint, [prose(0)], dataclasses.replace(SETTINGS, max_kl_nats=1e-7), record=record)
    assert found.calibration is None and found.predictor is None
    assert all(option.divergence > 1e-7 for layer in found.alone for option in layer[1:])


def test_a_choice_that_misses_on_held_out_text_is_narrowed(
    checkpoint: Checkpoint, record: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module._Chooser.achieved
    asked: list[module.Proposal] = []
    densities: list[float] = []

    def stricter(self: module._Chooser, proposal: module.Proposal, windows: object) -> object:
        found = original(self, proposal, windows)  # type: ignore[arg-type]
        if windows is not self._text.held_out:
            return found
        asked.append(proposal)
        densities.append(found[0].density)
        return tuple(dataclasses.replace(one, high=one.high + (0.05 if len(asked) < 3 else 0.0)) for one in found)

    monkeypatch.setattr(module._Chooser, "achieved", stricter)
    found = calibrate(checkpoint, [prose(0)], SETTINGS, record=record)
    assert found.calibration is not None and found.calibration.dhsa.layers == asked[2]
    assert len(set(asked)) == 3 and densities[0] < densities[-1]
    monkeypatch.setattr(
        module._Chooser,
        "achieved",
        lambda self, proposal, windows: tuple(
            dataclasses.replace(one, high=1.0 if windows is self._text.held_out else one.high)
            for one in original(self, proposal, windows)
        ),
    )
    never = calibrate(checkpoint, [prose(0)], SETTINGS, record=record)
    assert never.calibration is None and never.closest[0].high == 1.0 and never.part == "held out"


def test_what_is_stored_was_measured_once_on_text_that_nothing_was_chosen_by(
    checkpoint: Checkpoint, record: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrowing selects on the held-out text, so that a choice which misses the proof is not narrowed again."""
    original = module._Chooser.achieved
    seen: list[str] = []
    high = 0.0

    def spoken(self: module._Chooser, proposal: module.Proposal, windows: object) -> object:
        text = self._text
        seen.append(next(name for name in ("chosen_by", "held_out", "proof") if getattr(text, name) is windows))
        found = original(self, proposal, windows)  # type: ignore[arg-type]
        return (
            tuple(dataclasses.replace(one, high=high or one.high, mean_kl_nats=0.01) for one in found[:1])
            if (seen[-1] == "proof")
            else found
        )

    monkeypatch.setattr(module._Chooser, "achieved", spoken)
    proven = calibrate(checkpoint, [prose(0)], SETTINGS, record=record)
    assert proven.calibration is not None and proven.calibration.achieved[0].mean_kl_nats == 0.01
    assert seen.count("proof") == 1 and seen[-1] == "proof" and seen[-2] == "held_out"
    high = 1.0
    seen.clear()
    missed = calibrate(checkpoint, [prose(0)], SETTINGS, record=record)
    assert missed.calibration is None and missed.predictor is None
    assert missed.part == "proof" and missed.closest[0].high == 1.0
    assert seen.count("proof") == 1 and seen[-1] == "proof"


def test_two_runs_on_one_record_are_refused(checkpoint: Checkpoint, tmp_path: pathlib.Path) -> None:
    with record_lines.writer(tmp_path / "a.jsonl"), pytest.raises(EdgerunError, match="written by another run"):
        calibrate(checkpoint, [prose(0)], SETTINGS, record=tmp_path / "a.jsonl")


def test_every_length_keeps_the_target(checkpoint: Checkpoint) -> None:
    settings = dataclasses.replace(SETTINGS, lengths=(192, 256), budgets=(160,))
    found = calibrate(checkpoint, [prose(0)], settings)
    assert found.calibration is not None
    assert [one.length for one in found.calibration.achieved] == [192, 256]
    assert all(one.holds(0.05) for one in found.calibration.achieved)


def test_windowed_layers_keep_their_window(tmp_path: pathlib.Path) -> None:
    checkpoint = Checkpoint.open(save_tiny_checkpoint(tmp_path, "gemma3"))  # full, then windowed
    settings = dataclasses.replace(SETTINGS, budgets=(208,), max_kl_nats=5.0)
    found = calibrate(checkpoint, [prose(0)], settings)
    assert [len(layer) for layer in found.alone] == [1 + len(WAYS), 1]
    assert found.calibration is not None and found.calibration.dhsa.layers[1] == DENSE


def test_another_checkpoint_cannot_be_measured(outcome: Outcome, tmp_path: pathlib.Path) -> None:
    other = Checkpoint.open(save_tiny_checkpoint(tmp_path, seed=1, num_hidden_layers=3))
    assert outcome.calibration is not None
    with pytest.raises(EdgerunError, match="calibrate this checkpoint"):
        measure_calibration(outcome.calibration, other, [prose(0)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_kl_nats": 0.0}, "above 0"),
        ({"max_kl_nats": float("nan")}, "above 0"),
        ({"samples": 1}, "at least 2"),
        ({"decode_tokens": 200}, "at most half"),
        ({"max_context": 128}, "below the longest length of 256"),
        ({"budgets": (256, 512)}, "nothing would be sparse"),
        ({"budgets": (96,)}, "below its minimum of 108"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises((EdgerunError, ExportError), match=message):
        dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]


def test_ways_that_are_far_behind_are_measured_no_further() -> None:
    cosine, fixed, topk, window = WAYS
    found = {cosine: 0.004, fixed: 0.011, topk: 0.013, window: 0.03}
    assert module._worth_narrowing(found, 0.02) == [cosine, fixed]
    assert module._worth_narrowing(found, 0.003) == []
    assert module._worth_narrowing({cosine: 1e-6, topk: 3e-4, window: 5e-4}, 0.02) == [cosine, topk]
    assert module._worth_narrowing({}, 0.02) == []


def test_the_commands_defaults_are_the_settings() -> None:
    settings = Settings()
    assert settings.max_kl_nats == DEFAULT_MAX_KL_NATS == command._MAX_KL
    assert settings.budgets == DEFAULT_BUDGETS == command._BUDGETS
    assert (settings.lengths, settings.samples) == (command._LENGTHS, command._SAMPLES)
    assert settings.decode_tokens == command._DECODE
