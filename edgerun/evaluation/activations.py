"""What a model's attention sees: the queries and keys of its layers, after rotary embedding, for one text.

Taken by a hook on the layers' caches, so it works for every decoder that edgerun loads. Everything asked for is held at
once in float32, tokens * layers * (Hq + Hkv) * D * 4 bytes; more than MOST_BYTES is refused before the model runs:
ask for fewer layers then, one at a time if need be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from edgerun.errors import EdgerunError
from edgerun.models.cached_attention import cache_of

if TYPE_CHECKING:
    from edgerun.models.causal_lm import CausalLM

MOST_BYTES = 2 << 30  # e.g. 8,192 tokens of 25 layers with 32 + 8 heads of 64; one layer of that is 84 MB


@dataclasses.dataclass(frozen=True)
class LayerActivations:
    """One layer's queries [Hq, L, D] and keys [Hkv, L, D] after rotary embedding, float32."""

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    scale: float  # of q . k
    softcap: float  # 0: none


def layer_activations(
    model: CausalLM, tokens: Sequence[int], layers: Sequence[int] | None = None, prefill_slice: int = 512
) -> list[LayerActivations]:
    """Run `tokens` through an eager model from an empty state, in slices; what the given layers saw (None: all).

    The model's recipe decides what later layers see: load it dense to see dense attention's activations. Raises
    EdgerunError for a layer that is not there, for more tokens than the context holds, or above MOST_BYTES.
    """
    wanted = list(range(len(model.sites))) if layers is None else list(layers)
    for layer in wanted:
        if not 0 <= layer < len(model.sites):
            raise EdgerunError(f"layer {layer} is asked for; the model has layers 0 to {len(model.sites) - 1}")
    if not 0 < len(tokens) <= model.max_context:
        raise EdgerunError(f"the text has {len(tokens)} tokens; the model's context holds 1 to {model.max_context}")
    needed = sum(
        4 * len(tokens) * (model.sites[layer].query_heads + model.sites[layer].kv_heads) * model.sites[layer].head_dim
        for layer in wanted
    )
    if needed > MOST_BYTES:
        raise EdgerunError(
            f"activations of {len(wanted)} layers for {len(tokens)} tokens take {needed / 2**20:,.0f} MiB, the limit "
            f"is {MOST_BYTES / 2**20:,.0f} MiB: ask for fewer layers, or a shorter text"
        )
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in wanted}
    handles = [cache_of(model.sites[layer]).register_forward_pre_hook(_keep_into(seen[layer])) for layer in wanted]
    model.reset()
    try:
        with torch.inference_mode():
            for start in range(0, len(tokens), prefill_slice):
                part = list(tokens[start : start + prefill_slice])
                model(torch.tensor([part]), torch.tensor([start]))
    finally:
        for handle in handles:
            handle.remove()
    return [_joined(model, layer, seen.pop(layer)) for layer in wanted]


def _keep_into(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        query, key, _value = inputs
        parts.append((query[0].float().clone(), key[0].float().clone()))

    return keep


def _joined(model: CausalLM, layer: int, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> LayerActivations:
    asks = model.sites[layer].asks
    # Out of inference mode by a copy, so that a predictor can be trained on them.
    query, key = (torch.cat([part[i] for part in parts], dim=1).clone() for i in (0, 1))
    return LayerActivations(layer, query, key, asks.scale, asks.softcap)
