"""Error measures, and THE tolerance table: every test, gate and report takes its limits from here, by name.

Measures are computed in float64 on numpy arrays, whatever dtype comes in. `reference` is always the truth (a float64
run, the eager model), `measured` what is judged by it.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgerun.errors import ParityError

FloatArray = npt.NDArray[np.float64]


def relative_l2(measured: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """|measured - reference| / |reference|, Euclidean over all elements. 0/0 is 0, x/0 is infinite.

    Raises ParityError when the shapes differ or either holds a value that is not finite.
    """
    a, b = _pair(measured, reference)
    difference, size = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def nmse(measured: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Normalised mean squared error, mean((measured - reference)^2) / mean(reference^2): `relative_l2` squared."""
    return relative_l2(measured, reference) ** 2


def max_abs(measured: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Largest |measured - reference|; 0 for empty arrays. Raises ParityError as `relative_l2` does."""
    a, b = _pair(measured, reference)
    return float(np.max(np.abs(a - b), initial=0.0))


def psnr_db(measured: npt.ArrayLike, reference: npt.ArrayLike, peak: float) -> float:
    """Peak signal-to-noise ratio, 10 log10(peak^2 / mean squared error), in dB; infinite for equal arrays.

    peak: the largest value that the signal can take (255 for 8-bit pixels, 1 for pixels in [0, 1]).
    """
    a, b = _pair(measured, reference)
    mean_square = float(np.mean((a - b) ** 2)) if a.size else 0.0
    return math.inf if mean_square == 0.0 else 10.0 * math.log10(peak * peak / mean_square)


def log_softmax(logits: npt.ArrayLike) -> FloatArray:
    """log softmax over the last dimension, in float64."""
    values = np.asarray(logits, dtype=np.float64)
    shifted: FloatArray = values - values.max(axis=-1, keepdims=True)
    result: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def kl_divergence(measured_logits: npt.ArrayLike, reference_logits: npt.ArrayLike) -> FloatArray:
    """KL(reference || measured) of the softmax of each row, in nats. Logits [..., vocab] -> [...], never below 0.

    Raises ParityError as `relative_l2` does.
    """
    a, b = _pair(measured_logits, reference_logits)
    log_q, log_p = log_softmax(a), log_softmax(b)
    result: FloatArray = np.maximum(0.0, (np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
    return result


def top1_agreement(measured_logits: npt.ArrayLike, reference_logits: npt.ArrayLike) -> float:
    """Fraction of rows whose largest logit is the same token. Logits [rows, vocab]; 1 for no rows."""
    a, b = _pair(measured_logits, reference_logits)
    if a.shape[0] == 0:
        return 1.0
    return float(np.mean(a.argmax(axis=-1) == b.argmax(axis=-1)))


def top2_margin(logits: npt.ArrayLike) -> FloatArray:
    """Largest logit minus second largest of each row: how far a greedy choice is from a tie. [..., vocab] -> [...]."""
    values = np.asarray(logits, dtype=np.float64)
    top = np.partition(values, -2, axis=-1)
    result: FloatArray = top[..., -1] - top[..., -2]
    return result


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where two greedy runs part: step 0 is the first generated token. margin: the reference's top-2 margin there."""

    step: int
    measured_token: int
    reference_token: int
    margin: float


def first_divergence(
    measured_tokens: Sequence[int], reference_tokens: Sequence[int], reference_logits: npt.ArrayLike
) -> Divergence | None:
    """First step at which two greedy runs of the same prompt choose different tokens; None when they never do.

    reference_logits: [steps, vocab], row i chose reference_tokens[i]. A run that ends sooner is compared up to its end.
    Raises ParityError when there are fewer rows than steps to compare.
    """
    rows = np.asarray(reference_logits, dtype=np.float64)
    steps = min(len(measured_tokens), len(reference_tokens))
    if rows.ndim != 2 or rows.shape[0] < steps:
        raise ParityError(f"logits of shape {rows.shape} cannot judge {steps} greedy steps: pass one row per step")
    for step in range(steps):
        if measured_tokens[step] != reference_tokens[step]:
            margin = float(top2_margin(rows[step]))
            return Divergence(step, int(measured_tokens[step]), int(reference_tokens[step]), margin)
    return None


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """One limit: what is measured, the limit, and why it is that. `least`: the measure must be at least the limit."""

    value: float
    measure: str
    reason: str
    least: bool = False

    def allows(self, measured: float) -> bool:
        """Whether a measured value is within the limit; a value that is not a number never is."""
        return measured >= self.value if self.least else measured <= self.value


_FLOAT_EPSILON = 2.0**-23
_HALF_ROUNDING = 2.0**-11

TOLERANCES: Mapping[str, Tolerance] = types.MappingProxyType(
    {
        "op_fp32": Tolerance(
            64 * _FLOAT_EPSILON,
            "relative L2, float32 op against float64",
            "64 x 2^-23 = 7.6e-6: dot products of 128 and sums over thousands of keys in blocks lose a few bits each",
        ),
        "formula_fp64": Tolerance(
            1e-10,
            "relative L2, a module run in float64 against its formulas, float64",
            "the order of summation alone moves some 1e-14 through tens of layers; eps of 1e-6 for 1e-5 moves 1e-7",
        ),
        "op_fp16": Tolerance(
            8 * _HALF_ROUNDING,
            "relative L2, op on fp16 tensors against float64 of the same fp16 inputs",
            "8 x 2^-11 = 3.9e-3: cache and result are rounded to 11 bits, sums are kept in float32",
        ),
        "peer_fp16_sums": Tolerance(
            (8192 / 3) ** 0.5 * _HALF_ROUNDING,
            "relative L2, a benchmark's peer that sums 8192 weighted values in float16, against float64",
            "sqrt(8192 / 3) x 2^-11 = 2.6e-2: the rounding of each addition is a step of a random walk",
        ),
        "op_against_op_fp32": Tolerance(
            64 * _FLOAT_EPSILON,
            "relative L2, two float32 forms of one op given the same lists",
            "64 x 2^-23, as op_fp32: order of summation and contraction differ, nothing else",
        ),
        "selection_near_tie": Tolerance(
            1e-5,
            "relative difference of two float64 scores at the cut",
            "of 576 lists none flipped at 1e-6 relative noise and one at 1e-5: below it either choice is right",
        ),
        "logits_fp32": Tolerance(
            1e-4,
            "relative L2, float32 logits against the eager model",
            "about 10 layers x op_fp32 with room for another order of summation in every matrix product",
        ),
        "logits_fp16": Tolerance(
            2e-2,
            "relative L2, logits of a program with fp16 activations or a narrow cache against float32 eager",
            "about 40 x 2^-11: every activation of every layer is rounded to 11 bits",
        ),
        "logits_int8_cache": Tolerance(
            4e-2,
            "relative L2, logits with an int8 key/value cache against float32 eager, two layers",
            "a step of max / 127 in 32 channels errs by 0.5 %, times a spread of attention logits of 5, times sqrt 2",
        ),
        "logits_nmse_fp32": Tolerance(
            1e-8,
            "NMSE, float32 logits against the eager model",
            "logits_fp32 squared",
        ),
        "kl_fp32_nats": Tolerance(
            1e-6,
            "mean teacher-forced KL, float32 dense program against eager, nats",
            "KL grows with the square of the logits' error: (1e-4 x 10)^2 / 2 with logits of order 10",
        ),
        "kl_fp16_nats": Tolerance(
            5e-3,
            "mean teacher-forced KL, fp16 program against float32 eager, nats",
            "(2e-2 x 5)^2 / 2 with logits whose spread is about 5",
        ),
        "quantized_parity_logits": Tolerance(
            5e-2,
            "relative L2, quantised program against its fake-quantised eager model",
            "activations are rounded to 8 bits per token: a last-bit difference before it moves a value by 1/255",
        ),
        "quantized_parity_kl_nats": Tolerance(
            2e-2,
            "mean teacher-forced KL, quantised program against its fake-quantised eager model, nats",
            "(5e-2 x 4)^2 / 2 with logits whose spread is about 4",
        ),
        "quantized_parity_top1": Tolerance(
            0.95,
            "top-1 agreement, quantised program against its fake-quantised eager model",
            "at most one token in twenty lies closer to a tie than the 8-bit rounding moves its logits",
            least=True,
        ),
        "quantized_block": Tolerance(
            0.1,
            "relative L2, a block with int8 weights and 8-bit activations against its float32 module, eager",
            "steps of max / 127.5 in weights and range / 255 in a row of activations: 0.9 % each if spread normally; "
            "a row of 10,240 that one value dominates loses up to sqrt(10240) / (255 sqrt 12) = 11 %",
        ),
        "sparse_kl_nats": Tolerance(
            2e-3,
            "mean teacher-forced KL, float32 sparse program against eager with the same op, nats",
            "lists flip only at near ties, and then swap blocks of equal score; the rest is kl_fp32_nats",
        ),
        "sparse_top1": Tolerance(
            0.98,
            "top-1 agreement, float32 sparse program against eager with the same op",
            "as sparse_kl_nats: one flipped token in fifty can come from flipped lists near ties",
            least=True,
        ),
        "top1_fp32": Tolerance(
            0.99,
            "top-1 agreement, float32 dense program against eager",
            "only logits closer than greedy_margin may change places",
            least=True,
        ),
        "top1_fp16": Tolerance(
            0.95,
            "top-1 agreement, fp16 program against float32 eager",
            "logits closer than about logits_fp16 x their spread may change places",
            least=True,
        ),
        "greedy_margin": Tolerance(
            1e-2,
            "top-2 logit margin of the eager model at the first divergence of greedy tokens (float32)",
            "twice logits_fp32 x logits of order 10, with room x 5: a wider margin cannot be turned by rounding",
        ),
        "greedy_margin_reduced": Tolerance(
            0.5,
            "top-2 logit margin of the eager model at the first divergence (fp16 or quantised)",
            "quantized_parity_logits x logits of order 10",
        ),
        "pixel_levels": Tolerance(
            1.0,
            "largest difference of 8-bit pixels, frames of a float32 program against eager",
            "a value within logits_fp32 of a level's edge is rounded to either side; none is a whole level off",
        ),
        "quantized_frames_psnr_db": Tolerance(
            29.0,
            "PSNR, 8-bit frames of a quantised program against its fake-quantised eager model, dB",
            "20 log10(255 / (quantized_parity_logits x 128 levels x sqrt 2)) = 29: latents that far off, decoded",
            least=True,
        ),
        "cross_isa_logits": Tolerance(
            1e-4,
            "relative L2, float32 logits on arm64 against x86 of one bundle",
            "logits_fp32: other vector widths sum in another order, the program is the same",
        ),
        "memory_plan_over": Tolerance(
            0.0,
            "measured peak RSS over the memory plan, fraction",
            "a plan that is exceeded kills the process on a phone",
        ),
        "memory_plan_under": Tolerance(
            0.15,
            "measured peak RSS under the memory plan, fraction",
            "a plan that reserves more than 15 % too much refuses models that would fit",
        ),
    }
)


def tolerance(name: str) -> float:
    """The limit that the table gives `name`; the whole row is TOLERANCES[name]. Raises ParityError for another name."""
    if name not in TOLERANCES:
        raise ParityError(f"no tolerance is named {name!r}; edgerun/compare.py has {', '.join(sorted(TOLERANCES))}")
    return TOLERANCES[name].value


def _pair(measured: npt.ArrayLike, reference: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    a, b = np.asarray(measured, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        raise ParityError(f"measured has shape {a.shape}, the reference {b.shape}: compare arrays of one shape")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        side = "reference" if np.isfinite(a).all() else "measured"
        raise ParityError(f"the {side} array holds values that are not finite: nothing can be concluded from it")
    return a, b
