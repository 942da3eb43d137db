"""What coremltools 9.0 lacks for our programs: an op that torch.export leaves where a buffer is passed on unchanged."""

from __future__ import annotations

import coremltools as ct
import torch
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY, register_torch_op
from coremltools.converters.mil.mil import Builder, Program


def convert(program: torch.export.ExportedProgram, precision: ct.precision) -> Program:
    """The ML program (iOS 18, with states) that coremltools makes of an exported program; nothing is loaded or run."""
    if "alias" not in _TORCH_OPS_REGISTRY:

        @register_torch_op
        def alias(context, node) -> None:  # type: ignore[no-untyped-def]
            context.add(Builder.identity(x=_get_inputs(context, node, expected=1)[0], name=node.name))

    model = ct.convert(
        program.run_decompositions({}),
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=precision,
        skip_model_load=True,
    )
    return model._mil_program
