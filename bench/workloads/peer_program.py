"""A checkpoint as the .pte that ExecuTorch's own llama export would make of it: custom_sdpa over its own KV cache.

    python bench/workloads/peer_program.py CHECKPOINT OUT.pte [--quantize 8da4w] [--max-context 16384]

The peer of a dense edgerun bundle: weights, quantisation, context, slice, norms and rotary embedding are the same. What
differs is what edgerun replaces: attention is torch.ops.llama.custom_sdpa, the cache [1, context, Hkv, D] is written
by torch.ops.llama.update_cache, the embedding is aten's or quantized_decomposed's, the head a linear layer, and
lowering is ExecuTorch's own route with its stock XNNPACK partitioner. With quantised weights the head holds the very
integers of the bundle's table, run as XNNPACK's 8-bit linear, so that both sides compute the same logits.
"""

from __future__ import annotations

import argparse
import pathlib
import warnings
from typing import Any

import torch
from torch import nn

from edgerun import zoo
from edgerun.errors import EdgerunError
from edgerun.library_noise import quiet_libraries
from edgerun.models.causal_lm import CausalLM, load
from edgerun.models.token_table import TiedHead, TokenTable
from edgerun.ops.dhsa_attention import AttentionOptions
from edgerun.recipe import Recipe
from edgerun.techniques.weight_quantization import QuantizedLinear, WeightFormat

_CACHE = "attention_cache"  # the module that edgerun/models/cached_attention.py calls in each layer
_HEAD = WeightFormat("int8", -128, 127, 0, torch.float32)


def checkpoint_path(name: str) -> pathlib.Path:
    """`zoo:NAME` as the shipped model's folder, anything else as a path."""
    return zoo.zoo_model_path(name.removeprefix("zoo:")) if name.startswith("zoo:") else pathlib.Path(name)


class CustomSdpaCache(nn.Module):
    """One layer's keys and values as ExecuTorch's export keeps them, and its attention op over them."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, like: Any, kv_heads: int, head_dim: int, max_context: int) -> None:
        """like: the AttentionCache that this one stands in for."""
        super().__init__()
        self.step = like.step
        self.scale = like.options.scale
        self.register_buffer("keys", torch.zeros(1, max_context, kv_heads, head_dim))
        self.register_buffer("values", torch.zeros(1, max_context, kv_heads, head_dim))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [1, Hq, S, D], key and value [1, Hkv, S, D] → [1, S, Hq, D]."""
        start: Any = self.step.input_pos[0].item()  # an unknown integer to the exporter: it is told its range
        torch._check_is_size(start)
        torch._check(start <= self.keys.shape[1] - query.shape[2])
        torch.ops.llama.update_cache(key.transpose(1, 2), self.keys, start)
        torch.ops.llama.update_cache(value.transpose(1, 2), self.values, start)
        result: torch.Tensor = torch.ops.llama.custom_sdpa(
            query.transpose(1, 2), self.keys, self.values, start, None, 0.0, True, self.scale
        )
        return result


class ByteEmbedding(nn.Module):
    """int8 rows with a scale each, looked up by the op of ExecuTorch's quantised kernels."""

    table: torch.Tensor
    scales: torch.Tensor

    def __init__(self, table: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("scales", scales)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [1, S] → float32 [1, S, hidden]."""
        rows: torch.Tensor = torch.ops.quantized_decomposed.embedding_byte.dtype(
            self.table, self.scales, None, 0, 0, tokens, dtype=torch.float32
        )
        return rows


def peer_model(checkpoint: pathlib.Path, recipe: Recipe) -> CausalLM:
    """edgerun's dense model of the checkpoint with every part of edgerun's taken out again.

    Raises EdgerunError for a layer that custom_sdpa does not serve: a window, or soft-capped scores.
    """
    load_custom_ops()
    model = load(checkpoint, recipe)
    served = AttentionOptions(scale=1.0)
    for options in model.options:
        if options.window != served.window or options.softcap != served.softcap:
            raise EdgerunError(
                "a layer has a window or a soft cap, which custom_sdpa does not do: no peer for this model"
            )
    for module in model.modules():
        if (cache := module._modules.get(_CACHE)) is not None:
            kv_heads, _, head_dim, _ = cache.get_buffer("key_cache").shape
            module.add_module(_CACHE, CustomSdpaCache(cache, kv_heads, head_dim, model.max_context))
    decoder: Any = model.decoder
    table: TokenTable = decoder.get_input_embeddings()
    if table.multiplier != 1.0 or table.table.dtype == torch.float16:
        raise EdgerunError("the peer has no scaled and no float16 embedding: use a Llama, and fp32 or int8 tables")
    tied = isinstance(decoder.get_output_embeddings(), TiedHead)
    decoder.set_input_embeddings(_embedding(table))
    if tied:
        decoder.set_output_embeddings(_head(table))
    return model.eval().requires_grad_(False)


def _embedding(table: TokenTable) -> nn.Module:
    if table.scales is not None:
        return ByteEmbedding(table.table, table.scales)
    embedding: nn.Module = nn.Embedding.from_pretrained(table.table.float())
    return embedding


def _head(table: TokenTable) -> nn.Module:
    """A linear layer over the table's own values."""
    if table.scales is not None:
        return QuantizedLinear(table.table, table.scales.unsqueeze(1), None, _HEAD)
    vocab, hidden = table.table.shape
    head = nn.Linear(hidden, vocab, bias=False, device="meta")
    head.weight = nn.Parameter(table.table.float(), requires_grad=False)
    return head


def load_custom_ops() -> None:
    """Register torch.ops.llama and torch.ops.quantized_decomposed, quietly: their import warns of many things."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import executorch.kernels.quantized  # noqa: F401
        from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  (embedding_byte's schema)
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401


def write_peer(checkpoint: pathlib.Path, recipe: Recipe, out: pathlib.Path) -> None:
    """Export and lower the peer to `out`. Raises EdgerunError when attention is not ExecuTorch's op in every layer."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    model = peer_model(checkpoint, recipe)
    example = (torch.zeros(1, min(8, recipe.prefill_slice), dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    shapes = ({1: torch.export.Dim("S", min=1, max=recipe.prefill_slice)}, None)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
        found = sum(node.target is torch.ops.llama.custom_sdpa.default for node in program.graph.nodes)
        if found != len(model.options):
            raise EdgerunError(f"{found} of {len(model.options)} layers call custom_sdpa")
        del model
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods={
                "get_max_seq_len": recipe.prefill_slice,
                "get_max_context_len": recipe.max_context,
                "use_kv_cache": True,
                "use_sdpa_with_kv_cache": True,
                "enable_dynamic_shape": True,
            },
        )
        lowered = edge.to_executorch(ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass()))
    unfinished = out.with_suffix(".part")
    with unfinished.open("wb") as file:
        lowered.write_to_file(file)
    unfinished.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or zoo:NAME")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--quantize", choices=("none", "8da4w"), default="none")
    parser.add_argument("--max-context", type=int, required=True)
    parser.add_argument("--prefill-slice", type=int, default=512)
    values = parser.parse_args()
    recipe = Recipe(
        "dense", max_context=values.max_context, prefill_slice=values.prefill_slice, quantize=values.quantize
    )
    quiet_libraries()
    write_peer(checkpoint_path(values.checkpoint), recipe, values.out)
    print(f"{values.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
