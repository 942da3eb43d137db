"""A video bundle on devices: the host's clip comes back, options go through, and what ends a run ends its process."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time

import numpy as np
import psutil
import pytest

from bench.workloads.full_size_video import smallest_limit_bytes
from edgerun import compare
from edgerun.bundle import Bundle
from edgerun.cli import main
from edgerun.devices import Device, VideoRunRequest, open_device
from edgerun.devices.emulated_arm64 import EmulatedArm64Device
from edgerun.errors import DeviceError, EdgerunError
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.sessions.video import Clip, Leap, Progress, VideoSession
from tests import shared_video_bundle
from tests.devices.conftest import Board
from tests.sessions import tiny_video

PROMPT = "a red circle moves left"
TOKENS = (3, 4, 5, 6, 7, 1)
STOP_SECONDS = 20


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return shared_video_bundle.bundle(tmp_path_factory)


@pytest.fixture(scope="session", params=["host", "emulated-arm64"])
def device(request: pytest.FixtureRequest) -> Device:
    return open_device("host") if request.param == "host" else request.getfixturevalue("arm64")


def test_arm64_makes_the_models_clip(
    arm64: EmulatedArm64Device, video: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Few frames and steps: against the host, and against the models in torch."""
    source = VideoCheckpoint.open(shared_video_bundle.checkpoint(tmp_path_factory))
    expected = shared_video_bundle.eager_clip(source, video.manifest["video"], PROMPT)
    request = VideoRunRequest(tuple(expected.tokens), noise=expected.noise, threads=1)
    there, here = (one.run(video.path, request) for one in (arm64, open_device("host")))
    assert there.values["device"]["machine"] == "aarch64"
    assert there.clip.evaluations == here.clip.evaluations == expected.evaluations
    assert compare.relative_l2(there.clip.latents, here.clip.latents) <= compare.tolerance("cross_isa_logits")
    assert compare.relative_l2(there.clip.latents, expected.latents) <= compare.tolerance("logits_fp32")
    assert np.abs(there.clip.frames.astype(int) - here.clip.frames).max() <= 1  # a level's edge
    assert np.abs(there.clip.frames - expected.pixels).max() <= 1.5  # and rounding


def test_a_board_makes_the_hosts_clip(board: Board, video: Bundle) -> None:
    told: list[Progress] = []
    request = VideoRunRequest(TOKENS, seed=5, threads=1, memory_limit_bytes=10**9, on_progress=told.append)
    there = board.device.run(video.path, request)
    here = VideoSession(video.path, threads=1).generate(TOKENS, seed=5)
    assert (there.clip.frames == here.frames).all() and (there.clip.latents == here.latents).all()
    assert there.clip.report["memory_limit_bytes"] == 10**9
    decoder = video.manifest["video"]["decoder"]
    calls = sum(-(-here.frames.shape[0] // decoder[name]) for name in ("frames_per_chunk", "frames_per_call"))
    assert [(one.stage, one.done, one.total) for one in told] == [
        ("encode", 0, 1),
        *(("denoise", i, 4) for i in range(3)),  # then the leap
        *(("decode", i, calls) for i in range(calls + 1)),
    ]


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"guidance": 1.5, "solver": "ab2", "leap": Leap("none"), "merge_steps": 0}, {}),
        ({"leap": Leap("cosine", 0, 0.9, 0.5, 1), "prefetch": 0}, {"prefetch": 0}),
        ({"times": (0.9, 0.25), "leap": Leap("fixed", 2), "memory_limit_bytes": 10**9}, {"memory_limit_bytes": 10**9}),
    ],
)
def test_options_go_through(video: Bundle, changes: dict, options: dict) -> None:
    request = dataclasses.replace(VideoRunRequest(TOKENS, seed=2**64 - 1, threads=1), **changes)
    there = open_device("host").run(video.path, request).clip
    of_both = ("guidance", "solver", "leap", "merge_steps", "times")
    given = {name: value for name, value in changes.items() if name in of_both}
    here = VideoSession(video.path, threads=1, **options).generate(TOKENS, seed=2**64 - 1, **given)
    assert (there.latents == here.latents).all() and (there.frames == here.frames).all()
    assert there.evaluations == here.evaluations
    if "prefetch" in options:
        assert there.report["stages"]["denoise"]["chain"]["prefetch"] == 0


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_ctrl_c_ends_the_process(device: Device, video: Bundle, stage: str) -> None:
    begun: list[psutil.Process] = []

    def interrupt(progress: Progress) -> None:
        if progress.stage == stage:
            children = psutil.Process().children(recursive=True)
            # Another test's child may have ended without being waited for, and has no command line.
            begun.extend(one for one in children if str(video.path) in one.as_dict(["cmdline"], ad_value=[])["cmdline"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.run(video.path, VideoRunRequest(TOKENS, threads=1, on_progress=interrupt))
    assert begun and not any(one.is_running() for one in begun)


def test_ctrl_c_ends_the_process_on_a_board(board: Board, video: Bundle, tmp_path: pathlib.Path) -> None:
    """The board's shell ends the runner when the connection ends, and removes what the run had written there."""

    def runners() -> list[psutil.Process]:
        found = [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"]]
        return [one for one in found if one.info["cmdline"][0].startswith(str(board.cache))]

    def interrupt(progress: Progress) -> None:
        if progress.done == 5:
            assert len(runners()) == 1
            raise KeyboardInterrupt

    times = tuple(1 - i / 4096 for i in range(4096))  # half a minute
    request = VideoRunRequest(TOKENS, threads=1, times=times, leap=Leap("none"), on_progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        board.device.run(video.path, request)
    deadline = time.monotonic() + STOP_SECONDS
    while runners():
        assert time.monotonic() < deadline, "the runner goes on"
        time.sleep(0.05)


def test_the_devices_own_line_comes_back(device: Device, video: Bundle) -> None:
    for changes, said in (
        ({"tokens": (1,) * 10}, "the prompt has 10 tokens; the bundle takes 1 to 9"),
        ({"memory_limit_bytes": 10**6}, "a memory limit of 1000000 bytes is below"),
        ({"noise": np.zeros(3, np.float32)}, "the noise has 3 numbers"),
    ):
        with pytest.raises(DeviceError, match=said) as caught:
            device.run(video.path, dataclasses.replace(VideoRunRequest(TOKENS, threads=1), **changes))
        assert "\n" not in str(caught.value) and "progress" not in str(caught.value)
    with pytest.raises(EdgerunError, match="seed is -1"):
        VideoRunRequest(TOKENS, seed=-1)


def test_the_golden_case_holds_on_arm64(
    arm64: EmulatedArm64Device, video: Bundle, capsys: pytest.CaptureFixture
) -> None:
    assert main(["validate", str(video.path), "--device", arm64.name, "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "machine aarch64" in dict(report["facts"])["device"] and len(report["checks"]) == 2


@pytest.mark.slow  # for the export in int8
def test_int8_holds_on_arm64(
    arm64: EmulatedArm64Device, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture
) -> None:
    bundle = shared_video_bundle.bundle(tmp_path_factory, "int8")
    assert main(["validate", str(bundle.path), "--device", arm64.name, "--threads", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["checks"]) == 2
    request = VideoRunRequest(TOKENS, seed=5, threads=1)
    there, here = (one.run(bundle.path, request).clip for one in (arm64, open_device("host")))
    assert compare.relative_l2(there.latents, here.latents) <= compare.tolerance("quantized_parity_logits")


@pytest.mark.slow
def test_a_memory_limit_streams_blocks_on_arm64(
    arm64: EmulatedArm64Device, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Little over the smallest limit: the bits of a free run. What the emulator takes is the process's, and counts."""
    bundle = tiny_video.shared_bundle(tmp_path_factory, "megabyte-video", lambda: tiny_video.TinyVideo(1, 1 << 12, 10))
    request = VideoRunRequest((1, 2, 3), seed=5, threads=1, times=(1.0, 0.5), leap=Leap("none"))
    expected = arm64.run(bundle, request).clip
    chain = expected.report["stages"]["denoise"]["chain"]
    assert all(block["loads"] == 1 for block in chain["blocks"])

    def within(limit_bytes: int) -> Clip:
        return arm64.run(bundle, dataclasses.replace(request, memory_limit_bytes=limit_bytes)).clip

    roomy = within(10**9).report
    least, denoiser = smallest_limit_bytes(roomy), roomy["stages"]["denoise"]["chain"]["blocks"]
    limit = least + 4 * max(block["loaded_bytes"] for block in denoiser)
    small = within(limit)
    assert small.report["peak_rss_bytes"] <= limit
    assert (small.latents == expected.latents).all() and (small.frames == expected.frames).all()
    assert max(block["loads"] for block in small.report["stages"]["denoise"]["chain"]["blocks"]) > 1
    with pytest.raises(DeviceError, match=f"memory limit of {least // 2} bytes") as caught:
        within(least // 2)
    assert "\n" not in str(caught.value)


def test_run_writes_a_devices_clip(
    arm64: EmulatedArm64Device, video: Bundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "a clip.gif"
    command = ["run", str(video.path), "--prompt", PROMPT, "--device", arm64.name, "-o", str(out), "--threads", "1"]
    assert main([*command, "--lpl", "2", "--tdtm", "1", "--prefetch", "0", "--json"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert dict(report["facts"])["device"] == "emulated-arm64" and report["tables"][0]["rows"][0][3] == 2
    assert [line.split(":")[0] for line in said.err.splitlines()] == ["encode", "denoise", "decode"]
    assert list(tmp_path.iterdir()) == [out]
    assert main([*command, "--state", str(tmp_path / "state")]) == 2
    assert "--state keeps runs of the host" in capsys.readouterr().err
