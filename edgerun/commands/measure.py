"""Runs of a bundle on a device, and what a table wants to know of them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgerun.errors import EdgerunError

if TYPE_CHECKING:
    import tokenizers

    from edgerun.devices import Device
    from edgerun.sessions.text import TextStats


@dataclasses.dataclass(frozen=True)
class Timing:
    """One run in the units of a table; None where the run did not have it."""

    prompt_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s_per_token: float | None
    load_s: float
    peak_rss_bytes: int | None
    density: float | None  # attended of causal pairs, 0..1

    @property
    def sparse(self) -> bool:
        """Whether the run attended less than dense attention would have."""
        return self.density is not None and self.density < 1.0


def timing(values: dict[str, Any]) -> Timing:
    """What a runner's report says, in seconds. The first token comes with the prefill: n tokens take n - 1 steps."""
    stats = values["stats"]
    generated = int(stats["generated_tokens"])
    decode_s = (stats["inference_end_ms"] - stats["prompt_eval_end_ms"]) / 1e3
    causal = values["causal_pairs"]
    return Timing(
        prompt_tokens=int(stats["prompt_tokens"]),
        generated_tokens=generated,
        prefill_s=(stats["prompt_eval_end_ms"] - stats["inference_start_ms"]) / 1e3,
        decode_s_per_token=decode_s / (generated - 1) if generated > 1 else None,
        load_s=(stats["model_load_end_ms"] - stats["model_load_start_ms"]) / 1e3,
        peak_rss_bytes=values["peak_rss_bytes"],
        density=values["attended_pairs"] / causal if causal else None,
    )


def timing_of_session(stats: TextStats) -> Timing:
    """What a session in this process says, in seconds; its peak RSS is this whole process's, so it is left out."""
    values = dataclasses.asdict(stats)
    return timing({**values, "stats": values, "peak_rss_bytes": None})


def generate_on(
    device: Device,
    bundle: pathlib.Path,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    threads: int | None = None,
    stop_ids: tuple[int, ...] | None = None,
) -> tuple[Timing, list[int]]:
    """Greedy tokens from a device, and what they cost; stop_ids None: the bundle's own end tokens."""
    from edgerun.devices import RunRequest

    request = RunRequest(prompt=tuple(prompt), max_new_tokens=max_new_tokens, stop_ids=stop_ids, threads=threads)
    report = device.run(bundle, request)
    return timing(report.values), report.tokens


def force_on(
    device: Device, bundle: pathlib.Path, prompt: Sequence[int], forced: Sequence[int], *, threads: int | None = None
) -> tuple[Timing, npt.NDArray[np.float32]]:
    """Logits float32 [forced + 1, vocab] from a device: after the prompt and each forced token; and what they cost."""
    from edgerun.devices import RunRequest

    report = device.run(bundle, RunRequest(prompt=tuple(prompt), forced=tuple(forced), threads=threads))
    assert report.logits is not None
    return timing(report.values), report.logits


def encode_prompt(tokenizer: tokenizers.Tokenizer, text: str, max_context: int) -> list[int]:
    """Token ids of a prompt. Raises EdgerunError when it is empty or longer than the context."""
    if not text:
        raise EdgerunError("the prompt is empty: give at least one character")
    ids: list[int] = tokenizer.encode(text).ids
    if len(ids) >= max_context:
        raise EdgerunError(
            f"the prompt has {len(ids):,} tokens; the bundle's context holds {max_context:,} with the answer: "
            "shorten the prompt, or export with a larger --max-context"
        )
    return ids
