"""A command in a bounded amount of memory: what it needs is not asked of the command, but enforced by the kernel.

    with memory_box(1_100_000_000) as box:
        done = box.run([...])

In a memory cgroup of its own, version 1 or 2, without swap: page tables and the page cache that the command brings in
count too, and a command that needs more is killed. Where no cgroup can be made, by its address space (RLIMIT_AS), in
which a command's allocations fail: as it holds more than what is in RAM, a run without a limit measures how much more,
and that is added.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

_POLL_SECONDS = 0.002


Command = Sequence[str | pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Boxed:
    """How a command ended."""

    status: int  # exit status; -N: killed by signal N
    output: str
    errors: str
    wall_s: float
    killed: bool  # by the kernel, for memory
    peak_bytes: int | None  # of everything that counts in the cgroup; None: the kernel does not tell
    limit_bytes: int | None  # of the cgroup, or of the address space


class MemoryBox(Protocol):
    """What runs commands."""

    kind: str

    def run(self, command: Command) -> Boxed:
        """Run `command` to its end."""


class NoBox:
    """No limit."""

    kind = "no box"

    def run(self, command: Command) -> Boxed:
        """As MemoryBox says."""
        return Boxed(*_run(list(map(str, command))), False, None, None)


class CgroupBox:
    """A cgroup, made for this and removed at the end."""

    def __init__(self, limit_bytes: int, folder: pathlib.Path, version: int) -> None:
        """folder: of the new cgroup, which is there. Raises OSError when its limits cannot be set."""
        self.limit_bytes, self.folder, self.version, self.kind = limit_bytes, folder, version, f"cgroup v{version}"
        if version == 1:
            (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
            if (folder / "memory.memsw.limit_in_bytes").exists():  # memory and swap together
                (folder / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
            else:
                (folder / "memory.swappiness").write_text("0")
        else:
            (folder / "memory.max").write_text(str(limit_bytes))
            if (folder / "memory.swap.max").exists():
                (folder / "memory.swap.max").write_text("0")

    def run(self, command: Command) -> Boxed:
        """As MemoryBox says. The peak is of this command alone where the kernel lets it be reset."""
        peak = self.folder / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        with contextlib.suppress(OSError):
            peak.write_text("0")
        before = self._kills()
        join = f"echo $$ > '{self.folder}/cgroup.procs' && exec \"$@\""
        status, output, errors, wall_s = _run(["sh", "-c", join, "sh", *map(str, command)])
        peak_bytes = int(peak.read_text()) if peak.exists() else None
        return Boxed(status, output, errors, wall_s, self._kills() > before, peak_bytes, self.limit_bytes)

    def _kills(self) -> int:
        file = self.folder / ("memory.oom_control" if self.version == 1 else "memory.events")
        return sum(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("oom_kill "))


class AddressSpaceBox:
    """RLIMIT_AS."""

    kind = "address space"

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._beyond_bytes: int | None = None  # that an address space holds beyond what is in RAM

    def run(self, command: Command) -> Boxed:
        """As MemoryBox says; the box's first command runs once more, before, to be measured."""
        # The C library reserves 64 MiB for every thread that allocates: as many as the scheduler made of them.
        calm = {"MALLOC_ARENA_MAX": "1"}
        if self._beyond_bytes is None:
            peaks: dict[str, int] = {}
            _run(list(map(str, command)), calm, peaks)
            self._beyond_bytes = peaks["VmPeak"] - peaks["VmHWM"]
        limit = self.limit_bytes + self._beyond_bytes
        bounded = ["sh", "-c", f'ulimit -v {limit // 1024} && exec "$@"', "sh", *map(str, command)]
        status, output, errors, wall_s = _run(bounded, calm)
        return Boxed(status, output, errors, wall_s, False, None, limit)


@contextlib.contextmanager
def memory_box(limit_bytes: int | None, *, cgroups: bool = True) -> Iterator[MemoryBox]:
    """The strictest box that can be had; limit_bytes None: no limit. cgroups: False for RLIMIT_AS in any case."""
    with contextlib.ExitStack() as stack:
        if limit_bytes is None:
            yield NoBox()
        else:
            yield (_cgroup_box(limit_bytes, stack) if cgroups else None) or AddressSpaceBox(limit_bytes)


def _cgroup_box(limit_bytes: int, stack: contextlib.ExitStack) -> CgroupBox | None:
    for version, parent in _parents():
        folder = parent / f"edgerun-{os.getpid()}-{time.monotonic_ns()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        stack.callback(_remove, folder)
        try:
            return CgroupBox(limit_bytes, folder, version)
        except OSError:
            continue
    return None


def _parents() -> Iterator[tuple[int, pathlib.Path]]:
    """Cgroups below which one may be made, with the version of their hierarchy: this process's own, then those above.

    In version 2 a cgroup with processes can have none below it that limits memory, so it is mostly one further up.
    """
    own = {}  # of this process, by controller; version 2 names none
    for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, options = line.split()[:4]
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        controller = "memory" if version == 1 else ""
        if version is None or controller not in own or (version == 1 and "memory" not in options.split(",")):
            continue
        place, top = pathlib.Path(mount + own[controller]), pathlib.Path(mount)
        for parent in (place, *place.parents):
            given = parent / "cgroup.subtree_control"
            if parent.is_dir() and (version == 1 or (given.is_file() and "memory" in given.read_text().split())):
                yield version, parent
            if parent == top:
                break


def _remove(folder: pathlib.Path) -> None:
    for _ in range(100):  # a process that ended is counted for a moment longer
        try:
            return folder.rmdir()
        except OSError:
            time.sleep(0.02)
    folder.rmdir()


def _run(
    command: list[str], environment: dict[str, str] | None = None, peaks: dict[str, int] | None = None
) -> tuple[int, str, str, float]:
    """Status, output, errors and seconds; peaks takes VmPeak and VmHWM as /proc had them last, in bytes."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        begin = time.monotonic()
        child = subprocess.Popen(command, stdout=output, stderr=errors, env={**os.environ, **(environment or {})})
        try:
            while peaks is not None and child.poll() is None:
                with contextlib.suppress(OSError):
                    for line in pathlib.Path(f"/proc/{child.pid}/status").read_text().splitlines():
                        name, _, value = line.partition(":")
                        if name in ("VmPeak", "VmHWM"):
                            peaks[name] = int(value.split()[0]) * 1024
                time.sleep(_POLL_SECONDS)
            status = child.wait()
        finally:
            child.kill()
            child.wait()
        wall_s = time.monotonic() - begin
        output.seek(0)
        errors.seek(0)
        return status, output.read(), errors.read(), wall_s
