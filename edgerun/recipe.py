"""Recipe: every choice that shapes a text bundle. Frozen; its hash names the build, whatever the file is called."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from edgerun.errors import ExportError

MICRO_BLOCK = 16  # tokens; the same unit as csrc/ops/dhsa_attention/dhsa_attention.h
BOUNDARY_REACH = 12  # tokens after an edge that must be there before its cut is decided
MAX_CHUNK = 64  # tokens


Selector = Literal["chunk", "block-topk", "window-sink"]  # block-topk: fixed chunking, mean pooling
Chunks = Literal["fixed", "cosine"]


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """What one layer does where layers differ; all else is as the options that hold it say."""

    budget: int = 0  # tokens; 0: the layer is dense, and the rest says nothing
    selector: Selector = "chunk"
    chunking: Chunks = "cosine"  # of the selector "chunk"

    @property
    def name(self) -> str:
        """The choice in a few words: "chunk cosine 512", "dense"."""
        if self.budget == 0:
            return "dense"
        return f"{self.selector} {f'{self.chunking} ' if self.selector == 'chunk' else ''}{self.budget}"


@dataclasses.dataclass(frozen=True)
class DhsaOptions:
    """Settings of dynamic hierarchical sparse attention; csrc/ops/dhsa_attention/dhsa_attention.h explains them."""

    budget: int = 2048  # most distinct key tokens per query tile and KV head; the largest of `layers`
    tile: int = 64  # queries that share one selection
    sink: int = 16  # first tokens, always attended
    dense_tail: int = 0  # a call of 2..dense_tail tokens attends densely; 0: never
    dense_layers: int = 0  # first layers that stay dense
    chunking: Chunks = "cosine"
    boundary_threshold: float = 0.25
    pooling: Literal["mean", "sqrt", "centred", "minmax", "moments"] = "moments"
    query_pooling: Literal["mean", "max"] = "max"
    refine: int = 12  # channels of the keys that a single query (decode) reads to rank the best again; 0: never
    selector: Selector = "chunk"
    reselect: int = 1  # tokens of decode that one selection serves
    layers: tuple[LayerChoice, ...] = ()  # one a layer of the model, windowed ones too; empty: all layers alike

    def minimum_budget(self) -> int:
        """Smallest budget that always holds the sink, the local band and the tile itself, in tokens."""
        return self.sink + MAX_CHUNK + BOUNDARY_REACH + self.tile + self.reselect - 1

    def with_layers(self, layers: Sequence[LayerChoice]) -> DhsaOptions:
        """These options with a choice for every layer. Raises ExportError where all are dense, or one out of range."""
        alike = dataclasses.replace(self, dense_layers=0, selector="chunk", chunking="cosine", layers=())
        budget = max((choice.budget for choice in layers), default=0)
        if budget == 0:
            raise ExportError(f"{len(layers)} layers are chosen and none is sparse: use --attention dense")
        return dataclasses.replace(alike, budget=budget, layers=tuple(layers))

    def of_layer(self, index: int) -> DhsaOptions | None:
        """What the layer `index` does, as options that are alike for all layers; None: it is dense."""
        if not self.layers:
            return self if index >= self.dense_layers else None
        choice = self.layers[index]
        if choice.budget == 0:
            return None
        return dataclasses.replace(
            self, budget=choice.budget, selector=choice.selector, chunking=choice.chunking, layers=()
        )

    def budgets(self) -> tuple[int, ...]:
        """The budgets that layers have, each once, ascending, in tokens."""
        return tuple(sorted({one.budget for one in self.layers if one.budget != 0} or {self.budget}))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. `layers` only where there are some: the hash of other recipes stays what it was."""
        values = dataclasses.asdict(self)
        choices = values.pop("layers")
        return {**values, "layers": list(choices)} if choices else values

    @staticmethod
    def from_json(values: dict[str, Any]) -> DhsaOptions:
        """What `to_json` gave. Raises TypeError for a name that is not known."""
        layers = tuple(LayerChoice(**choice) for choice in values.get("layers", ()))
        return DhsaOptions(**{**values, "layers": layers})

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise ExportError(f"tile is {self.tile} tokens; it must be at least 1")
        if self.sink < 0 or self.sink % MICRO_BLOCK:
            raise ExportError(f"sink is {self.sink} tokens; it must be a multiple of {MICRO_BLOCK}")
        if self.dense_tail < 0 or self.dense_layers < 0 or self.refine < 0:
            raise ExportError(
                f"dense_tail is {self.dense_tail}, dense_layers {self.dense_layers} and refine {self.refine}; "
                "none can be below 0"
            )
        if self.reselect < 1:
            raise ExportError(f"reselect is {self.reselect} tokens; it must be at least 1 (select for every token)")
        if self.layers and (self.budget != max(one.budget for one in self.layers) or self.dense_layers):
            raise ExportError(
                f"budget is {self.budget} and dense_layers {self.dense_layers}, but every layer has a choice of its "
                "own: budget must be the largest of theirs, dense_layers 0 (DhsaOptions.with_layers does that)"
            )
        if (smallest := self.budgets()[0]) < self.minimum_budget():
            raise ExportError(
                f"budget is {smallest} tokens, below its minimum of {self.minimum_budget()} "
                f"(sink {self.sink} + local {MAX_CHUNK + BOUNDARY_REACH} + tile {self.tile} + reselect "
                f"{self.reselect} - 1): raise --budget, or lower --tile, --sink or --reselect"
            )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what a text bundle computes and how much memory it takes."""

    attention: Literal["dhsa", "dense"] = "dhsa"
    dhsa: DhsaOptions = DhsaOptions()
    max_context: int | None = None  # tokens; None: the model's own limit
    prefill_slice: int = 512  # most tokens per call
    quantize: Literal["none", "int8", "8da4w"] = "none"
    dtype: Literal["fp32", "fp16"] = "fp32"
    kv_dtype: Literal["auto", "fp32", "fp16", "int8"] = "auto"  # of the key/value cache; auto: dtype
    embedding_dtype: Literal["auto", "fp32", "fp16", "int8"] = "auto"  # auto: int8 when quantized, else dtype

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values, as the manifest stores it."""
        return {**dataclasses.asdict(self), "dhsa": self.dhsa.to_json()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Recipe:
        """The recipe that a manifest stores."""
        return Recipe(**{**values, "dhsa": DhsaOptions.from_json(values["dhsa"])})

    def hash(self, checkpoint_hash: str) -> str:
        """sha256 (hex) over this recipe and the checkpoint it is applied to: the identity of a build."""
        text = json.dumps({"recipe": self.to_json(), "checkpoint": checkpoint_hash}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
