"""A bundle whose layers differ: what its program computes, what it plans, and what its manifest says of it."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import torch

from edgerun import compare
from edgerun.bundle import Bundle
from edgerun.checkpoint import Checkpoint
from edgerun.commands.validate import validate_bundle
from edgerun.evaluation.fidelity import eager_logits
from edgerun.export import export_bundle
from edgerun.export.golden import golden_cases, passage_ids
from edgerun.export.pipeline import plan
from edgerun.models.cached_attention import cache_of
from edgerun.models.causal_lm import load
from edgerun.ops.dhsa_attention_reference import find_boundaries
from edgerun.ops.dhsa_attention_types import AttentionState, Chunking
from edgerun.recipe import DhsaOptions, LayerChoice, Recipe
from edgerun.sessions.text import TextSession
from tests.models.tiny_checkpoints import save_tiny_checkpoint

CHOICES = (LayerChoice(112, "window-sink"), LayerChoice(), LayerChoice(128), LayerChoice(176, "block-topk"))
ALIKE = DhsaOptions(budget=112, tile=16)
RECIPE = Recipe(max_context=256, prefill_slice=32, dhsa=ALIKE.with_layers(CHOICES))
PROMPT_TOKENS = 230


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=len(CHOICES))


@pytest.fixture(scope="module")
def bundle(checkpoint: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(checkpoint, RECIPE, tmp_path_factory.mktemp("bundle") / "model.edgerun")


@pytest.fixture(scope="module")
def ids(checkpoint: pathlib.Path) -> list[int]:
    return passage_ids(Checkpoint.open(checkpoint), RECIPE.max_context or 0)


def test_bundle_computes_what_its_eager_model_does(bundle: Bundle, checkpoint: pathlib.Path, ids: list[int]) -> None:
    prompt, forced = ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:]
    session = TextSession(bundle.path, threads=1)
    starts = range(0, PROMPT_TOKENS, RECIPE.prefill_slice)
    rows = [session.forward(prompt[start : start + RECIPE.prefill_slice], start) for start in starts][-1:]
    assert session.stats.attended_pairs < session.stats.causal_pairs
    rows += [session.forward([token], PROMPT_TOKENS + offset) for offset, token in enumerate(forced)]
    eager = eager_logits(load(checkpoint, RECIPE), prompt, forced, RECIPE.prefill_slice)
    kl = compare.kl_divergence(np.stack(rows).astype(np.float64), eager.astype(np.float64))
    assert float(kl.mean()) <= compare.tolerance("sparse_kl_nats")


def test_every_sparse_layer_selects_in_a_golden_case(bundle: Bundle) -> None:
    assert [len(case.prompt) for case in bundle.golden_cases()] == [5, 49, 176 + 2 * 16 + 17]
    report = validate_bundle(bundle.path)
    assert report.passed and "not exercised" not in dict(report.facts)


def test_golden_case_shrinks_to_the_budget_that_fits(checkpoint: pathlib.Path) -> None:
    recipe = dataclasses.replace(RECIPE, max_context=208)
    cases = dict(golden_cases(load(checkpoint, recipe), recipe, Checkpoint.open(checkpoint)))
    assert len(cases["sparse"].prompt) == 128 + 2 * 16 + 17


def test_manifest_says_what_each_layer_does(bundle: Bundle) -> None:
    assert bundle.recipe == RECIPE
    layers = bundle.manifest["attention"]["layers"]
    assert [layer["kind"] for layer in layers] == ["dhsa", "dense", "dhsa", "dhsa"]
    assert [layer["budget"] for layer in layers] == [112, None, 128, 176]


def test_memory_plan_leaves_out_the_summaries_that_no_layer_keeps(checkpoint: pathlib.Path) -> None:
    alike = plan(checkpoint, dataclasses.replace(RECIPE, dhsa=ALIKE)).cache_bytes
    dense = plan(checkpoint, dataclasses.replace(RECIPE, attention="dense")).cache_bytes
    mixed = plan(checkpoint, RECIPE).cache_bytes
    one_vector = (alike - dense) // (len(CHOICES) * 2)  # of a layer: its summaries have two vectors, mean and variance
    assert mixed - dense == one_vector * (2 + 1)  # the cosine layer's two, block top-k's mean


def test_each_way_of_chunking_has_boundaries_of_its_own(checkpoint: pathlib.Path, ids: list[int]) -> None:
    model = load(checkpoint, RECIPE)
    eager_logits(model, ids[:PROMPT_TOKENS], [], RECIPE.prefill_slice)
    fixed, cosine = (model.shared.boundaries_of(kind) for kind in (Chunking.FIXED, Chunking.COSINE))
    decided = (PROMPT_TOKENS - 12) // 16 + 1
    assert fixed[:decided].nonzero().flatten().tolist() == list(range(0, decided, 4))
    cache = cache_of(model.sites[2])
    expected = torch.zeros_like(cosine)
    state = AttentionState(cache.key_cache, cache.value_cache, cache.summaries, expected)
    find_boundaries(state, 0, PROMPT_TOKENS, model.options[2])
    assert torch.equal(cosine, expected) and not torch.equal(cosine, fixed)
    model.reset()
    assert not fixed.any() and not cosine.any()


def test_layers_that_are_alike_by_choice_compute_what_alike_options_do(
    checkpoint: pathlib.Path, ids: list[int]
) -> None:
    same = dataclasses.replace(RECIPE, dhsa=ALIKE.with_layers([LayerChoice(112)] * len(CHOICES)))
    alike = dataclasses.replace(RECIPE, dhsa=ALIKE)
    one, other = (
        eager_logits(load(checkpoint, recipe), ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:], RECIPE.prefill_slice)
        for recipe in (same, alike)
    )
    assert np.array_equal(one, other)


def test_a_loaded_model_can_attend_another_way(checkpoint: pathlib.Path, ids: list[int]) -> None:
    model = load(checkpoint, dataclasses.replace(RECIPE, attention="dense"))
    eager_logits(model, ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:], RECIPE.prefill_slice)
    model.attend_as(RECIPE)
    changed = eager_logits(model, ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:], RECIPE.prefill_slice)
    fresh = eager_logits(load(checkpoint, RECIPE), ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:], RECIPE.prefill_slice)
    assert np.array_equal(changed, fresh)
