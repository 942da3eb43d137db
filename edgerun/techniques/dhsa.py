"""Dynamic hierarchical sparse attention (arXiv 2510.24606 v1): which layer of a decoder attends how.

The attention itself is the op edgerun/ops/dhsa_attention.py; the paper's own algorithm, to compare with, is
edgerun/ops/dhsa_attention_paper.py. Ours: windowed layers keep their window and no selection,
and the chunk boundaries are found by the first layer that is sparse, not by layer 0, and shared by the others. Where
layers chunk differently, the first of each way finds that way's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from edgerun.errors import ExportError
from edgerun.ops.dhsa_attention_types import AttentionOptions, Chunking
from edgerun.recipe import DhsaOptions


@dataclasses.dataclass(frozen=True)
class LayerAttention:
    """What the model itself asks of one layer's attention."""

    scale: float  # multiplies q . k
    softcap: float = 0.0  # 0: none
    window: int = 0  # tokens, its own among them; 0: full attention


def layer_options(dhsa: DhsaOptions | None, layers: Sequence[LayerAttention]) -> list[AttentionOptions]:
    """The op's options for every layer of a model, first layer first. `dhsa` None: every layer as the model has it.

    A windowed layer keeps its window, whatever is chosen for it. Every other layer does what `DhsaOptions.of_layer`
    says, and the first sparse one of each way of chunking finds the boundaries. Raises ExportError when `dhsa` has
    choices for another number of layers.
    """
    if dhsa is not None and dhsa.layers and len(dhsa.layers) != len(layers):
        raise ExportError(
            f"the recipe has choices for {len(dhsa.layers)} layers, the model has {len(layers)}: "
            "calibrate this model (`edgerun calibrate`)"
        )
    options: list[AttentionOptions] = []
    found: set[Chunking] = set()
    for index, layer in enumerate(layers):
        mine = dhsa.of_layer(index) if dhsa is not None else None
        one = AttentionOptions.from_recipe(
            mine or DhsaOptions(), scale=layer.scale, softcap=layer.softcap, window=layer.window, dense=mine is None
        )
        if one.budget > 0 and one.chunking not in found:
            found.add(one.chunking)
            one = dataclasses.replace(one, finds_boundaries=True)
        options.append(one)
    return options
