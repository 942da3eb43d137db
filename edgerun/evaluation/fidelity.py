"""Teacher-forced fidelity: the same tokens go through two models, and their logits are held against each other.

Row 0 of the logits follows the prompt, row i the i-th forced token: k forced tokens give k + 1 rows. Where the forced
tokens are the reference's own greedy ones, the first row whose largest logit differs is where free greedy runs part.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgerun import compare
from edgerun.compare import Divergence
from edgerun.recipe import Recipe
from edgerun.report import Check

if TYPE_CHECKING:
    from edgerun.models.causal_lm import CausalLM


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How far measured logits are from the reference's, over `rows` positions."""

    rows: int
    relative_l2: float
    nmse: float
    mean_kl_nats: float
    max_kl_nats: float
    top1: float  # fraction of rows with the same largest logit
    divergence: Divergence | None  # the first row where it differs


def measure(measured: npt.ArrayLike, reference: npt.ArrayLike) -> Fidelity:
    """Logits [rows, vocab] of both -> their fidelity. Raises ParityError for other shapes or values not finite."""
    a, b = np.asarray(measured, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    kl = compare.kl_divergence(a, b)
    return Fidelity(
        rows=len(b),
        relative_l2=compare.relative_l2(a, b),
        nmse=compare.nmse(a, b),
        mean_kl_nats=float(kl.mean()),
        max_kl_nats=float(kl.max()),
        top1=compare.top1_agreement(a, b),
        divergence=compare.first_divergence(a.argmax(axis=-1).tolist(), b.argmax(axis=-1).tolist(), b),
    )


def checks(fidelity: Fidelity, recipe: Recipe, *, sparse: bool, label: str = "") -> tuple[Check, ...]:
    """The gates of edgerun/compare.py that a program of this recipe must pass against its own eager model.

    sparse: whether the run attended fewer keys than dense attention would; a sparse recipe on a short prompt does not.
    """
    names: tuple[str | None, str, str, str]
    if recipe.quantize != "none":
        names = (
            "quantized_parity_logits",
            "quantized_parity_kl_nats",
            "quantized_parity_top1",
            "greedy_margin_reduced",
        )
    elif recipe.dtype == "fp16" or recipe.kv_dtype in ("fp16", "int8"):
        names = ("logits_fp16", "kl_fp16_nats", "top1_fp16", "greedy_margin_reduced")
    elif sparse:
        names = (None, "sparse_kl_nats", "sparse_top1", "greedy_margin")
    else:
        names = ("logits_fp32", "kl_fp32_nats", "top1_fp32", "greedy_margin")
    parting = fidelity.divergence
    margin = 0.0 if parting is None else parting.margin
    where = "same greedy tokens" if parting is None else f"greedy tokens part at step {parting.step}"
    measured = (
        ("relative L2 of logits", fidelity.relative_l2, ""),
        ("mean KL, nats", fidelity.mean_kl_nats, f"largest {fidelity.max_kl_nats:.2e}"),
        ("top-1 agreement", fidelity.top1, f"{fidelity.rows} positions"),
        ("top-2 margin at first divergence", margin, where),
    )
    return tuple(
        _check(f"{label}{name}", value, limit, detail)
        for (name, value, detail), limit in zip(measured, names, strict=True)
        if limit is not None
    )


def eager_logits(
    model: CausalLM, prompt: Sequence[int], forced: Sequence[int], prefill_slice: int
) -> npt.NDArray[np.float32]:
    """Logits [len(forced) + 1, vocab] of an eager model: after the prompt, fed in slices, and each forced token."""
    rows = [_prefill(model, prompt, prefill_slice)]
    rows += [_feed(model, [token], len(prompt) + offset) for offset, token in enumerate(forced)]
    return np.stack(rows)


@dataclasses.dataclass(frozen=True)
class GreedyRun:
    """Tokens that a model chose greedily, the one it ended with included, and the logits it chose each from."""

    tokens: tuple[int, ...]
    logits: npt.NDArray[np.float32]  # [len(tokens), vocab]
    prefill_s: float
    decode_s: float


def greedy(
    model: CausalLM, prompt: Sequence[int], *, max_new_tokens: int, ends: Collection[int], prefill_slice: int
) -> GreedyRun:
    """Greedy decoding of an eager model until a token of `ends` or max_new_tokens (at least 1)."""
    begin = time.monotonic()
    rows = [_prefill(model, prompt, prefill_slice)]
    prefilled = time.monotonic()
    tokens = [int(rows[0].argmax())]
    while tokens[-1] not in ends and len(tokens) < max_new_tokens:
        rows.append(_feed(model, tokens[-1:], len(prompt) + len(tokens) - 1))
        tokens.append(int(rows[-1].argmax()))
    return GreedyRun(tuple(tokens), np.stack(rows), prefilled - begin, time.monotonic() - prefilled)


def _prefill(model: CausalLM, prompt: Sequence[int], prefill_slice: int) -> npt.NDArray[np.float32]:
    """The prompt in slices into a fresh state -> logits [vocab] after it."""
    model.reset()
    starts = range(0, len(prompt), prefill_slice)
    return [_feed(model, prompt[start : start + prefill_slice], start) for start in starts][-1]


def _feed(model: CausalLM, ids: Sequence[int], position: int) -> npt.NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(ids)]), torch.tensor([position]))
    row: npt.NDArray[np.float32] = logits[0].numpy().copy()
    return row


def _check(name: str, value: float, limit: str, detail: str) -> Check:
    row = compare.TOLERANCES[limit]
    return Check(name, value, row.value, row.least, row.allows(value), detail)
