"""Fidelity by hand, its gates by recipe, and the eager runs that it is taken from."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import torch

from edgerun import compare
from edgerun.evaluation import fidelity
from edgerun.models import causal_lm
from edgerun.models.causal_lm import CausalLM
from edgerun.recipe import Recipe
from tests.models.tiny_checkpoints import save_tiny_checkpoint

RECIPE = Recipe(attention="dense", max_context=64, prefill_slice=64)
PROMPT = list(range(40))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return causal_lm.load(save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")), RECIPE)


def test_measure_by_hand() -> None:
    reference = np.array([[3.0, 1.0, 0.0], [2.0, 2.5, 0.0]])
    measured = np.array([[3.0, 1.0, 0.0], [2.5, 2.0, 0.0]])
    found = fidelity.measure(measured, reference)
    assert found.rows == 2 and found.top1 == 0.5
    assert found.relative_l2 == pytest.approx((0.5 / (9 + 1 + 4 + 6.25)) ** 0.5)
    assert found.divergence == compare.Divergence(step=1, measured_token=0, reference_token=1, margin=0.5)
    p = np.exp([2.0, 2.5, 0.0]) / np.exp([2.0, 2.5, 0.0]).sum()
    assert found.max_kl_nats == pytest.approx(0.5 * p[1] - 0.5 * p[0])
    assert found.mean_kl_nats == pytest.approx(found.max_kl_nats / 2)


@pytest.mark.parametrize(
    ("recipe", "sparse", "limits"),
    [
        (Recipe(), False, ("logits_fp32", "kl_fp32_nats", "top1_fp32", "greedy_margin")),
        (Recipe(), True, ("sparse_kl_nats", "sparse_top1", "greedy_margin")),
        (Recipe(dtype="fp16"), False, ("logits_fp16", "kl_fp16_nats", "top1_fp16", "greedy_margin_reduced")),
        (Recipe(kv_dtype="int8"), False, ("logits_fp16", "kl_fp16_nats", "top1_fp16", "greedy_margin_reduced")),
        (Recipe(kv_dtype="int8"), True, ("sparse_kl_nats", "sparse_top1", "greedy_margin")),
    ],
)
def test_gates_follow_the_recipe(recipe: Recipe, sparse: bool, limits: tuple[str, ...]) -> None:
    found = fidelity.measure(np.eye(3), np.eye(3))
    gates = fidelity.checks(found, recipe, sparse=sparse)
    assert [gate.limit for gate in gates] == [compare.tolerance(name) for name in limits]
    assert all(gate.passed for gate in gates)


def test_a_divergence_with_a_wide_margin_fails_its_gate() -> None:
    found = fidelity.measure(np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]))
    gate = fidelity.checks(found, Recipe(), sparse=True)[-1]
    assert gate.measured == 1.0 and not gate.passed


def test_a_quantised_model_is_allowed_twice_its_own_noise() -> None:
    names = ("quantized_parity_logits", "quantized_parity_kl_nats", "quantized_parity_top1", "greedy_margin_reduced")
    recipe, table = Recipe(quantize="8da4w"), [compare.tolerance(name) for name in names]
    found = fidelity.Fidelity(20, 0.14, 0.14**2, 0.07, 0.2, 0.75, compare.Divergence(3, 1, 2, 1.5))
    quiet, loud = fidelity.Noise(0.01, 1e-4, 1.0, 0.0), fidelity.Noise(0.08, 0.02, 0.85, 0.8)
    limits = {noise: fidelity.checks(found, recipe, sparse=False, noise=noise) for noise in (None, quiet, loud)}
    for noise in (None, quiet):
        assert [gate.limit for gate in limits[noise]] == table and not any(gate.passed for gate in limits[noise])
    assert [gate.limit for gate in limits[loud]] == pytest.approx([0.16, 0.08, 0.7, 1.6])
    assert all(gate.passed and "noise" in gate.detail for gate in limits[loud])
    wrong = fidelity.checks(dataclasses.replace(found, relative_l2=1.0, top1=0.1), recipe, sparse=False, noise=loud)
    assert [gate.passed for gate in wrong] == [False, True, False, True]
    assert fidelity.checks(found, Recipe(), sparse=False, noise=loud) == fidelity.checks(found, Recipe(), sparse=False)


def test_noise_is_what_a_last_bit_of_the_embeddings_does(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = fidelity.eager_logits(model, PROMPT, [7, 8], prefill_slice=64)
    plain = fidelity.own_noise(model, PROMPT, [7, 8], 64, logits)
    assert 0 < plain.relative_l2 <= compare.tolerance("logits_fp32") and plain.top1 == 1.0
    assert np.array_equal(fidelity.eager_logits(model, PROMPT, [7, 8], prefill_slice=64), logits)  # nothing is left
    monkeypatch.setattr(fidelity, "_NUDGE", 1e-3)
    louder = fidelity.own_noise(model, PROMPT, [7, 8], 64, logits)
    assert 100 * plain.relative_l2 < louder.relative_l2 < 1e-1


def test_a_divergence_at_a_tie_passes_its_gate() -> None:
    found = fidelity.measure(np.array([[1.0, 1.0001]]), np.array([[1.0001, 1.0]]))
    assert fidelity.checks(found, Recipe(), sparse=True)[-1].passed


def test_eager_logits_are_the_models_own_at_every_position(model: CausalLM) -> None:
    rows = fidelity.eager_logits(model, PROMPT, [7, 8], prefill_slice=16)
    for row, length in zip(rows, (40, 41, 42), strict=True):
        ids = torch.tensor([[*PROMPT, 7, 8][:length]])
        with torch.inference_mode():
            expected = model(ids, torch.tensor([0]))[0]
        assert compare.relative_l2(row, expected) <= compare.tolerance("logits_fp32")


def test_greedy_takes_the_largest_logit_and_feeds_it_back(model: CausalLM) -> None:
    run = fidelity.greedy(model, PROMPT, max_new_tokens=6, ends=(), prefill_slice=64)
    assert list(run.tokens) == run.logits.argmax(axis=-1).tolist() and len(run.tokens) == 6
    forced = fidelity.eager_logits(model, PROMPT, run.tokens[:-1], prefill_slice=64)
    assert np.array_equal(forced, run.logits)


def test_greedy_ends_with_an_end_token(model: CausalLM) -> None:
    free = fidelity.greedy(model, PROMPT, max_new_tokens=6, ends=(), prefill_slice=64).tokens
    end = free[2]
    ended = fidelity.greedy(model, PROMPT, max_new_tokens=6, ends={end}, prefill_slice=64).tokens
    assert ended == free[: free.index(end) + 1]


def test_a_checkpoint_of_other_weights_is_found_out(model: CausalLM, tmp_path: pathlib.Path) -> None:
    other = causal_lm.load(save_tiny_checkpoint(tmp_path, seed=1), RECIPE)
    found = fidelity.measure(*(fidelity.eager_logits(m, PROMPT, [7], prefill_slice=64) for m in (other, model)))
    assert not all(gate.passed for gate in fidelity.checks(found, RECIPE, sparse=False))


class _Recorder:
    """A model that remembers what it is fed: (tokens, position), and None where it is reset."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int] | None] = []

    def reset(self) -> None:
        self.calls.append(None)

    def __call__(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self.calls.append((ids.shape[1], int(position)))
        return torch.zeros(1, 4)


def test_what_is_appended_is_cut_at_multiples_of_the_tile() -> None:
    model = _Recorder()
    fidelity.append(model, range(101), 129, prefill_slice=64, tile=16)  # type: ignore[arg-type]
    assert model.calls == [(63, 129), (38, 192)]


def test_position_zero_begins_anew_and_a_slice_below_the_tile_still_goes_on() -> None:
    model = _Recorder()
    fidelity.append(model, range(20), 0, prefill_slice=8, tile=16)  # type: ignore[arg-type]
    assert model.calls == [None, (8, 0), (8, 8), (4, 16)]
