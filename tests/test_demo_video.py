"""The video half of `edgerun demo`: its schedule, its methods and gates, and the whole way on a random model."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from edgerun import cli
from edgerun.commands import demo_video
from edgerun.commands.demo_video import FASTEST, FEWER, LEAP, MERGED, PAPERS, PLAIN, REFERENCE, STREAMED, TOGETHER, Made
from edgerun.errors import EdgerunError
from edgerun.evaluation import clips
from edgerun.sessions.video import Leap
from tests.browser import chromium, films, measured
from tests.models import tiny_video_checkpoint

__all__ = ["chromium"]  # a fixture

MADE = Made(
    frames=np.zeros((2, 4, 4, 3), np.uint8),
    seconds=2.0,
    denoise_seconds=1.5,
    evaluations=30,
    peak_rss_bytes=100,
    streams=True,
    right=True,
    psnr_db=30.0,
    ssim=0.9,
    flicker=1.0,
    dynamic_degree=0.5,
)


def test_each_technique_alone_and_together() -> None:
    fewer, leap, merged, streamed, papers, fastest, together = demo_video.techniques(30, 1000)
    assert (fewer.steps, fewer.solver, fewer.leap) == (16, "ab2", Leap("none"))
    assert (leap.steps, leap.solver, leap.leap) == (None, "euler", Leap("fixed", 19))
    assert (merged.steps, merged.leap, streamed.leap) == (None, Leap("none"), Leap("none"))
    assert [one.merged_share for one in (fewer, leap, streamed)] == [0, 0, 0]
    assert merged.merged_share == papers.merged_share == fastest.merged_share > 0
    assert (papers.solver, papers.leap, fastest.solver, fastest.steps) == ("euler", Leap("fixed", 19), "ab2", 16)
    assert dataclasses.replace(together, name=FASTEST, memory_limit_bytes=None) == fastest
    limits = [one.memory_limit_bytes for one in (fewer, leap, merged, streamed, papers, fastest, together)]
    assert limits == [None, None, None, 1000, 1000, None, 1000]


@pytest.mark.parametrize("steps", [1, 2, 4, 200])
def test_no_technique_evaluates_more_than_plain_sampling(steps: int) -> None:
    for method in demo_video.techniques(steps, 1000):
        assert (method.steps or steps) <= steps and method.leap.evaluations <= steps


def test_gates_see_another_clip_a_limit_that_does_not_hold_and_programs_that_stayed() -> None:
    made = {PLAIN: [MADE], STREAMED: [MADE], PAPERS: [MADE], TOGETHER: [MADE]}
    assert all(check.passed for check in demo_video._checks(made, 100))
    assert [check.passed for check in demo_video._checks(made, 99)] == [True, True, False]
    other = dataclasses.replace(MADE, frames=MADE.frames + np.uint8(1))
    assert [check.passed for check in demo_video._checks({**made, STREAMED: [other]}, 100)] == [True, False, True]
    stayed = dataclasses.replace(MADE, streams=False)
    assert [check.passed for check in demo_video._checks({**made, TOGETHER: [stayed]}, 100)] == [False, True, True]


def test_the_verdict_counts_what_is_right() -> None:
    fast = dataclasses.replace(MADE, denoise_seconds=0.5, evaluations=19, peak_rss_bytes=50 * 2**20, right=False)
    plain = dataclasses.replace(MADE, peak_rss_bytes=80 * 2**20)
    made = {PLAIN: [plain, plain], FASTEST: [fast, fast], TOGETHER: [fast, dataclasses.replace(fast, right=True)]}
    assert demo_video._verdict(made) == (
        "Second-order steps (ab2) with TDTM denoise 3.00 times as fast as plain sampling, 19 evaluations instead of "
        "30. Their blocks streamed too, they are 3.00 times as fast in a process of 50 MiB instead of 80 MiB. 1 of 2 "
        "clips are what the caption says, of plain sampling 2. Means of 2 captions; bench/workloads/video_quality.py "
        "measures quality with intervals."
    )
    said = demo_video._verdict({PLAIN: [plain], FASTEST: [fast], TOGETHER: [fast]})
    assert "0 of 1 clip is what the caption says, of plain sampling 1. One caption; " in said


def test_options_of_the_text_demo_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "video", "--no-device"]) == 2
    assert "--no-device are of the text demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"), [([], ("zoo:video", 1)), (["--checkpoint", "a folder", "--captions", "4"], ("a folder", 4))]
)
def test_the_model_that_ships_and_one_caption_unless_others_are_given(
    given: list[str], expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def demonstrate(output: pathlib.Path, exporter: Any, model: str, captions: int, *, command: str) -> None:
        asked.append((model, captions))
        raise EdgerunError("enough")

    monkeypatch.setattr(demo_video, "demonstrate", demonstrate)
    assert cli.main(["demo", "video", *given]) == 2 and asked == [expected]


@pytest.mark.parametrize("option", ["--checkpoint", "--captions"])
def test_options_of_the_video_demo_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", option, "1"]) == 2
    assert "are of the video demo: leave them out" in capsys.readouterr().err


def test_a_file_where_the_folder_would_be_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "-o", str(tmp_path / "file" / "in it")]) == 2
    assert "is a file, not a folder: give another --output" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_way(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, chromium: str) -> None:
    import edgerun.export as exporter

    words = clips.caption_words()
    source = tiny_video_checkpoint.write(tmp_path / "a model", words=words, max_tokens=20, height=32, width=32)
    monkeypatch.setattr(demo_video, "LIMIT_SHARE", 2.0)  # the model is so small that the process is most of it
    report = demo_video.demonstrate(tmp_path / "out put", exporter, str(source), 2)
    assert [check.passed for check in report.checks] == [False, True, True]  # with so much room nothing streams
    table = report.tables[0]
    names = [row[0] for row in table.rows]
    assert names == [REFERENCE, PLAIN, FEWER, LEAP, MERGED, STREAMED, PAPERS, FASTEST, TOGETHER]
    evaluations = {row[0]: row[3] for row in table.rows}
    assert [evaluations[name] for name in names] == [200, 4, 2, 3, 4, 4, 3, 2, 2]
    written = {path.name for path in (tmp_path / "out put").iterdir()}
    clip_names = {f"{name}_{index}.mp4" for name in ("plain", "ab2_tdtm_streamed") for index in range(2)}
    assert written == {demo_video.BUNDLE, demo_video.PAGE, demo_video.VALUES} | clip_names
    values = json.loads((tmp_path / "out put" / demo_video.VALUES).read_text())
    assert len(values["clips"]) == len(names) * 2
    page = (tmp_path / "out put" / demo_video.PAGE).read_text()
    for frame in measured(chromium, page, tmp_path):
        assert frame["needed"] == frame["width"] and frame["pictures"] == 2 * len(values["clips"])
        assert frame["broken"] == 0
    assert len(films(chromium, page, tmp_path)) == len(values["clips"])
