"""One run of edgerun-runner: what is asked of it, what it says, and how both cross to wherever it runs.

A request becomes a folder of files and a command line; what it gives comes back as a folder of files (text_run.py and
video_run.py say which). Where the command runs is the device's part (host.py, emulated_arm64.py, linux_ssh.py).
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from edgerun.errors import DeviceError

PROMPT_FILE = "prompt.txt"
REPORT_FILE = "report.json"
REPORT_SCHEMA_VERSION = 1
DESCRIBE_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0

Report = TypeVar("Report")
ReportGiven = TypeVar("ReportGiven", covariant=True)


class Request(Protocol[ReportGiven]):
    """What to run, for a bundle of one kind."""

    def write(self, folder: pathlib.Path) -> None:
        """Write the files that `arguments` names."""

    def arguments(self, requests: str, results: str) -> list[str]:
        """The runner's arguments after the bundle. requests, results: the two folders as the device sees them."""

    def read(self, folder: pathlib.Path, device: str) -> ReportGiven:
        """What a run left in `folder`. Raises DeviceError when it is not what was asked for."""

    def hear(self, line: str) -> bool:
        """Take a line of the runner's standard error if it tells how the run gets on; False: it is something else."""


class Device(Protocol):
    """Something that runs a bundle."""

    @property
    def name(self) -> str:
        """As `open_device` takes it."""

    def describe(self) -> dict[str, object]:
        """System, machine, cpu, features and threads. Raises DeviceError when a bundle cannot run there now."""

    def run(self, bundle: pathlib.Path, request: Request[Report]) -> Report:
        """Run `request`; what it raises, Ctrl-C too, ends the run on the device.

        Raises DeviceError with the runner's own line when it fails.
        """


def read_json(folder: pathlib.Path, device: str) -> dict[str, Any]:
    """The runner's JSON report. Raises DeviceError when there is none that this edgerun reads."""
    try:
        values = json.loads((folder / REPORT_FILE).read_text())
    except (OSError, ValueError) as error:
        raise DeviceError(f"{device} gave no report that can be read ({error}): run it again") from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != REPORT_SCHEMA_VERSION:
        raise DeviceError(
            f"{device} gave a report of schema version {version}; this edgerun reads {REPORT_SCHEMA_VERSION}: "
            "give both the same version of edgerun"
        )
    found: dict[str, Any] = values
    return found


def run_locally(command: Sequence[str], bundle: pathlib.Path, request: Request[Report], device: str) -> Report:
    """Run a runner that this machine can start, in a process of its own. Raises DeviceError."""
    with tempfile.TemporaryDirectory(prefix="edgerun-run-") as temporary:
        folder = pathlib.Path(temporary)
        request.write(folder)
        whole = [*command, str(bundle), *request.arguments(temporary, temporary)]
        try:
            process = subprocess.Popen(
                whole, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise DeviceError(f"{device}: {whole[0]} does not start ({error}): build it again") from None
        try:
            said = listen(process, request.hear)
        finally:
            stop(process)
        if process.returncode != 0:
            raise DeviceError(failure(device, process.returncode, said))
        return request.read(folder, device)


def listen(process: subprocess.Popen[bytes], hear: Callable[[str], bool]) -> str:
    """Wait for the end of a process; what its standard error, a pipe, says but for the lines that `hear` takes."""
    assert process.stderr is not None
    kept = [line for raw in process.stderr if not hear(line := raw.decode(errors="replace"))]
    process.wait()
    return "".join(kept)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs: it is asked first, so that it can remove what it began. Closes its pipe."""
    try:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()


def describe_locally(command: Sequence[str], device: str) -> dict[str, object]:
    """What a runner that this machine can start says of its machine. Raises DeviceError."""
    return parse_description(run_command([*command, "--describe"], device, DESCRIBE_TIMEOUT_S), device)


def parse_description(text: str, device: str) -> dict[str, object]:
    """The output of `edgerun-runner --describe` as one flat dict. Raises DeviceError."""
    try:
        values = json.loads(text)
        return {**values["device"], "edgerun": values["version"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DeviceError(f"{device}: its runner cannot say what the machine is ({error}): build it again") from None


def run_command(command: Sequence[str], device: str, timeout_s: float) -> str:
    """Standard output of a command. Raises DeviceError with the last line of its standard error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{device} did not answer within {timeout_s:.0f} s: is the machine overloaded?") from None
    except OSError as error:
        raise DeviceError(f"{device}: {command[0]} does not start ({error}): build it again") from None
    if done.returncode != 0:
        raise DeviceError(failure(device, done.returncode, done.stderr))
    return done.stdout


def failure(device: str, status: int, error_text: str) -> str:
    """One line for a runner that failed: its own, else what its status means."""
    lines = [line.strip() for line in error_text.splitlines() if line.strip()]
    said = lines[-1].removeprefix("edgerun-runner: ") if lines else ""
    if "error while loading shared libraries" in said or "GLIBC" in said:
        return f"{device} lacks a library: {said.split(': ', 1)[-1]}; install it there, or update its system"
    if status < 0 or status >= 128:
        number = -status if status < 0 else status - 128
        what = f"ended by signal {number}" + (" (out of memory?)" if number == 9 else "")
        return f"{device}: the runner was {what}" + (f": {said}" if said else "")
    return f"{device}: {said}" if said else f"{device}: the runner failed with status {status} and no message"
