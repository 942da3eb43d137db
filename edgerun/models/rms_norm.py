"""The RMS norms of a transformers decoder as edgerun's op, wherever they compute what the op computes.

Every family has a class of its own for it. What a class computes is not read from its name: it runs on random rows
beside the op, and keeps its place when the two differ.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from edgerun import compare
from edgerun.ops import rms_norm

_NAME_ENDS = "RMSNorm"
_EPS_NAMES = ("variance_epsilon", "eps")
_SIZE_WITHOUT_WEIGHT = 64  # elements; a norm without weights takes rows of any size
# Spreads of the rows that are tried: with the smallest, eps decides the result; the largest overflows half precision
# when it is squared.
_SPREADS = (1e-4, 1.0, 1e3)


class RmsNorm(nn.Module):
    """A norm over the last dimension, by edgerun::rms_norm."""

    weight: torch.Tensor | None

    def __init__(self, weight: torch.Tensor | None, eps: float) -> None:
        """weight: float32 [size], or None for a norm without weights."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., size] in float32 or float16 → the same shape and dtype."""
        return rms_norm.normalize(hidden, self.weight, self.eps)


def as_rms_norm(module: nn.Module) -> RmsNorm | None:
    """The op's form of a filled transformers norm; None when `module` is no norm, or computes something else."""
    if not type(module).__name__.endswith(_NAME_ENDS):
        return None
    wide = copy.deepcopy(module).float()  # judged in float32, also where it will run in float16
    eps = next((value for name in _EPS_NAMES if isinstance(value := getattr(wide, name, None), float)), None)
    if eps is None:
        return None
    return next((norm for norm in _candidates(wide, eps) if _agree(wide, norm)), None)


def _candidates(module: nn.Module, eps: float) -> Iterator[RmsNorm]:
    """The ways in which families apply a weight, as a float32 factor: 1 + w of a float16 w needs more than its bits."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        yield RmsNorm(None, eps)
    elif weight.dim() == 1:
        yield RmsNorm(weight.detach(), eps)
        yield RmsNorm(1.0 + weight.detach(), eps)  # Gemma


def _agree(module: nn.Module, norm: RmsNorm) -> bool:
    """Whether both compute the same of random rows."""
    size = _SIZE_WITHOUT_WEIGHT if norm.weight is None else norm.weight.shape[0]
    rows = torch.randn(1, 2, size, generator=torch.Generator().manual_seed(0))
    for spread in _SPREADS:
        try:
            with torch.no_grad():
                expected = module(spread * rows)
        except (RuntimeError, TypeError, ValueError):
            return False  # it wants other arguments
        if not isinstance(expected, torch.Tensor) or expected.shape != rows.shape or not expected.isfinite().all():
            return False
        difference = compare.relative_l2(norm(spread * rows), expected)
        if difference > compare.tolerance("op_against_op_fp32"):
            return False
    return True
