"""The attention benchmark on a tiny grid: it writes its schema, goes on after a stop, and times no wrong answer."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

from bench import speedup_picture
from bench.ops import dhsa_attention as bench
from bench.ops import dhsa_attention_summary as summary
from bench.peers import torch_sdpa
from bench.peers.interface import AttentionCase, Prepared

SIZES = ["--lengths", "256", "--head-dims", "32", "--groups", "4", "--budgets", "192", "--query-heads", "4"]
EFFORT = ["--repeats", "2", "--least", "1", "--decode-repeats", "2", "--threads", "1"]
SMALL = [*SIZES, *EFFORT, "--decode-length", "320", "--growth-lengths", "256", "512", "--peers", "torch"]


def run(output: pathlib.Path, *more: str) -> dict[str, Any]:
    bench.main([*SMALL, "--output", str(output), *more])
    written: dict[str, Any] = json.loads(output.read_text())
    return written


def test_every_candidate_keeps_its_raw_samples(tmp_path: pathlib.Path) -> None:
    written = run(tmp_path / "results.json")
    assert [row["kind"] for row in written["rows"]] == ["prefill", "decode", "growth", "growth"]
    assert written["settings"]["threads"] == 1 and written["machine"]["cores"] >= 1
    for one in ({**one, "row": row} for row in written["rows"] for one in row["candidates"]):
        cycle = one.get("cycle", 1)
        runs = max(other.get("cycle", 1) for other in one["row"]["candidates"])
        assert len(one["wall_ms"]) == len(one["cpu_ms"]) == max(2, runs)
        turns = [sum(one["wall_ms"][i : i + cycle]) / cycle for i in range(0, len(one["wall_ms"]) - cycle + 1, cycle)]
        assert one["minimum_ms"] == pytest.approx(min(turns)) and one["minimum_ms"] <= one["median_ms"]
    (decode,) = [row for row in written["rows"] if row["kind"] == "decode"]
    assert [one.get("reselect") for one in decode["candidates"]] == [None, None, 4, 16]


def test_sparse_figures_follow_from_the_samples(tmp_path: pathlib.Path) -> None:
    row = run(tmp_path / "results.json", "--kinds", "prefill")["rows"][0]
    (figures,) = summary.sparse_figures(row)
    dense, sparse, other = (
        summary.candidate(row, **facts) for facts in ({"role": "dense"}, {"role": "sparse"}, {"peer": "torch"})
    )
    assert dense is not None and sparse is not None and other is not None
    assert 0.5 < figures.density < 1
    assert figures.efficiency == dense["median_ms"] * figures.density / sparse["median_ms"]
    assert figures.speed_against_torch == other["median_ms"] / sparse["median_ms"]


def test_the_same_command_goes_on_after_a_stop(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench.measure
    calls: list[int] = []

    def stop_at_the_second(*arguments: Any) -> list[dict[str, Any]]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(bench, "measure", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "results.json")
    first = json.loads((tmp_path / "results.json").read_text())["rows"]
    rows = run(tmp_path / "results.json")["rows"]
    assert len(first) == 1 and rows[0] == first[0]
    assert len(rows) == 4 and len(calls) == 2 + 3


def test_other_settings_start_anew(tmp_path: pathlib.Path) -> None:
    first = run(tmp_path / "results.json", "--kinds", "decode")
    again = run(tmp_path / "results.json", "--kinds", "decode", "--repeats", "3")
    assert first["rows"][0]["candidates"][0]["wall_ms"] != again["rows"][0]["candidates"][0]["wall_ms"]


def test_a_wrong_peer_is_not_timed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_sdpa.prepare

    def wrong(case: AttentionCase, threads: int) -> Prepared:
        prepared = right(case, threads)
        return Prepared(prepared.run, lambda result: prepared.answer(result) * 1.001)

    monkeypatch.setattr(torch_sdpa, "prepare", wrong)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("timed a wrong answer"))
    with pytest.raises(SystemExit, match=r"torch SDPA: relative L2 error .* nothing of this row was timed"):
        run(tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()


def test_a_wrong_sparse_answer_is_not_timed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = bench.Native.run

    def wrong(native: bench.Native) -> torch.Tensor:
        answer = attend(native)
        return torch.where(torch.arange(answer.shape[1])[:, None, None] > 200, answer + 1e-3, answer)

    monkeypatch.setattr(bench.Native, "run", wrong)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("timed a wrong answer"))
    with pytest.raises(SystemExit, match="nothing of this row was timed"):
        run(tmp_path / "results.json", "--peers")


def test_an_unknown_cache_dtype_is_named_and_left_out(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path / "results.json", "--kinds", "decode", "--kv-dtypes", "int3", "fp16", "int8")["rows"]
    assert [row["kv_dtype"] for row in rows] == ["fp16", "int8"]
    assert "int3 cache: this build's op has fp32, fp16, int8" in capsys.readouterr().out
    sparse, full = (summary.candidate(rows[0], role="sparse", kv_dtype=kind) for kind in ("fp16", "fp32"))
    assert sparse is not None and full is not None
    assert 0.45 < sparse["cache_bytes"] / full["cache_bytes"] < 0.55


def test_a_result_file_can_be_shown(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "results.json")
    capsys.readouterr()
    bench.main(["--show", str(tmp_path / "results.json")])
    shown = capsys.readouterr().out
    assert "dense, edgerun against" in shown and "decode after 320 tokens" in shown and "256 -> 512 tokens" in shown


def test_the_pictures_show_every_length_and_budget(tmp_path: pathlib.Path) -> None:
    run(tmp_path / "results.json", "--kinds", "prefill", "--lengths", "256", "512")
    speedup_picture.main([str(tmp_path / "results.json"), "--head-dim", "32"])
    by_length = (tmp_path / "speedup_by_length.svg").read_text()
    assert all(f">{name}<" in by_length for name in ("dense", "budget 192", "torch SDPA"))
    assert all(f">{n} tokens<" in (tmp_path / "speedup_by_density.svg").read_text() for n in (256, 512))


def test_a_picture_of_what_was_not_measured_is_refused(tmp_path: pathlib.Path) -> None:
    run(tmp_path / "results.json", "--kinds", "prefill")
    with pytest.raises(SystemExit, match="head size 96, group 4: measure it first"):
        speedup_picture.main([str(tmp_path / "results.json"), "--head-dim", "96"])
