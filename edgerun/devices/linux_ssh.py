"""A Linux board over ssh: runner, libraries and bundle are copied once per build, then a run is one connection.

On the board everything lies below ${XDG_CACHE_HOME:-$HOME/.cache}/edgerun, in folders named by the sha256 of what they
hold; a folder gets its name when it is complete. The board needs Linux on arm64 or x86-64, sh, tar and libstdc++.
A run lives as long as its connection: when that ends, as by Ctrl-C here, the board ends the runner.
Host keys are ssh's own business (known_hosts); nothing here asks for a password.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from typing import IO

from edgerun._library import executorch_library_folder, op_library_path, runner_path, runtime_library_path
from edgerun.bundle import MANIFEST, sha256_of
from edgerun.devices import runner
from edgerun.devices.emulated_arm64 import arm64_folder, arm64_runner
from edgerun.devices.runner import Report, Request
from edgerun.errors import BundleError, DeviceError

CONFIG_VARIABLE = "EDGERUN_SSH_CONFIG"  # an ssh_config file instead of the user's own
CONNECT_TIMEOUT_S = 10
COMMAND_TIMEOUT_S = 60.0

_Files = Sequence[tuple[pathlib.Path, str]]  # (file here, its path below the folder there)

_EXECUTORCH_LIBRARIES = ("", "_threadpool", "_kernels_optimized", "_backend_xnnpack")
_COMPLETE = ".complete"  # the last member of every copy: a connection that breaks does not bring it
_CACHE = '"${XDG_CACHE_HOME:-$HOME/.cache}"/edgerun'
_SSH_FAILED = 255
# What ssh says, and what to do about it.
_SSH_ADVICE = (
    ("Could not resolve", "check the name, or use its address"),
    ("Connection refused", "start sshd there, or give its port as ssh:HOST:PORT"),
    ("timed out", "is it on, and on this network?"),
    ("No route to host", "is it on, and on this network?"),
    ("IDENTIFICATION HAS CHANGED", "make sure that it is the same board, then `ssh-keygen -R` its name"),
    ("Host key verification failed", "connect once with `ssh` to accept its key"),
    ("Permission denied", "put your public key there with `ssh-copy-id`"),
)
_ADDRESS = re.compile(
    r"(?P<user>[^@\s-][^@\s]*@)?(?:\[(?P<bracketed>[0-9a-zA-Z:.%]+)\]|(?P<host>[^\s:\[\]@-][^\s:\[\]@]*))(?::(?P<port>\d{1,5}))?"
)
_PROBE_SCRIPT = f"uname -s -m; ls {_CACHE} 2>/dev/null || true"
_INSTALL_SCRIPT = f"""set -e
umask 077
mkdir -p {_CACHE}
work=$(mktemp -d {_CACHE}/partial.XXXXXX)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
tar -xf - -C "$work"
test -f "$work/{_COMPLETE}"
test -d {_CACHE}/NAME || mv "$work" {_CACHE}/NAME
"""
# What comes in is BYTES of files; then the input stays open, and its end says that nobody waits any more.
_RUN_SCRIPT = """set -e
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"
mkdir in out
head -c BYTES | tar -xf - -C in
exec 3<&0
COMMAND </dev/null 3<&- &
runner=$!
{ cat <&3 >/dev/null; kill $runner; } >/dev/null 2>&1 &
watcher=$!
wait $runner || { status=$?; exec 2>/dev/null; kill $watcher; exit $status; }
kill $watcher
tar -cf - -C out .
"""


@dataclasses.dataclass(frozen=True)
class _BoardState:
    machine: str  # as uname says
    folders: frozenset[str]  # complete copies in its cache


@dataclasses.dataclass(frozen=True)
class LinuxSshDevice:
    """A board. `host` as ssh takes it: a name, an address or an alias of the ssh configuration, perhaps with USER@."""

    host: str
    port: int | None = None
    config: pathlib.Path | None = None  # an ssh_config file; None: $EDGERUN_SSH_CONFIG, else the user's own

    @staticmethod
    def parse(text: str) -> LinuxSshDevice:
        """[USER@]HOST[:PORT], an IPv6 address in brackets. Raises DeviceError."""
        match = _ADDRESS.fullmatch(text)
        port = int(match["port"]) if match and match["port"] else None
        if match is None or (port is not None and not 1 <= port <= 65535):
            raise DeviceError(f"'ssh:{text}' names no board: use ssh:[USER@]HOST[:PORT], an IPv6 address in brackets")
        return LinuxSshDevice((match["user"] or "") + (match["bracketed"] or match["host"]), port)

    @property
    def name(self) -> str:
        """As `open_device` takes it."""
        user, at, host = self.host.rpartition("@")
        return f"ssh:{user}{at}" + (f"[{host}]" if ":" in host else host) + (f":{self.port}" if self.port else "")

    def describe(self) -> dict[str, object]:
        """What the board is; copies the runner there. Raises DeviceError when a bundle cannot run there now."""
        command = f"{self._install_runtime(self._probe())}/edgerun/bin/edgerun-runner --describe"
        return runner.parse_description(self._shell(command, timeout_s=COMMAND_TIMEOUT_S).decode(), self.name)

    def run(self, bundle: pathlib.Path, request: Request[Report]) -> Report:
        """Run `request` on the board; copies there what it lacks. Raises DeviceError, or BundleError for no bundle."""
        state = self._probe()
        remote_bundle = self._install_bundle(state, pathlib.Path(bundle))
        options = shlex.join(request.arguments("in", "out"))
        command = f"{self._install_runtime(state)}/edgerun/bin/edgerun-runner {remote_bundle} {options}"
        with tempfile.TemporaryDirectory(prefix="edgerun-ssh-") as temporary:
            folder = pathlib.Path(temporary)
            (folder / "in").mkdir()
            request.write(folder / "in")
            given = io.BytesIO()
            _write_tar(given, [(file, file.name) for file in sorted((folder / "in").iterdir())])
            script = _RUN_SCRIPT.replace("BYTES", str(len(given.getvalue()))).replace("COMMAND", command)
            answer = self._shell(script, lambda stream: stream.write(given.getvalue()), hear=request.hear)
            with tarfile.open(fileobj=io.BytesIO(answer)) as archive:
                archive.extractall(folder / "out", filter="data")
            return request.read(folder / "out", self.name)

    def _install_runtime(self, state: _BoardState) -> str:
        files = _runtime_files(state.machine, self.name)
        digest = hashlib.sha256("".join(f"{name} {sha256_of(file)}\n" for file, name in files).encode())
        return self._install(state, f"runtime-{digest.hexdigest()[:32]}", files)

    def _install_bundle(self, state: _BoardState, bundle: pathlib.Path) -> str:
        manifest = bundle / MANIFEST  # holds the sha256 of every other file
        if not manifest.is_file():
            raise BundleError(f"{bundle} is not a bundle: it has no {MANIFEST}; make one with `edgerun export`")
        files = [(file, file.relative_to(bundle).as_posix()) for file in sorted(bundle.rglob("*")) if file.is_file()]
        return self._install(state, f"bundle-{sha256_of(manifest)[:32]}", files)

    def _install(self, state: _BoardState, name: str, files: _Files) -> str:
        """Copy `files` to the board's folder `name` unless it is there; its path, quoted for the board's shell."""
        if name not in state.folders:
            self._shell(_INSTALL_SCRIPT.replace("NAME", name), lambda stream: _write_tar(stream, files))
        return f"{_CACHE}/{name}"

    def _probe(self) -> _BoardState:
        answer = self._shell(_PROBE_SCRIPT, timeout_s=COMMAND_TIMEOUT_S).decode(errors="replace").splitlines()
        words = answer[0].split() if answer else []
        if len(words) == 2 and words[0] == "Linux":
            return _BoardState(words[1], frozenset(answer[1:]))
        raise DeviceError(f"{self.name} says it is {' '.join(words)!r}: only Linux boards can be used over ssh")

    def _command(self) -> list[str]:
        if shutil.which("ssh") is None:
            raise DeviceError(f"{self.name}: ssh is not installed: apt install openssh-client")
        config = self.config or os.environ.get(CONFIG_VARIABLE)
        command = ["ssh", *(["-F", str(config)] if config else []), *(["-p", str(self.port)] if self.port else [])]
        command += ["-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}"]
        return [*command, "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4", "--", self.host]

    def _shell(
        self,
        script: str,
        send: Callable[[IO[bytes]], object] | None = None,
        timeout_s: float | None = None,
        hear: Callable[[str], bool] | None = None,
    ) -> bytes:
        """Standard output of a shell script on the board, which reads what `send` writes. Raises DeviceError.

        hear: gets the lines of the script's standard error, as Request's; the script's input then stays open.
        """
        command = [*self._command(), f"sh -c {shlex.quote(script)}"]
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=errors if hear is None else subprocess.PIPE
            )
            assert process.stdin is not None
            try:
                with contextlib.suppress(BrokenPipeError):  # one that ends early says on its standard error why
                    if send is not None:
                        send(process.stdin)
                    process.stdin.flush()
                if hear is None:
                    _close(process.stdin)
                    process.wait(timeout_s)
                    errors.seek(0)
                    error_text = errors.read().decode(errors="replace")
                else:
                    error_text = runner.listen(process, hear)
            except subprocess.TimeoutExpired:
                raise DeviceError(f"{self.name} did not answer within {timeout_s:.0f} s: is it overloaded?") from None
            finally:
                _close(process.stdin)
                runner.stop(process)
            if process.returncode == _SSH_FAILED:
                raise DeviceError(_ssh_failure(self.name, error_text))
            if process.returncode != 0:
                raise DeviceError(runner.failure(self.name, process.returncode, error_text))
            output.seek(0)
            return output.read()


def _close(stream: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def _write_tar(stream: IO[bytes], files: _Files) -> None:
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
        for file, name in files:
            archive.add(file.resolve(), arcname=name, recursive=False)
        archive.addfile(tarfile.TarInfo(_COMPLETE))


def _runtime_files(machine: str, device: str) -> list[tuple[pathlib.Path, str]]:
    """What the runner needs on a machine of that kind. Raises DeviceError when we cannot serve it."""
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
    if (platform.system(), platform.machine()) == ("Linux", machine):
        ours, executorch = [op_library_path(), runtime_library_path()], executorch_library_folder()
        program = runner_path()
    elif machine == "aarch64":
        folder = arm64_folder()
        program = arm64_runner()
        ours = [folder / "edgerun/lib/libedgerun_ops.so", folder / "edgerun/lib/libedgerun.so"]
        executorch = folder / "executorch/lib"
    else:
        raise DeviceError(
            f"{device} is a {machine}: from this {platform.machine()}, boards with arm64 (aarch64) can be served, "
            f"and Linux boards of its own kind"
        )
    theirs = [executorch / f"libexecutorch{part}.so" for part in _EXECUTORCH_LIBRARIES]
    files = [(program, "edgerun/bin/edgerun-runner"), *((file, f"edgerun/lib/{file.name}") for file in ours)]
    files += [(file, f"executorch/lib/{file.name}") for file in theirs]
    for file, _ in files:
        if not file.is_file():
            raise DeviceError(f"{device}: {file} is missing here: build again, for arm64 boards with `make arm64`")
    return files


def _ssh_failure(device: str, error_text: str) -> str:
    lines = [line.strip() for line in error_text.splitlines() if line.strip().strip("@")]
    said = lines[-1] if lines else "ssh gave no reason"
    advice = next((advice for pattern, advice in _SSH_ADVICE if pattern in error_text), "try `ssh` to it by hand")
    return f"{device} cannot be reached ({said}): {advice}"
