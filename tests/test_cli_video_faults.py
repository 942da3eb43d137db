"""What can go wrong while `edgerun run` makes a clip: one clear line, no partial file, nothing goes on or hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from edgerun import _native
from edgerun.bundle import Bundle
from edgerun.cli import main
from edgerun.commands import video
from edgerun.errors import BundleError
from edgerun.sessions.video import Progress, VideoSession
from tests import shared_video_bundle
from tests.runtime.loader_thread import run_script
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


def flip(path: pathlib.Path) -> None:
    """One bit of the weights, which lie last in the file: the program runs as well as before."""
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("harm", [remove, truncate, overwrite, flip])
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
    assert ("changed since it was checked" in said) == (harm is not remove)
    assert list(out.iterdir()) == []


PAIRS, STATED_BYTES = 6, 64 << 20


@pytest.fixture(scope="module")
def streaming(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A denoiser of eight blocks, each a file of its own that is stated to take 64 MiB: memory that nobody needs."""
    target = tmp_path_factory.mktemp("streaming") / "s.edgerun"

    def change(manifest: dict[str, Any]) -> None:
        programs = {program["name"]: program for program in manifest["programs"]}
        first = programs["denoiser_pairs_0"]
        for i in range(1, PAIRS):
            name, file = f"denoiser_pairs_{i}", f"programs/denoiser_pairs_{i}.pte"
            shutil.copy(target / first["file"], target / file)
            programs[name] = first | {"name": name, "file": file}
            manifest["files"][file] = manifest["files"][first["file"]]
        chain = ["denoiser_head", *(f"denoiser_pairs_{i}" for i in range(PAIRS)), "denoiser_tail"]
        for name in chain:
            programs[name] = programs[name] | {"table_bytes": STATED_BYTES}
        manifest["chains"]["denoiser"] = chain
        manifest["programs"] = list(programs.values())

    return changed_bundle(bundle.path, target, change)


def streaming_limit() -> list[str]:
    """Room for about four and a half blocks: two stay, the others stream through, one ahead."""
    taken = sum(_native.resident_bytes()) + (8 << 20)  # and what a session keeps free
    return ["--memory-limit", str(taken + 9 * STATED_BYTES // 2), "--lpl", "none"]


@pytest.mark.parametrize("prefetch", ["0", "1"])
@pytest.mark.parametrize("harm", [remove, truncate, flip])
def test_a_streamed_block_of_the_denoiser_that_goes_bad(
    streaming: pathlib.Path,
    harm: Callable[[pathlib.Path], None],
    prefetch: str,
    during: Callable,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """After the first step, which loaded it whole: that the second fails shows that it streams."""
    copy, out = tmp_path / "copy.edgerun", tmp_path / "out"
    shutil.copytree(streaming, copy)
    out.mkdir()
    block, told = copy / f"programs/denoiser_pairs_{PAIRS - 1}.pte", []

    def at_the_second_step(progress: Progress) -> None:
        told.append((progress.stage, progress.done))
        if told[-1] == ("denoise", 1):
            harm(block)

    during(at_the_second_step)
    assert run(copy, out, "--prefetch", prefetch, *streaming_limit()) == 2
    said = capsys.readouterr().err
    assert said.startswith("edgerun run: ") and said.count("\n") == 1 and str(block) in said
    assert ("changed since it was checked" in said) == (harm is not remove)
    assert told[-1] == ("denoise", 1) and list(out.iterdir()) == []


# Four clips: of the second the loading thread ends as it packs weights, of the third a signal ends it between steps.
RUNS_WITH_A_THREAD_THAT_ENDS = """
import contextlib, ctypes, io, json, os, pathlib, signal, sys
from edgerun.cli import main
from edgerun.commands import video
from tests.test_cli_video_faults import run, streaming_limit

bundle, folder = map(pathlib.Path, sys.argv[1:])
process, found = ctypes.CDLL(None), []

def end(progress):
    step = (len(found), progress.stage, progress.done)
    if step == (1, "denoise", 1):
        process.end_loader_at(2, 4096)
    if step == (2, "denoise", 2):
        tasks = pathlib.Path("/proc/self/task").iterdir()
        (thread,) = (task for task in tasks if (task / "comm").read_text() == "edgerun-loader\\n")
        process.signal(signal.SIGUSR1, ctypes.cast(process.pthread_exit, ctypes.c_void_p))
        process.tgkill(os.getpid(), int(thread.name), signal.SIGUSR1)
        while thread.exists():
            pass

@contextlib.contextmanager
def bar():
    yield end

video._step_bar = bar
for i in range(4):
    out, said = folder / str(i), io.StringIO()
    out.mkdir()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = run(bundle, out, *streaming_limit())
    found.append([status, said.getvalue(), {path.name: path.read_bytes().hex() for path in out.iterdir()}])
print(json.dumps(found))
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="finds the thread in /proc; only glibc unwinds one that ends itself"
)
def test_a_loading_thread_that_is_ended(streaming: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = run_script(RUNS_WITH_A_THREAD_THAT_ENDS, tmp_path, str(streaming), str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    before, in_a_load, by_a_signal, after = json.loads(done.stdout)
    assert before[0] == after[0] == 0 and before[2].keys() == {"c.gif"} and after[2] == before[2]
    assert [(status, files) for status, _, files in (in_a_load, by_a_signal)] == [(2, {}), (2, {})]
    line = r"edgerun run: the thread that loads ahead ended while it loaded block 'denoiser_\w+': run again\n"
    assert re.fullmatch(line, in_a_load[1])
    assert by_a_signal[1] == "edgerun run: the thread that loads ahead was ended from outside: run again\n"


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
    stages = ("encode", "denoise", "decode")

    def fail(stage: str) -> None:
        path = programs[stages.index(stage)]
        aside = path.with_suffix(".aside")
        path.rename(aside)
        try:
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
