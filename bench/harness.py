"""How every benchmark of bench/ measures: candidates in turn, raw samples kept, results written row by row.

Candidates of one row run one after the other, round after round, so that whatever else the machine does falls on all of
them; ratios are taken within a row only. A row goes to disk as soon as it is complete: the same command goes on from
there after a stop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from edgerun.errors import ParityError
from edgerun.machine import package_versions, this_machine
from edgerun.report import write_whole

SCHEMA_VERSION = 1
ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# What the figures depend on: a change there starts a result file anew.
_MEASURED = (
    "csrc",
    "edgerun",
    "export",
    "bench/harness.py",
    "bench/memory_box.py",
    "bench/ops",
    "bench/peers",
    "bench/workloads",
)
_PEER_PACKAGES = ("onnxruntime", "llama-cpp-cffi")

Row = dict[str, Any]  # {"kind", ..., "candidates": [Samples.to_json(), ...]}: plain JSON


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a row is measured: `repeats` rounds, or fewer once it took `row_seconds`, but `least` in any case."""

    repeats: int = 9
    row_seconds: float = 120.0
    least: int = 3


@dataclasses.dataclass
class Candidate:
    """One way to do a row's work. `facts` goes into the results as it is after the row was measured.

    cycle: where runs differ in turn, so many of them are one measurement, their mean; a row has that many at least.
    before: run before each run, not timed.
    """

    name: str
    run: Callable[[], object]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    cycle: int = 1
    before: Callable[[], object] | None = None


@dataclasses.dataclass(frozen=True)
class Samples:
    """Every run of one candidate: wall time of a monotonic clock, and CPU time of all threads."""

    name: str
    wall_ms: list[float]
    cpu_ms: list[float]
    facts: dict[str, Any]
    cycle: int = 1

    def to_json(self, baseline: Samples) -> dict[str, Any]:
        """The samples with what is derived from them; a ratio above 1 means faster than the row's baseline."""
        wall, cpu = _means(self.wall_ms, self.cycle), _means(self.cpu_ms, self.cycle)
        baseline_wall, baseline_cpu = (_means(ms, baseline.cycle) for ms in (baseline.wall_ms, baseline.cpu_ms))
        return {
            "name": self.name,
            **self.facts,
            **({"cycle": self.cycle} if self.cycle > 1 else {}),
            "median_ms": statistics.median(wall),
            "minimum_ms": min(wall),
            "spread_ms": statistics.pstdev(wall),
            "cpu_median_ms": statistics.median(cpu),
            "speed_by_median": statistics.median(baseline_wall) / statistics.median(wall),
            "speed_by_minimum": min(baseline_wall) / min(wall),
            "speed_by_cpu_minimum": min(baseline_cpu) / min(cpu) if min(cpu) > 0 else None,
            "wall_ms": self.wall_ms,
            "cpu_ms": self.cpu_ms,
        }


def _means(samples: Sequence[float], cycle: int) -> list[float]:
    """The mean of every `cycle` samples in a row."""
    return [statistics.fmean(samples[i : i + cycle]) for i in range(0, len(samples) - cycle + 1, cycle)]


def prove(name: str, error: float, limit: float) -> None:
    """Raises ParityError, so that nothing of the row is timed, when a candidate's answer is wrong."""
    if not error <= limit:
        raise ParityError(f"{name}: relative L2 error {error:.2e} is above {limit:.2e}; nothing of this row was timed")


def measure(candidates: Sequence[Candidate], effort: Effort) -> list[dict[str, Any]]:
    """Samples of all candidates, the first being the baseline. Every candidate must have run before: that warms up."""
    wall: list[list[float]] = [[] for _ in candidates]
    cpu: list[list[float]] = [[] for _ in candidates]
    begin = time.monotonic()
    least = max([effort.least, *(candidate.cycle for candidate in candidates)])
    for done in range(max(effort.repeats, least)):
        if done >= least and time.monotonic() - begin > effort.row_seconds:
            break
        for index, candidate in enumerate(candidates):
            if candidate.before is not None:
                candidate.before()
            cpu_start, start = time.process_time(), time.perf_counter()
            candidate.run()
            stop, cpu_stop = time.perf_counter(), time.process_time()
            wall[index].append((stop - start) * 1e3)
            cpu[index].append((cpu_stop - cpu_start) * 1e3)
    samples = [
        Samples(candidate.name, wall[index], cpu[index], candidate.facts, candidate.cycle)
        for index, candidate in enumerate(candidates)
    ]
    return [one.to_json(samples[0]) for one in samples]


def geometric_mean(values: Iterable[float]) -> float | None:
    """None for no values."""
    logarithms = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logarithms)) if logarithms else None


class ResultFile:
    """A benchmark's JSON file: what it was made on, and its rows. `None` as path keeps everything in memory."""

    def __init__(self, path: pathlib.Path | None, command: str, settings: dict[str, Any], *, fresh: bool) -> None:
        self.path = path
        self.header: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "command": command,
            "commit": commit(),
            "machine": dataclasses.asdict(this_machine()),
            "peers": package_versions(_PEER_PACKAGES),
            "settings": settings,
        }
        self.rows: list[Row] = []
        self.continued = False
        if not fresh and path is not None and path.is_file():
            self._take(json.loads(path.read_text(encoding="utf-8")))

    def find(self, key: dict[str, Any]) -> Row | None:
        """The row with these values, if it was measured already."""
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: Row) -> None:
        """Keep a complete row, on disk too. Raises OSError when the file cannot be written."""
        self.rows.append({**row, "load_average_at_end": os.getloadavg()[0]})
        self.write()

    def write(self) -> None:
        """Write the file whole."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps({**self.header, "rows": self.rows}, indent=1) + "\n")

    def _take(self, found: dict[str, Any]) -> None:
        """Go on with the rows of a file that the same code wrote, on this machine, with the same settings."""
        found.setdefault("rows", [])
        same = ("schema_version", "commit", "machine", "peers", "settings")
        plain = json.loads(json.dumps(self.header))
        if all(found.get(name) == plain[name] for name in same):
            self.rows, self.continued = found["rows"], True


def commit() -> str | None:
    """The commit that is measured, with "+" and a hash of the changes when there are some; None outside a clone."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    changes = f"{_git('status', '--porcelain', '--', *_MEASURED)}{_git('diff', 'HEAD', '--', *_MEASURED)}"
    return head + (f"+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else "")


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
