"""Weight quantisation: what a weight becomes, and that XNNPACK takes the layers as dynamically quantised linears."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.extension.pybindings.portable_lib import _load_for_executorch

from edgerun import compare
from edgerun.errors import ExportError
from edgerun.techniques.weight_quantization import quantize_linear, quantize_linears, quantize_rows

Quantize = Literal["int8", "8da4w"]
FORMATS: tuple[Quantize, ...] = ("int8", "8da4w")


def random_linear(inputs: int, outputs: int, bias: bool = False, seed: int = 0) -> torch.nn.Linear:
    linear = torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    linear.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(seed))
    return linear


@pytest.mark.parametrize(("quantize", "steps"), [("int8", 127.5), ("8da4w", 7.5)])
def test_every_weight_is_within_half_a_step(quantize: Quantize, steps: float) -> None:
    linear = random_linear(96, 40)
    quantized = quantize_linear(linear, quantize)
    groups = linear.weight.reshape(40, quantized.scales.shape[1], -1)
    # Half a step for rounding; one more half at the positive end, which has one integer less than the negative.
    step = groups.abs().amax(dim=2, keepdim=True) / steps
    error = (quantized.dequantized_weight().reshape(groups.shape) - groups).abs()
    assert bool((error <= step * 1.02).all())
    assert float((error <= step * 0.51).float().mean()) > 0.9


def test_8da4w_scales_survive_the_delegates_rounding_to_bfloat16() -> None:
    scales = quantize_linear(random_linear(64, 8), "8da4w").scales
    assert torch.equal(scales, scales.bfloat16().float())


def test_quantising_in_blocks_of_rows_changes_nothing() -> None:
    linear = random_linear(32, 1500)
    alone = random_linear(32, 1)
    alone.weight.copy_(linear.weight[1400:1401])
    whole, one = quantize_linear(linear, "8da4w"), quantize_linear(alone, "8da4w")
    assert torch.equal(whole.weight[1400:1401], one.weight) and torch.equal(whole.scales[1400:1401], one.scales)


def test_layers_of_a_module_are_replaced_and_let_go_of() -> None:
    inner = torch.nn.Sequential(random_linear(32, 8), torch.nn.SiLU(), random_linear(8, 32))
    module = torch.nn.ModuleDict({"kept": random_linear(32, 8), "kept_not": random_linear(32, 8), "inner": inner})
    before = [inner[0], inner[2], module["kept_not"]]
    assert quantize_linears(module, "int8", precise=("kept", "inner.2")) == 2
    assert [type(part).__name__ for part in (module["kept"], module["kept_not"], *inner)] == [
        "Linear", "QuantizedLinear", "QuantizedLinear", "SiLU", "Linear",
    ]  # fmt: skip
    assert [linear.weight.is_meta for linear in before] == [True, False, True]


def test_rows_of_a_table_are_within_half_a_step() -> None:
    table = random_linear(48, 1100).weight.bfloat16()
    quantized, scales = quantize_rows(table)
    error = (quantized.float() * scales.unsqueeze(1) - table.float()).abs()
    assert bool((error <= 0.5001 * scales.unsqueeze(1)).all())


def test_a_row_of_zeros_stays_zero() -> None:
    quantized, scales = quantize_rows(torch.zeros(2, 8))
    assert not quantized.any() and bool((scales > 0).all())


def test_8da4w_refuses_inputs_that_are_no_multiple_of_the_group() -> None:
    with pytest.raises(ExportError, match=r"48 inputs and 8 outputs cannot be 8da4w.*--quantize int8"):
        quantize_linear(random_linear(48, 8), "8da4w")


@pytest.mark.parametrize("quantize", FORMATS)
def test_weights_that_are_not_finite_are_refused(quantize: Quantize) -> None:
    linear = random_linear(32, 4)
    linear.weight[1, 2] = torch.inf
    with pytest.raises(ExportError, match="not finite"):
        quantize_linear(linear, quantize)
    with pytest.raises(ExportError, match="not finite"):
        quantize_rows(linear.weight)


@pytest.mark.parametrize("quantize", FORMATS)
def test_xnnpack_takes_the_layers_and_computes_the_eager_model(quantize: Quantize, tmp_path: Path) -> None:
    layers = [quantize_linear(random_linear(128, 256, bias=True), quantize), torch.nn.SiLU()]
    layers.append(quantize_linear(random_linear(256, 128, seed=1), quantize))
    model = torch.nn.Sequential(*layers).eval().requires_grad_(False)
    tokens = torch.export.Dim("tokens", min=1, max=16)
    program = torch.export.export(model, (torch.zeros(1, 4, 128),), dynamic_shapes=({1: tokens},))
    lowered = to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False)
    ).to_executorch()
    names = [getattr(node.target, "__name__", node.target) for node in lowered.exported_program().graph.nodes]
    assert names.count("executorch_call_delegate") == 1 and len(names) == 5  # input, module, call, getitem, output
    path = tmp_path / "layers.pte"
    with path.open("wb") as file:
        lowered.write_to_file(file)
    bits = 8 if quantize == "int8" else 4 + 16 / 32
    assert path.stat().st_size <= 2 * 128 * 256 * bits / 8 + 12 * 1024
    module = _load_for_executorch(str(path))
    for length in (1, 5):
        x = torch.randn(1, length, 128, generator=torch.Generator().manual_seed(length))
        (measured,) = module.forward([x])
        assert compare.relative_l2(measured, model(x)) <= compare.tolerance("quantized_parity_logits")
