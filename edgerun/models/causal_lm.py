"""CausalLM: any decoder-only transformers model with edgerun's attention, its state as buffers.

transformers builds the model on the meta device; weights then come module by module from the mapped checkpoint, so that
quantisation needs no more than one module in full precision. The forward pass is transformers' own (multipliers,
activations, soft-capping of the logits); attention, norms, the token embedding and a tied head are edgerun's ops.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from edgerun.checkpoint import Checkpoint, Progress, model_class
from edgerun.errors import CheckpointError, ExportError
from edgerun.models import cached_attention
from edgerun.models.cached_attention import AttentionSite, Step
from edgerun.models.rms_norm import as_rms_norm
from edgerun.models.rotary import freeze_rotary, rope_types
from edgerun.models.token_table import TiedHead, TokenTable, multiplier_of
from edgerun.ops import embedding_logits, embedding_lookup  # noqa: F401  (registers the ops)
from edgerun.ops.dhsa_attention import AttentionOptions
from edgerun.recipe import Recipe
from edgerun.techniques.dhsa import layer_options

LinearTransform = Callable[[nn.Linear], nn.Module]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_STATE = frozenset({"key_cache", "value_cache", "summaries", "boundaries", "fixed_boundaries", "selection"})


@dataclasses.dataclass(frozen=True)
class RopeFacts:
    """How positions enter the model."""

    type: str  # transformers' rope type; several joined by "+"; "none"
    frozen_from_max_context: bool  # frequencies depend on length, and are those of max_context


class CausalLM(nn.Module):
    """A decoder with its key/value state inside. Calls append: give each call the position it continues from."""

    def __init__(
        self,
        decoder: nn.Module,
        step: Step,
        sites: list[AttentionSite],
        options: list[AttentionOptions],
        rope: RopeFacts,
        max_context: int,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.shared = step.shared
        self.step = step
        self.options = tuple(options)
        self.sites = tuple(sites)
        self.head_dim = sites[0].head_dim
        self.query_heads = sites[0].query_heads
        self.kv_heads = sites[0].kv_heads
        self.rope = rope
        self.max_context = max_context  # tokens

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        """tokens int64 [1, S] stored from position input_pos (int64 [1]) → float32 [1, vocab], the last token's logits.

        What was stored at or after input_pos is dropped first.
        """
        positions = (input_pos + torch.arange(tokens.shape[1], device=tokens.device)).unsqueeze(0)  # [1, S]
        with self.step.at(input_pos):
            output = self.decoder(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1)
        logits: torch.Tensor = output.logits[:, -1]
        return logits.float()

    def attend_as(self, recipe: Recipe) -> None:
        """Attend as another recipe says from now on, with the same weights, context and cache dtype, and no state.

        Raises ExportError for choices that are not for this model's layers.
        """
        recipe = dataclasses.replace(recipe, max_context=self.max_context)
        options = attention_options(list(self.sites), recipe)
        dtype = cached_attention.cache_of(self.sites[0]).key_cache.dtype
        self.step = cached_attention.install(list(self.sites), options, self.max_context, dtype)
        self.shared = self.step.shared
        self.options = tuple(options)

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return int(self.decoder.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def reset(self) -> None:
        """Zero the state. A call with input_pos 0 needs no reset."""
        for name, buffer in self.named_buffers():
            if name.rsplit(".", 1)[-1] in _STATE:
                buffer.zero_()


def resolve(config: Any, recipe: Recipe) -> Recipe:
    """`recipe` with max_context filled in from the model's own limit.

    Raises ExportError when max_context is above that limit, or prefill_slice does not fit into max_context.
    """
    limit = getattr(config, "max_position_embeddings", None)
    context = recipe.max_context if recipe.max_context is not None else limit
    if context is None:
        raise ExportError("the model states no context limit of its own: pass --max-context")
    if context < 1 or (limit is not None and context > limit):
        raise ExportError(
            f"max_context is {context} tokens; it must be 1 to the model's own limit of {limit}: lower --max-context"
        )
    if not 1 <= recipe.prefill_slice <= context:
        raise ExportError(
            f"prefill_slice is {recipe.prefill_slice} tokens; it must be 1 to max_context, {context}: "
            "lower --prefill-slice"
        )
    return dataclasses.replace(recipe, max_context=context)


def load(
    checkpoint: Checkpoint | pathlib.Path,
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    arithmetic: torch.dtype | None = None,
) -> CausalLM:
    """The model of `checkpoint` as `recipe` wants it: attention, dtype, quantisation, context. Ready to call.

    arithmetic: dtype of activations and, unless theirs is narrower by the recipe, of caches; the recipe's when None.
    Weights are rounded to the recipe's dtype all the same: torch.float32 gives the truth that a float16 program is
    judged by.
    Raises CheckpointError for a checkpoint that lacks or misshapes a tensor, ExportError for a recipe it cannot serve.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint)
    recipe = resolve(checkpoint.config, recipe)
    assert recipe.max_context is not None
    dtype = arithmetic or _DTYPES[recipe.dtype]
    decoder, sites, frozen = outline(checkpoint, recipe.max_context)
    options = attention_options(sites, recipe)
    names = _TensorNames(checkpoint, decoder)
    names.check()
    _materialise(decoder, names, recipe, dtype, progress)
    step = cached_attention.install(sites, options, recipe.max_context, cache_dtype(recipe, dtype))
    kinds = rope_types(decoder.config)
    rope = RopeFacts(type="+".join(kinds) or "none", frozen_from_max_context=frozen)
    return CausalLM(decoder, step, sites, options, rope, recipe.max_context).eval().requires_grad_(False)


def cache_dtype(recipe: Recipe, arithmetic: torch.dtype | None = None) -> torch.dtype:
    """The dtype of the key/value caches; arithmetic: of the activations, where it is not the recipe's.

    A cache narrower than the recipe's activations belongs to what the model computes, as quantised weights do.
    """
    if recipe.kv_dtype in ("auto", recipe.dtype):
        return arithmetic or _DTYPES[recipe.dtype]
    return torch.int8 if recipe.kv_dtype == "int8" else _DTYPES[recipe.kv_dtype]


def outline(checkpoint: Checkpoint, max_context: int) -> tuple[Any, list[AttentionSite], bool]:
    """The decoder on the meta device, its attention layers, and whether max_context froze its rotary frequencies."""
    decoder, frozen = _on_meta(checkpoint, max_context)
    return decoder, cached_attention.find_sites(decoder), frozen


def attention_options(sites: list[AttentionSite], recipe: Recipe) -> list[AttentionOptions]:
    """The op's options for every attention layer under a resolved recipe."""
    assert recipe.max_context is not None
    asks = [_without_idle_window(site, recipe.max_context) for site in sites]
    return layer_options(recipe.dhsa if recipe.attention == "dhsa" else None, asks)


def _without_idle_window(site: AttentionSite, max_context: int) -> Any:
    """A window that no context of this bundle can leave is no window: the layer may be sparse."""
    if site.asks.window < max_context:
        return site.asks
    return dataclasses.replace(site.asks, window=0)


def _on_meta(checkpoint: Checkpoint, max_context: int) -> tuple[Any, bool]:
    cached_attention.register()
    config = checkpoint.config
    config._attn_implementation = cached_attention.ATTENTION_NAME
    with torch.device("meta"):
        decoder: Any = model_class(config)(config)
    return decoder.eval(), freeze_rotary(decoder, max_context)


class _TensorNames:
    """Which checkpoint tensor fills which parameter of the decoder."""

    def __init__(self, checkpoint: Checkpoint, decoder: Any) -> None:
        self.checkpoint = checkpoint
        self.embedding = decoder.get_input_embeddings()
        self.head = decoder.get_output_embeddings()
        tied = bool(getattr(decoder.config, "tie_word_embeddings", False)) and self.head is not None
        self.tied = tied and not isinstance(self.head.bias, torch.Tensor)
        self.multiplier = multiplier_of(self.embedding)
        if self.multiplier is None:
            raise CheckpointError(
                f"{type(decoder).__name__} embeds tokens through {type(self.embedding).__name__}, which edgerun does "
                "not know: this architecture is not supported"
            )
        self._decoder = decoder
        self._prefix = f"{decoder.base_model_prefix}."
        if isinstance(self.head, nn.Linear) and self.head.weight is self.embedding.weight and not self.tied:
            raise CheckpointError(f"{type(decoder).__name__} ties its head in a way that edgerun does not know")

    def stored(self, name: str) -> str:
        """The checkpoint's name for a parameter; base-model checkpoints lack the prefix."""
        short = name.removeprefix(self._prefix)
        return short if name not in self.checkpoint.entries and short in self.checkpoint.entries else name

    def check(self) -> None:
        """Raise CheckpointError unless every parameter and kept buffer is there with its shape."""
        for prefix, module in self._decoder.named_modules():
            if self.tied and module is self.head:
                continue
            for name, tensor in _kept_tensors(module).items():
                self.checkpoint.check_tensor(self.stored(f"{prefix}.{name}"), tensor.shape)


def _kept_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of the module itself."""
    own: dict[str, torch.Tensor] = dict(module.named_parameters(recurse=False))
    lost = module._non_persistent_buffers_set
    own |= {name: buffer for name, buffer in module.named_buffers(recurse=False) if name not in lost}
    return own


def _materialise(
    decoder: Any, names: _TensorNames, recipe: Recipe, dtype: torch.dtype, progress: Progress | None
) -> None:
    """Fill the decoder from the checkpoint, one module at a time, each transformed before the next is read."""
    transform = _linear_transform(recipe)
    modules = list(decoder.named_modules())
    table: TokenTable | None = None
    for done, (prefix, module) in enumerate(modules):
        if module is names.embedding:
            weight = names.checkpoint.tensor(names.stored(f"{prefix}.weight"))
            table = _token_table(weight, recipe, dtype, names.multiplier or 1.0)
            decoder.set_submodule(prefix, table)
        elif not (names.tied and module is names.head):
            for name in _kept_tensors(module):
                full = f"{prefix}.{name}"
                tensor = convert(names.checkpoint.tensor(names.stored(full)), _DTYPES[recipe.dtype], full)
                tensor = convert(tensor, dtype, full)
                _assign(module, name, tensor)
            _fill_computed_buffers(decoder, module)
            if isinstance(module, nn.Linear) and (transformed := transform(module)) is not module:
                decoder.set_submodule(prefix, transformed)
                module._parameters.clear()  # `modules` still holds it; its full-precision weight must go now
            if (norm := as_rms_norm(module)) is not None:
                decoder.set_submodule(prefix, norm)
        names.checkpoint.release_pages()
        if progress is not None:
            progress("load weights", (done + 1) / len(modules))
    if names.tied:
        assert table is not None
        decoder.set_output_embeddings(TiedHead(table))


def convert(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A weight in `dtype`; the stored tensor itself when it has that dtype. Other than float tensors stay as they are.

    Raises ExportError for a weight that does not fit into float16.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(converted).all():
        raise ExportError(
            f"weight {name!r} reaches {float(tensor.abs().max()):.4g}, beyond float16's 65504: export with --dtype fp32"
        )
    return converted


def _assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


def _fill_computed_buffers(decoder: Any, module: nn.Module) -> None:
    """Compute the buffers that no checkpoint stores (rotary frequencies), as transformers does."""
    unfilled = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
    if not unfilled:
        return
    for name in unfilled:
        module._buffers[name] = torch.full(module._buffers[name].shape, torch.nan)  # type: ignore[union-attr]
    with torch.no_grad():
        decoder._init_weights(module)
    for name in unfilled:
        if torch.isnan(module._buffers[name]).any():  # type: ignore[arg-type]
            raise CheckpointError(
                f"{type(module).__name__} has a buffer {name!r} that edgerun cannot compute: "
                "this architecture is not supported"
            )


def embedding_format(recipe: Recipe) -> Literal["fp32", "fp16", "int8"]:
    """How the token table is stored: "auto" is int8 when weights are quantised, else the recipe's dtype."""
    if recipe.embedding_dtype != "auto":
        return recipe.embedding_dtype
    return "int8" if recipe.quantize != "none" else recipe.dtype


def _token_table(weight: torch.Tensor, recipe: Recipe, dtype: torch.dtype, multiplier: float) -> TokenTable:
    stored = embedding_format(recipe)
    if stored == "int8":
        from edgerun.techniques.weight_quantization import quantize_rows

        table, scales = quantize_rows(weight)
        return TokenTable(table, scales, dtype, multiplier)
    return TokenTable(convert(weight, _DTYPES[stored], "token embedding"), None, dtype, multiplier)


def _linear_transform(recipe: Recipe) -> LinearTransform:
    if recipe.quantize == "none":
        return lambda linear: linear
    from edgerun.techniques.weight_quantization import linear_transform

    return linear_transform(recipe.quantize)
