"""What can go wrong while `edgerun run` makes a clip: one clear line, no partial file, nothing goes on or hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

from edgerun import _native
from edgerun.bundle import Bundle
from edgerun.cli import main
from edgerun.commands import video
from edgerun.errors import BundleError
from edgerun.sessions.video import Progress, VideoSession
from tests import shared_video_bundle
from tests.shared_bundle import changed_bundle

PROMPT = "a red circle moves left"
TOKENS = [3, 4, 5, 6, 7, 1]
WATCHDOG_SECONDS = 300


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return shared_video_bundle.bundle(tmp_path_factory)


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """A test that hangs ends the process, and says where it stood."""
    faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=["host", "emulated-arm64"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "emulated-arm64":
        request.getfixturevalue("arm64")
    return str(request.param)


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Progress], None]], None]:
    """Has something done whenever a run tells how it gets on."""

    def install(hook: Callable[[Progress], None]) -> None:
        @contextlib.contextmanager
        def bar() -> Iterator[Callable[[Progress], None]]:
            yield hook

        monkeypatch.setattr(video, "_step_bar", bar)

    return install


def run(path: pathlib.Path, folder: pathlib.Path, *options: str) -> int:
    return main(["run", str(path), "--prompt", PROMPT, "-o", str(folder / "c.gif"), "--threads", "1", *options])


def children_that_run(path: pathlib.Path) -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [child] if str(path) in child.cmdline() else []
    return found


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_ctrl_c(
    bundle: Bundle, device: str, stage: str, during: Callable, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    during(lambda progress: os.kill(os.getpid(), signal.SIGINT) if progress.stage == stage else None)
    assert run(bundle.path, tmp_path, "--device", device) == 130
    assert capsys.readouterr().err == "edgerun: interrupted; nothing half-written is left\n"
    assert list(tmp_path.iterdir()) == [] and children_that_run(bundle.path) == []


def remove(path: pathlib.Path) -> None:
    path.unlink()


def truncate(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: pathlib.Path) -> None:
    path.write_bytes(b"\x7f" * path.stat().st_size)


@pytest.mark.parametrize("harm", [remove, truncate, overwrite])
@pytest.mark.parametrize(("stage", "program"), [("encode", "denoiser_tail"), ("denoise", "decoder_frames_0")])
def test_a_program_that_goes_bad(
    bundle: Bundle,
    stage: str,
    program: str,
    harm: Callable[[pathlib.Path], None],
    during: Callable,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
) -> None:
    copy, out = tmp_path / "copy.edgerun", tmp_path / "out"
    shutil.copytree(bundle.path, copy)
    out.mkdir()
    during(lambda told: harm(copy / f"programs/{program}.pte") if (told.stage, told.done) == (stage, 0) else None)
    assert run(copy, out) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{program}.pte" in said and said.startswith("edgerun run: ")
    assert list(out.iterdir()) == []


def test_a_program_that_goes_bad_on_a_device(
    bundle: Bundle, arm64: object, during: Callable, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    times = [1 - i / 20 for i in range(20)]  # the file is gone long before it is needed
    copy = changed_bundle(bundle.path, tmp_path / "c.edgerun", lambda manifest: manifest["video"].update(times=times))
    (tmp_path / "out").mkdir()
    during(lambda told: remove(copy / "programs/decoder_frames_0.pte") if told.stage == "encode" else None)
    assert run(copy, tmp_path / "out", "--lpl", "none", "--device", "emulated-arm64") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "decoder_frames_0.pte' cannot be read" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_a_runner_that_is_killed(
    bundle: Bundle, arm64: object, during: Callable, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    def kill(progress: Progress) -> None:
        for child in children_that_run(bundle.path):
            child.kill()

    during(kill)
    assert run(bundle.path, tmp_path, "--device", "emulated-arm64") == 2
    assert capsys.readouterr().err == (
        "edgerun run: emulated-arm64: the runner was ended by signal 9 (out of memory?)\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_signal_to_all_as_a_terminal_sends_it(bundle: Bundle, device: str, tmp_path: pathlib.Path) -> None:
    number = signal.SIGINT if device == "host" else signal.SIGTERM
    times = [1 - i / 20_000 for i in range(20_000)]
    long = changed_bundle(bundle.path, tmp_path / "l.edgerun", lambda manifest: manifest["video"].update(times=times))
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "edgerun.cli", "run", long, "--prompt", PROMPT, "--lpl", "none"]
    command += ["--device", device, "-o", tmp_path / "out" / "c.gif", "--threads", "1"]
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stderr is not None
        assert [process.stderr.readline(), process.stderr.readline()] == ["encode: 1 to do\n", "denoise: 20000 to do\n"]
        os.killpg(process.pid, number)
        out, said = process.communicate(timeout=WATCHDOG_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    interrupted = number == signal.SIGINT
    assert process.returncode == (130 if interrupted else 128 + number)
    assert (out, said) == ("", "edgerun: interrupted; nothing half-written is left\n" if interrupted else "")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, 0)


def test_runs_that_end_early_leave_nothing_behind(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    """Descriptors, threads and memory of the process, after runs that fail and runs that are cancelled."""
    copy = tmp_path / "copy.edgerun"
    shutil.copytree(bundle.path, copy)
    programs = [copy / f"programs/{name}.pte" for name in ("text_norm", "denoiser_tail", "decoder_frames_0")]
    session, process = VideoSession(copy, threads=1), psutil.Process()

    def fail(stage: str) -> None:
        for path, where in zip(programs, ("encode", "denoise", "decode"), strict=True):
            aside = path.with_suffix(".aside")
            path.rename(aside)
            try:
                if where == stage:
                    with pytest.raises(BundleError, match="cannot be read"):
                        session.generate(TOKENS)
            finally:
                aside.rename(path)

        def cancel(progress: Progress) -> None:
            if progress.stage == stage:
                session.cancel()

        assert session.generate(TOKENS, on_progress=cancel).cancelled

    def state() -> tuple[int, int]:
        return process.num_fds(), process.num_threads()

    stages = ("encode", "denoise", "decode")
    for stage in stages * 3:
        fail(stage)
    before, memory = state(), _native.resident_bytes()[0]
    for stage in stages * 20:
        fail(stage)
    assert state() == before
    assert _native.resident_bytes()[0] - memory < 1 << 20


EXPORT_OF_ONE_PROGRAM = """
import sys
from edgerun import compare
from edgerun.cli import main
compare.tolerance = lambda name: -1.0
sys.exit(main(["export", sys.argv[1], "-o", sys.argv[2]]))
"""


@pytest.mark.slow
def test_an_export_that_fails_says_why_and_no_more(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: pathlib.Path
) -> None:
    """No line of a library among the progress: the first program was made, loaded and run."""
    checkpoint, out = shared_video_bundle.checkpoint(tmp_path_factory), tmp_path / "v.edgerun"
    command = [sys.executable, "-c", EXPORT_OF_ONE_PROGRAM, str(checkpoint), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WATCHDOG_SECONDS)
    *progress, last = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert last.startswith("edgerun export: the program text_embedding is not its module: relative L2 ")
    assert progress and all(line.startswith("export v.edgerun: ") for line in progress)
    assert list(tmp_path.iterdir()) == []
