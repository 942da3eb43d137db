"""How much memory a bundle needs to run, known before anything is exported.

    peak = 1.05 * (weights + cache + activations + runtime)

What is resident when `edgerun-runner` is at the end of a full context, as measured (bench/results, memory):
    weights      the delegate's packed copy of every linear layer (the file's pages are unmapped once they are packed),
                 and the token table, mapped from the file, when a tied head reads all of it
    cache        keys, values and summaries of every layer for max_context tokens; written page by page as tokens come
    activations  what the program plans outside the delegate, and the delegate's workspace for its widest layers, both
                 for prefill_slice tokens
    runtime      code, the parsed program, and 5 % for what none of the above counts: packing to whole tiles, fragments
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from edgerun.errors import ExportError
from edgerun.recipe import MICRO_BLOCK, Recipe

if TYPE_CHECKING:
    from edgerun.checkpoint import Checkpoint
    from edgerun.models.cached_attention import AttentionSite

_BASE_BYTES = 10 << 20  # code and heap of the runner with nothing loaded
_MARGIN = 0.05
_BYTES = {"fp32": 4, "fp16": 2}
# A linear layer's packed bytes: a weight's, and each output row's (scale, bias and the sum of its integers).
_PER_WEIGHT = {"int8": 1.0, "8da4w": 0.5 + 2 / 32}
_PER_ROW = {"none": 4, "int8": 12, "8da4w": 8}
# Buffers of one prefill slice that are alive at once in the delegate: gate, up and their product; or, where heads are
# wide, what rotates queries and keys: them, them in order of heads, and each times cosines and sines; values beside.
_WIDE_BUFFERS = 3
_ROTATION_BUFFERS = 4


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What the plan needs of a model. Nothing here depends on the recipe."""

    linears: tuple[tuple[int, int], ...]  # (inputs, outputs) of every linear layer but a tied head
    other_elements: int  # norms, which are float32 in every bundle, and the like
    vocab: int
    hidden: int
    tied: bool
    sites: tuple[AttentionSite, ...]
    context_limit: int | None  # tokens; the model's own


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a bundle takes to run a prompt of its whole context, by what they are for."""

    weights_bytes: int
    cache_bytes: int
    activation_bytes: int
    runtime_bytes: int
    peak_rss_bytes: int  # their sum: measured peak RSS stays within +0/-15 % of it
    source: dataclasses.InitVar[tuple[ModelSizes, Recipe] | None] = None

    def __post_init__(self, source: tuple[ModelSizes, Recipe] | None) -> None:
        object.__setattr__(self, "_source", source)

    def require(self, limit_bytes: int) -> None:
        """Raise ExportError, naming what would fit, when the peak is above `limit_bytes`."""
        if self.peak_rss_bytes > limit_bytes:
            raise ExportError(
                f"the bundle needs {_mib(self.peak_rss_bytes)} to run, above the limit of {_mib(limit_bytes)} "
                f"(weights {_mib(self.weights_bytes)}, cache {_mib(self.cache_bytes)}, activations "
                f"{_mib(self.activation_bytes)}): {self._what_fits(limit_bytes)}"
            )

    def with_planned_bytes(self, planned_bytes: int) -> MemoryPlan:
        """This plan, its activations corrected by what a lowered program plans for state and activations together."""
        source: tuple[ModelSizes, Recipe] | None = getattr(self, "_source", None)
        if source is None:
            return self
        sizes, recipe = source
        activations = max(planned_bytes - self.cache_bytes, 0) + _workspace_bytes(sizes, recipe)
        return _plan_of(self.weights_bytes, self.cache_bytes, activations, source)

    def _what_fits(self, limit_bytes: int) -> str:
        source: tuple[ModelSizes, Recipe] | None = getattr(self, "_source", None)
        options = [] if source is None else [text for text in _alternatives(*source, limit_bytes) if text]
        return " or ".join(options) + " would fit" if options else "choose a smaller model, or raise --memory-limit"


def plan_memory(checkpoint: Checkpoint, recipe: Recipe) -> MemoryPlan:
    """The plan of a resolved recipe (max_context given). Reads configuration and tensor names, no weights.

    Raises CheckpointError for a checkpoint that cannot be exported.
    """
    return plan_sizes(model_sizes(checkpoint, recipe), recipe)


def model_sizes(checkpoint: Checkpoint, recipe: Recipe) -> ModelSizes:
    """Layer sizes of the checkpoint's model, from its outline on the meta device."""
    from edgerun.models.causal_lm import outline

    assert recipe.max_context is not None
    decoder, sites, _ = outline(checkpoint, recipe.max_context)
    head, embedding = decoder.get_output_embeddings(), decoder.get_input_embeddings()
    config = decoder.config
    tied = bool(getattr(config, "tie_word_embeddings", False)) and head is not None
    linears = [
        module for module in decoder.modules() if isinstance(module, torch.nn.Linear) and not (tied and module is head)
    ]
    counted = {id(linear.weight) for linear in linears} | {id(embedding.weight)}
    return ModelSizes(
        linears=tuple((linear.in_features, linear.out_features) for linear in linears),
        other_elements=sum(one.numel() for one in decoder.parameters() if id(one) not in counted),
        vocab=embedding.weight.shape[0],
        hidden=embedding.weight.shape[1],
        tied=tied,
        sites=tuple(sites),
        context_limit=getattr(config, "max_position_embeddings", None),
    )


def plan_sizes(sizes: ModelSizes, recipe: Recipe) -> MemoryPlan:
    """The plan of a model of these sizes under a resolved recipe."""
    activations = _planned_activation_bytes(sizes, recipe) + _workspace_bytes(sizes, recipe)
    return _plan_of(_weights_bytes(sizes, recipe), _cache_bytes(sizes, recipe), activations, (sizes, recipe))


def _plan_of(weights: int, cache: int, activations: int, source: tuple[ModelSizes, Recipe]) -> MemoryPlan:
    runtime = _BASE_BYTES + math.ceil(_MARGIN * (weights + cache + activations + _BASE_BYTES))
    return MemoryPlan(weights, cache, activations, runtime, weights + cache + activations + runtime, source)


def _weights_bytes(sizes: ModelSizes, recipe: Recipe) -> int:
    from edgerun.models.causal_lm import embedding_format

    element = _BYTES[recipe.dtype]
    per_weight = _PER_WEIGHT.get(recipe.quantize, float(element))
    packed = sum(
        inputs * outputs * per_weight + outputs * _PER_ROW[recipe.quantize] for inputs, outputs in sizes.linears
    )
    stored = embedding_format(recipe)
    table = sizes.vocab * (sizes.hidden + 4 if stored == "int8" else sizes.hidden * _BYTES[stored])
    return math.ceil(packed) + sizes.other_elements * _BYTES["fp32"] + (table if sizes.tied else 0)


def _cache_bytes(sizes: ModelSizes, recipe: Recipe) -> int:
    from edgerun.models.causal_lm import attention_options, cache_dtype
    from edgerun.ops.dhsa_attention_types import AttentionState

    assert recipe.max_context is not None
    dtype = cache_dtype(recipe)
    options = attention_options(list(sizes.sites), recipe)
    with torch.device("meta"):
        states = [
            AttentionState.allocate(site.kv_heads, site.head_dim, recipe.max_context, one, dtype)
            for site, one in zip(sizes.sites, options, strict=True)
        ]
    kept = [(state.key_cache, state.value_cache, state.summaries, state.selection) for state in states]
    return sum(tensor.nbytes for tensors in kept for tensor in tensors)


def _planned_activation_bytes(sizes: ModelSizes, recipe: Recipe) -> int:
    """What the program's own plan holds while a layer attends: the residual stream, the attention's inputs and output,
    cosines and sines."""
    attending = max((2 * one.query_heads + 2 * one.kv_heads + 2) * one.head_dim for one in sizes.sites)
    return math.ceil((recipe.prefill_slice * (sizes.hidden + attending) + sizes.vocab) * _BYTES[recipe.dtype])


def _workspace_bytes(sizes: ModelSizes, recipe: Recipe) -> int:
    widest = max((inputs for inputs, _ in sizes.linears), default=sizes.hidden)
    rotated = max((one.query_heads + 2 * one.kv_heads) * one.head_dim for one in sizes.sites)
    floats = recipe.prefill_slice * max(_WIDE_BUFFERS * widest, _ROTATION_BUFFERS * rotated)
    return floats * _BYTES[recipe.dtype]


def _alternatives(sizes: ModelSizes, recipe: Recipe, limit_bytes: int) -> list[str]:
    """Changes of the recipe that fit, each alone."""
    found = [_largest_context(sizes, recipe, limit_bytes)]
    for quantize in ("int8", "8da4w"):
        changed = dataclasses.replace(recipe, quantize=quantize)
        if recipe.quantize != quantize and plan_sizes(sizes, changed).peak_rss_bytes <= min(
            limit_bytes, plan_sizes(sizes, recipe).peak_rss_bytes - 1
        ):
            found.append(f"--quantize {quantize}")
            break
    for kv_dtype in ("fp16", "int8"):
        narrower = dataclasses.replace(recipe, kv_dtype=kv_dtype)
        if plan_sizes(sizes, narrower).peak_rss_bytes <= min(limit_bytes, plan_sizes(sizes, recipe).peak_rss_bytes - 1):
            found.append(f"--kv-dtype {kv_dtype}")
            break
    if len([text for text in found if text]) == 0:
        smallest = dataclasses.replace(recipe, quantize="8da4w")
        if context := _largest_context(sizes, smallest, limit_bytes):
            found.append(f"--quantize 8da4w with {context}")
    return found


def _largest_context(sizes: ModelSizes, recipe: Recipe, limit_bytes: int) -> str:
    """The option for the longest context that fits, "" when none does."""
    assert recipe.max_context is not None
    low, high = 0, recipe.max_context // MICRO_BLOCK  # micro-blocks: low fits, high may not
    while low < high:
        middle = (low + high + 1) // 2
        context = middle * MICRO_BLOCK
        changed = dataclasses.replace(recipe, max_context=context, prefill_slice=min(recipe.prefill_slice, context))
        if plan_sizes(sizes, changed).peak_rss_bytes <= limit_bytes:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        return ""
    slice_option = f" --prefill-slice {low * MICRO_BLOCK}" if low * MICRO_BLOCK < recipe.prefill_slice else ""
    return f"--max-context {low * MICRO_BLOCK}{slice_option}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
