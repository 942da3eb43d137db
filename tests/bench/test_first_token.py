"""The first-token benchmark, small and whole: three programs, each in its processes, and a peer that must agree."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from bench.workloads import first_token
from tests.models.tiny_checkpoints import save_tiny_checkpoint

SIZES = ["--lengths", "192", "--budget", "176", "--prefill-slice", "64", "--new-tokens", "3", "--threads", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "8da4w"])
def test_peer_and_dense_agree_and_all_are_timed(tmp_path: pathlib.Path, quantize: str) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "checkpoint", "llama3")
    output = tmp_path / "results.json"
    paths = ["--work", str(tmp_path), "--checkpoint", str(checkpoint), "--output", str(output)]
    first_token.main([*SIZES, *paths, "--quantize", quantize, "--repeats", "1"])
    (row,) = json.loads(output.read_text())["rows"]
    assert list(row["sides"]) == ["peer", "dense", "dhsa"]
    assert 0 < row["sides"]["dense"]["relative_l2_against_peer"] < row["sides"]["dhsa"]["relative_l2_against_peer"]
    for one in row["sides"].values():
        assert one["first_token_seconds"] > 0 and one["decode_ms_per_token"] > 0
        assert one["peak_rss_bytes"] > one["peak_over_start_bytes"] > 0


def test_a_peer_that_disagrees_is_not_timed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def answer(plan: object, side: str, program: object, prompt: list[int], *_: object) -> tuple[dict, np.ndarray]:
        asked.append(len(prompt))
        return {}, np.ones(8) if side == "peer" else np.full(8, 1.1)

    monkeypatch.setattr(first_token, "build", lambda side, *_: tmp_path / side)
    monkeypatch.setattr(first_token, "child", answer)
    with pytest.raises(SystemExit, match=r"dense edgerun against the peer, 64 tokens: relative L2 error 1\.00e-01"):
        first_token.main(["--work", str(tmp_path), "--lengths", "64", "--output", str(tmp_path / "results.json")])
    assert asked == [64, 64]
    assert not (tmp_path / "results.json").exists()
