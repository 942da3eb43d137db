"""One run of edgerun-runner: what is asked of it, what it says, and how both cross to wherever it runs.

A request becomes a folder of token files and a command line; a report comes back as JSON and raw logits. Where the
command runs is the device's part (host.py, emulated_arm64.py, linux_ssh.py).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from edgerun.errors import DeviceError

PROMPT_FILE = "prompt.txt"
FORCED_FILE = "forced.txt"
REPORT_FILE = "report.json"
LOGITS_FILE = "logits.f32"
REPORT_SCHEMA_VERSION = 1
DESCRIBE_TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """What to run: a prompt, and either tokens to sample after it or tokens to force."""

    prompt: tuple[int, ...]  # token ids
    max_new_tokens: int = 128  # 0: only read the prompt
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # 1: all
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None  # None: the bundle's end tokens; (): none
    forced: tuple[int, ...] | None = None  # fed in turn; the report then has the logits before and after each
    threads: int | None = None  # None: as many as the processor has good cores


@dataclasses.dataclass(frozen=True)
class RunReport:
    """What a run gave."""

    values: dict[str, Any]  # the runner's JSON report
    logits: np.ndarray | None  # float32 [forced + 1, vocab] when tokens were forced

    @property
    def tokens(self) -> list[int]:
        """The tokens generated, or forced."""
        return list(self.values["tokens"])


class Device(Protocol):
    """Something that runs a bundle."""

    @property
    def name(self) -> str:
        """As `open_device` takes it."""

    def describe(self) -> dict[str, object]:
        """System, machine, cpu, features and threads. Raises DeviceError when a bundle cannot run there now."""

    def run(self, bundle: pathlib.Path, request: RunRequest) -> RunReport:
        """Run `request`. Raises DeviceError with the runner's own line when it fails."""


def write_request(folder: pathlib.Path, request: RunRequest) -> None:
    """Write the token files that `arguments` names."""
    (folder / PROMPT_FILE).write_text(" ".join(map(str, request.prompt)))
    if request.forced is not None:
        (folder / FORCED_FILE).write_text(" ".join(map(str, request.forced)))


def arguments(request: RunRequest, bundle: str, requests: str, results: str) -> list[str]:
    """The runner's arguments: paths as the device sees them, `requests` and `results` being folders."""
    given = [bundle, "--tokens-file", f"{requests}/{PROMPT_FILE}", "--report", f"{results}/{REPORT_FILE}"]
    given += ["--max-new-tokens", str(request.max_new_tokens), "--temperature", repr(request.temperature)]
    given += ["--top-k", str(request.top_k), "--top-p", repr(request.top_p), "--seed", str(request.seed)]
    if request.threads is not None:
        given += ["--threads", str(request.threads)]
    if request.stop_ids is not None:
        given += ["--stop", ",".join(map(str, request.stop_ids))]
    if request.forced is not None:
        given += ["--force-file", f"{requests}/{FORCED_FILE}", "--logits-out", f"{results}/{LOGITS_FILE}"]
    return given


def read_report(folder: pathlib.Path, request: RunRequest, device: str) -> RunReport:
    """The report and logits that a run left in `folder`. Raises DeviceError when they are not what was asked for."""
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
    if request.forced is None:
        return RunReport(values, None)
    rows = len(request.forced) + 1
    raw = np.fromfile(folder / LOGITS_FILE, dtype="<f4")
    if raw.size == 0 or raw.size % rows:
        raise DeviceError(f"{device} gave {raw.size} logits for {rows} positions: run it again")
    return RunReport(values, raw.reshape(rows, -1))


def run_locally(command: Sequence[str], bundle: pathlib.Path, request: RunRequest, device: str) -> RunReport:
    """Run a runner that this machine can start, in a process of its own. Raises DeviceError."""
    with tempfile.TemporaryDirectory(prefix="edgerun-run-") as temporary:
        folder = pathlib.Path(temporary)
        write_request(folder, request)
        run_command([*command, *arguments(request, str(bundle), temporary, temporary)], device)
        return read_report(folder, request, device)


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


def run_command(command: Sequence[str], device: str, timeout_s: float | None = None) -> str:
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
