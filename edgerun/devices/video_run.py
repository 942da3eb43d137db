"""A run of a video bundle: token ids and perhaps noise go in, raw frames and the latent come back."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from edgerun.devices.runner import PROMPT_FILE, REPORT_FILE, read_json
from edgerun.errors import DeviceError
from edgerun.models.solvers import Solver
from edgerun.sessions.video import Clip, Leap, Progress, Stage, check_seed

NOISE_FILE = "noise.f32"
LATENT_FILE = "latent.f32"
FRAMES_FILE = "frames.u8"
_PROGRESS = re.compile(r"progress (encode|denoise|decode) (\d+) (\d+) (\d+) (\S+) (\S+)\n")


@dataclasses.dataclass(frozen=True)
class VideoRunReport:
    """What a run gave."""

    values: dict[str, Any]  # the runner's JSON report
    clip: Clip  # its report is the session's part of `values`


@dataclasses.dataclass(frozen=True)
class VideoRunRequest:
    """What to run. None: as the bundle has it."""

    tokens: tuple[int, ...]  # of the prompt
    seed: int = 0  # of the noise
    noise: np.ndarray | None = None  # float32 [channels, latent frames, height, width], instead of the seed's
    guidance: float | None = None
    times: tuple[float, ...] | None = None
    solver: Solver | None = None
    leap: Leap | None = None
    merge_steps: int | None = None
    memory_limit_bytes: int | None = None  # for all of the runner's process in RAM; None: no limit
    prefetch: int = 1  # programs to load while one executes
    threads: int | None = None  # None: as many as the processor has good cores
    on_progress: Callable[[Progress], None] | None = None  # what it raises ends the run

    def __post_init__(self) -> None:
        """Raises EdgerunError for a seed that is none."""
        check_seed(self.seed)

    def write(self, folder: pathlib.Path) -> None:
        """The prompt's tokens and the noise."""
        (folder / PROMPT_FILE).write_text(" ".join(map(str, self.tokens)))
        if self.noise is not None:
            np.ascontiguousarray(self.noise, dtype="<f4").tofile(folder / NOISE_FILE)

    def arguments(self, requests: str, results: str) -> list[str]:
        """As Request's."""
        given = ["--tokens-file", f"{requests}/{PROMPT_FILE}", "--report", f"{results}/{REPORT_FILE}", "--progress"]
        given += ["--latent-out", f"{results}/{LATENT_FILE}", "--frames-out", f"{results}/{FRAMES_FILE}"]
        given += ["--seed", str(self.seed), "--prefetch", str(self.prefetch)]
        if self.noise is not None:
            given += ["--noise-file", f"{requests}/{NOISE_FILE}"]
        if self.times is not None:
            given += ["--times", ",".join(repr(float(time)) for time in self.times)]
        if self.solver is not None:
            given += ["--solver", self.solver]
        if self.leap is not None:
            given += ["--leap", _leap_text(self.leap)]
        optional = {
            "--guidance": self.guidance,
            "--merge-steps": self.merge_steps,
            "--memory-limit": self.memory_limit_bytes,
            "--threads": self.threads,
        }
        for name, value in optional.items():
            given += [] if value is None else [name, repr(value)]
        return given

    def read(self, folder: pathlib.Path, device: str) -> VideoRunReport:
        """Report, frames and latent. Raises DeviceError."""
        values = read_json(folder, device)
        frames = _read_array(folder / FRAMES_FILE, np.uint8, values.get("frames"), device)
        latents = _read_array(folder / LATENT_FILE, "<f4", values.get("latent"), device)
        run = values["run"]
        return VideoRunReport(values, Clip(frames, latents, int(run["evaluations"]), False, run))

    def hear(self, line: str) -> bool:
        """A line of `edgerun-runner --progress`."""
        match = _PROGRESS.fullmatch(line)
        if match is None:
            return False
        if self.on_progress is not None:
            done, total, evaluations = (int(match[group]) for group in (2, 3, 4))
            stage = cast(Stage, match[1])
            self.on_progress(Progress(stage, done, total, evaluations, float(match[5]), float(match[6])))
        return True


def _leap_text(leap: Leap) -> str:
    if leap.kind == "fixed":
        return f"fixed:{leap.evaluations}"
    return "none" if leap.kind == "none" else f"cosine:{leap.latest_time!r},{leap.tolerance!r},{leap.patience}"


def _read_array(path: pathlib.Path, dtype: npt.DTypeLike, shape: Any, device: str) -> np.ndarray:
    try:
        return np.fromfile(path, dtype=dtype).reshape(shape)
    except (OSError, ValueError, TypeError) as error:
        raise DeviceError(f"{device}: {path.name} is not of the shape {shape} ({error}): run it again") from None
