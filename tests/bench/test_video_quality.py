"""The comparison of samplers, small and whole: what it measures, and what it goes on from."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

from bench.workloads import video_quality as bench
from edgerun.evaluation import clips
from edgerun.models.text_to_video import VideoCheckpoint
from tests.models import tiny_video_checkpoint

SIZES = ["--prompts", "2", "--steps", "6", "--reference-steps", "8", "--evaluations", "4", "--threads", "1"]
METHODS = ["--merge-steps", "3", "--thresholds", "0.5"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    sizes = {"height": 32, "width": 32}
    return tiny_video_checkpoint.write(folder, 15, 1, words=clips.caption_words(), max_tokens=32, **sizes)


def rows(checkpoint: pathlib.Path, folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    paths = ["--checkpoint", str(checkpoint), "--work", str(folder / "work"), "--output", str(folder / "out.json")]
    bench.main([*SIZES, *METHODS, *paths])
    return {row["method"]: row for row in json.loads((folder / "out.json").read_text())["rows"]}


def test_every_method_is_measured_and_a_second_run_measures_nothing(
    checkpoint: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = rows(checkpoint, tmp_path)
    assert list(found) == [
        "plain",
        "Euler, 4 steps",
        "LPL, cosine rule",
        "LPL after 4",
        "step caching, 0.5",
        "TDTM, 3 steps",
        "LPL, cosine rule, and TDTM, 3 steps",
    ]
    assert found["plain"]["evaluations"] == found["TDTM, 3 steps"]["evaluations"] == [6, 6]
    assert found["Euler, 4 steps"]["evaluations"] == found["LPL after 4"]["evaluations"] == [4, 4]
    assert found["plain"]["psnr"] != found["TDTM, 3 steps"]["psnr"]
    assert all(len(row[name]) == 2 for row in found.values() for name in ("right", *bench.MEASURES))
    shown = capsys.readouterr().out
    assert "2 prompts" in shown and "loss" in shown.split("Euler, 4 steps")[1].splitlines()[0]
    monkeypatch.setattr(bench.Sampler, "latents", lambda *_: pytest.fail("measured again"))
    assert rows(checkpoint, tmp_path) == found


def test_the_reference_is_its_own_best(checkpoint: pathlib.Path) -> None:
    """The same steps give the same latents bit for bit, and more steps come nearer."""
    sampler = bench.Sampler(VideoCheckpoint.open(checkpoint))
    caption = clips.prompts(1, 0)[0].caption()
    many, again, half, few = (
        sampler.latents(caption, 7, bench.Method(str(steps), steps)).latents for steps in (64, 64, 32, 4)
    )
    assert torch.equal(many, again)
    assert (half - many).norm() < (few - many).norm()


def test_merging_ends_with_its_steps(checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = bench.Sampler(VideoCheckpoint.open(checkpoint))
    merged: list[bool] = []
    forward = sampler.denoiser.forward

    def noted(*arguments: torch.Tensor, **named: Any) -> torch.Tensor:
        merged.append(named["merge"] is not None)
        return forward(*arguments, **named)

    monkeypatch.setattr(sampler.denoiser, "forward", noted)
    for count, expected in ((0, [False] * 5), (2, [True] * 2 + [False] * 3), (5, [True] * 5)):
        merged.clear()
        sampler.latents("a red circle moves left", 0, bench.Method("", 5, merge_steps=count))
        assert merged == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--steps", "3"], "at most the 3 steps"),
        (["--steps", "0"], "counts are at least 1"),
        (["--merge-steps", "7"], "at most the 6 steps"),
        (["--reference-steps", "6"], "give it more than the 6"),
        (["--thresholds", "0"], "each must be above 0"),
    ],
)
def test_settings_that_cannot_be(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--checkpoint", str(checkpoint), "--work", str(tmp_path), *SIZES, *METHODS, *wrong])
    assert message in capsys.readouterr().err


def test_a_folder_that_is_none(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit, match="is not a folder"):
        bench.main(["--checkpoint", str(tmp_path / "none"), "--work", str(tmp_path)])
