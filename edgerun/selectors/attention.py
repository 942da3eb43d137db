"""Selectors inside a whole model: each layer's attention takes its lists from a selector instead of the op.

What is stored, and the attention over given lists, stay the op's: the boundaries and summaries are written by its
reference, the products are computed by its kernel. So answers differ from the shipped model's by the lists alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from edgerun.errors import EdgerunError
from edgerun.models.cached_attention import AttentionCache
from edgerun.models.causal_lm import CausalLM
from edgerun.ops.dhsa_attention import AttentionState, count_pairs_in_context, native_attend, reference_append
from edgerun.selectors.interface import BlockSelector, Call, Rotation, fold
from edgerun.selectors.paper import PaperAttention


@dataclasses.dataclass(frozen=True)
class Engine:
    """Who chooses: one for calls of several tokens, one for single tokens."""

    prefill: BlockSelector | PaperAttention
    decode: BlockSelector | PaperAttention


class SelectedAttention(nn.Module):
    """Stands where the layer's AttentionCache was, whose buffers it uses."""

    def __init__(
        self, cache: AttentionCache, engine: Engine, layer: int, rotation: Rotation | None, shared: dict[Any, Any]
    ) -> None:
        super().__init__()
        self.cache = cache
        self.engine = engine
        self.budget: int | None = None  # in place of the options' own
        self._layer, self._rotation, self._shared = layer, rotation, shared
        kv_heads, blocks, head_dim, micro = cache.key_cache.shape
        self._keys = torch.zeros(kv_heads, blocks * micro, head_dim)
        self._memory: dict[Any, Any] = {}

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [1, Hq, S, D], key and value [1, Hkv, S, D] -> [1, S, Hq, D]."""
        cache, options = self.cache, self.cache.options
        if self.budget is not None:
            options = dataclasses.replace(options, budget=self.budget)
        assert cache.step.input_pos is not None
        position, tokens = int(cache.step.input_pos), query.shape[2]
        boundaries = cache.step.shared.boundaries_of(cache.options.chunking)
        state = AttentionState(cache.key_cache, cache.value_cache, cache.summaries, boundaries, cache.selection)
        reference_append(key, value, state, position, cache.options)
        self._keys[:, position : position + tokens] = key[0]
        if position == 0:
            self._memory.clear()
            if cache.options.finds_boundaries:
                self._shared.clear()
        call = Call(
            query=fold(query[0], 0, (key.shape[1], -1)),
            keys=self._keys[:, : position + tokens],
            input_pos=position,
            state=state,
            options=options,
            layer=self._layer,
            rotation=self._rotation,
            memory=self._memory,
            shared=self._shared,
        )
        selector = self.engine.prefill if tokens > 1 else self.engine.decode
        if isinstance(selector, PaperAttention):
            values = cache.value_cache.flatten(1, 2)[:, : position + tokens]
            out, pairs = selector(call, values)
            causal = tokens * position + tokens * (tokens + 1) // 2
            count_pairs_in_context(pairs * key.shape[1], causal * key.shape[1])
            return out
        lists = selector.lists(call)
        out, counted = native_attend(query, state, position, options, lists, threads=torch.get_num_threads())
        count_pairs_in_context(counted.attended_pairs, counted.causal_pairs)
        return out


def install(model: CausalLM, engine: Engine) -> None:
    """Let `engine` choose for every sparse layer of a loaded model, in place; windowed and dense layers stay.

    Raises EdgerunError for a model that does not keep float32 caches, or has no sparse layer.
    """
    shared: dict[Any, Any] = {}
    rotation = rotation_of(model)
    caches = [(name, module) for name, module in model.named_modules() if isinstance(module, AttentionCache)]
    sparse = 0
    for layer, (name, cache) in enumerate(caches):
        if cache.options.kind != "dhsa":
            continue
        if cache.key_cache.dtype != torch.float32:
            raise EdgerunError(f"selectors are measured on float32 caches, not {cache.key_cache.dtype}: use fp32")
        if cache.options.dense_tail or cache.options.reselect > 1:
            raise EdgerunError("selectors know no --dense-tail and no --reselect: leave them out")
        model.set_submodule(name, SelectedAttention(cache, engine, layer, rotation, shared))
        sparse += 1
    if not sparse:
        raise EdgerunError("the model has no layer with a budget: a selector has nothing to choose")


def use(model: CausalLM, engine: Engine, budget: int | None = None) -> None:
    """Let another engine choose, at another budget (tokens; None: the recipe's), in a model after `install`."""
    for module in model.modules():
        if isinstance(module, SelectedAttention):
            module.engine, module.budget = engine, budget


def rotation_of(model: CausalLM) -> Rotation | None:
    """The model's one rotary embedding; None when it has none, or several."""
    found = [m for m in model.decoder.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
    if len(found) != 1:
        return None
    frequencies: torch.Tensor = found[0].inv_freq  # type: ignore[assignment]
    return Rotation(frequencies, float(getattr(found[0], "attention_scaling", 1.0)))
