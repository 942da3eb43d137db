"""A bundle whose key/value cache is narrower than its activations."""

from __future__ import annotations

import pathlib
from typing import Literal

import numpy as np
import pytest

from edgerun import compare
from edgerun.export import export_bundle
from edgerun.export.pipeline import plan
from edgerun.recipe import DhsaOptions, Recipe
from edgerun.sessions.text import TextSession
from tests.models.decoding import transformers_logits, worst_relative_l2
from tests.models.tiny_checkpoints import save_tiny_checkpoint

DHSA = DhsaOptions(budget=112, tile=16)


@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
def test_a_narrow_cache_keeps_the_logits(kv_dtype: Literal["fp16", "int8"], tmp_path: pathlib.Path) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "checkpoint", "qwen2")
    recipe = Recipe(max_context=256, prefill_slice=32, dhsa=DhsaOptions(budget=256), kv_dtype=kv_dtype)
    bundle = export_bundle(checkpoint, recipe, tmp_path / "model.edgerun")
    assert bundle.recipe.kv_dtype == kv_dtype
    worst = worst_relative_l2(TextSession(bundle.path, threads=1).forward, transformers_logits(checkpoint))
    limits = {"fp16": "logits_fp16", "int8": "logits_int8_cache"}
    assert worst <= compare.tolerance(limits[kv_dtype])


def test_the_plan_counts_what_the_cache_takes(tmp_path: pathlib.Path) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "checkpoint", "llama3", head_dim=64)
    sizes = {
        kv_dtype: plan(checkpoint, Recipe(max_context=512, dhsa=DHSA, kv_dtype=kv_dtype)).cache_bytes
        for kv_dtype in ("fp32", "fp16", "int8")
    }
    summaries = 2 * 64 * 2 / 16  # bytes a token: two vectors in float16 for every 16
    fp32 = 2 * 64 * 4 + summaries
    assert sizes["fp16"] == pytest.approx(sizes["fp32"] * (2 * 64 * 2 + summaries) / fp32)
    scales = 2 * 2 + 2  # of keys and of values
    assert sizes["int8"] == pytest.approx(sizes["fp32"] * (2 * 64 + scales + summaries) / fp32)
    assert sizes["int8"] <= 0.30 * sizes["fp32"]


def test_state_does_not_depend_on_slices(tmp_path: pathlib.Path) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "checkpoint", "llama3", num_hidden_layers=1)
    recipe = Recipe(max_context=256, prefill_slice=64, dhsa=DHSA, kv_dtype="int8")
    session = TextSession(export_bundle(checkpoint, recipe, tmp_path / "model.edgerun").path, threads=1)
    prompt = list(range(1, 201))
    whole = session.forward(prompt, 0)
    for cut in (16, 64, 192):
        session.forward(prompt[:cut], 0)
        assert np.array_equal(session.forward(prompt[cut:], cut), whole)
