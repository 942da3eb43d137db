"""Is anything broken at all? Runs first, in under ten seconds: the op, a model around it, and the command line."""

from __future__ import annotations

import pathlib

import pytest
import torch
import transformers

from edgerun import cli, compare
from edgerun.models import causal_lm
from edgerun.ops import dhsa_attention as op
from edgerun.recipe import DhsaOptions, Recipe
from tests.models.tiny_checkpoints import save_tiny_checkpoint


def test_native_op_equals_the_reference() -> None:
    options = op.AttentionOptions.from_recipe(DhsaOptions(budget=112, tile=16), scale=0.25, finds_boundaries=True)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 211, 16, generator=generator)
    key, value = torch.randn(2, 1, 2, 211, 16, generator=generator)
    start = torch.tensor([0])
    measured = op.attend(query, key, value, op.AttentionState.allocate(2, 16, 256, options), start, options)
    state = op.AttentionState.allocate(2, 16, 256, options, torch.float64)
    expected = op.reference(query.double(), key.double(), value.double(), state, start, options)
    assert compare.relative_l2(measured, expected) <= compare.tolerance("op_fp32")


def test_a_model_equals_transformers(tmp_path: pathlib.Path) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path, "llama3")
    ids = torch.arange(40).reshape(1, 40)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    with torch.inference_mode():
        expected = model(ids).logits[:, -1]
        measured = causal_lm.load(checkpoint, Recipe(max_context=64, prefill_slice=64))(ids, torch.tensor([0]))
    assert compare.relative_l2(measured, expected) <= compare.tolerance("logits_fp32")


def test_the_command_line_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert [verb for verb in cli.VERBS if f"    {verb} " not in printed] == []
