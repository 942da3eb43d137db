"""VideoSession: a video bundle, loaded and generating in this process; thin over csrc/runtime/video_session.

    session = VideoSession(Path("model.edgerun"), memory_limit_bytes=10**9)
    clip = session.generate(token_ids, seed=0)
    clip.frames  # uint8 [T, H, W, 3]

Programs stream through what the memory limit leaves. A run that was cancelled can go on later, from its saved state.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from edgerun.errors import EdgerunError
from edgerun.models.solvers import SOLVERS, Solver
from edgerun.ops.native import native_module

Stage = Literal["encode", "denoise", "decode"]
_LEAPS = {"none": 0, "fixed": 1, "cosine": 2}


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, before each call of a chain of programs and at the end."""

    stage: Stage
    done: int  # prompts, steps, or chunks of latents and then calls for frames
    total: int
    evaluations: int  # of the denoiser so far
    time: float  # of the diffusion: 1 is noise, 0 is data
    elapsed_ms: float  # since the run began

    @property
    def fraction(self) -> float:
        """Of the denoising, which takes nearly all of a run: 0 before it, 1 after it."""
        return self.done / self.total if self.stage == "denoise" else float(self.stage == "decode")


@dataclasses.dataclass(frozen=True)
class Leap:
    """When the last velocity is followed to the end (edgerun/techniques/linear_proportional_leap.py)."""

    kind: Literal["none", "fixed", "cosine"]
    evaluations: int = 0  # fixed
    latest_time: float = 0.5  # cosine, as the two below
    tolerance: float = 1e-3
    patience: int = 3


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a run gave."""

    frames: np.ndarray  # uint8 [frames, height, width, 3]; no frames when it was not decoded
    latents: (
        np.ndarray
    )  # float32 [channels, latent frames, height, width]; undefined when cancelled before the last step
    evaluations: int  # of the denoiser, both halves of guidance being one (NFE)
    cancelled: bool
    report: dict[str, Any]  # times and bytes, by stage, step, chain and block


def check_seed(seed: int) -> None:
    """Raises EdgerunError for a seed of the noise that is none."""
    if not 0 <= seed < 2**64:
        raise EdgerunError(f"seed is {seed}; it must be 0 to 2^64 - 1")


class VideoSession:
    """One video bundle. Calls from several threads must not overlap, except `cancel` and `set_memory_limit`."""

    def __init__(
        self,
        bundle: pathlib.Path,
        *,
        threads: int | None = None,
        verify: bool = True,
        prefetch: int = 1,
        memory_limit_bytes: int | None = None,
    ) -> None:
        """Look at `bundle`; programs are loaded when they run.

        prefetch: programs to load while one executes; 0: none. memory_limit_bytes: for all of this process in RAM.
        Raises BundleError for a bundle that is damaged, EdgerunError for a limit below what one program needs.
        """
        if threads is not None and threads < 1:
            raise EdgerunError(f"threads is {threads}; it must be at least 1, or None for the pool as it is")
        if memory_limit_bytes is not None and memory_limit_bytes < 1:
            raise EdgerunError(f"memory_limit_bytes is {memory_limit_bytes}; it must be above 0, or None for no limit")
        self._native = native_module().VideoSession(
            path=str(bundle),
            verify=verify,
            threads=threads or 0,
            prefetch=prefetch,
            memory_limit_bytes=memory_limit_bytes or 0,
        )

    def generate(
        self,
        tokens: Sequence[int],
        *,
        seed: int = 0,
        noise: np.ndarray | None = None,
        guidance: float | None = None,
        times: Sequence[float] | None = None,
        solver: Solver | None = None,
        leap: Leap | None = None,
        merge_steps: int | None = None,
        state: bytes | None = None,
        decode: bool = True,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Clip:
        """Make the clip of the prompt `tokens`, which is encoded, denoised and decoded.

        noise: float32 [channels, latent frames, height, width], instead of the seed's. guidance, times, solver, leap
        and merge_steps stand in for the bundle's own. state: what `state` gave after an earlier run, which goes on;
        tokens, seed and noise are not read then. What `on_progress` raises ends the run and is raised here, as Ctrl-C
        is.
        Raises EdgerunError for a prompt that is empty or too long, and for options out of range.
        """
        check_seed(seed)
        if times is not None and len(times) == 0:
            raise EdgerunError("there are 0 times: give at least one, or None for the bundle's")
        if solver is not None and solver not in SOLVERS:
            raise EdgerunError(f"solver is {solver!r}; choose {' or '.join(SOLVERS)}, or None for the bundle's")

        def tell(stage: Stage, done: int, total: int, evaluations: int, time: float, elapsed_ms: float) -> None:
            if on_progress is not None:
                on_progress(Progress(stage, done, total, evaluations, time, elapsed_ms))

        chosen = (-1, 0, 0.5, 1e-3, 3) if leap is None else (_LEAPS[leap.kind], *dataclasses.astuple(leap)[1:])
        frames, latents, evaluations, cancelled = self._native.generate(
            ids=[int(token) for token in tokens],
            guidance=math.nan if guidance is None else guidance,
            seed=seed,
            noise=None if noise is None else np.ascontiguousarray(noise, dtype=np.float32),
            times=None if times is None else [float(time) for time in times],
            solver=-1 if solver is None else SOLVERS.index(solver),
            leap=chosen,
            merge_steps=-1 if merge_steps is None else merge_steps,
            state=state,
            decode=decode,
            on_progress=tell,
        )
        return Clip(frames, latents, evaluations, cancelled, json.loads(self._native.report()))

    @property
    def state(self) -> bytes:
        """What a cancelled or finished run can go on from, in this machine's byte order; empty: there is nothing."""
        state: bytes = self._native.state()
        return state

    def cancel(self) -> None:
        """End the running call before its next program, from any thread; without one, do nothing."""
        self._native.cancel()

    def set_memory_limit(self, limit_bytes: int) -> None:
        """Another memory limit, from any thread; a run's programs leave memory at the next block.

        Raises EdgerunError, and the old limit stays, when a program would not fit.
        """
        self._native.set_memory_limit(limit_bytes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip."""
        return int(self._native.frames), int(self._native.height), int(self._native.width)

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self._native.fps)

    @property
    def steps(self) -> int:
        """Steps of the bundle's schedule."""
        return int(self._native.steps)

    @property
    def max_tokens(self) -> int:
        """Most tokens of a prompt."""
        return int(self._native.max_tokens)
