"""VideoSession against the same sampling in torch, and everything that a caller can do wrong."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from edgerun import compare
from edgerun._library import runner_path
from edgerun.errors import BundleError, EdgerunError
from edgerun.models.solvers import Solver
from edgerun.sessions.video import Leap, Progress, VideoSession
from tests.sessions.tiny_video import (
    CHANNELS,
    COLUMNS,
    FRAMES,
    GUIDANCE,
    MAX_TOKENS,
    ROWS,
    TIMES,
    WIDE_BLOCKS,
    TinyVideo,
    noise_of,
    shared_bundle,
    wide_bundle,
)

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def model() -> TinyVideo:
    return TinyVideo()


@pytest.fixture(scope="module")
def bundle(model: TinyVideo, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return shared_bundle(tmp_path_factory, "video", lambda: model)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return wide_bundle(tmp_path_factory)


@pytest.fixture(scope="module")
def session(bundle: pathlib.Path) -> VideoSession:
    return VideoSession(bundle, threads=1)


@pytest.fixture(scope="module")
def euler(model: TinyVideo) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    """Time, latent and velocity of every step, from noise of seed 7."""
    return list(model.sample(PROMPT, noise_of(7)))


def assert_same(latents: np.ndarray, expected: torch.Tensor) -> None:
    """Six evaluations of a few layers in float32: as a model's logits."""
    assert compare.relative_l2(latents, expected.numpy()) <= compare.tolerance("logits_fp32")


def test_latents_and_frames_are_those_of_torch(model: TinyVideo, session: VideoSession, euler: list) -> None:
    clip = session.generate(PROMPT, seed=7)
    assert_same(clip.latents, euler[-1][1])
    assert (clip.evaluations, clip.cancelled) == (len(TIMES), False)
    frames = model.decode(torch.from_numpy(clip.latents)).numpy()
    assert clip.frames.shape == frames.shape == (7, 2 * ROWS, 2 * COLUMNS, 3)
    assert np.abs(clip.frames.astype(int) - frames).max() <= 1  # a level's edge
    assert frames.std() > 30 and frames.min() == 0 and frames.max() == 255


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_what_is_in_memory_does_not_change_a_bit(bundle: pathlib.Path, session: VideoSession, prefetch: int) -> None:
    expected = session.generate(PROMPT, seed=7)
    limit = 1 << 40
    other = VideoSession(bundle, threads=1, prefetch=prefetch, memory_limit_bytes=limit)
    clip = other.generate(PROMPT, seed=7)
    assert (clip.latents == expected.latents).all() and (clip.frames == expected.frames).all()
    assert clip.report["memory_limit_bytes"] == limit
    denoise = clip.report["stages"]["denoise"]["chain"]
    assert denoise["prefetch"] == prefetch and denoise["passes"]["count"] == len(TIMES)


@pytest.mark.parametrize("merge_steps", [0, 6])
def test_merged_steps(model: TinyVideo, session: VideoSession, euler: list, merge_steps: int) -> None:
    clip = session.generate(PROMPT, seed=7, merge_steps=merge_steps, decode=False)
    *_, (_, expected, _) = model.sample(PROMPT, noise_of(7), merge_steps)
    assert_same(clip.latents, expected)
    assert compare.relative_l2(clip.latents, euler[-1][1].numpy()) > 1e-2
    assert [step["merged"] for step in clip.report["steps"]] == [i < merge_steps for i in range(len(TIMES))]


def test_guidance_times_and_noise_can_be_given(model: TinyVideo, session: VideoSession) -> None:
    noise = torch.randn(CHANNELS, FRAMES, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    y = model.encode(PROMPT)
    x = noise + model.velocity(noise, 0.9, y, True, 1.5) * (0.9 - 0.4)
    x = x + model.velocity(x, 0.4, y, True, 1.5) * 0.4
    clip = session.generate(PROMPT, noise=noise.numpy(), guidance=1.5, times=[0.9, 0.4], decode=False)
    assert_same(clip.latents, x)
    assert clip.frames.shape[0] == 0


def second_order(model: TinyVideo, times: list[float], merge_steps: int = 0) -> list[tuple[float, torch.Tensor]]:
    """Latent and velocity after every step: each goes along the line through two velocities, at its middle."""
    x, y, found, before = noise_of(7), model.encode(PROMPT), [], None
    for index, (t, following) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        v = model.velocity(x, t, y, index < merge_steps, GUIDANCE)
        middle = v if before is None else v + (v - before[1]) / (t - before[0]) * ((t + following) / 2 - t)
        x = x + middle * (t - following)
        before = (t, v)
        found.append((x, v))
    return found


def test_the_bundles_own_solver(
    model: TinyVideo, bundle: pathlib.Path, session: VideoSession, tmp_path: pathlib.Path
) -> None:
    other = VideoSession(changed_copy(bundle, tmp_path / "ab2.edgerun", put("ab2", "video", "solver")), threads=1)
    assert_same(other.generate(PROMPT, seed=7, decode=False).latents, second_order(model, TIMES, 2)[-1][0])
    euler = other.generate(PROMPT, seed=7, solver="euler", decode=False).latents
    assert (euler == session.generate(PROMPT, seed=7, decode=False).latents).all()
    with pytest.raises(EdgerunError, match="solver is 'heun'; choose euler or ab2"):
        other.generate(PROMPT, solver="heun")  # type: ignore[arg-type]


@pytest.mark.parametrize("merge_steps", [0, 2])
def test_second_order_steps(model: TinyVideo, session: VideoSession, euler: list, merge_steps: int) -> None:
    times = [1.0, 0.9, 0.55, 0.5, 0.2]
    clip = session.generate(PROMPT, seed=7, solver="ab2", times=times, merge_steps=merge_steps, decode=False)
    expected = second_order(model, times, merge_steps)
    assert_same(clip.latents, expected[-1][0])
    assert clip.evaluations == len(times)
    first = session.generate(PROMPT, seed=7, solver="euler", times=times, merge_steps=merge_steps, decode=False)
    assert compare.relative_l2(clip.latents, first.latents) > 1e-2
    leapt = session.generate(
        PROMPT, seed=7, solver="ab2", times=times, leap=Leap("fixed", 3), merge_steps=merge_steps, decode=False
    )
    assert_same(leapt.latents, expected[1][0] + expected[2][1] * times[2])  # a leap follows the velocity as it is


@pytest.mark.parametrize("prompt", [[0], list(range(MAX_TOKENS))])
def test_prompts_of_any_length(model: TinyVideo, session: VideoSession, prompt: list[int]) -> None:
    clip = session.generate(prompt, seed=7, decode=False)
    *_, (_, expected, _) = model.sample(prompt, noise_of(7))
    assert_same(clip.latents, expected)


def test_noise_is_standard_normal_and_a_seeds_own(session: VideoSession) -> None:
    """With one time that is nearly 0 the latent stays the noise."""
    draws = [session.generate(PROMPT, seed=seed, times=[1e-12], decode=False).latents for seed in (0, 0, 1, 2**64 - 1)]
    for seed, values in zip((0, 0, 1, 2**64 - 1), draws, strict=True):
        np.testing.assert_allclose(values, noise_of(seed).numpy(), rtol=2**-23, atol=1e-9)
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()
    many = np.concatenate(
        [session.generate(PROMPT, seed=s, times=[1e-12], decode=False).latents.ravel() for s in range(40)]
    )
    assert abs(many.mean()) < 5 / len(many) ** 0.5 and abs(many.std() - 1) < 5 / (2 * len(many)) ** 0.5
    assert abs(np.mean(many**4) - 3) < 5 * (96 / len(many)) ** 0.5


@pytest.mark.parametrize("evaluations", [1, 3, 6, 9])
def test_fixed_leap(session: VideoSession, euler: list, evaluations: int) -> None:
    clip = session.generate(PROMPT, seed=7, leap=Leap("fixed", evaluations), decode=False)
    made = min(evaluations, len(TIMES))
    t, _, v = euler[made - 1]
    before = euler[made - 2][1] if made > 1 else noise_of(7)
    assert clip.evaluations == made
    assert_same(clip.latents, before + v * t)


@pytest.mark.parametrize(
    "leap",
    [
        Leap("cosine", 0, 1.0, 0.0, 1),
        Leap("cosine", 0, 0.6, 0.05, 1),
        Leap("cosine", 0, 0.6, 2.5, 2),
        Leap("cosine", 0, 0.1),
    ],
)
def test_cosine_leap(session: VideoSession, euler: list, leap: Leap) -> None:
    expected, best, stale, before = len(TIMES), -1.0, 0, None
    for index, (t, _, v) in enumerate(euler):
        if before is not None:
            cosine = float(
                torch.nn.functional.cosine_similarity(before.flatten().double(), v.flatten().double(), dim=0)
            )
            best, stale = (cosine, 0) if cosine > best + leap.tolerance else (best, stale + 1)
            if t <= leap.latest_time and stale >= leap.patience:
                expected = index + 1
                break
        before = v
    clip = session.generate(PROMPT, seed=7, leap=leap, decode=False)
    assert clip.evaluations == expected
    t, x, v = euler[expected - 1]
    assert_same(clip.latents, x if expected == len(TIMES) else euler[expected - 2][1] + v * t)


def test_the_eager_sampler_agrees(model: TinyVideo, session: VideoSession) -> None:
    flow = pytest.importorskip("edgerun.models.rectified_flow", reason="the eager video models are not in this tree")
    rules = pytest.importorskip("edgerun.techniques.linear_proportional_leap", reason="nor are their techniques")
    y = model.encode(PROMPT)
    for leap, rule in [
        (Leap("none"), None),
        (Leap("fixed", 4), rules.FixedLeap(4)),
        (Leap("cosine", 0, 0.7, 0.05, 1), rules.CosineLeap(0.7, 0.05, 1)),
    ]:
        calls = iter(range(len(TIMES)))
        sampled = flow.sample(
            lambda x, t, calls=calls: model.velocity(x, t, y, next(calls) < 2, 3.0), noise_of(7), TIMES, rule
        )
        clip = session.generate(PROMPT, seed=7, leap=leap, decode=False)
        assert clip.evaluations == sampled.evaluations
        assert_same(clip.latents, sampled.latents)


@pytest.mark.parametrize("solver", ["euler", "ab2"])
@pytest.mark.parametrize("leap", [Leap("none"), Leap("fixed", 5), Leap("cosine", 0, 0.6, 2.5, 3)])
@pytest.mark.parametrize("stop_at", [("denoise", 0), ("denoise", 3), ("decode", 1), ("decode", 5)])
def test_a_cancelled_run_goes_on_to_the_same_bits(
    bundle: pathlib.Path, session: VideoSession, leap: Leap, solver: Solver, stop_at: tuple[str, int]
) -> None:
    expected = session.generate(PROMPT, seed=7, solver=solver, leap=leap)

    def stop(progress: Progress) -> None:
        if (progress.stage, progress.done) == stop_at:
            session.cancel()

    stopped = session.generate(PROMPT, seed=7, solver=solver, leap=leap, on_progress=stop)
    assert stopped.cancelled and stopped.evaluations <= expected.evaluations
    saved = session.state
    told: list[Progress] = []
    other = VideoSession(bundle, threads=1)
    clip = other.generate([], solver=solver, leap=leap, state=saved, on_progress=told.append)
    assert (clip.latents == expected.latents).all() or stop_at[0] == "decode"
    assert (clip.frames == expected.frames).all()
    assert clip.evaluations == expected.evaluations
    assert "encode" not in {one.stage for one in told}


@pytest.mark.parametrize("first", [Leap("none"), Leap("fixed", 2), Leap("fixed", 6), Leap("cosine")])
@pytest.mark.parametrize("done", [0, 1])
def test_a_run_that_goes_on_leaps_by_its_own_rule(session: VideoSession, first: Leap, done: int) -> None:
    """Not by what was left of the evaluations of the run that it goes on from."""
    expected = session.generate(PROMPT, seed=7, leap=Leap("fixed", 3), decode=False)

    def stop(progress: Progress) -> None:
        if (progress.stage, progress.done) == ("denoise", done):
            session.cancel()

    assert session.generate(PROMPT, seed=7, leap=first, on_progress=stop).cancelled
    clip = session.generate([], leap=Leap("fixed", 3), state=session.state, decode=False)
    assert clip.evaluations == expected.evaluations == 3
    assert (clip.latents == expected.latents).all()


def test_second_order_steps_do_not_go_on_at_later_times(session: VideoSession) -> None:
    def stop(progress: Progress) -> None:
        if (progress.stage, progress.done) == ("denoise", 3):
            session.cancel()

    assert session.generate(PROMPT, seed=7, solver="ab2", on_progress=stop).cancelled
    state = session.state
    for last in (TIMES[2], 0.9):
        with pytest.raises(EdgerunError, match=r"after a step at time 0\.7.*give the times that it was made with"):
            session.generate([], solver="ab2", times=[1.0, 0.99, 0.98, last], state=state, decode=False)


def test_damaged_states_are_refused(session: VideoSession) -> None:
    session.generate(PROMPT, seed=7, decode=False)
    whole = session.state
    for damaged in (
        b"x" + whole[1:],
        whole[:-1],
        whole + b"\0",
        whole[:40],
        whole[:8] + b"\1" + whole[9:],
        b"EDGERUNV",
    ):
        with pytest.raises(EdgerunError, match="saved state"):
            session.generate(PROMPT, state=damaged, decode=False)
    generator = np.random.default_rng(0)
    for _ in range(200):
        changed = bytearray(whole[: 16 + int(generator.integers(len(whole)))])
        changed[int(generator.integers(min(len(changed), 200)))] ^= int(generator.integers(1, 256))
        with pytest.raises(EdgerunError):
            session.generate(PROMPT, state=bytes(changed), decode=False)


def test_progress_tells_every_step(session: VideoSession) -> None:
    told: list[Progress] = []
    session.generate(PROMPT, seed=7, leap=Leap("fixed", 4), on_progress=told.append)
    assert [(one.stage, one.done, one.total) for one in told] == [
        ("encode", 0, 1),
        *(("denoise", i, 6) for i in range(4)),
        *(("decode", i, 7) for i in range(8)),  # three chunks, and seven frames by two
    ]
    assert [one.time for one in told[1:5]] == TIMES[:4]
    elapsed = [one.elapsed_ms for one in told]
    assert elapsed == sorted(elapsed)


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_ctrl_c_in_any_stage(session: VideoSession, stage: str) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stage == stage:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        session.generate(PROMPT, on_progress=interrupt)
    session.generate(PROMPT, decode=False)  # it is free again


def test_what_the_listener_raises_is_raised(session: VideoSession) -> None:
    def fail(progress: Progress) -> None:
        raise ZeroDivisionError(progress.stage)

    with pytest.raises(ZeroDivisionError, match="encode"):
        session.generate(PROMPT, on_progress=fail)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tokens": []}, r"the prompt has 0 tokens; the bundle takes 1 to 8: give some text"),
        ({"tokens": [1] * 9}, r"the prompt has 9 tokens; the bundle takes 1 to 8: shorten it"),
        ({"tokens": [-1]}, r"token -1 is below 0"),
        ({"times": [0.5, 0.5]}, r"time 1 is 0.5"),
        ({"times": []}, r"there are 0 times"),
        ({"times": [1.5]}, r"time 0 is 1.5"),
        ({"leap": Leap("fixed", 0)}, r"a leap after 0 evaluations"),
        ({"leap": Leap("cosine", 0, 1.5)}, r"latest_time 1.5"),
        ({"merge_steps": -2}, r"merge_steps is -2"),
        ({"noise": np.zeros(3, np.float32)}, r"the noise has 3 numbers; the latent has 480"),
        ({"guidance": float("inf")}, r"guidance is not a finite number"),
        ({"seed": -1}, r"seed is -1"),
    ],
)
def test_bad_arguments(session: VideoSession, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(EdgerunError, match=said):
        session.generate(**{"tokens": PROMPT, **arguments})


def changed_copy(bundle: pathlib.Path, target: pathlib.Path, change: Callable[[dict[str, Any]], None]) -> pathlib.Path:
    shutil.copytree(bundle, target)
    manifest = json.loads((target / "manifest.json").read_text())
    change(manifest)
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def drop(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for name in path[:-1]:
            place = place[name]
        del place[path[-1]]

    return change


def put(value: Any, *path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("text", "kind"), "of kind 'text'; a video session runs kind 'video' only"),
        (drop("chains", "frame_decoder"), "no chain 'frame_decoder'"),
        (put(["decode_time", "decode_frames"], "chains", "time_decoder"), "takes 'pictures', which nothing before it"),
        (put(0, "video", "decoder", "frames_per_call"), "decoder.frames_per_call = 0"),
        (put(4, "video", "decoder", "frames_per_call"), "frames_per_call is 4, more than the 3 frames of a chunk"),
        (put(2**63 - 1, "video", "decoder", "frames_per_call"), "which is no size"),
        (lambda manifest: manifest["video"].update(frames=2**20, height=2**20, width=2**20), "together no size"),
        (
            put(2**62, "programs", 0, "inputs", 0, "shape", 0),
            "'tokens' of program 'text_embedding' is of no size",
        ),
        (put(2**62, "programs", 0, "arena_bytes"), f"states {2**62} and 0 bytes for XNNPACK"),
        (put(-1, "programs", 0, "arena_bytes"), "states -1 and 0 bytes for XNNPACK"),
        (put(3, "schema_version"), "schema version 3; this edgerun reads version 4: export the bundle again"),
        (put(["embed", "gone"], "chains", "denoiser"), "'gone', which is none of its programs"),
        (put(["pair_0", "embed", "finish"], "chains", "denoiser"), "takes 't', which nothing before it gives"),
        (put(["embed", "pair_0"], "chains", "denoiser"), "does not end with 'v'"),
        (drop("video", "times"), "no usable 'video.times'"),
        (put(0, "video", "latent", "frames"), "latent.frames = 0"),
        (put(12, "video", "frames"), "not the same number of chunks"),
        (put("heun", "video", "solver"), "video.solver is 'heun', none of euler and ab2: update edgerun"),
        (put("maybe", "video", "leap", "kind"), "knows none, fixed and cosine"),
        (put({"kind": "fixed", "evaluations": 0}, "video", "leap"), "a leap after 0 evaluations"),
        (put([[1.0]], "video", "merge", "matrix"), "'video.merge.matrix' is not a matrix of 1 × 5"),
        (put({"frequencies": [1.0]}, "video", "rotary"), "1 frequencies for heads of 16"),
        (drop("files", "programs/pair_1.pte"), "no size and hash for 'programs/pair_1.pte'"),
        (put("../x.pte", "programs", 0, "file"), "no size and hash"),
        (drop("programs", 3, "inputs", 0), "inputs and 1 outputs, the manifest names 6"),
    ],
)
def test_manifests_that_do_not_fit(
    bundle: pathlib.Path, tmp_path: pathlib.Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    with pytest.raises(BundleError, match=said.replace("(", r"\(")):
        VideoSession(changed_copy(bundle, tmp_path / "changed.edgerun", change), threads=1)


def test_how_many_frames_a_call_decodes_changes_no_pixel(
    bundle: pathlib.Path, session: VideoSession, tmp_path: pathlib.Path
) -> None:
    copy = changed_copy(bundle, tmp_path / "one.edgerun", put(1, "video", "decoder", "frames_per_call"))
    told: list[Progress] = []
    clip = VideoSession(copy, threads=1).generate(PROMPT, seed=7, on_progress=told.append)
    assert told[-1].total == 3 + 7 and told[-1].stage == "decode"
    assert (clip.frames == session.generate(PROMPT, seed=7).frames).all()


def test_a_limit_set_in_a_run_is_that_of_the_chains_after_it(bundle: pathlib.Path, session: VideoSession) -> None:
    limited = VideoSession(bundle, threads=1, memory_limit_bytes=2**40)
    lower = 2 * psutil.Process().memory_info().rss
    refused: list[str] = []

    def on_progress(progress: Progress) -> None:
        if (progress.stage, progress.done) == ("denoise", 1):
            try:
                limited.set_memory_limit(1)  # below a block: the old one stays
            except EdgerunError as error:
                refused.append(str(error))
            limited.set_memory_limit(lower)

    clip = limited.generate(PROMPT, seed=7, on_progress=on_progress)
    assert len(refused) == 1
    assert (clip.frames == session.generate(PROMPT, seed=7).frames).all()
    budgets = {name: stage["chain"]["budget_bytes"] for name, stage in clip.report["stages"].items()}
    assert budgets["encode"] > 2**39 and 0 < budgets["denoise"] < lower and 0 < budgets["decode"] < lower
    assert clip.report["memory_limit_bytes"] == lower


def test_a_limit_set_between_runs_is_the_next_ones(bundle: pathlib.Path) -> None:
    limited = VideoSession(bundle, threads=1, memory_limit_bytes=2**40)
    limited.set_memory_limit(2**39)
    clip = limited.generate(PROMPT, seed=7)
    assert all(0 < stage["chain"]["budget_bytes"] < 2**39 for stage in clip.report["stages"].values())
    limited.set_memory_limit(1)
    with pytest.raises(EdgerunError, match="memory limit of 1 bytes"):
        limited.generate(PROMPT, seed=7)


def test_pictures_of_another_size_than_the_memory_limit_counted_are_refused(
    bundle: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def smaller(manifest: dict[str, Any]) -> None:
        (program,) = (one for one in manifest["programs"] if one["name"] == "decode_frames")
        program["inputs"][0]["shape"][1] = 2  # of 8 channels

    copy = VideoSession(changed_copy(bundle, tmp_path / "small.edgerun", smaller), threads=1)
    with pytest.raises(BundleError, match=f"'chunk' came out as .* of {4 * 2 * ROWS * COLUMNS} bytes a picture"):
        copy.generate(PROMPT, seed=7)


def test_a_damaged_program_is_found_by_its_hash(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = changed_copy(bundle, tmp_path / "copy.edgerun", lambda manifest: None)
    path = copy / "programs/pair_2.pte"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"'programs/pair_2\.pte' is damaged"):
        VideoSession(copy, threads=1)


def test_a_program_that_goes_missing_in_mid_run(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = changed_copy(bundle, tmp_path / "copy.edgerun", lambda manifest: None)
    session = VideoSession(copy, threads=1)

    def remove(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.done == 0:
            (copy / "programs/decode_frames.pte").unlink()

    with pytest.raises(BundleError, match=r"decode_frames\.pte' cannot be read"):
        session.generate(PROMPT, seed=7, on_progress=remove)
    shutil.copy(bundle / "programs/decode_frames.pte", copy / "programs")
    clip = session.generate([], state=session.state)  # nothing of the denoising is lost
    assert (clip.frames == VideoSession(bundle, threads=1).generate(PROMPT, seed=7).frames).all()


def test_a_memory_limit_below_the_process(bundle: pathlib.Path) -> None:
    with pytest.raises(EdgerunError, match=r"a memory limit of 1000000 bytes is below the \d+ that the process takes"):
        VideoSession(bundle, threads=1, memory_limit_bytes=1_000_000)


def run_wide(wide: pathlib.Path, folder: pathlib.Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        runner_path(),
        wide,
        "--tokens",
        "1,2,3",
        "--seed",
        "5",
        "--threads",
        "1",
        "--latent-out",
        folder / "latent",
    ]
    return subprocess.run([*map(str, command), *options], capture_output=True, text=True, timeout=300)


def test_the_memory_limit_bounds_the_runner(wide: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The whole process: a limit that holds a few blocks gives the bits of a run without one; half of it fails."""
    free = run_wide(wide, tmp_path)
    assert free.returncode == 0, free.stderr
    expected = (tmp_path / "latent").read_bytes()
    unlimited = json.loads(free.stdout)["run"]["peak_rss_bytes"]
    limit = 85_000_000
    assert unlimited > 1.1 * limit  # or the limit would say nothing
    done = run_wide(wide, tmp_path, "--memory-limit", "85MB", "--frames-out", str(tmp_path / "frames"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "latent").read_bytes() == expected
    report = json.loads(done.stdout)
    assert report["run"]["peak_rss_bytes"] <= limit
    chain = report["run"]["stages"]["denoise"]["chain"]
    assert 0 < chain["resident_blocks"] < WIDE_BLOCKS  # some stay, the others stream
    assert (tmp_path / "frames").stat().st_size == 7 * 2 * ROWS * 2 * COLUMNS * 3
    (tmp_path / "latent").unlink()
    half = run_wide(wide, tmp_path, "--memory-limit", "40MB")
    assert half.returncode == 2 and half.stderr.count("\n") == 1 and "40000000 bytes" in half.stderr
    assert not (tmp_path / "latent").exists()


def test_the_first_pass_stays_within_the_memory_limit(wide: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """One evaluation, of which nothing can be measured before: what the bundle states of its programs must do."""

    def forget(manifest: dict[str, Any]) -> None:
        for program in manifest["programs"]:
            program["arena_bytes"] = 0

    silent = changed_copy(wide, tmp_path / "silent.edgerun", forget)
    reports = []
    for bundle in (wide, silent):
        done = run_wide(bundle, tmp_path, "--memory-limit", "60MB", "--times", "0.5")
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout)["run"])
    assert reports[0]["peak_rss_bytes"] <= 60_000_000 < reports[1]["peak_rss_bytes"]
    assert reports[0]["stages"]["denoise"]["chain"]["passes"]["count"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--top-k", "3"], "--top-k is no option for a bundle of kind 'video'"),
        (["--memory-limit", "much"], "--memory-limit is 'much'; it must be a size"),
        (["--solver", "heun"], "--solver is 'heun'; it must be euler or ab2"),
        (["--leap", "soon"], "--leap is 'soon'; it must be none, fixed:EVALUATIONS or"),
        (["--memory-limit", "1MB"], "a memory limit of 1000000 bytes is below"),
        (["--state-in", "/nowhere"], "--state-in: /nowhere cannot be read"),
    ],
)
def test_the_runner_says_what_is_wrong(
    bundle: pathlib.Path, tmp_path: pathlib.Path, options: list[str], said: str
) -> None:
    done = run_wide(bundle, tmp_path, *options)
    assert done.returncode == 2
    assert done.stderr.startswith(f"edgerun-runner: {said}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "latent").exists()
