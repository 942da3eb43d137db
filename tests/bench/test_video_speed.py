"""The comparison of sampling speeds: what it says of rows by hand, and small and whole."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from bench.workloads import video_quality, video_speed
from edgerun.errors import EdgerunError
from edgerun.evaluation import clips
from tests.models import tiny_video_checkpoint


def row(method: str, denoise_ms: list[float], evaluations: int = 30) -> dict[str, Any]:
    return {"method": method, "denoise_ms": denoise_ms, "evaluations": evaluations, "peak_rss_bytes": 2**20}


def test_only_what_keeps_the_quality_counts() -> None:
    rows = [row("plain", [100.0, 110.0, 90.0]), row("fast", [25.0, 22.0, 30.0], 8), row("good", [50.0, 55.0, 60.0], 15)]
    report = video_speed.speed_report(rows, {"plain": [], "fast": ["motion"], "good": []}, "")
    (check,) = report.checks
    assert (check.measured, check.passed) == (2.0, True)
    assert (
        "the fastest is good: 2.00 times plain sampling; the fastest of all is fast with 4.00 (motion)"
        in report.verdict
    )
    (slow,) = video_speed.speed_report(rows, {"plain": [], "fast": ["motion"]}, "").checks
    assert (slow.measured, slow.passed) == (1.0, False)  # what was not measured does not count either
    assert [cells[5] for cells in report.tables[0].rows] == ["keeps all", "motion", "keeps all"]


def test_the_methods_have_the_names_of_the_quality_file() -> None:
    plan = video_speed.Plan("", 30, 19, (14, 16), 16, (10, 30), 1, 1)
    known = video_quality.Plan("", 1, 30, 200, 19, (16, 14), 16, (0.5,), (10, 30), 0.9, 1)
    named = {way.name for way in known.methods()} | {"Euler, 19 steps", video_speed.PLAIN_THAT_CAN}
    assert {way.name for way in video_speed.methods(plan)} <= named


def test_quality_of_another_checkpoint_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "quality.json"
    with pytest.raises(EdgerunError, match="has no quality to read"):
        video_speed.quality_of(path, "a")
    plain = {"kind": "method", "method": "plain", "psnr": [1.0], "right": [1.0], "dynamic": [1.0]}
    path.write_text(json.dumps({"settings": {"checkpoint": "b"}, "rows": [plain]}))
    with pytest.raises(EdgerunError, match="is of another checkpoint"):
        video_speed.quality_of(path, "a")
    assert video_speed.quality_of(path, "b") == {"plain": []}


@pytest.mark.slow
def test_a_small_checkpoint_is_timed(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "model"
    tiny_video_checkpoint.write(checkpoint, 15, 1, words=clips.caption_words(), max_tokens=32, height=32, width=32)
    folders = ["--checkpoint", str(checkpoint), "--work", str(tmp_path / "work")]
    quality, speed = str(tmp_path / "quality.json"), str(tmp_path / "speed.json")
    same = ["--evaluations", "3", "--merge-steps", "3", "--threads", "1", "--solver-steps", "2"]
    same += ["--merged-solver-steps", "3"]
    sizes = ["--prompts", "1", "--reference-steps", "40", "--latest-times", "0.9", "--output", quality]
    video_quality.main([*folders, *same, *sizes])
    try:
        video_speed.main([*folders, *same, "--repeats", "2", "--quality", quality, "--output", speed])
    except SystemExit as end:
        assert end.code == 1  # a model of random weights need not be fast
    rows = {each["method"]: each for each in json.loads((tmp_path / "speed.json").read_text())["rows"]}
    assert rows["LPL after 3"]["evaluations"] == rows["Euler, 3 steps"]["evaluations"] == 3
    assert rows["plain"]["evaluations"] == 4 and all(len(each["denoise_ms"]) == 2 for each in rows.values())
    assert "Of what keeps every limit of quality the fastest is" in capsys.readouterr().out
