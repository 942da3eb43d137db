"""The memory plan: it grows with what it should, it refuses with what would fit, and a run keeps within it."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from edgerun import compare, zoo
from edgerun.devices import RunRequest, open_device
from edgerun.errors import ExportError
from edgerun.export import export_bundle, plan
from edgerun.recipe import Recipe
from tests.models.tiny_checkpoints import save_tiny_checkpoint

PARTS = ("weights_bytes", "cache_bytes", "activation_bytes", "runtime_bytes")
ZOO = zoo.zoo_model_path("text")


def test_parts_add_up_to_the_peak() -> None:
    memory = plan(ZOO, Recipe())
    assert sum(getattr(memory, part) for part in PARTS) == memory.peak_rss_bytes


def test_cache_is_that_of_the_context() -> None:
    dense = Recipe(attention="dense", max_context=4096)
    layers, kv_heads, head_dim = 6, 2, 64
    assert plan(ZOO, dense).cache_bytes == layers * kv_heads * head_dim * 2 * 4 * 4096
    assert (
        plan(ZOO, dataclasses.replace(dense, dtype="fp16")).cache_bytes == layers * kv_heads * head_dim * 2 * 2 * 4096
    )


def test_quantised_weights_take_less() -> None:
    sizes = [plan(ZOO, Recipe(quantize=one)).weights_bytes for one in ("none", "int8", "8da4w")]  # type: ignore[arg-type]
    assert 3.5 < sizes[0] / sizes[1] < 4 and 1.5 < sizes[1] / sizes[2] < 2


def test_a_limit_that_holds_is_accepted() -> None:
    memory = plan(ZOO, Recipe())
    memory.require(memory.peak_rss_bytes)


def test_a_refusal_names_a_context_that_fits() -> None:
    memory = plan(ZOO, Recipe())
    limit = memory.peak_rss_bytes - (20 << 20)
    with pytest.raises(ExportError, match=r"above the limit of .* --max-context (\d+)") as refusal:
        memory.require(limit)
    context = int(str(refusal.value).split("--max-context ")[1].split()[0])
    plan(ZOO, Recipe(max_context=context)).require(limit)
    with pytest.raises(ExportError):
        plan(ZOO, Recipe(max_context=context + 16)).require(limit)


def test_a_refusal_that_nothing_can_meet_says_so() -> None:
    with pytest.raises(ExportError, match="choose a smaller model, or raise --memory-limit"):
        plan(ZOO, Recipe()).require(1 << 20)


def test_what_a_program_plans_corrects_the_activations() -> None:
    memory = plan(ZOO, Recipe())
    corrected = memory.with_planned_bytes(memory.cache_bytes + (30 << 20))
    assert corrected.activation_bytes > 30 << 20 and corrected.weights_bytes == memory.weights_bytes


def test_an_export_above_its_limit_leaves_nothing(tmp_path: pathlib.Path) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "checkpoint")
    out = tmp_path / "out" / "model.edgerun"
    out.parent.mkdir()
    with pytest.raises(ExportError, match="above the limit"):
        export_bundle(checkpoint, Recipe(max_context=64, prefill_slice=16), out, memory_limit_bytes=1 << 20)
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_a_full_context_on_the_zoo_model_stays_within_the_plan(tmp_path: pathlib.Path) -> None:
    bundle = export_bundle(ZOO, Recipe(), tmp_path / "zoo.edgerun")
    planned = bundle.manifest["memory_plan"]["peak_rss_bytes"]
    length = bundle.manifest["context"]["max_context"] - 2
    prompt = tuple(32 + position % 64 for position in range(length))
    report = open_device("host").run(bundle.path, RunRequest(prompt=prompt, max_new_tokens=2, stop_ids=()))
    share = report.values["peak_rss_bytes"] / planned
    assert share - 1 <= compare.tolerance("memory_plan_over")
    assert 1 - share <= compare.tolerance("memory_plan_under")
