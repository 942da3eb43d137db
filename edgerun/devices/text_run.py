"""A run of a text bundle: token ids go in, tokens and, where some were forced, raw logits come back."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from edgerun.devices.runner import PROMPT_FILE, REPORT_FILE, read_json
from edgerun.errors import DeviceError

FORCED_FILE = "forced.txt"
LOGITS_FILE = "logits.f32"


@dataclasses.dataclass(frozen=True)
class RunReport:
    """What a run gave."""

    values: dict[str, Any]  # the runner's JSON report
    logits: np.ndarray | None  # float32 [forced + 1, vocab] when tokens were forced

    @property
    def tokens(self) -> list[int]:
        """The tokens generated, or forced."""
        return list(self.values["tokens"])


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

    def write(self, folder: pathlib.Path) -> None:
        """The token files."""
        (folder / PROMPT_FILE).write_text(" ".join(map(str, self.prompt)))
        if self.forced is not None:
            (folder / FORCED_FILE).write_text(" ".join(map(str, self.forced)))

    def arguments(self, requests: str, results: str) -> list[str]:
        """As Request's."""
        given = ["--tokens-file", f"{requests}/{PROMPT_FILE}", "--report", f"{results}/{REPORT_FILE}"]
        given += ["--max-new-tokens", str(self.max_new_tokens), "--temperature", repr(self.temperature)]
        given += ["--top-k", str(self.top_k), "--top-p", repr(self.top_p), "--seed", str(self.seed)]
        if self.threads is not None:
            given += ["--threads", str(self.threads)]
        if self.stop_ids is not None:
            given += ["--stop", ",".join(map(str, self.stop_ids))]
        if self.forced is not None:
            given += ["--force-file", f"{requests}/{FORCED_FILE}", "--logits-out", f"{results}/{LOGITS_FILE}"]
        return given

    def read(self, folder: pathlib.Path, device: str) -> RunReport:
        """The report and the logits. Raises DeviceError."""
        values = read_json(folder, device)
        if self.forced is None:
            return RunReport(values, None)
        rows = len(self.forced) + 1
        raw = np.fromfile(folder / LOGITS_FILE, dtype="<f4")
        if raw.size == 0 or raw.size % rows:
            raise DeviceError(f"{device} gave {raw.size} logits for {rows} positions: run it again")
        return RunReport(values, raw.reshape(rows, -1))

    def hear(self, line: str) -> bool:
        """A text run says nothing on its way."""
        return False
