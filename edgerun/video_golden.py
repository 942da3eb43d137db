"""VideoGolden: a short run of a video model, made by its own modules in torch, that every device is judged by."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from edgerun.bundle import Bundle
from edgerun.errors import BundleError
from edgerun.models.solvers import SOLVERS, Solver


@dataclasses.dataclass(frozen=True)
class VideoGolden:
    """A prompt and noise, and what a few steps without a leap make of them, with the bundle's guidance and solver."""

    tokens: np.ndarray  # int64 [n], of the prompt
    noise: np.ndarray  # float32 [C, T, h, w]
    times: np.ndarray  # float64 [steps], from 1 down
    merge_steps: int  # first steps with merged frames
    solver: Solver
    latents: np.ndarray  # float32 [C, T, h, w], after the steps
    frames: np.ndarray  # uint8 [f, H, W, 3], the first of the clip that the latents decode to

    def save(self, path: pathlib.Path) -> None:
        """Write as safetensors."""
        from safetensors.numpy import save

        numbers = {"merge_steps": self.merge_steps, "solver": SOLVERS.index(self.solver)}
        tensors = vars(self) | {name: np.array([value]) for name, value in numbers.items()}
        path.write_bytes(save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))

    @staticmethod
    def load(path: pathlib.Path) -> VideoGolden:
        """Read what `save` wrote. Raises BundleError for anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(path.read_bytes())
            values: dict[str, Any] = {field.name: tensors[field.name] for field in dataclasses.fields(VideoGolden)}
            merge_steps, solver = (int(tensors[name].item()) for name in ("merge_steps", "solver"))
            return VideoGolden(**values | {"merge_steps": merge_steps, "solver": SOLVERS[solver]})
        except (OSError, SafetensorError, LookupError, ValueError) as error:
            raise BundleError(f"golden case {path} cannot be read ({error}): export the bundle again") from None


def golden_of(bundle: Bundle) -> VideoGolden:
    """A video bundle's golden case. Raises BundleError where there is none, or it cannot be read."""
    cases = bundle.manifest["golden"]
    if not cases:
        raise BundleError(f"{bundle.path} has no golden case, so nothing can be checked: export it again")
    return VideoGolden.load(bundle.path / str(cases[0]["file"]))
