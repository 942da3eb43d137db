"""Writes a random bfloat16 checkpoint in the shape of Llama 3.2 1B: for measuring memory and speed, not for its text.

    python bench/workloads/make_checkpoint.py FOLDER [--layers 16] [--hidden 2048] ...

The tokenizer is the zoo's byte-level one: its ids lie within any larger vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys

import torch

from edgerun import zoo

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.random_weights import write_random_weights

_STANDARD_DEVIATION = 0.02  # transformers' initializer_range


@dataclasses.dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama decoder with tied embeddings. The defaults are those of Llama 3.2 1B."""

    layers: int = 16
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    intermediate: int = 8192
    vocab: int = 128256
    max_context: int = 131072  # tokens

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in the order in which they are stored."""
        hidden, query, key = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}.self_attn.q_proj.weight"] = (query, hidden)
            shapes[f"{prefix}.self_attn.k_proj.weight"] = (key, hidden)
            shapes[f"{prefix}.self_attn.v_proj.weight"] = (key, hidden)
            shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, query)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}.mlp.gate_proj.weight"] = (self.intermediate, hidden)
            shapes[f"{prefix}.mlp.up_proj.weight"] = (self.intermediate, hidden)
            shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, self.intermediate)
        shapes["model.norm.weight"] = (hidden,)
        return shapes

    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_context,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        }


def make_checkpoint(folder: pathlib.Path, shape: LlamaShape, seed: int = 0) -> int:
    """Write the checkpoint into `folder`, unless one of the same shape is there; returns the bytes of its weights."""
    weights = folder / "model.safetensors"
    config = json.dumps(shape.config(), indent=2)
    if weights.is_file() and (folder / "config.json").is_file() and (folder / "config.json").read_text() == config:
        return weights.stat().st_size
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(zoo.zoo_model_path("text") / name, folder / name)

    def filling(name: str, _: tuple[int, ...]) -> tuple[float, float]:
        return (1.0, 0.0) if name.endswith("norm.weight") else (0.0, _STANDARD_DEVIATION)

    write_random_weights(weights, shape.tensors(), filling, torch.bfloat16, seed)
    (folder / "config.json").write_text(config)
    return weights.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    for field in dataclasses.fields(LlamaShape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = vars(parser.parse_args())
    size = make_checkpoint(arguments.pop("folder"), LlamaShape(**arguments))
    print(f"{size} bytes of weights")


if __name__ == "__main__":
    main()
