"""The bundle of each decoder family, run by the real runtime, against transformers' own eager run.

One export a family (about 10 s of one core, nearly all of it ExecuTorch's lowering), shared by the tests below; the
group keeps a family's tests on one worker.
"""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from edgerun import compare
from edgerun.bundle import Bundle
from edgerun.export import export_bundle
from edgerun.recipe import DhsaOptions, Recipe
from edgerun.sessions.text import TextSession
from tests.export.programs import partitions, portable_calls
from tests.models.decoding import transformers_logits, worst_relative_l2
from tests.models.tiny_checkpoints import FAMILIES, save_tiny_checkpoint

LAYERS = 2
# Parts of a layer that XNNPACK runs between norms and attention: queries, keys and values with their rotation; the
# output; the MLP. Norms of queries and keys, or of what a block adds, cut them further.
PARTITIONS_OF_A_LAYER = {"qwen3": 4, "gemma2": 5, "gemma3": 5}  # 3 in the other families
# Per call, not per layer: positions as float, and the last token.
CALLS_OUTSIDE = {
    "aten::arange",
    "aten::add",
    "aten::slice_copy",
    "aten::select_copy",
    "dim_order_ops::_to_dim_order_copy",
}
RECIPE = Recipe(max_context=256, prefill_slice=32, dhsa=DhsaOptions(budget=256))


@dataclasses.dataclass(frozen=True)
class Family:
    name: str
    checkpoint: pathlib.Path
    bundle: Bundle


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(f"family-{name}")) for name in sorted(FAMILIES)],
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = save_tiny_checkpoint(folder / "checkpoint", request.param)
    return Family(request.param, checkpoint, export_bundle(checkpoint, RECIPE, folder / "model.edgerun"))


def test_bundle_matches_transformers(family: Family) -> None:
    session = TextSession(family.bundle.path, threads=1)
    worst = worst_relative_l2(session.forward, transformers_logits(family.checkpoint))
    assert worst <= compare.tolerance("logits_fp32")


def test_xnnpack_has_all_but_norms_and_attention(family: Family) -> None:
    program = family.bundle.path / "programs/text.pte"
    calls = portable_calls(program)
    assert set(calls) <= CALLS_OUTSIDE and len(calls) <= 6
    of_layers = LAYERS * PARTITIONS_OF_A_LAYER.get(family.name, 3)
    around = {"gemma2": 2, "gemma3": 3}.get(family.name, 1)  # embedding's scale, logits' cap or head, other rotations
    assert of_layers <= partitions(program) <= of_layers + around


def test_manifest_states_the_attention_and_the_rope(family: Family) -> None:
    manifest = Bundle.open(family.bundle.path).manifest
    kinds = [layer["kind"] for layer in manifest["attention"]["layers"]]
    windows = [layer["window"] for layer in manifest["attention"]["layers"]]
    assert ("window" in kinds) == (family.name in ("mistral", "gemma2", "gemma3"))
    assert all((kind == "window") == (window is not None) for kind, window in zip(kinds, windows, strict=True))
    assert manifest["rope"]["frozen_from_max_context"] == (family.name == "phi3")
    assert {"edgerun::dhsa_attention", "edgerun::rms_norm"} <= set(manifest["programs"][0]["operators"])
    assert manifest["context"] == {"max_context": 256, "prefill_slice": 32, "model_max_context": 512}


def test_parity_is_recorded(family: Family) -> None:
    parity = family.bundle.manifest["parity"]
    assert set(parity) == {"short", "slices"}
    assert all(case["relative_l2"] <= compare.tolerance("logits_fp32") for case in parity.values())
