"""A random text-to-video checkpoint of a few kilobytes, in the layout that edgerun reads."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import torch
from safetensors.torch import save_file
from torch import nn

from edgerun.models.stdit import Stdit, StditConfig
from edgerun.models.temporal_vae import VideoAutoencoder, VideoAutoencoderConfig
from edgerun.models.text_encoder import build_word_tokenizer

WORDS = ("a", "red", "circle", "moves", "left")
DENOISER = StditConfig(
    hidden_size=24, depth=2, num_heads=2, caption_channels=16, model_max_length=9, input_sq_size=32, patch_size=(2, 2)
)
AUTOENCODER = VideoAutoencoderConfig(
    block_out_channels=(8, 8),
    layers_per_block=1,
    spatial_norm_groups=2,
    temporal_filters=8,
    temporal_multipliers=(1, 1),
    temporal_downsample=(True,),
    temporal_residual_blocks=1,
    temporal_norm_groups=2,
    frames_per_chunk=5,
    scaling_factor=0.5,
    scale=(1.1, 0.9, 1.2, 0.8),
    shift=(0.1, -0.2, 0.0, 0.3),
)
SETTINGS = {"height": 12, "width": 16, "fps": 8, "steps": 4, "guidance": 2.0, "schedule_base": 16}


def filled(module: nn.Module, seed: int) -> nn.Module:
    """Weights large enough that every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        spread = 0.3 if parameter.dim() < 2 else 0.8 / parameter[0].numel() ** 0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread + ("norm" in name)
    return module.eval().requires_grad_(False)


def text_model(vocabulary: int = 16) -> nn.Module:
    """A T5 v1.1 encoder of two layers."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    return filled(T5EncoderModel(config), 3)


def write(
    folder: pathlib.Path,
    frames: int = 10,
    depth: int = DENOISER.depth,
    *,
    words: Sequence[str] = WORDS,
    max_tokens: int = DENOISER.model_max_length,
    **settings: object,
) -> pathlib.Path:
    """Write the checkpoint; the video has `frames` frames, two chunks. settings: others of video.json."""
    config = dataclasses.replace(DENOISER, depth=depth, model_max_length=max_tokens)
    denoiser = Stdit(config)
    denoiser.y_embedder.y_embedding = torch.randn(max_tokens, 16, generator=torch.Generator().manual_seed(4))
    parts = {
        "denoiser": (filled(denoiser, 1), config.to_dict()),
        "vae": (filled(VideoAutoencoder(AUTOENCODER), 2), AUTOENCODER.to_json()),
    }
    for name, (module, config) in parts.items():
        (folder / name).mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))
    tokenizer = build_word_tokenizer(words)
    vocabulary = max(16, tokenizer.get_vocab_size())
    text_model(vocabulary).save_pretrained(folder / "text_encoder")  # type: ignore[operator]
    tokenizer.save(str(folder / "text_encoder" / "tokenizer.json"))
    (folder / "video.json").write_text(json.dumps(SETTINGS | {"frames": frames} | settings))
    return folder
