"""Ctrl-C while `edgerun run` writes the clip: no half file, and a run with --state goes on without its steps."""

from __future__ import annotations

import pathlib

import av
import PIL.Image
import pytest

from edgerun.bundle import Bundle
from edgerun.cli import main
from edgerun.sessions.video import VideoSession
from tests import shared_video_bundle

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return shared_video_bundle.bundle(tmp_path_factory)


def run(bundle: Bundle, clip: pathlib.Path, *options: str) -> int:
    return main(["run", str(bundle.path), "--prompt", PROMPT, "-o", str(clip), "--threads", "1", *options])


def interrupt_the_encoder(patch: pytest.MonkeyPatch, folder: pathlib.Path) -> list[str]:
    """Has Ctrl-C come once a part of a clip is written; the list is to hold the clip's files that are there then."""
    half_written: list[str] = []
    open_real = av.open

    def stop() -> None:
        half_written.extend(path.name for path in folder.rglob("clip.*") if path.is_file())
        raise KeyboardInterrupt

    class Container:
        def __init__(self, *given: str) -> None:
            self.real = open_real(*given)
            self.add_stream = self.real.add_stream

        def __enter__(self) -> Container:
            return self

        def __exit__(self, *_: object) -> None:
            self.real.close()

        def mux(self, packets: list[av.Packet]) -> None:
            self.real.mux(packets)
            if packets:
                stop()

    def save(image: PIL.Image.Image, path: pathlib.Path, **_: object) -> None:
        path.write_bytes(b"half of a picture")
        stop()

    patch.setattr(av, "open", Container)
    patch.setattr(PIL.Image.Image, "save", save)
    return half_written


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_ctrl_c_while_the_clip_is_written(
    bundle: Bundle,
    tmp_path: pathlib.Path,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    half_written, clip = interrupt_the_encoder(monkeypatch, tmp_path), tmp_path / f"clip{suffix}"
    assert run(bundle, clip) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "edgerun: interrupted; nothing half-written is left"
    assert half_written == [clip.name]  # in a folder of its own
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_the_clip_that_was_there(
    bundle: Bundle, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"an older clip")
    interrupt_the_encoder(monkeypatch, tmp_path)
    assert run(bundle, clip) == 130
    assert clip.read_bytes() == b"an older clip" and list(tmp_path.iterdir()) == [clip]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_run_whose_writing_was_stopped_goes_on(
    bundle: Bundle,
    tmp_path: pathlib.Path,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    state, clip, whole = tmp_path / "a state", tmp_path / f"clip{suffix}", tmp_path / f"whole{suffix}"
    assert run(bundle, whole) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_the_encoder(patch, tmp_path)
        assert run(bundle, clip, "--state", str(state)) == 130
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"edgerun run: stopped; the same command goes on from {state}",
        "edgerun: interrupted; nothing half-written is left",
    ]
    assert sorted(tmp_path.iterdir()) == [state, whole]
    stages: list[str] = []
    real = VideoSession.generate

    def told(self: VideoSession, *given: object, **more: object) -> object:
        return real(self, *given, **(more | {"on_progress": lambda progress: stages.append(progress.stage)}))  # type: ignore[arg-type]

    monkeypatch.setattr(VideoSession, "generate", told)
    assert run(bundle, clip, "--state", str(state)) == 0
    assert clip.read_bytes() == whole.read_bytes() and sorted(tmp_path.iterdir()) == [clip, whole]
    assert set(stages) == {"decode"}
