"""Dynamic hierarchical sparse attention (arXiv 2510.24606 v1): which layer of a decoder attends how.

The attention itself is the op edgerun/ops/dhsa_attention.py; the paper's own algorithm, to compare with, is
edgerun/ops/dhsa_attention_paper.py. Ours: windowed layers keep their window and no selection,
and the chunk boundaries are found by the first layer that is sparse, not by layer 0, and shared by the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from edgerun.ops.dhsa_attention_types import AttentionOptions
from edgerun.recipe import DhsaOptions


@dataclasses.dataclass(frozen=True)
class LayerAttention:
    """What the model itself asks of one layer's attention."""

    scale: float  # multiplies q . k
    softcap: float = 0.0  # 0: none
    window: int = 0  # tokens, its own among them; 0: full attention


def layer_options(dhsa: DhsaOptions | None, layers: Sequence[LayerAttention]) -> list[AttentionOptions]:
    """The op's options for every layer of a model, first layer first. `dhsa` None: every layer as the model has it.

    A windowed layer keeps its window and one of the first `dense_layers` layers stays dense; every other layer is
    sparse, and the first of those finds the boundaries.
    """
    options: list[AttentionOptions] = []
    boundaries_found = False
    for index, layer in enumerate(layers):
        sparse = dhsa is not None and layer.window == 0 and index >= dhsa.dense_layers
        options.append(
            AttentionOptions.from_recipe(
                dhsa or DhsaOptions(),
                scale=layer.scale,
                softcap=layer.softcap,
                window=layer.window,
                finds_boundaries=sparse and not boundaries_found,
                dense=not sparse,
            )
        )
        boundaries_found = boundaries_found or sparse
    return options
