"""Teacher-forced fidelity: the same tokens go through two models, and their logits are held against each other.

Row 0 of the logits follows the prompt, row i the i-th forced token: k forced tokens give k + 1 rows. Where the forced
tokens are the reference's own greedy ones, the first row whose largest logit differs is where free greedy runs part.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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


@dataclasses.dataclass(frozen=True)
class Noise:
    """How far a quantised model's logits move when its embeddings change in their last bits.

    Activations that are rounded to 8 bits turn a last bit into a step somewhere, and every later layer turns that into
    more: two right ways of computing a deep model end this far apart, so it is no sign of a wrong program.
    """

    relative_l2: float
    mean_kl_nats: float
    top1: float
    margin: float  # of the first divergence, 0 without one

    @staticmethod
    def from_manifest(manifest: Mapping[str, Any]) -> Noise | None:
        """What `edgerun export` measured; None for a bundle that is not quantised."""
        values = manifest.get("noise")
        return None if values is None else Noise(**values)


_NUDGE = 2.0**-20  # relative: about what another order of summation does to a float32 activation
NOISE_ROOM = 2.0  # times the noise itself: it is one draw of two


def own_noise(
    model: CausalLM, prompt: Sequence[int], forced: Sequence[int], prefill_slice: int, logits: npt.ArrayLike
) -> Noise:
    """The noise of an eager model whose own logits after `prompt` and each forced token are `logits`."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def nudge(_: object, __: object, embedded: torch.Tensor) -> torch.Tensor:
        return embedded * (1.0 + _NUDGE * torch.randn(embedded.shape, generator=generator))

    table: torch.nn.Module = model.decoder.get_input_embeddings()  # type: ignore[operator, assignment]
    handle = table.register_forward_hook(nudge)
    try:
        found = measure(eager_logits(model, prompt, forced, prefill_slice), logits)
    finally:
        handle.remove()
    margin = 0.0 if found.divergence is None else found.divergence.margin
    return Noise(found.relative_l2, found.mean_kl_nats, found.top1, margin)


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


def checks(
    fidelity: Fidelity, recipe: Recipe, *, sparse: bool, noise: Noise | None = None, label: str = ""
) -> tuple[Check, ...]:
    """The gates of edgerun/compare.py that a program of this recipe must pass against its own eager model.

    sparse: whether the run attended fewer keys than dense attention would; a sparse recipe on a short prompt does not.
    noise: of a quantised model; where twice that (four times in KL, a square) is more than a gate allows, it is the
    limit.
    """
    names: tuple[str | None, str, str, str]
    if recipe.quantize != "none":
        names = (
            "quantized_parity_logits",
            "quantized_parity_kl_nats",
            "quantized_parity_top1",
            "greedy_margin_reduced",
        )
    elif recipe.dtype == "fp16" or (recipe.kv_dtype in ("fp16", "int8") and not sparse):
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
    found = tuple(
        _check(f"{label}{name}", value, limit, detail)
        for (name, value, detail), limit in zip(measured, names, strict=True)
        if limit is not None
    )
    if noise is None or recipe.quantize == "none":
        return found
    floors = (
        NOISE_ROOM * noise.relative_l2,
        NOISE_ROOM**2 * noise.mean_kl_nats,
        1.0 - NOISE_ROOM * (1.0 - noise.top1),
        NOISE_ROOM * noise.margin,
    )
    return tuple(_with_floor(check, floor) for check, floor in zip(found, floors, strict=True))


def eager_logits(
    model: CausalLM, prompt: Sequence[int], forced: Sequence[int], prefill_slice: int
) -> npt.NDArray[np.float32]:
    """Logits [len(forced) + 1, vocab] of an eager model: after the prompt, fed in slices, and each forced token."""
    rows = [append(model, prompt, 0, prefill_slice)]
    rows += [feed(model, [token], len(prompt) + offset) for offset, token in enumerate(forced)]
    return np.stack(rows)


@dataclasses.dataclass(frozen=True)
class GreedyRun:
    """Tokens that a model chose greedily, the one it ended with included, and the logits it chose each from."""

    tokens: tuple[int, ...]
    logits: npt.NDArray[np.float32]  # [len(tokens), vocab]
    prefill_s: float
    decode_s: float


def greedy(
    model: CausalLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    ends: Collection[int],
    prefill_slice: int,
    position: int = 0,
    tile: int = 1,
) -> GreedyRun:
    """Greedy decoding of an eager model until a token of `ends` or max_new_tokens (at least 1).

    position and tile: as in `append`; the last token of an earlier run was not fed, so a later prompt begins with it.
    """
    begin = time.monotonic()
    rows = [append(model, prompt, position, prefill_slice, tile)]
    prefilled = time.monotonic()
    tokens = [int(rows[0].argmax())]
    while tokens[-1] not in ends and len(tokens) < max_new_tokens:
        rows.append(feed(model, tokens[-1:], position + len(prompt) + len(tokens) - 1))
        tokens.append(int(rows[-1].argmax()))
    return GreedyRun(tuple(tokens), np.stack(rows), prefilled - begin, time.monotonic() - prefilled)


def append(
    model: CausalLM, ids: Sequence[int], position: int, prefill_slice: int, tile: int = 1
) -> npt.NDArray[np.float32]:
    """Feed ids (at least one) in slices after the model's first `position` tokens -> logits [vocab] after them.

    position 0 begins a fresh state. Slices end at multiples of `tile`, as a session cuts them, where one fits.
    """
    if position == 0:
        model.reset()
    at, end = position, position + len(ids)
    while at < end:
        cut = min(at + prefill_slice, end)
        if cut < end and cut // tile * tile > at:
            cut = cut // tile * tile
        row = feed(model, ids[at - position : cut - position], at)
        at = cut
    return row


def feed(model: CausalLM, ids: Sequence[int], position: int) -> npt.NDArray[np.float32]:
    """One call of an eager model: tokens stored from `position` on -> logits [vocab] after the last."""
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(ids)]), torch.tensor([position]))
    row: npt.NDArray[np.float32] = logits[0].numpy().copy()
    return row


def _with_floor(check: Check, floor: float) -> Check:
    """The check, its limit moved to `floor` where that allows more."""
    if (floor >= check.limit) if check.least else (floor <= check.limit):
        return check
    assert check.measured is not None
    passed = check.measured >= floor if check.least else check.measured <= floor
    detail = f"{check.detail}; limit: the model's own noise".removeprefix("; ")
    return dataclasses.replace(check, limit=floor, passed=passed, detail=detail)


def _check(name: str, value: float, limit: str, detail: str) -> Check:
    row = compare.TOLERANCES[limit]
    return Check(name, value, row.value, row.least, row.allows(value), detail)
