"""Tiny random checkpoints of the decoder families edgerun supports, saved as real Hugging Face folders.

Every folder holds config.json, generation_config.json, safetensors and the byte-level tokenizer of the zoo model
(ids 0..255 are bytes, 256 is <bos>, 257 is <eos>). Weights are random but not small, so that an attention, a norm or
a bias that is left out shows in the logits.
"""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import torch
import transformers

from edgerun.zoo import zoo_model_path

VOCABULARY = 264  # the tokenizer's 258, rounded up to a multiple of 8
MAX_POSITIONS = 512  # tokens
LONGROPE_ORIGINAL = 64  # tokens; the tiny Phi-3's context before its long factors apply
WINDOW = 40  # tokens; not a multiple of a micro-block

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"

# family -> (configuration class, what sets it apart)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": (
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": [_FULL, _SLIDING],  # not the pattern that the class would choose
            "rope_parameters": {
                _SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
                _FULL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
        },
    ),
    "phi3": (
        "Phi3Config",
        {
            "original_max_position_embeddings": LONGROPE_ORIGINAL,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.02 * i for i in range(8)],
                "long_factor": [1.5 + 0.75 * i for i in range(8)],
            },
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
}


def tiny_config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    """Configuration of one of FAMILIES; `changes` replace its fields."""
    class_name, own = FAMILIES[family]
    return getattr(transformers, class_name)(**{**_SHARED, **own, **changes})


def tiny_model(config: transformers.PretrainedConfig, seed: int = 0, weight_scale: float = 1.0) -> torch.nn.Module:
    """A random float32 model in eval mode with transformers' own eager attention."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.5 * weight_scale / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    return model.eval()


def save_tiny_checkpoint(
    folder: pathlib.Path,
    family: str = "llama3",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
    weight_scale: float = 1.0,
    **changes: Any,
) -> pathlib.Path:
    """Write a checkpoint to `folder` and return it; small `max_shard_bytes` gives several safetensors and an index."""
    model = tiny_model(tiny_config(family, **changes), seed, weight_scale).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, **({"max_shard_size": max_shard_bytes} if max_shard_bytes else {}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(zoo_model_path("text") / name, folder / name)
    return folder
