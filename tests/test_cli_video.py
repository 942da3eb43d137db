"""`edgerun export`, `run` and `inspect` of video models, in this process and as a user would misuse them."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image, ImageSequence

from edgerun import compare
from edgerun.bundle import Bundle
from edgerun.cli import main
from edgerun.commands import video
from edgerun.errors import EdgerunError
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.sessions.video import Leap, VideoSession
from edgerun.video_file import write_clip
from tests import shared_video_bundle

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return shared_video_bundle.checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return shared_video_bundle.bundle(tmp_path_factory)


def test_a_session_makes_the_eager_models_clip(checkpoint: pathlib.Path, bundle: Bundle) -> None:
    source = VideoCheckpoint.open(checkpoint)
    expected = shared_video_bundle.eager_clip(source, bundle.manifest["video"], PROMPT)
    clip = VideoSession(bundle.path, threads=1).generate(expected.tokens, noise=expected.noise)
    assert clip.evaluations == expected.evaluations == 3
    assert compare.relative_l2(clip.latents, expected.latents) <= compare.tolerance("logits_fp32")
    assert clip.frames.shape == expected.pixels.shape
    assert np.abs(clip.frames - expected.pixels).max() <= 1.5  # rounding, and a level's edge


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_run_writes_a_clip(bundle: Bundle, tmp_path: pathlib.Path, suffix: str, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / f"a clip{suffix}"
    assert main(["run", str(bundle.path), "--prompt", "a blue circle", "-o", str(out), "--threads", "1"]) == 0
    said = capsys.readouterr()
    assert out.stat().st_size > 100 and list(tmp_path.iterdir()) == [out]
    assert "12 frames of 12 x 16" in said.out
    assert "does not know 'blue'" in said.err and "3 evaluations" in said.err


def test_options_stand_in_for_the_bundles(
    bundle: Bundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["run", str(bundle.path), "--prompt", PROMPT, "-o", str(tmp_path / "c.png"), "--json"]
    assert main([*arguments, "--lpl", "none", "--tdtm", "0", "--guidance", "1", "--seed", "5"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert table["rows"][0][3] == 4


def test_a_stopped_run_goes_on(bundle: Bundle, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts, state = tmp_path / "whole.gif", tmp_path / "parts.gif", tmp_path / "a state"
    arguments = ["run", str(bundle.path), "--prompt", PROMPT, "--lpl", "none"]
    assert main([*arguments, "-o", str(whole)]) == 0
    real = VideoSession.generate

    def interrupted(self: VideoSession, *given: object, **more: object) -> object:
        def stop(progress: object) -> None:
            if getattr(progress, "done", 0) == 2:
                raise KeyboardInterrupt

        return real(self, *given, **(more | {"on_progress": stop}))  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(VideoSession, "generate", interrupted)
        assert main([*arguments, "-o", str(parts), "--state", str(state)]) == 130
    assert state.is_file() and not parts.exists()
    for other in (
        ["--prompt", "another"],
        ["--seed", "1"],
        ["--guidance", "3"],
        ["--lpl", "3"],
        ["--tdtm", "0"],
        ["--solver", "ab2"],
        ["--steps", "9"],
    ):
        assert main([*arguments, *other, "-o", str(parts), "--state", str(state)]) == 2
    assert main([*arguments, "-o", str(parts), "--state", str(state)]) == 0
    assert parts.read_bytes() == whole.read_bytes() and not state.exists()


def test_a_run_whose_clip_cannot_be_made_goes_on(
    bundle: Bundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """A decoder that is gone costs no step of the denoiser."""
    copy, state, clip = tmp_path / "copy.edgerun", tmp_path / "a state", tmp_path / "clip.gif"
    shutil.copytree(bundle.path, copy)
    arguments = ["run", str(copy), "--prompt", PROMPT, "-o", str(clip), "--state", str(state)]
    program = copy / "programs" / "decoder_frames_0.pte"
    real = VideoSession.generate

    def harmed(self: VideoSession, *given: object, **more: object) -> object:
        program.rename(program.with_suffix(".gone"))
        return real(self, *given, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoSession, "generate", harmed)
        assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"goes on from {state}" in said and state.is_file() and not clip.exists()
    program.with_suffix(".gone").rename(program)
    stages: list[str] = []

    def told(self: VideoSession, *given: object, **more: object) -> object:
        return real(self, *given, **(more | {"on_progress": lambda progress: stages.append(progress.stage)}))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoSession, "generate", told)
        assert main(arguments) == 0
    assert clip.is_file() and not state.exists() and set(stages) == {"decode"}


def test_the_cosine_rule_of_a_bundle_and_of_a_run() -> None:
    own = {"kind": "cosine", "evaluations": 0, "latest_time": 0.7, "tolerance": 0.01, "patience": 2}
    assert video.run_leap(None, own) is None and video.run_leap("cosine", own) is None
    assert video.run_leap("cosine", {**own, "kind": "none"}) == Leap("cosine")
    assert video.run_leap("cosine:0.6,0.1,4", own) == Leap("cosine", 0, 0.6, 0.1, 4)
    assert video.parse_leap("cosine:0.6") == Leap("cosine", latest_time=0.6)


def test_a_gif_lasts_as_long_as_its_clip(tmp_path: pathlib.Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (51, 8, 8, 3), dtype=np.uint8)
    write_clip(frames, 17.0, tmp_path / "c.gif")
    with Image.open(tmp_path / "c.gif") as read:
        lasting = [frame.info["duration"] for frame in ImageSequence.Iterator(read)]
    assert len(lasting) == 51 and sum(lasting) == 3000 and set(lasting) == {50, 60}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "pass -o CLIP.mp4"),
        (["-o", "c.avi"], "'.avi'"),
        (["-o", "nowhere/c.mp4"], "does not exist"),
        (["-o", "c.mp4", "--lpl", "soon"], "--lpl is 'soon'"),
        (["-o", "c.mp4", "--lpl", "²"], "--lpl is '²'"),
        (["-o", "c.mp4", "--lpl", "cosine:"], "--lpl is 'cosine:'"),
        (["-o", "c.mp4", "--lpl", "cosine:2"], "0 < TIME <= 1"),
        (["-o", "c.mp4", "--lpl", "cosine:0.5,0.1,1,1"], "as cosine:0.6,0.001,3"),
        (["-o", "c.mp4", "--lpl", "none:1"], "--lpl is 'none:1'"),
        (["-o", "c.mp4", "--state", "nowhere/s"], "its folder does not exist"),
        (["-o", "c.mp4", "--memory-limit", "1MB"], "memory limit of 1000000 bytes"),
        (["-o", "c.mp4", "--device", "toaster"], "there is no device 'toaster'"),
        (["-o", "c.mp4", "--device", "ssh:pi", "--state", "s"], "--state keeps runs of the host"),
        (["-o", "c.mp4", "--prompt", " "], "the prompt is empty"),
        (["-o", "c.mp4", "--stream"], "--stream is for text"),
        (["-o", "c.mp4", "--top-p", "0.9"], "--top-p is for text"),
        (["-o", "c.mp4", "--max-new-tokens", "9"], "--max-new-tokens is for text"),
    ],
)
def test_bad_runs_end_in_one_line(
    bundle: Bundle,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(bundle.path), "--prompt", PROMPT, *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and list(tmp_path.iterdir()) == []


def test_a_prompt_over_the_limit(bundle: Bundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", str(bundle.path), "--prompt", "red " * 9, "-o", str(tmp_path / "c.png")]) == 2
    assert "the limit is 9: shorten it" in capsys.readouterr().err


def test_a_file_that_is_no_saved_run(bundle: Bundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "state").write_bytes(b"\0\1")
    out = ["-o", str(tmp_path / "c.png"), "--state", str(tmp_path / "state")]
    assert main(["run", str(bundle.path), "--prompt", PROMPT, *out]) == 2
    assert "is not a saved run" in capsys.readouterr().err


def test_verbs_for_text_say_so(bundle: Bundle, capsys: pytest.CaptureFixture) -> None:
    assert main(["eval", str(bundle.path), "ruler"]) == 2
    assert "is a video bundle, this needs a text bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-context", "64"], "a text model's options"),
        (["--quantize", "8da4w"], "8da4w is for text models"),
        (["--blocks", "4"], "has 1 pairs"),
        (["--height", "13"], "13 x 16 pixels: both must be multiples of 2; the nearest is 12 x 16"),
        (["--lpl", "0"], "--lpl is '0'"),
        (["--tdtm-parts", "mlp"], "without --tdtm"),
        (["--memory-limit", "1GB"], "takes its limit when it runs"),
        (["--tdtm", "2", "--tdtm-parts", "norm"], "choose of spatial"),
    ],
)
def test_bad_exports_end_in_one_line(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "v.edgerun"), *options]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_options_become_the_recipe(checkpoint: pathlib.Path, bundle: Bundle) -> None:
    arguments = ["export", str(checkpoint), "-o", str(bundle.path), "--tdtm", "2", "--lpl", "3", "--quantize", "int8"]
    arguments += ["--solver", "ab2"]
    recipe = video.video_recipe(_parsed(arguments), 1)
    assert (recipe.merge_steps, recipe.leap, recipe.leap_evaluations, recipe.quantize) == (2, "fixed", 3, "int8")
    assert recipe.solver == "ab2"


def _parsed(arguments: list[str]) -> object:
    import argparse

    from edgerun.commands import export

    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return parser.parse_args(arguments[1:])


@pytest.mark.parametrize("option", [["--solver", "ab2"], ["--steps", "9"], ["--lpl", "3"]])
def test_a_text_model_has_no_sampler(
    option: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "zoo:text", *option, "-o", str(tmp_path / "t.edgerun")]) == 2
    assert f"{option[0]} is for video models; zoo:text is a text model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_leap_rules() -> None:
    assert (video.parse_leap("none"), video.parse_leap("cosine")) == (Leap("none"), Leap("cosine"))
    assert video.parse_leap("18") == Leap("fixed", 18)
    with pytest.raises(EdgerunError, match="write none"):
        video.parse_leap("1.5")


def test_clips_of_odd_sizes(tmp_path: pathlib.Path) -> None:
    import av

    frames = np.zeros((5, 7, 9, 3), np.uint8)
    frames[:] = np.arange(0, 250, 50, dtype=np.uint8)[:, None, None, None]
    write_clip(frames, 12.5, tmp_path / "odd.mp4")
    with av.open(str(tmp_path / "odd.mp4")) as container:
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == 12.5
    assert len(read) == 5 and read[0].shape == (8, 10, 3)
    assert max(abs(int(image.mean()) - 50 * i) for i, image in enumerate(read)) <= 4
