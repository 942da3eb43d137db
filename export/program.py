"""Stage 3: a CausalLM becomes one ExportedProgram with a dynamic number of tokens a call."""

from __future__ import annotations

import collections

import torch

from edgerun.errors import ExportError
from edgerun.models.causal_lm import CausalLM
from edgerun.models.rms_norm import RmsNorm
from edgerun.models.token_table import TiedHead


def export_program(model: CausalLM, prefill_slice: int) -> torch.export.ExportedProgram:
    """forward(tokens int64 [1, S], input_pos int64 [1]) → float32 [1, vocab], S = 1..prefill_slice.

    Raises ExportError when the graph lacks an op that the model was built with: a program that silently computes
    attention another way is never lowered.
    """
    example = (torch.zeros(1, min(8, prefill_slice), dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    tokens = torch.export.Dim("S", min=1, max=prefill_slice) if prefill_slice > 1 else None
    shapes = ({1: tokens} if tokens is not None else None, None)
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
    _check_operators(program, model)
    return program


def _check_operators(program: torch.export.ExportedProgram, model: CausalLM) -> None:
    found = collections.Counter(node.target for node in program.graph.nodes if node.op == "call_function")
    ops = torch.ops.edgerun
    norms = sum(isinstance(module, RmsNorm) for module in model.modules())
    tied = any(isinstance(module, TiedHead) for module in model.modules())
    expected = {
        ops.dhsa_attention.default: len(model.options),
        ops.embedding_lookup.default: 1,
        ops.embedding_logits.default: int(tied),
    }
    if norms and not found[ops.rms_norm.default]:  # how often each is called is the model's own affair
        expected[ops.rms_norm.default] = norms
    for operator, count in expected.items():
        if found[operator] != count:
            raise ExportError(
                f"the exported program has {found[operator]} calls of {operator}, expected {count}: "
                "this architecture is not exported as it runs; report it with its config.json"
            )
