"""XNNPACK's passes over a partition, without those that look for what no part of a decoder has.

ExecuTorch runs 17 passes over every partition. Nearly all trace it anew, also where they find nothing, and that is half
of a lowering. A partition of plain operators alone is spared the passes that look for others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from executorch.backends.xnnpack import _passes as xnnpack_passes
from executorch.backends.xnnpack import xnnpack_preprocess
from torch.export.exported_program import ExportedProgram

_LOOK_FOR_OTHERS = (
    xnnpack_passes.ConvertToUpsampleBilinear2d,
    xnnpack_passes.ConvertToSDPAPass,
    xnnpack_passes.FuseBatchNormPass,
    xnnpack_passes.DecomposeBatchNorm,
    xnnpack_passes.FuseActivationPass,
    xnnpack_passes.RemoveGetItemPass,
    xnnpack_passes.Conv1dUnsqueezePass,
    xnnpack_passes.PReLUReshapePass,
)
_PLAIN_PREFIXES = ("quantized_decomposed.", "torchao.", "dim_order_ops.")
_PLAIN = {
    "getitem",
    *(f"aten.{name}.Tensor" for name in ("add", "mul", "sub", "div", "slice_copy")),
    *(f"aten.{name}.default" for name in ("linear", "addmm", "mm", "cat", "neg", "cos", "sin", "sigmoid", "tanh")),
    *(f"aten.{name}.default" for name in ("view_copy", "permute_copy", "t_copy", "unsqueeze_copy", "gelu")),
}


class NeededPasses(xnnpack_passes.XNNPACKPassManager):  # type: ignore[misc]
    """XNNPACK's pass manager, its own passes shortened where a partition is plain."""

    passes: list[type]

    def __init__(self, exported_program: ExportedProgram, passes: list[type] | None = None) -> None:
        super().__init__(exported_program, passes)
        targets = [node.target for node in exported_program.graph.nodes if node.op == "call_function"]
        names = [getattr(target, "__name__", "") for target in targets]
        if all(name in _PLAIN or name.startswith(_PLAIN_PREFIXES) for name in names):
            self.passes = [one for one in self.passes if one not in _LOOK_FOR_OTHERS]


@contextlib.contextmanager
def needed_passes() -> Iterator[None]:
    """XNNPACK's preprocessing inside runs the needed passes alone; it has no option for it."""
    own = xnnpack_preprocess.XNNPACKPassManager
    xnnpack_preprocess.XNNPACKPassManager = NeededPasses
    try:
        yield
    finally:
        xnnpack_preprocess.XNNPACKPassManager = own
