"""Random checkpoints of the largest video models: STDiT3-XL/2, and a text encoder of T5 v1.1 XXL's size.

Each has the other two parts of a text-to-video checkpoint tiny, with Open-Sora v1.2's interfaces: 4096 channels of text
features, 4 of latents, 8 times smaller in space and 4 times in time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import torch
from safetensors.torch import save_file

from bench.random_weights import Shape, write_random_weights
from edgerun.models.stdit import Stdit, StditConfig
from edgerun.models.temporal_vae import VideoAutoencoder, VideoAutoencoderConfig
from edgerun.models.text_encoder import build_word_tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the two: its sizes, what is stored of it and how it is exported, and what that costs."""

    name: str
    cost: str
    denoiser: StditConfig
    text: dict[str, int]  # of T5Config
    dtype: torch.dtype  # of the weights on disk
    quantize: str


_CAPTION = 4096  # channels of the text features in Open-Sora v1.2
_TINY_TEXT = {"num_layers": 1, "num_heads": 2, "d_ff": 64, "vocab_size": 64}
_XXL = {"num_layers": 24, "num_heads": 64, "d_ff": 10240, "vocab_size": 32128}
MODELS = {
    model.name: model
    for model in (
        Model("denoiser", "10 GB of disk, 60 minutes on two cores", StditConfig(), _TINY_TEXT, torch.float32, "none"),
        Model(
            "text_encoder",
            "15 GB of disk, 30 minutes on two cores",
            StditConfig(hidden_size=32, depth=1, num_heads=2),
            _XXL,
            torch.bfloat16,
            "int8",
        ),
    )
}


def make_checkpoint(folder: pathlib.Path, model: Model) -> dict[str, int]:
    """Write the checkpoint unless it is there; returns parameters and bytes of denoiser and text encoder."""
    from transformers import T5Config, T5EncoderModel

    for part in ("denoiser", "text_encoder", "vae"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    config = T5Config(d_model=_CAPTION, d_kv=64, feed_forward_proj="gated-gelu", **model.text)
    config.save_pretrained(folder / "text_encoder")
    build_word_tokenizer(["a", "red", "circle"]).save(str(folder / "text_encoder" / "tokenizer.json"))
    (folder / "denoiser" / "config.json").write_text(json.dumps(model.denoiser.to_dict()))
    with torch.device("meta"):
        modules = {"denoiser": Stdit(model.denoiser), "text_encoder": T5EncoderModel(config)}
    states = {part: module.state_dict() for part, module in modules.items()}
    del states["text_encoder"]["encoder.embed_tokens.weight"]  # shared.weight, by its other name
    frequencies = Stdit(dataclasses.replace(model.denoiser, depth=0)).rope.freqs
    known = {"rope.freqs": frequencies}
    facts = {}
    for part, tensors in states.items():
        file = folder / part / "model.safetensors"
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if not file.is_file():
            print(f"making {part}/{file.name}", flush=True)
            write_random_weights(file, shapes, lambda name, shape: known.get(name, _filling(name, shape)), model.dtype)
        facts[f"{part}_parameters"] = sum(one.numel() for one in modules[part].parameters())
        facts[f"{part}_bytes"] = file.stat().st_size
    _make_autoencoder(folder / "vae")
    return facts


def _filling(name: str, shape: Shape) -> tuple[float, float]:
    """So spread that every part of the model matters, and no softmax is one token's alone."""
    if name.endswith(("shared.weight", "y_embedding")):
        return 0.0, 1.0
    if "norm" in name:
        return 1.0, 0.1
    if len(shape) < 2 or name.endswith(("scale_shift_table", "relative_attention_bias.weight")):
        return 0.0, 0.1
    fan_in = math.prod(shape[1:])
    return 0.0, (0.1 if name.endswith("SelfAttention.q.weight") else 0.8) / fan_in**0.5


def _make_autoencoder(folder: pathlib.Path) -> None:
    """A tiny one with Open-Sora's factors of space and time."""
    config = VideoAutoencoderConfig(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        spatial_norm_groups=2,
        mid_block_attention=False,
        temporal_filters=8,
        temporal_multipliers=(1, 1, 1),
        temporal_downsample=(True, True),
        temporal_residual_blocks=1,
        temporal_norm_groups=2,
    )
    torch.manual_seed(0)
    state = VideoAutoencoder(config).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_json()))
