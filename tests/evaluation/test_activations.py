"""Captured queries and keys against transformers' own attention inputs, and what is refused."""

from __future__ import annotations

import pathlib

import pytest
import torch
import transformers

from edgerun.errors import EdgerunError
from edgerun.evaluation import activations
from edgerun.evaluation.activations import layer_activations
from edgerun.models import causal_lm
from edgerun.models.causal_lm import CausalLM
from edgerun.recipe import Recipe
from tests.models.tiny_checkpoints import save_tiny_checkpoint

TOKENS = [(7 * i) % 250 for i in range(53)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(checkpoint: pathlib.Path) -> CausalLM:
    return causal_lm.load(checkpoint, Recipe(attention="dense", max_context=64, prefill_slice=16))


def test_activations_are_what_transformers_hands_its_attention(model: CausalLM, checkpoint: pathlib.Path) -> None:
    seen = []

    def record(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__):
        seen.append((query[0].clone(), key[0].clone()))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        ).transpose(1, 2), None

    transformers.AttentionInterface.register("edgerun_test_record", record)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation="edgerun_test_record", dtype=torch.float32
    )
    with torch.no_grad():
        theirs(torch.tensor([TOKENS]), use_cache=False)
    ours = layer_activations(model, TOKENS, prefill_slice=16)
    assert [one.layer for one in ours] == [0, 1] and ours[0].scale == 16**-0.5 and ours[0].softcap == 0.0
    for one, (query, key) in zip(ours, seen, strict=True):
        assert one.query.shape == (4, 53, 16) and one.key.shape == (2, 53, 16)
        assert torch.allclose(one.query, query, atol=1e-4) and torch.allclose(one.key, key, atol=1e-4)


def test_one_layer_alone_is_the_same_and_leaves_no_hook(model: CausalLM) -> None:
    whole = layer_activations(model, TOKENS)
    (alone,) = layer_activations(model, TOKENS, layers=[1])
    assert alone.layer == 1 and torch.equal(alone.query, whole[1].query) and torch.equal(alone.key, whole[1].key)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not alone.key.is_inference()


@pytest.mark.parametrize(
    ("tokens", "layers", "message"),
    [
        (TOKENS, [2], "layer 2 is asked for; the model has layers 0 to 1"),
        ([1] * 65, None, "65 tokens; the model's context holds 1 to 64"),
        ([], None, "0 tokens"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    model: CausalLM, tokens: list[int], layers: list[int] | None, message: str
) -> None:
    with pytest.raises(EdgerunError, match=message):
        layer_activations(model, tokens, layers)


def test_more_memory_than_the_limit_is_refused(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    one_layer = 53 * (4 + 2) * 16 * 4
    monkeypatch.setattr(activations, "MOST_BYTES", one_layer)
    assert len(layer_activations(model, TOKENS, layers=[0])) == 1
    with pytest.raises(EdgerunError, match="ask for fewer layers"):
        layer_activations(model, TOKENS)
