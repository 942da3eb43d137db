"""Which norms of a decoder become edgerun's op: those that compute what it computes, in every family, and no others."""

from __future__ import annotations

import pathlib

import pytest
import torch
from torch import nn

from edgerun import compare
from edgerun.models.causal_lm import load
from edgerun.models.rms_norm import RmsNorm, as_rms_norm
from edgerun.recipe import Recipe
from tests.models.tiny_checkpoints import FAMILIES, save_tiny_checkpoint

NORMS_OF_A_LAYER = {"qwen3": 4, "gemma2": 4, "gemma3": 6}  # 2 in the other families


class PlainRMSNorm(nn.Module):
    """As Llama's: the weight itself."""

    def __init__(self, size: int = 24, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(1.0 + 0.3 * torch.randn(size, generator=torch.Generator().manual_seed(0)))
        self.variance_epsilon = eps

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self.normalized(x)


class OffsetRMSNorm(PlainRMSNorm):
    """As Gemma's: one more than the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1.0 + self.weight.float()) * self.normalized(x)


class WeightlessRMSNorm(PlainRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalized(x)


class CentredRMSNorm(PlainRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self.normalized(x - x.mean(-1, keepdim=True))


class EpsOutsideRMSNorm(PlainRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class GatedRMSNorm(PlainRMSNorm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * gate


class WithoutEpsRMSNorm(PlainRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        del self.variance_epsilon

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_norm_of_a_family_is_the_op(family: str, tmp_path: pathlib.Path) -> None:
    model = load(save_tiny_checkpoint(tmp_path, family), Recipe(max_context=64, prefill_slice=32))
    norms = [module for module in model.modules() if type(module).__name__.lower().endswith("rmsnorm")]
    assert all(isinstance(norm, RmsNorm) for norm in norms)
    assert len(norms) == 1 + len(model.options) * NORMS_OF_A_LAYER.get(family, 2)


@pytest.mark.parametrize("kind", [PlainRMSNorm, OffsetRMSNorm, WeightlessRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_that_the_op_computes(kind: type[PlainRMSNorm], dtype: torch.dtype) -> None:
    module = kind().to(dtype)
    norm = as_rms_norm(module)
    assert norm is not None
    assert norm.weight is None or norm.weight.dtype == torch.float32
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    limit = compare.tolerance("op_fp32" if dtype == torch.float32 else "op_fp16")
    with torch.no_grad():
        assert compare.relative_l2(norm(x.to(dtype)), module.double()(x.to(dtype).double())) <= limit


@pytest.mark.parametrize("kind", [CentredRMSNorm, EpsOutsideRMSNorm, GatedRMSNorm, WithoutEpsRMSNorm])
def test_a_norm_that_computes_something_else_keeps_its_place(kind: type[PlainRMSNorm]) -> None:
    assert as_rms_norm(kind()) is None


def test_a_module_of_another_name_is_not_tried() -> None:
    assert as_rms_norm(nn.LayerNorm(24)) is None
