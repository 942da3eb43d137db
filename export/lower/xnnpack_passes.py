"""XNNPACK's passes over a partition, without those that look for what is not in it.

ExecuTorch runs 17 passes over every partition. Nearly all trace it anew, also where they find nothing.
A partition of known operators alone is spared the passes that look for others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from executorch.backends.xnnpack import _passes as xnnpack_passes
from executorch.backends.xnnpack import xnnpack_preprocess
from torch.export.exported_program import ExportedProgram

_KNOWN_PREFIXES = ("quantized_decomposed.", "torchao.", "dim_order_ops.")
_KNOWN = {
    "getitem",
    *(f"aten.{name}.Tensor" for name in ("add", "mul", "sub", "div", "slice_copy")),
    *(f"aten.{name}.default" for name in ("linear", "addmm", "mm", "bmm", "cat", "neg", "cos", "sin", "sigmoid")),
    *(f"aten.{name}.default" for name in ("tanh", "gelu", "rsqrt", "_softmax", "convolution", "constant_pad_nd")),
    *(f"aten.{name}.default" for name in ("view_copy", "permute_copy", "t_copy", "unsqueeze_copy")),
    "aten.mean.dim",
}
# The passes that can be left out, and which of the known operators each looks for.
_LOOK_FOR: dict[type, set[str]] = {
    xnnpack_passes.ConvertToUpsampleBilinear2d: set(),
    xnnpack_passes.ConvertToSDPAPass: {"aten._softmax.default"},
    xnnpack_passes.FuseBatchNormPass: set(),
    xnnpack_passes.DecomposeBatchNorm: set(),
    xnnpack_passes.FuseActivationPass: set(),
    xnnpack_passes.RemoveGetItemPass: set(),
    xnnpack_passes.Conv1dUnsqueezePass: {"aten.convolution.default"},
    xnnpack_passes.PReLUReshapePass: set(),
}


class NeededPasses(xnnpack_passes.XNNPACKPassManager):  # type: ignore[misc]
    """XNNPACK's pass manager, its own passes shortened where all of a partition's operators are known."""

    passes: list[type]

    def __init__(self, exported_program: ExportedProgram, passes: list[type] | None = None) -> None:
        super().__init__(exported_program, passes)
        targets = [node.target for node in exported_program.graph.nodes if node.op == "call_function"]
        names = {getattr(target, "__name__", "") for target in targets}
        if all(name in _KNOWN or name.startswith(_KNOWN_PREFIXES) for name in names):
            self.passes = [one for one in self.passes if one not in _LOOK_FOR or _LOOK_FOR[one] & names]


@contextlib.contextmanager
def needed_passes() -> Iterator[None]:
    """XNNPACK's preprocessing inside runs the needed passes alone; it has no option for it."""
    own = xnnpack_preprocess.XNNPACKPassManager
    xnnpack_preprocess.XNNPACKPassManager = NeededPasses
    try:
        yield
    finally:
        xnnpack_preprocess.XNNPACKPassManager = own
