"""A quantised bundle computes its fake-quantised model, and stores every weight once."""

from __future__ import annotations

import pathlib
from typing import Literal

import pytest

from edgerun import compare
from edgerun.export import export_bundle
from edgerun.models.causal_lm import load
from edgerun.recipe import Recipe
from tests.models.tiny_checkpoints import save_tiny_checkpoint


@pytest.mark.parametrize("quantize", ["int8", "8da4w"])
def test_quantised_bundle(quantize: Literal["int8", "8da4w"], tmp_path: pathlib.Path) -> None:
    # The table is most of the model: stored twice, or in float, it could not hide in 5 %.
    checkpoint = save_tiny_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1, vocab_size=16384)
    recipe = Recipe(attention="dense", max_context=64, prefill_slice=32, quantize=quantize)
    bundle = export_bundle(checkpoint, recipe, tmp_path / "model.edgerun")
    for measured in bundle.manifest["parity"].values():
        assert measured["relative_l2"] <= compare.tolerance("quantized_parity_logits")
        assert measured["top1"] >= compare.tolerance("quantized_parity_top1")
    model = load(checkpoint, recipe)
    unique_bytes = 0.0
    for name, tensor in model.state_dict().items():
        if name.rsplit(".", 1)[-1] in ("key_cache", "value_cache", "summaries", "boundaries", "zero_points"):
            continue
        is_int4 = quantize == "8da4w" and name.endswith(".weight") and tensor.element_size() == 1
        unique_bytes += tensor.nbytes * (0.5 if is_int4 else 1.0)
    graph_bytes = 48 * 1024  # the program without its weights
    assert bundle.program_path.stat().st_size <= 1.05 * unique_bytes + graph_bytes
