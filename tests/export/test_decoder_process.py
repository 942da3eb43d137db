"""Decoders exported in a process beside: the same programs, and what happens when it or its parent ends."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import sys

import pytest
import torch

from edgerun import compare
from edgerun.bundle import Bundle
from edgerun.errors import CheckpointError, ExportError
from edgerun.export import decoder_process, export_video_bundle, video_pipeline
from edgerun.export.decoder_process import DecoderProcess, ProcessEndedError
from edgerun.models.text_to_video import VideoCheckpoint
from tests import shared_video_bundle

RECIPE = shared_video_bundle.RECIPE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return shared_video_bundle.checkpoint(tmp_path_factory)


@pytest.fixture
def begun(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> DecoderProcess:
    (tmp_path / "programs").mkdir()
    return DecoderProcess(checkpoint, RECIPE.to_json(), "build", tmp_path)


@pytest.mark.slow
def test_the_bundle_of_two_processes_is_that_of_one(
    checkpoint: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(video_pipeline, "available_cores", lambda: 2)
    one = shared_video_bundle.bundle(tmp_path_factory)
    stages: list[str] = []
    two = export_video_bundle(
        checkpoint, RECIPE, tmp_path / "two.edgerun", parallel=True, progress=lambda stage, _: stages.append(stage)
    )
    assert "export decoders" in stages and not any("decoder_" in stage for stage in stages)  # no program of one here
    for name in one.manifest["files"]:
        if not name.startswith("golden/"):  # of another number of threads
            assert (one.path / name).read_bytes() == (two.path / name).read_bytes(), name
    changed = {"files", "parity"}
    same = [{key: value for key, value in of.manifest.items() if key not in changed} for of in (one, two)]
    assert same[0] == same[1] and one.manifest["parity"].keys() == two.manifest["parity"].keys()
    assert max(two.manifest["parity"].values()) <= compare.tolerance("logits_fp32")


def test_a_large_model_is_exported_in_one_process(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Never:
        def __init__(self, *_: object) -> None:
            raise AssertionError("a second process")

    def stop(stage: str, fraction: float) -> None:
        if stage.endswith("text_embedding"):
            raise KeyboardInterrupt

    monkeypatch.setattr(video_pipeline, "available_cores", lambda: 2)
    monkeypatch.setattr(video_pipeline, "DecoderProcess", Never)
    with pytest.raises(AssertionError, match="a second process"):
        export_video_bundle(checkpoint, RECIPE, tmp_path / "a.edgerun", parallel=True)
    monkeypatch.setattr(video_pipeline, "_SMALL_BYTES", 1000)
    with pytest.raises(KeyboardInterrupt):
        export_video_bundle(checkpoint, RECIPE, tmp_path / "a.edgerun", parallel=True, progress=stop)


def test_what_is_raised_there_is_raised_here(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "cut")
    weights = tmp_path / "cut" / "vae" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as expected:
        VideoCheckpoint.open(tmp_path / "cut").load_autoencoder()
    begun = DecoderProcess(tmp_path / "cut", RECIPE.to_json(), "build", tmp_path)
    with begun as process:
        assert process._process is not None
        process._process.wait(60)
        for call in (process.check, process.wait):
            with pytest.raises(CheckpointError) as error:
                call()
    assert str(error.value) == str(expected.value) and "export_decoders" in error.value.__notes__[0]


def test_a_process_that_ends_otherwise_is_told_in_one_line(begun: DecoderProcess) -> None:
    with begun as process:
        assert process._process is not None
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(ProcessEndedError, match="was ended by signal 9: export again") as error:
            process.wait()
        process.check()  # may be made up for
    assert "\n" not in str(error.value)


def test_what_cannot_be_told_otherwise_is_an_export_error(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    begun = DecoderProcess(checkpoint, {**RECIPE.to_json(), "frames": "twelve"}, "build", tmp_path)
    with begun as process, pytest.raises(ExportError, match="the decoders: TypeError: ") as error:
        process.wait()
    assert "Traceback" in error.value.__notes__[0]


def test_a_folder_with_modules_of_the_same_names_is_left_alone(
    begun: DecoderProcess, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    with begun as process:
        assert process._process is not None and process._process.stdin is not None
        process._process.stdin.close()
        assert process._process.wait(60) == decoder_process.ORPHANED


@pytest.mark.slow
def test_without_a_second_process_the_decoders_are_exported_here(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(DecoderProcess):
        def __enter__(self) -> DecoderProcess:
            entered = super().__enter__()
            assert self._process is not None
            self._process.kill()
            return entered

    monkeypatch.setattr(video_pipeline, "available_cores", lambda: 2)
    monkeypatch.setattr(video_pipeline, "DecoderProcess", Killed)
    bundle = export_video_bundle(checkpoint, RECIPE, tmp_path / "a.edgerun", parallel=True)
    assert max(bundle.manifest["parity"].values()) <= compare.tolerance("logits_fp32")
    assert bundle.manifest["chains"]["frame_decoder"] == ["decoder_frames_0"]
    Bundle.open(bundle.path, kind="video")


def test_nothing_is_left_when_it_is_not_waited_for(begun: DecoderProcess) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), begun as process:
        child, folder = process._process, process._folder
        assert child.poll() is None and os.getpgid(child.pid) != os.getpgid(0)  # Ctrl-C is not for it
        raise KeyboardInterrupt
    assert child.returncode == -signal.SIGKILL and not folder.exists() and torch.get_num_threads() == threads


def test_it_ends_with_its_parent(begun: DecoderProcess) -> None:
    with begun as process:
        assert process._process is not None and process._process.stdin is not None
        process._process.stdin.close()  # as the end of the parent would
        assert process._process.wait(60) == decoder_process.ORPHANED
        assert not process._folder.exists()
