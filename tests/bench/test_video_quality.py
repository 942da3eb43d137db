"""The comparison of samplers, small and whole: what it measures, and what it goes on from."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest
import torch

from bench import video_quality_page as page
from bench.workloads import video_quality as bench
from edgerun.evaluation import clips
from edgerun.models.text_to_video import VideoCheckpoint
from tests.models import tiny_video_checkpoint

SIZES = ["--prompts", "2", "--steps", "6", "--reference-steps", "8", "--evaluations", "4", "--threads", "1"]
METHODS = ["--merge-steps", "3", "--latest-times", "0.9", "--solver-steps", "3", "--merged-solver-steps", "4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    sizes = {"height": 32, "width": 32}
    return tiny_video_checkpoint.write(folder, 15, 1, words=clips.caption_words(), max_tokens=32, **sizes)


def rows(checkpoint: pathlib.Path, folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    paths = ["--checkpoint", str(checkpoint), "--work", str(folder / "work"), "--output", str(folder / "out.json")]
    bench.main([*SIZES, *METHODS, *paths])
    found = json.loads((folder / "out.json").read_text())["rows"]
    return {row["method"]: row for row in found if row["kind"] == "method"}


def test_every_method_is_measured_and_a_second_run_measures_nothing(
    checkpoint: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = rows(checkpoint, tmp_path)
    assert list(found)[:10] == [
        "plain",
        "LPL after 4",
        "LPL, cosine from 0.9",
        "TDTM, 3 steps",
        "TDTM, 3 steps, pairs, feed-forward too",
        "TDTM, 3 steps, similar pairs",
        "ab2, 4 steps",
        "ab2, 3 steps",
        "LPL after 4 and TDTM, 3 steps",
        "ab2, 4 steps and TDTM, 2 steps",
    ]
    cosine = found["LPL, cosine from 0.9"]["evaluations"]
    counts = {4, math.ceil(sum(cosine) / 2)} - {6}
    assert set(list(found)[10:]) == {n for c in counts for n in (f"Euler, {c} steps", f"step caching at {c}")}
    assert found["plain"]["evaluations"] == found["TDTM, 3 steps"]["evaluations"] == [6, 6]
    assert found["Euler, 4 steps"]["evaluations"] == found["LPL after 4"]["evaluations"] == [4, 4]
    assert found["ab2, 4 steps"]["evaluations"] == [4, 4]
    assert found["ab2, 4 steps"]["psnr"] != found["Euler, 4 steps"]["psnr"]
    assert found["plain"]["psnr"] != found["TDTM, 3 steps"]["psnr"]
    assert all(len(row[name]) == 2 for row in found.values() for name in ("right", *bench.MEASURES))
    shown = capsys.readouterr().out
    assert "2 prompts" in shown and "LPL after 4: 4.0 evaluations, loss" in shown
    written = (tmp_path / "out.html").read_text()
    assert written.count("<img") >= 2 * bench.SHOWN * (len(found) + 1)  # each clip moves, and lies still
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
        (["--latest-times", "0"], "times are above 0"),
        (["--least-cosine", "2"], "cosines from -1 to 1"),
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


def method_row(psnr: list[float], right: list[float], evaluations: float, dynamic: float = 1.0) -> dict[str, Any]:
    count = len(psnr)
    same = {"evaluations": [evaluations] * count, "ssim": [0.9] * count, "flicker": [1.0] * count}
    return {"kind": "method", "psnr": psnr, "right": right, "dynamic": [dynamic] * count, **same}


def test_the_verdict_goes_by_limits_and_rivals() -> None:
    noise = [0.01 * (i % 5) for i in range(40)]
    plain = method_row([30 + n for n in noise], [1.0] * 40, 30)
    leap = method_row([29.7 + 2 * n for n in noise], [1.0] * 40, 19)
    worse = method_row([29.0 + n for n in noise], [1.0] * 40, 19)
    methods = {"plain": plain, "LPL after 19": leap, "Euler, 19 steps": worse, "step caching at 19": worse}
    assert page.leap_verdict(methods, 19).startswith("LPL after 19 keeps the quality")
    for change in (
        {"Euler, 19 steps": method_row([31.0] * 40, [1.0] * 40, 19)},  # a rival is better
        {"LPL after 19": method_row([29.7] * 40, [1.0] * 40, 20)},  # too many evaluations
        {"LPL after 19": method_row([29.4] * 40, [1.0] * 40, 19)},  # 0.6 dB
        {"LPL after 19": method_row([29.7] * 40, [0.0, *[1.0] * 39], 19)},  # 2.5 points
    ):
        assert page.leap_verdict(methods | change, 19).startswith("No leap keeps the quality")
    assert "nearest to the reference with as few is Euler, 19 steps" in page.leap_verdict(
        methods | {"Euler, 19 steps": method_row([31.0] * 40, [1.0] * 40, 19)}, 19
    )


def test_a_rival_must_take_as_many_evaluations() -> None:
    plain, leap = method_row([30.0] * 9, [1.0] * 9, 30), method_row([29.8] * 9, [1.0] * 9, 17.2)
    cheap, dear = method_row([20.0] * 9, [1.0] * 9, 16.5), method_row([20.0] * 9, [1.0] * 9, 18.0)
    methods = {"plain": plain, "LPL, cosine": leap, "Euler, 18 steps": dear, "step caching at 18": cheap}
    said = page.leap_verdict(methods, 19)
    assert said.startswith("No leap") and "no step caching of as many to compare" in said
    assert page.leap_verdict(methods | {"step caching at 18": dear}, 19).startswith("LPL, cosine keeps the quality")


def test_motion_that_stops_is_said() -> None:
    methods = {
        "plain": method_row([30.0] * 10, [1.0] * 10, 30, 2.0),
        "TDTM, 30 steps": method_row([25.0] * 10, [1.0] * 10, 30, 1.0),
        "TDTM, 10 steps": method_row([25.0] * 10, [1.0] * 10, 30, 1.9),
    }
    stops, moves = page.merge_verdicts(methods)
    assert stops.startswith("TDTM, 30 steps does not keep 0.9 of the plain run's dynamic degree: 0.50 [0.50, 0.50]")
    assert moves.startswith("TDTM, 10 steps keeps 0.9 of the plain run's dynamic degree: 0.95")


def test_the_default_keeps_every_limit_with_fewest_evaluations() -> None:
    plain = method_row([30.0] * 10, [1.0] * 10, 30, 2.0)
    methods = {
        "plain": plain,
        "LPL after 19": method_row([29.6] * 10, [1.0] * 10, 19, 1.9),
        "Euler, 19 steps": method_row([29.8] * 10, [1.0] * 10, 19, 1.9),
        "LPL after 19 and TDTM, 10 steps": method_row([29.6] * 10, [1.0] * 10, 18.9, 1.7),
    }
    assert page.gates_broken(plain, methods["LPL after 19 and TDTM, 10 steps"]) == ["motion"]
    assert page.gates_broken(plain, method_row([29.4] * 10, [0.0, *[1.0] * 9], 19, 2.0)) == ["loss", "caption"]
    assert "by: Euler, 19 steps (19.0); LPL after 19 (19.0)." in page.default_verdict(methods, 19)
    worse = {name: methods[name] | {"psnr": [29.0] * 10} for name in methods if name != "plain"}
    said = page.default_verdict({"plain": plain, **worse}, 19)
    assert said.startswith("Nothing with fewer evaluations") and "nearest of the others is LPL after 19" in said


def test_the_curve_has_motion_and_loss_by_merged_steps() -> None:
    methods = {
        "plain": method_row([30.0] * 10, [1.0] * 10, 30, 2.0),
        "TDTM, 10 steps": method_row([29.0] * 10, [1.0] * 10, 30, 1.9),
        "TDTM, 30 steps": method_row([25.0] * 10, [1.0] * 10, 30, 1.0),
    }
    moves, losses = page.merge_curves(methods, (10, 20, 30))
    assert [(x, round(y.value, 6)) for x, y in moves.series[0].points] == [(0, 1), (10, 0.95), (30, 0.5)]
    assert [(x, y.value) for x, y in losses.series[0].points] == [(0, 0), (10, 1), (30, 5)]
    assert page.merge_curves({"plain": methods["plain"]}, (10,)) == []


def test_a_ratio_of_means_by_hand() -> None:
    found = page.ratio_of_means([1.0, 3.0], [2.0, 2.0])
    assert found.estimate == 1.0 and (found.low, found.high) == (0.5, 1.5)
