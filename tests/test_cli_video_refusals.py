"""What `edgerun run` and `edgerun export` refuse of a video: one line, status 2, nothing written, nothing left open."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import psutil
import pytest
from PIL import Image, ImageSequence

from edgerun.bundle import Bundle
from edgerun.cli import main
from tests import shared_video_bundle
from tests.shared_bundle import changed_bundle

PROMPT = "a red circle moves left"
PROGRAM = "programs/denoiser_pairs_0.pte"
REPEATS = 20

# What is given, its options, and what the line says.
RUNS = {
    "a limit below the process": ("bundle", ["--memory-limit", "1MB"], "a memory limit of 1000000 bytes is below the"),
    "a limit below one block": (
        "a block of 8 GB",
        ["--memory-limit", "4GB"],
        "are left for the denoiser: a budget of",
    ),
    "a limit that is no size": ("bundle", ["--memory-limit", "much"], "'much' is not a size: write it as 800MB"),
    "no prompt": ("bundle", ["--prompt", ""], "the prompt is empty: say what the clip shows"),
    "a blank prompt": ("bundle", ["--prompt", " \t"], "the prompt is empty: say what the clip shows"),
    "a prompt over the limit": ("bundle", ["--prompt", "red " * 9], "has 10 tokens, end mark included; the limit is 9"),
    "a missing block": ("a missing block", [], f"{PROGRAM} is missing from"),
    "a damaged block": ("a damaged block", [], f"{PROGRAM} is damaged: its sha256 is not"),
    "a block cut short": ("a block cut short", [], f"{PROGRAM} has 100 bytes, its manifest says"),
    "TDTM of programs without": ("programs without TDTM", ["--tdtm", "2"], "exported without merging: give 0, or"),
    "a leap after no step": ("bundle", ["--lpl", "0"], "--lpl is '0'; write none"),
    "a clip of another kind": ("bundle", ["-o", "c.avi"], "c.avi has the suffix '.avi'; a clip is written as .mp4"),
}
EXPORTS = {
    "a height that is no multiple": ("checkpoint", ["--height", "13"], "13 x 16 pixels: both must be multiples of 2"),
    "a width that is no multiple": ("checkpoint", ["--width", "7"], "12 x 7 pixels: both must be multiples of 2"),
    "no frames": ("checkpoint", ["--frames", "0"], "'0' is not a whole number of at least 1"),
    "TDTM in no part": ("checkpoint", ["--frames", "7", "--tdtm", "2", "--tdtm-parts", ""], "choose of spatial"),
    "no decoder": ("no decoder", [], "has no model.safetensors: fetch the checkpoint again"),
    "a missing shard": ("a missing shard", [], "b.safetensors is missing from"),
    "no text encoder": ("no text encoder", [], "has no folder text_encoder/: a video checkpoint has denoiser/"),
}
REFUSALS = [("run", *row) for row in RUNS.values()] + [("export", *row) for row in EXPORTS.values()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return shared_video_bundle.checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return shared_video_bundle.bundle(tmp_path_factory)


@pytest.fixture(scope="module")
def places(
    checkpoint: pathlib.Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pathlib.Path]:
    """Bundles and checkpoints, whole and spoiled, by what they are called above."""
    folder = tmp_path_factory.mktemp("spoiled")

    def copy(source: pathlib.Path, name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(source, folder / name))

    def hungry(manifest: dict) -> None:
        next(one for one in manifest["programs"] if one["file"] == PROGRAM)["table_bytes"] = 8 * 10**9

    found = {"bundle": bundle.path, "checkpoint": checkpoint}
    for name in ("a missing block", "a damaged block", "a block cut short"):
        found[name] = copy(bundle.path, name)
    (found["a missing block"] / PROGRAM).unlink()
    program = (bundle.path / PROGRAM).read_bytes()
    (found["a damaged block"] / PROGRAM).write_bytes(program[:-1] + bytes([program[-1] ^ 1]))
    (found["a block cut short"] / PROGRAM).write_bytes(program[:100])
    found["a block of 8 GB"] = changed_bundle(bundle.path, folder / "hungry", hungry)
    found["programs without TDTM"] = changed_bundle(
        bundle.path, folder / "plain", lambda manifest: manifest["video"].pop("merge")
    )
    for name in ("no decoder", "a missing shard", "no text encoder"):
        found[name] = copy(checkpoint, name)
    (found["no decoder"] / "vae" / "model.safetensors").unlink()
    shutil.rmtree(found["no text encoder"] / "text_encoder")
    denoiser = found["a missing shard"] / "denoiser"
    (denoiser / "model.safetensors").rename(denoiser / "a.safetensors")
    index = {"weight_map": {"rope.freqs": "a.safetensors", "t_block.1.bias": "b.safetensors"}}
    (denoiser / "model.safetensors.index.json").write_text(json.dumps(index))
    return found


def status_of(verb: str, place: pathlib.Path, options: list[str], out: pathlib.Path) -> int:
    """The exit status of the command line, whose clip or bundle goes to the folder `out`."""
    if verb == "run":
        arguments = ["run", str(place), "--prompt", PROMPT, "-o", str(out / "c.gif"), "--threads", "1", *options]
    else:
        arguments = ["export", str(place), "-o", str(out / "v.edgerun"), *options]
    try:
        return main(arguments)
    except SystemExit as ended:  # of the parser
        return int(ended.code or 0)


@pytest.mark.parametrize(("verb", "place", "options", "said"), REFUSALS, ids=[*RUNS, *EXPORTS])
def test_a_fault_is_refused_in_one_line(
    verb: str,
    place: str,
    options: list[str],
    said: str,
    places: dict[str, pathlib.Path],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status_of(verb, places[place], options, tmp_path) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.endswith("\n")
    assert error.startswith(f"edgerun {verb}: ") and said in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("verb", "place", "options"), [row[:3] for row in REFUSALS], ids=[*RUNS, *EXPORTS])
def test_refusals_leave_nothing_open(
    verb: str, place: str, options: list[str], places: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    process = psutil.Process()

    def after(times: int) -> tuple[int, int]:
        for _ in range(times):
            assert status_of(verb, places[place], options, tmp_path) == 2
        return process.num_fds(), process.num_threads()

    before = after(2)  # the pool of threads, and what is imported when it is first needed
    assert after(REPEATS) == before
    assert list(tmp_path.iterdir()) == []


# An odd number of frames is no fault.


def pictures(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def test_tdtm_of_an_odd_number_of_latents(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    video = bundle.manifest["video"]
    assert video["latent"]["frames"] == 7 and video["merge"]["positions"] == [0.0, 1.5, 3.5, 5.5]
    for steps in ("0", "4"):
        arguments = ["run", str(bundle.path), "--prompt", PROMPT, "--lpl", "none", "--threads", "1", "--tdtm", steps]
        assert main([*arguments, "-o", str(tmp_path / f"{steps}.png")]) == 0
    plain, merged = (pictures(tmp_path / f"{steps}.png") for steps in ("0", "4"))
    assert plain.shape == merged.shape == (1, 12, 8 * 16, 3) and (plain != merged).any()


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "latents"), [(7, 4), (9, 5)])
def test_an_odd_number_of_frames(checkpoint: pathlib.Path, tmp_path: pathlib.Path, frames: int, latents: int) -> None:
    """Of 9 frames the latents, too, are an odd number: the first is merged with none."""
    path, clip = tmp_path / "odd.edgerun", tmp_path / "c.gif"
    assert main(["export", str(checkpoint), "-o", str(path), "--frames", str(frames), "--tdtm", "2"]) == 0
    merge = Bundle.open(path, kind="video").manifest["video"]["merge"]
    assert merge["positions"] == ([0.5, 2.5] if latents == 4 else [0.0, 1.5, 3.5])
    assert main(["run", str(path), "--prompt", PROMPT, "-o", str(clip), "--threads", "1"]) == 0
    assert pictures(clip).shape == (frames, 12, 16, 3)
