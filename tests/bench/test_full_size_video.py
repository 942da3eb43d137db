"""The largest video models: their checkpoints in small, and, marked slow, the whole of it at full size."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import psutil
import pytest
import torch

from bench.workloads import full_size_video as bench
from bench.workloads.full_size_checkpoint import MODELS, make_checkpoint
from edgerun.models.text_to_video import VideoCheckpoint

EXPORT_LIMIT_BYTES = 3_000_000_000
NEEDED_BYTES = 20 << 30


@pytest.mark.parametrize("name", sorted(MODELS))
def test_checkpoints_have_every_tensor(tmp_path: pathlib.Path, name: str) -> None:
    """The official names and shapes, of fewer and narrower layers."""
    model = MODELS[name]
    denoiser = dataclasses.replace(model.denoiser, depth=1, hidden_size=32, num_heads=2)
    text = {**model.text, "num_layers": 1, "d_ff": 8, "num_heads": 2, "vocab_size": 64}
    model = dataclasses.replace(model, denoiser=denoiser, text=text)
    facts = make_checkpoint(tmp_path, model)
    assert facts["denoiser_bytes"] > model.dtype.itemsize * facts["denoiser_parameters"]
    source = VideoCheckpoint.open(tmp_path)
    _, weights = source.outline_text_encoder()
    assert weights["shared.weight"].dtype == model.dtype and weights["shared.weight"].shape[1] == 4096
    _, weights = source.outline_denoiser()
    expected = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(weights["rope.freqs"].float(), expected.to(model.dtype).float())
    assert abs(float(weights["y_embedder.y_embedding"].float().std()) - 1) < 0.01
    assert source.load_autoencoder().config.spatial_factor == 8


def run_row(case: str, step_ms: float, resident: int, load_ms: float = 0.0, execute_ms: float = 0.0) -> dict:
    """Of two passes over 10 blocks."""
    block = {"load_ms": 2 * load_ms, "loads": 2, "execute_ms": 2 * execute_ms, "executions": 2}
    steps = {"step_wall_ms": [9 * step_ms, step_ms], "blocks": [block] * 10, "resident_blocks": resident}
    return {"case": case, **steps}


def test_the_factors_by_hand() -> None:
    """l = 100 and e = 400 ms, TDTM twice as fast, 2 of 10 blocks resident. In turn a pass takes 5,000 ms.

    Streamed plain steps would take 4,000 ms, and take 4,080: alpha (1 - 2/10) = 80. Merged ones take 3,000 in turn and
    2,080 by the formula: 1.44 times as fast.
    """
    rows = [
        run_row("two steps, all resident", 4000, 10),
        run_row("two steps", 4080, 2),
        run_row("two steps, one block after another", 5000, 0, 100, 400),
        run_row("all together, all resident", 2000, 10),
        run_row("all together", 2200, 2),
    ]
    found = bench.factors(rows)
    assert (found["load_of_a_block_ms"], found["execute_of_a_block_ms"]) == (100, 400)
    assert found["alpha_ms"] == pytest.approx(100)
    assert (found["evaluations_ratio"], found["tdtm_step_ratio"]) == (1.5, 2)
    assert found["streaming_ratio_by_formula"] == pytest.approx(3000 / 2080)
    assert found["measured_ratio"] == pytest.approx(3 * 5000 / (2 * 2200))
    assert found["reached_share"] == pytest.approx(found["measured_ratio"] / (1.5 * 2 * 3000 / 2080))
    assert f"{100 * found['reached_share']:.0f} % of it" in bench.factors_line(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_full_size_within_a_gigabyte(tmp_path: pathlib.Path, name: str) -> None:
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(tmp_path).free
    if memory < NEEDED_BYTES // 2 or disk < NEEDED_BYTES:
        pytest.skip(f"needs 10 GiB of memory and 20 of disk; {memory >> 30} and {disk >> 30} GiB are free")
    output = tmp_path / "rows.json"
    bench.main(["--work", str(tmp_path / "work"), "--models", name, "--output", str(output)])  # it checks every run
    export, *runs = json.loads(output.read_text())["rows"]
    if name == "denoiser":
        assert runs.pop()["kind"] == "factors"
    assert export["peak_rss_bytes"] <= EXPORT_LIMIT_BYTES
    assert [row["case"] for row in runs] == [case.name for case in bench.cases(name)]
    for row in runs:
        if "no prefetch" in row["case"] or "one block after another" in row["case"]:
            assert row["hidden_share"] < 0.1
    assert [row["case"] for row in runs if row["status"] != 0] == [
        case.name for case in bench.cases(name) if case.fails
    ]
