"""edgerun's attention inside a transformers decoder: what each layer asks for, and the state it keeps.

transformers hands every attention call to the function registered under the configuration's attention name. Ours finds
the layer's cache on the attention module and calls edgerun::dhsa_attention. No mask is registered beside it:
transformers then builds none, and the op itself is causal and knows the layer's window.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from edgerun.errors import CheckpointError
from edgerun.ops.dhsa_attention import AttentionOptions, AttentionState, Chunking, attend
from edgerun.recipe import MICRO_BLOCK
from edgerun.techniques.dhsa import LayerAttention

ATTENTION_NAME = "edgerun"
_PROBE_NAME = "edgerun_probe"
_CACHE_NAME = "attention_cache"
# Arguments of an attention call that say nothing about what is attended.
_WITHOUT_EFFECT = frozenset({"dropout", "position_ids", "use_cache", "is_causal", "output_attentions"})


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention layer of a decoder: where it is, its shape, and what the model asks of it."""

    module: nn.Module
    query_heads: int
    kv_heads: int
    head_dim: int
    asks: LayerAttention


class SharedState(nn.Module):
    """State that all sparse layers read: the chunk boundaries, found once per call for each way of chunking."""

    boundaries: torch.Tensor
    fixed_boundaries: torch.Tensor  # of the layers with fixed chunks, where others have cosine ones; else not there

    def __init__(self, options: Sequence[AttentionOptions], blocks: int) -> None:
        super().__init__()
        self._kinds = {one.chunking for one in options if one.budget > 0}
        flags = torch.zeros(blocks + 1 if self._kinds else 0, dtype=torch.uint8)
        self.register_buffer("boundaries", flags)
        if len(self._kinds) > 1:
            self.register_buffer("fixed_boundaries", flags.clone())

    def boundaries_of(self, chunking: Chunking) -> torch.Tensor:
        """The flags that a sparse layer which chunks so reads."""
        return self.fixed_boundaries if len(self._kinds) > 1 and chunking == Chunking.FIXED else self.boundaries


class Step:
    """What the layers of one model share during one call. Not a module, so that it is no part of the model's tree."""

    def __init__(self, shared: SharedState) -> None:
        self.shared = shared
        self.input_pos: torch.Tensor | None = None

    @contextlib.contextmanager
    def at(self, input_pos: torch.Tensor) -> Iterator[None]:
        """Layers called inside append at `input_pos`, int64 [1]."""
        self.input_pos = input_pos
        try:
            yield
        finally:
            self.input_pos = None


class AttentionCache(nn.Module):
    """The caches, chunk summaries and kept selection of one layer, as buffers, and the op's options."""

    key_cache: torch.Tensor
    value_cache: torch.Tensor
    summaries: torch.Tensor
    selection: torch.Tensor
    no_boundaries: torch.Tensor

    def __init__(self, options: AttentionOptions, state: AttentionState, step: Step) -> None:
        super().__init__()
        self.options = options
        self.step = step
        self.register_buffer("key_cache", state.key_cache)
        self.register_buffer("value_cache", state.value_cache)
        self.register_buffer("summaries", state.summaries)
        self.register_buffer("selection", state.selection)
        if options.budget == 0:
            self.register_buffer("no_boundaries", state.boundaries)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [1, Hq, S, D], key and value [1, Hkv, S, D] → [1, S, Hq, D]."""
        input_pos = self.step.input_pos
        assert input_pos is not None, "a layer was called outside CausalLM.forward"
        options = self.options
        boundaries = self.step.shared.boundaries_of(options.chunking) if options.budget > 0 else self.no_boundaries
        state = AttentionState(self.key_cache, self.value_cache, self.summaries, boundaries, self.selection)
        return attend(query, key, value, state, input_pos, self.options)


def cache_of(site: AttentionSite) -> AttentionCache:
    """The cache that `install` gave a layer: a module whose inputs are the layer's queries, keys and values."""
    found = site.module.get_submodule(_CACHE_NAME)
    assert isinstance(found, AttentionCache)
    return found


def register() -> None:
    """Make ATTENTION_NAME known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention)


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **_: object
) -> tuple[torch.Tensor, None]:
    """transformers' attention call. What its other arguments ask for was found by `find_sites`."""
    return module.get_submodule(_CACHE_NAME)(query, key, value), None


def find_sites(model: Any) -> list[AttentionSite]:
    """The attention layers of a transformers decoder on the meta device, in the order in which a call meets them.

    Found by calling the model, so that each layer's window, scale and soft-capping are what it really asks for.
    Raises CheckpointError when a layer asks for something that the op does not do.
    """
    from transformers import AttentionInterface

    sites: list[AttentionSite] = []

    def record(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **asked: Any
    ) -> tuple[torch.Tensor, None]:
        sites.append(_site(module, query, key, value, mask, asked))
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_PROBE_NAME, record)
    name = model.config._attn_implementation
    model.config._attn_implementation = _PROBE_NAME
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=tokens, position_ids=tokens, use_cache=False, logits_to_keep=1)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{type(model).__name__} cannot be followed by shapes alone ({reason}): this architecture is not supported"
        ) from error
    finally:
        model.config._attn_implementation = name
    expected = model.config.num_hidden_layers
    if len(sites) != expected or len({id(site.module) for site in sites}) != expected:
        raise CheckpointError(
            f"{type(model).__name__} has {expected} layers, but {len(sites)} went through transformers' "
            "AttentionInterface: this architecture is not supported"
        )
    return sites


def install(sites: list[AttentionSite], options: list[AttentionOptions], max_context: int, dtype: torch.dtype) -> Step:
    """Give every layer its cache for `max_context` tokens, and all of them one Step. What they had is gone."""
    shared = SharedState(options, -(-max_context // MICRO_BLOCK))
    step = Step(shared)
    for site, one in zip(sites, options, strict=True):
        known = shared.boundaries_of(one.chunking)
        state = AttentionState.allocate(site.kv_heads, site.head_dim, max_context, one, dtype, known)
        site.module.add_module(_CACHE_NAME, AttentionCache(one, state, step))
    return step


def _site(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: object,
    asked: dict[str, Any],
) -> AttentionSite:
    where = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
    scale, softcap, window = (asked.pop(name, None) for name in ("scaling", "softcap", "sliding_window"))
    unknown = sorted(name for name, given in asked.items() if given is not None and name not in _WITHOUT_EFFECT)
    if unknown or mask is not None:
        raise CheckpointError(
            f"{where} asks its attention for {', '.join(unknown) or 'a mask of its own'}, which edgerun's attention "
            "does not do: this architecture is not supported"
        )
    if query.shape[-1] != value.shape[-1] or query.shape[1] % key.shape[1]:
        raise CheckpointError(
            f"{where} has queries {list(query.shape)}, keys {list(key.shape)} and values {list(value.shape)}: edgerun "
            "needs one head size, and query heads in groups of equal size"
        )
    return AttentionSite(
        module=module,
        query_heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[-1],
        asks=LayerAttention(
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            softcap=float(softcap or 0.0),
            window=int(window or 0),
        ),
    )
