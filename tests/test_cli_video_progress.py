"""How `edgerun run` tells how far a clip is: lines with what is left, and on a terminal a bar."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import struct
import termios
import threading
from collections.abc import Callable

import pytest

from edgerun.bundle import Bundle
from edgerun.cli import main
from edgerun.commands import video
from edgerun.sessions.video import Progress, Stage
from tests import shared_video_bundle

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return shared_video_bundle.bundle(tmp_path_factory)


def told(stage: Stage, done: int, total: int, seconds: float) -> Progress:
    return Progress(stage, done, total, done, 1.0, 1e3 * seconds)


def on_a_terminal(work: Callable[[], object]) -> str:
    """What `work` writes to stderr, which is a pseudo-terminal of 100 columns meanwhile."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    parts: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how a terminal ends whose other side is closed
            while part := os.read(ours, 4096):
                parts.append(part)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        with os.fdopen(theirs, "w", encoding="utf-8") as stream, contextlib.redirect_stderr(stream):
            work()
    finally:
        reader.join()
        os.close(ours)
    return b"".join(parts).decode()


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    """Steps of 4 s: at most a line every 10 s, and what is left by their mean."""
    with video._step_bar() as tell:
        tell(told("encode", 0, 1, 0.0))
        for done in range(8):
            tell(told("denoise", done, 30, 60.0 + 4.0 * done))
        tell(told("decode", 0, 3, 100.0))
        tell(told("decode", 1, 3, 200.0))
        tell(told("decode", 2, 3, 4000.0))
        tell(told("decode", 3, 3, 5000.0))
    assert capsys.readouterr().err.splitlines() == [
        "encode: 1 to do",
        "denoise: 30 to do",
        "denoise: 3 of 30 done, about 01:48 to go",  # 27 x 4 s
        "denoise: 6 of 30 done, about 01:36 to go",
        "decode: 3 to do",
        "decode: 1 of 3 done, about 03:20 to go",
        "decode: 2 of 3 done, about 32:30 to go",  # 3900 s for two
    ]


def test_steps_before_a_run_goes_on_say_nothing_of_its_pace(capsys: pytest.CaptureFixture) -> None:
    with video._step_bar() as tell:
        tell(told("denoise", 20, 30, 0.5))
        tell(told("denoise", 21, 30, 20.5))
    assert capsys.readouterr().err.splitlines()[1:] == ["denoise: 21 of 30 done, about 03:00 to go"]


def test_lines_of_a_run(
    bundle: Bundle, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(video, "_LINE_EVERY_MS", 0.0)
    arguments = ["run", str(bundle.path), "--prompt", PROMPT, "-o", str(tmp_path / "c.png"), "--lpl", "none"]
    assert main([*arguments, "--threads", "1"]) == 0
    said = capsys.readouterr().err
    steps = ["denoise: 4 to do", *(f"denoise: {done} of 4 done, about 00:00 to go" for done in (1, 2, 3))]
    assert "\n".join(["encode: 1 to do", *steps, "decode: 6 to do", "decode: 1 of 6 done, about 00:00 to go"]) in said


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10 s, of a run that goes on at its twentieth."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def work() -> None:
        with video._step_bar() as tell:
            tell(told("encode", 0, 1, 0.0))
            for done in (20, 21, 22):
                tell(told("denoise", done, 30, now[0]))
                now[0] += 10.0
            tell(told("decode", 0, 3, now[0]))

    drawn = on_a_terminal(work).split("\r")
    assert any(re.match(r"denoise:  70%\|.*\| 21/30 \[00:10<01:30, 10.00s/step\]", line) for line in drawn)
    assert any(re.match(r"denoise:  73%\|.*\| 22/30 \[00:20<01:20, 10.00s/step\]", line) for line in drawn)
    assert any(re.match(r"decode:   0%\|.*\| 0/3 \[00:00<\?", line) for line in drawn)
    assert drawn[-1].strip() == drawn[-2].strip() == ""  # nothing of it stays


def test_a_run_on_a_terminal(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    arguments = ["run", str(bundle.path), "--prompt", PROMPT, "-o", str(tmp_path / "c.png"), "--lpl", "none"]
    statuses: list[int] = []
    *drawn, last = on_a_terminal(lambda: statuses.append(main([*arguments, "--threads", "1"]))).rstrip().split("\r")
    assert statuses == [0]
    for stage, done in (("encode", "0/1"), ("denoise", "0/4"), ("denoise", "3/4"), ("decode", "5/6")):
        assert any(re.match(rf"{stage}: +\d+%\|.*\| {done} \[\d\d:\d\d<", line) for line in drawn), (stage, done)
    assert "to do" not in "".join(drawn) and "\n" not in "".join(drawn)
    assert re.fullmatch(r"\[encode .* s, denoise .* s, decode .* s, 4 evaluations, .* s in all\]", last)
