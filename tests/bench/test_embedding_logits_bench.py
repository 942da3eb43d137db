"""The benchmark of the tied head's product, small: every variant is timed, and none whose answer is wrong."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

from bench.ops import embedding_logits as bench
from edgerun.ops.native import native_module

SMALL = ["--vocab", "300", "--hidden", "64", "--threads", "1", "--repeats", "2"]


def test_every_variant_is_timed_over_every_table(tmp_path: pathlib.Path) -> None:
    bench.main([*SMALL, "--output", str(tmp_path / "results.json")])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["dtype"] for row in rows] == list(bench.DTYPES)
    for row in rows:
        names = [one["name"] for one in row["candidates"]]
        assert names[0] == "portable" and set(native_module().embedding_logits_variants()) < set(names)
        assert all(len(one["wall_ms"]) == 2 for one in row["candidates"])


def test_a_wrong_answer_is_not_timed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, hidden: torch.Tensor, table: torch.Tensor, scales: torch.Tensor | None) -> object:
        return lambda: torch.ones(1, table.shape[0])

    monkeypatch.setattr(bench, "variant", wrong)
    with pytest.raises(SystemExit, match="portable: relative L2 error"):
        bench.main([*SMALL, "--output", str(tmp_path / "results.json")])
    assert not (tmp_path / "results.json").exists()
