"""Weight quantisation: a linear layer in, the same layer with integer weights and 8-bit dynamic activations out.

    int8    weights int8, one scale per output row
    8da4w   weights int4 in groups of 32 along the input, one scale a group, rounded to bfloat16 as delegates keep it
    both    activations int8 per token, asymmetric, with scale and zero point found at run time
    table   the token embedding and a tied head: int8, one scale per row, activations not quantised

Symmetric weights (torchao's affine scheme): w ~ scale * q with q in [-128, 127] or [-8, 7] and scale = max|w| / 127.5
or / 7.5 over the row or group. The layer's forward is torchao's quantise-dequantise arithmetic: called eagerly it is
the fake-quantised model that a program is judged by, exported it is the graph that XNNPACK takes as a dynamically
quantised linear. A technique does not know the target: any lowering may fold the same pattern.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Literal

import torch
from torch import nn

from edgerun.errors import ExportError

GROUP_SIZE = 32  # inputs that share a scale in 8da4w
_ROWS_AT_ONCE = 1024  # quantised together: bounds the float copies that finding scales needs


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How a linear's weight is stored. group_size 0: one group a row."""

    name: Literal["int8", "8da4w"]
    minimum: int
    maximum: int
    group_size: int
    scale_dtype: torch.dtype  # what the scales are rounded to; they are kept as float32


_FORMATS = {
    "int8": WeightFormat("int8", -128, 127, 0, torch.float32),
    "8da4w": WeightFormat("8da4w", -8, 7, GROUP_SIZE, torch.bfloat16),
}


class QuantizedLinear(nn.Module):
    """y = dequantise(quantise(x)) . dequantise(weight)^T + bias, in x's dtype."""

    weight: torch.Tensor  # int8 [out_features, in_features]
    scales: torch.Tensor  # float32 [out_features, groups]
    zero_points: torch.Tensor  # int8 [out_features, groups], all 0: the operators ask for them
    bias: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, weight_format: WeightFormat
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", torch.zeros(scales.shape, dtype=torch.int8))
        self.register_buffer("bias", bias)
        self.weight_format = weight_format
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return nn.functional.linear(_fake_quantized_per_token(x), self.dequantized_weight(x.dtype), self.bias)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out_features, in_features] that the integers stand for."""
        if not torch.compiler.is_exporting():  # the same products, in a tenth of the time
            groups = self.weight.reshape(*self.scales.shape, -1).to(dtype)
            return groups.mul_(self.scales.to(dtype).unsqueeze(2)).reshape(self.weight.shape)
        block = (1, self.in_features // self.scales.shape[1])
        form = self.weight_format
        result: torch.Tensor = _primitives().dequantize_affine(
            self.weight,
            block,
            self.scales,
            self.zero_points,
            torch.int8,
            form.minimum,
            form.maximum,
            output_dtype=dtype,
        )
        return result

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight_format.name}, bias={self.bias is not None}"


def linear_transform(quantize: Literal["none", "int8", "8da4w"]) -> Callable[[nn.Linear], nn.Module]:
    """The function that quantises one linear layer as a recipe's `quantize` says."""
    if quantize == "none":
        return lambda linear: linear
    weight_format = _FORMATS[quantize]
    return lambda linear: quantize_linear(linear, weight_format.name)


def quantize_linear(linear: nn.Linear, quantize: Literal["int8", "8da4w"]) -> QuantizedLinear:
    """`linear` with integer weights. Its own weight is not kept, and no more than a few rows of it are copied.

    Raises ExportError for `8da4w` when in_features is not a multiple of the group, and for weights that are not finite.
    """
    form = _FORMATS[quantize]
    if form.group_size and linear.in_features % form.group_size:
        raise ExportError(
            f"a linear layer of {linear.in_features} inputs and {linear.out_features} outputs cannot be 8da4w: "
            f"inputs must be a multiple of the group of {form.group_size}; export with --quantize int8"
        )
    group = form.group_size or linear.in_features
    weight = torch.empty(linear.weight.shape, dtype=torch.int8)
    scales = torch.empty(linear.out_features, linear.in_features // group, dtype=torch.float32)
    for start in range(0, linear.out_features, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        weight[rows], scales[rows] = _quantize_block(linear.weight.detach()[rows].float(), group, form)
    bias = None if linear.bias is None else linear.bias.detach()
    return QuantizedLinear(weight, scales, bias, form)


def quantize_linears(module: nn.Module, quantize: Literal["int8", "8da4w"], precise: Collection[str] = ()) -> int:
    """Put the quantised form of every linear layer below `module` in its place, and return how many there were.

    Done one by one: the float weights of each go to the meta device before the next is read. precise: submodules whose
    layers stay as they are. Raises ExportError as `quantize_linear` does.
    """
    linears = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not any(f"{name}.".startswith(f"{part}.") for part in precise)
    ]
    for name, linear in linears:
        module.set_submodule(name, quantize_linear(linear, quantize))
        linear.to("meta")
    return len(linears)


def quantize_rows(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float table [vocab, hidden] as int8 [vocab, hidden] and float32 scales [vocab], one a row.

    Row values are scale * q with q in [-127, 127]. Raises ExportError for values that are not finite.
    """
    quantized = torch.empty(table.shape, dtype=torch.int8)
    scales = torch.empty(table.shape[0], dtype=torch.float32)
    for start in range(0, table.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        block = table[rows].float()
        _check_finite(block)
        scale = (block.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        quantized[rows] = (block / scale.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
        scales[rows] = scale
    return quantized, scales


def _quantize_block(rows: torch.Tensor, group: int, form: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    _check_finite(rows)
    torchao = _primitives()
    limits = {"quant_min": form.minimum, "quant_max": form.maximum}
    scales, zero_points = torchao.choose_qparams_affine(
        rows,
        torchao.MappingType.SYMMETRIC,
        (1, group),
        target_dtype=torch.int8,
        zero_point_dtype=torch.int8,
        keepdim=True,
        **limits,
    )
    # Rounded before the weights are: they are divided by the scale that the device multiplies with.
    scales = scales.to(form.scale_dtype).to(torch.float32)
    quantized = torchao.quantize_affine(rows, (1, group), scales, zero_points, output_dtype=torch.int8, **limits)
    return quantized, scales


def _check_finite(rows: torch.Tensor) -> None:
    if not torch.isfinite(rows).all():
        raise ExportError("a weight holds values that are not finite and cannot be quantised: check the checkpoint")


def _fake_quantized_per_token(x: torch.Tensor) -> torch.Tensor:
    torchao = _primitives()
    block = (*(1 for _ in x.shape[:-1]), x.shape[-1])
    limits = {"quant_min": -128, "quant_max": 127}
    scale, zero_point = torchao.choose_qparams_affine(
        x, torchao.MappingType.ASYMMETRIC, block, target_dtype=torch.int8, zero_point_dtype=torch.int8, **limits
    )
    quantized = torchao.quantize_affine(x, block, scale, zero_point, output_dtype=torch.int8, **limits)
    result: torch.Tensor = torchao.dequantize_affine(
        quantized, block, scale, zero_point, torch.int8, -128, 127, output_dtype=x.dtype
    )
    return result


def _primitives() -> ModuleType:
    # Imported late: only an export needs torchao. Its log lines about GPU libraries are of no concern here.
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        primitives: ModuleType = importlib.import_module("torchao.quantization.quant_primitives")
    finally:
        logger.setLevel(level)
    return primitives
