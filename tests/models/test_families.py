"""The eager model of each decoder family against transformers' own eager run, with a budget that covers the length."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import torch
import transformers

from edgerun import compare
from edgerun.checkpoint import Checkpoint
from edgerun.errors import CheckpointError, ExportError
from edgerun.models.causal_lm import CausalLM, load
from edgerun.recipe import DhsaOptions, Recipe
from tests.models.decoding import CALLS, TOKENS, token_ids, transformers_logits, worst_relative_l2
from tests.models.tiny_checkpoints import FAMILIES, LONGROPE_ORIGINAL, WINDOW, save_tiny_checkpoint

RECIPE = Recipe(max_context=256, prefill_slice=32, dhsa=DhsaOptions(budget=256))
SPARSE = dataclasses.replace(RECIPE, dhsa=DhsaOptions(budget=112, tile=16, sink=16))


def eager(model: CausalLM, ids: list[int], position: int) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([ids]), torch.tensor([position]))[0].numpy()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pathlib.Path]:
    return request.param, save_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def test_slices_and_decode_match_transformers(family: tuple[str, pathlib.Path]) -> None:
    model = load(family[1], RECIPE)
    worst = worst_relative_l2(lambda ids, at: eager(model, ids, at), transformers_logits(family[1]))
    assert worst <= compare.tolerance("logits_fp32")


def test_dense_recipe_matches_transformers(family: tuple[str, pathlib.Path]) -> None:
    model = load(family[1], dataclasses.replace(RECIPE, attention="dense"))
    worst = worst_relative_l2(lambda ids, at: eager(model, ids, at), transformers_logits(family[1]))
    assert worst <= compare.tolerance("logits_fp32")
    assert {one.kind for one in model.options} <= {"dense", "window"}


def test_layer_kinds_follow_the_model(family: tuple[str, pathlib.Path]) -> None:
    kinds = {
        "mistral": ["window", "window"],
        "gemma2": ["window", "dhsa"],
        "gemma3": ["dhsa", "window"],
    }
    model = load(family[1], RECIPE)
    assert [one.kind for one in model.options] == kinds.get(family[0], ["dhsa", "dhsa"])
    assert {one.window for one in model.options if one.kind == "window"} <= {WINDOW}


def test_a_small_budget_changes_the_logits(tmp_path: pathlib.Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, "qwen3")
    model = load(folder, SPARSE)
    worst = worst_relative_l2(lambda ids, at: eager(model, ids, at), transformers_logits(folder), calls=(TOKENS,))
    dense = worst_relative_l2(lambda ids, at: eager(model, ids, at), transformers_logits(folder), calls=(TOKENS // 2,))
    assert worst > compare.tolerance("logits_fp32") >= dense


def test_a_call_at_an_earlier_position_drops_what_came_after(tmp_path: pathlib.Path) -> None:
    model = load(save_tiny_checkpoint(tmp_path), RECIPE)
    ids = token_ids()
    first = eager(model, ids[:40], 0)
    eager(model, ids[40:90], 40)
    again = eager(model, ids[30:40], 30)
    assert compare.relative_l2(again, first) <= compare.tolerance("logits_fp32")


def test_reset_forgets(tmp_path: pathlib.Path) -> None:
    model = load(save_tiny_checkpoint(tmp_path), RECIPE)
    eager(model, token_ids()[:32], 0)
    model.reset()
    state = {name: tensor for name, tensor in model.named_buffers() if "cache" in name or "boundaries" in name}
    assert len(state) == 9
    assert not any(tensor.any() for tensor in state.values())


def test_longrope_is_frozen_for_short_prompts_too(tmp_path: pathlib.Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, "phi3")
    model = load(folder, RECIPE)
    assert model.rope.frozen_from_max_context
    expected = transformers_logits(folder)  # one call past the original length: the long frequencies throughout
    ids = token_ids()[: LONGROPE_ORIGINAL // 2]
    assert compare.relative_l2(eager(model, ids, 0), expected[len(ids) - 1]) <= compare.tolerance("logits_fp32")


def test_longrope_within_the_original_context_takes_the_short_frequencies(tmp_path: pathlib.Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, "phi3")
    model = load(folder, dataclasses.replace(RECIPE, max_context=LONGROPE_ORIGINAL))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = token_ids()[:50]
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0, -1].numpy()
    assert compare.relative_l2(eager(model, ids, 0)[:], expected) <= compare.tolerance("logits_fp32")


def test_dynamic_rope_is_frozen_at_max_context(tmp_path: pathlib.Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = save_tiny_checkpoint(tmp_path, "llama3", rope_parameters=rope, max_position_embeddings=TOKENS)
    model = load(folder, dataclasses.replace(RECIPE, max_context=TOKENS))
    worst = worst_relative_l2(lambda ids, at: eager(model, ids, at), transformers_logits(folder))
    assert model.rope == dataclasses.replace(model.rope, type="dynamic", frozen_from_max_context=True)
    assert worst <= compare.tolerance("logits_fp32")


def test_window_as_long_as_the_context_is_full_attention(tmp_path: pathlib.Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, "mistral", sliding_window=256)
    assert [one.kind for one in load(folder, RECIPE).options] == ["dhsa", "dhsa"]


def test_half_precision_stays_near_float32(tmp_path: pathlib.Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, "gemma3", dtype=torch.float16)
    half = dataclasses.replace(RECIPE, dtype="fp16")
    model, truth = load(folder, half), load(folder, half, arithmetic=torch.float32)
    assert next(model.parameters()).dtype == torch.float16
    worst, position = 0.0, 0
    for length in CALLS:
        ids = token_ids()[position : position + length]
        worst = max(worst, compare.relative_l2(eager(model, ids, position), eager(truth, ids, position)))
        position += length
    assert worst <= compare.tolerance("logits_fp16")


def test_sharded_checkpoint_gives_the_same_model(tmp_path: pathlib.Path) -> None:
    whole = load(save_tiny_checkpoint(tmp_path / "whole"), RECIPE)
    parts_folder = save_tiny_checkpoint(tmp_path / "parts", max_shard_bytes=100_000)
    assert len(Checkpoint.open(parts_folder).weight_files) > 1
    parts = load(parts_folder, RECIPE)
    assert np.array_equal(eager(whole, token_ids()[:9], 0), eager(parts, token_ids()[:9], 0))


def test_tied_table_is_held_once(tmp_path: pathlib.Path) -> None:
    model = load(save_tiny_checkpoint(tmp_path), RECIPE)
    vocabulary_sized = [tensor for tensor in (*model.parameters(), *model.buffers()) if 264 in tensor.shape]
    assert len(vocabulary_sized) == 1


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (dataclasses.replace(RECIPE, max_context=1024), "max_context is 1024"),
        (dataclasses.replace(RECIPE, max_context=16), "prefill_slice is 32"),
        (dataclasses.replace(RECIPE, prefill_slice=0), "prefill_slice is 0"),
    ],
)
def test_recipe_that_does_not_fit_is_refused(recipe: Recipe, words: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ExportError, match=words):
        load(save_tiny_checkpoint(tmp_path), recipe)


def test_weight_beyond_float16_is_refused(tmp_path: pathlib.Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, weight_scale=1e6)
    with pytest.raises(ExportError, match="beyond float16's 65504"):
        load(folder, dataclasses.replace(RECIPE, dtype="fp16"))


@pytest.mark.parametrize("asked", [{"s_aux": torch.zeros(4)}, {"position_bias": 1.0}])
def test_attention_that_asks_for_what_the_op_does_not_do_is_refused(
    asked: dict[str, object], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args, **given: forward(self, *args, **given, **asked))
    with pytest.raises(CheckpointError, match=f"asks its attention for {next(iter(asked))}"):
        load(save_tiny_checkpoint(tmp_path), RECIPE)
