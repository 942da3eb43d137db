"""What an export knows, as the manifest states it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from typing import Any

import edgerun
from edgerun.bundle import GoldenCase
from edgerun.checkpoint import Checkpoint
from edgerun.evaluation.fidelity import Noise
from edgerun.export.lower.executorch import TARGET, LoweredProgram
from edgerun.models.causal_lm import CausalLM
from edgerun.recipe import Recipe

PROGRAM_FILE = "programs/text.pte"
_TOOLS = ("torch", "executorch", "transformers", "torchao")


def constant_methods(checkpoint: Checkpoint, model: CausalLM, recipe: Recipe, build: str) -> dict[str, Any]:
    """What the .pte says of itself: ExecuTorch's stock language model contract, and which build it is."""
    methods: dict[str, Any] = {
        "get_max_seq_len": recipe.prefill_slice,  # stock runners slice a prompt by it
        "get_max_context_len": model.max_context,
        "get_vocab_size": model.vocab_size,
        "get_n_layers": len(model.options),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": recipe.prefill_slice > 1,
        "edgerun_build": build,
    }
    if start := checkpoint.token_id("bos_token_id"):
        methods["get_bos_id"] = start[0]
    if ends := checkpoint.token_id("eos_token_id"):
        methods["get_eos_ids"] = ends
    return methods


def manifest(
    checkpoint: Checkpoint,
    model: CausalLM,
    recipe: Recipe,
    build: str,
    lowered: LoweredProgram,
    golden: list[tuple[str, GoldenCase]],
    noise: Noise | None,
) -> dict[str, Any]:
    """The manifest, without what is known only later: files, memory plan and parity."""
    start = checkpoint.token_id("bos_token_id")
    return {
        "kind": "text",
        "edgerun_version": edgerun.__version__,
        "recipe": recipe.to_json(),
        "build": build,
        "source": {
            "sha256": checkpoint.sha256(),
            "model_type": checkpoint.config.model_type,
            "architecture": checkpoint.architecture,
        },
        "tools": {name: importlib.metadata.version(name) for name in _TOOLS} | {"python": platform.python_version()},
        "programs": [
            {
                "name": "text",
                "file": PROGRAM_FILE,
                "target": TARGET,
                "inputs": [
                    {
                        "name": "tokens",
                        "dtype": "int64",
                        "shape": [1, "S"],
                        "limits": {"S": [1, recipe.prefill_slice]},
                    },
                    {"name": "input_pos", "dtype": "int64", "shape": [1]},
                ],
                "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, model.vocab_size]}],
                "operators": list(lowered.operators),
            }
        ],
        "context": {
            "max_context": model.max_context,
            "prefill_slice": recipe.prefill_slice,
            "model_max_context": getattr(checkpoint.config, "max_position_embeddings", None),
        },
        "tokens": {
            "vocab_size": model.vocab_size,
            "bos_id": start[0] if start else None,
            "eos_ids": checkpoint.token_id("eos_token_id"),
        },
        "attention": {
            "layers": [
                {"kind": one.kind, "window": one.window or None, "budget": one.budget or None} for one in model.options
            ],
            "head_dim": model.head_dim,
            "query_heads": model.query_heads,
            "kv_heads": model.kv_heads,
        },
        "rope": {
            "type": model.rope.type,
            "frozen_from_max_context": model.rope.frozen_from_max_context,
            "parameters": getattr(checkpoint.config, "rope_parameters", None),
        },
        "noise": None if noise is None else dataclasses.asdict(noise),
        "golden": [
            {"file": f"golden/{name}.safetensors", "prompt_tokens": len(case.prompt), "forced_tokens": len(case.forced)}
            for name, case in golden
        ],
    }
