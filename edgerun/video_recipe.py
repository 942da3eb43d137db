"""VideoRecipe: every choice that shapes a video bundle. Frozen; its hash names the build."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any, Literal

from edgerun.errors import ExportError
from edgerun.models.solvers import SOLVERS, Solver
from edgerun.techniques.temporal_token_merging import PAPER_PARTS, PARTS


@dataclasses.dataclass(frozen=True)
class VideoRecipe:
    """Everything that decides what a video bundle computes. None: as the checkpoint's video.json has it."""

    frames: int | None = None
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    steps: int | None = None  # of the sampler
    guidance: float | None = None
    solver: Solver = "euler"
    leap: Literal["none", "fixed", "cosine"] = "none"  # linear proportional leap
    leap_evaluations: int = 0  # fixed: leap after so many
    leap_latest_time: float = 0.5  # cosine: no leap while the time is above it
    leap_tolerance: float = 1e-3
    leap_patience: int = 3
    merge_steps: int = 0  # temporal token merging in so many first steps
    merge_parts: tuple[str, ...] = PAPER_PARTS  # of temporal_token_merging.PARTS; only with merging
    merge_alone: Literal["first", "last"] = "first"  # the frame of an odd count that is not merged
    merge_possible: bool = False  # programs that can merge although merge_steps is 0
    pairs_per_program: int = 1  # of the denoiser's spatial and temporal blocks
    max_prompt_tokens: int | None = None
    quantize: Literal["none", "int8"] = "none"  # linear layers and token table of text encoder and denoiser
    frames_per_call: int | None = None  # decoded at once, at most a chunk's; None: as many as their size allows

    def __post_init__(self) -> None:
        """Raise ExportError for a value out of its range."""
        sizes = ("frames", "height", "width", "max_prompt_tokens", "frames_per_call")
        for name in (*sizes, "steps", "pairs_per_program", "leap_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ExportError(f"{name} is {value}; it must be at least 1")
        numbers = (self.guidance, self.leap_latest_time, self.leap_tolerance)
        if not all(math.isfinite(number) for number in numbers if number is not None):
            raise ExportError(f"guidance, leap_latest_time and leap_tolerance are {numbers}; they must be finite")
        if self.leap not in ("none", "fixed", "cosine") or self.merge_alone not in ("first", "last"):
            raise ExportError(
                f"leap is {self.leap!r} and merge_alone {self.merge_alone!r}; choose none, fixed or cosine, "
                "and first or last"
            )
        if self.solver not in SOLVERS:
            raise ExportError(f"solver is {self.solver!r}; choose {' or '.join(SOLVERS)}")
        if self.leap == "fixed" and self.leap_evaluations < 1:
            raise ExportError(f"a fixed leap after {self.leap_evaluations} evaluations; give at least 1")
        if self.quantize not in ("none", "int8"):
            raise ExportError(f"quantize is {self.quantize!r}; a video model's weights can be none or int8")
        if not 0.0 < self.leap_latest_time <= 1.0:
            raise ExportError(f"leap_latest_time is {self.leap_latest_time}; it must be above 0 and at most 1")
        if self.merge_steps < 0:
            raise ExportError(f"merge_steps is {self.merge_steps}; it must be 0 or above")
        unknown = sorted(set(self.merge_parts) - set(PARTS))
        if unknown or not self.merge_parts:
            raise ExportError(f"merge_parts are {list(self.merge_parts)}; choose of {', '.join(PARTS)}")

    @property
    def merges(self) -> bool:
        """Whether the programs can merge frames."""
        return self.merge_steps > 0 or self.merge_possible

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "merge_parts": list(self.merge_parts)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> VideoRecipe:
        """The recipe that a manifest stores."""
        return VideoRecipe(**{**values, "merge_parts": tuple(values["merge_parts"])})

    def hash(self, checkpoint_hash: str) -> str:
        """sha256 (hex) over this recipe and the checkpoint it is applied to: the identity of a build."""
        text = json.dumps({"kind": "video", "recipe": self.to_json(), "checkpoint": checkpoint_hash}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
