"""The four chains of a video model, block after block, in one form: modules with named values.

Text: tokens → embedding, layers, norm → y. Denoiser: edgerun/models/stdit_blocks.py. Decoder over time: one chunk of
latents z → chunk, a picture for every frame. Decoder on frames: a few pictures → frames.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from edgerun.models.rectified_flow import shift_ratio, times
from edgerun.models.stdit import Stdit, rotary_angles
from edgerun.models.stdit_blocks import Tensors, denoiser_blocks
from edgerun.models.temporal_vae import VideoAutoencoder, VideoAutoencoderConfig
from edgerun.models.temporal_vae_blocks import decoder_blocks
from edgerun.models.text_encoder import Embedding, encoder_blocks
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.techniques.temporal_token_merging import FrameMerge, adjacent_groups, frame_merge
from edgerun.techniques.weight_quantization import quantize_linears
from edgerun.tensor_files import TensorFiles
from edgerun.video_recipe import VideoRecipe

_EXAMPLE_TOKENS = 7  # of a prompt, where a program is traced
# Dimensions that a call decides, by value and dimension: n tokens of a prompt, m frames after merging, t latents of a
# chunk, f frames that a block of the decoder over time has of it, p pictures of a call of the decoder on frames.
_OPEN = {
    "tokens": {1: "n"},
    "text": {1: "n"},
    "bias": {1: "n", 2: "n"},
    "y": {1: "n"},
    "caption": {1: "n"},
    "merge": {0: "m"},
    "unmerge": {1: "m"},
    "cosines": {0: "m"},
    "sines": {0: "m"},
    "z": {2: "t"},
    "chunk": {0: "f"},
    "pictures": {0: "p"},
    "frames": {1: "p"},
}
# Of the largest value of a call of the decoder on frames; what the call needs in all is a few times as much.
_CALL_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Block:
    """A program to be: which values it takes and gives."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    precise: tuple[str, ...] | None = ()  # submodules that stay in float32 where the recipe quantises; None: all do

    def quantize(self) -> bool:
        """Quantise the module in place: linear layers and the token table to int8. False: there is nothing to."""
        if self.precise is None:
            return False
        tables = [module for module in self.module.modules() if isinstance(module, Embedding)]
        for table in tables:
            table.quantize()
        return quantize_linears(self.module, "int8", self.precise) > 0 or bool(tables)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of one bundle."""

    frames: int
    height: int  # pixels
    width: int  # pixels
    latent: tuple[int, int, int]  # frames, height, width
    chunk_latents: tuple[int, int]  # of the decoder's last chunk, and of the others
    call_frames: tuple[int, int]  # of the last call of the decoder on frames, and of the others
    max_tokens: int
    steps: int
    guidance: float
    fps: float
    times: list[float]

    @staticmethod
    def of(source: VideoCheckpoint, recipe: VideoRecipe) -> Geometry:
        """What `recipe` leaves open is the checkpoint's."""
        settings, config = source.settings, source.autoencoder
        frames, height, width = frame_size(source, recipe)
        steps = recipe.steps or settings.steps
        factor, latents = config.spatial_factor, config.latent_frames(frames)
        of_call = min(recipe.frames_per_call or frames_per_call(config, height, width), config.frames_per_chunk)
        chunk = (config.frames_per_chunk, config.temporal_factor)
        return Geometry(
            frames,
            height,
            width,
            (latents, height // factor, width // factor),
            _last_and_others(latents, min(latents, config.latents_per_chunk)),
            _last_and_others(frames, min(frames, of_call)),
            recipe.max_prompt_tokens or source.denoiser.model_max_length,
            steps,
            settings.guidance if recipe.guidance is None else recipe.guidance,
            float(settings.fps),
            times(steps, shift_ratio((height, width), frames, settings.schedule_base, chunk)),
        )

    def limits(self, dimension: str, example: int) -> tuple[int, int]:
        """Least and most of a dimension that a call decides; example: its size where the program is traced."""
        last, others = self.chunk_latents
        return {
            "n": (1, self.max_tokens),
            "m": (1, self.latent[0]),
            "t": self.chunk_latents,
            "f": (example // others * last, example),
            "p": self.call_frames,
        }[dimension]


def _last_and_others(total: int, most: int) -> tuple[int, int]:
    """The last part, and the others, of a total that is taken in parts of `most`."""
    return total % most or most, most


def frames_per_call(config: VideoAutoencoderConfig, height: int, width: int) -> int:
    """How many frames the AutoencoderKL decodes at once: its own micro-batch, or fewer where pictures are large."""
    channels = max(config.block_out_channels[:2])  # its widest values of full height and width
    return max(1, min(config.micro_batch or config.frames_per_chunk, _CALL_BYTES // (4 * channels * height * width)))


def frame_size(source: VideoCheckpoint, recipe: VideoRecipe) -> tuple[int, int, int]:
    """Frames, height and width of the video."""
    settings = source.settings
    return recipe.frames or settings.frames, recipe.height or settings.height, recipe.width or settings.width


def open_dimensions(name: str) -> dict[int, str]:
    """The dimensions of a value that a call decides."""
    return _OPEN.get(name, {})


def merge_of(geometry: Geometry, recipe: VideoRecipe) -> FrameMerge | None:
    """Which frames a merged step computes together; None: the programs cannot merge."""
    if not recipe.merges:
        return None
    return frame_merge(adjacent_groups(geometry.latent[0], alone=recipe.merge_alone), frozenset(recipe.merge_parts))


def text_chain(model: Any, weights: TensorFiles, geometry: Geometry) -> tuple[Iterator[Block], dict[str, torch.Tensor]]:
    """Blocks and example inputs. weights: where the model, which is on the meta device, gets its tensors."""

    def blocks() -> Iterator[Block]:
        for block in encoder_blocks(model, geometry.max_tokens, weights):
            first, last = block.name == "embedding", block.name == "norm"
            inputs = ("tokens",) if first else ("text",) if last else ("text", "bias")
            outputs = ("text", "bias") if first else ("y",) if last else ("text",)
            yield Block(f"text_{block.name}", block.module, inputs, outputs)

    count = min(_EXAMPLE_TOKENS, geometry.max_tokens)
    vocabulary = int(model.config.vocab_size)
    tokens = torch.randint(0, vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
    return blocks(), {"tokens": tokens}


def denoiser_chain(
    model: Stdit, weights: Tensors, geometry: Geometry, recipe: VideoRecipe
) -> tuple[Iterator[Block], dict[str, torch.Tensor]]:
    """Blocks and example inputs. weights: where the model, which is on the meta device, gets its tensors."""
    merge, frequencies = merge_of(geometry, recipe), weights["rope.freqs"].float()

    def blocks() -> Iterator[Block]:
        for block in denoiser_blocks(
            model,
            geometry.latent,
            (geometry.height, geometry.width),
            merge_parts=frozenset() if merge is None else merge.parts,
            pairs_per_block=recipe.pairs_per_program,
            weights=weights,
        ):
            yield Block(f"denoiser_{block.name}", block.module, block.inputs, block.outputs, block.precise)

    generator = torch.Generator().manual_seed(0)
    count = min(_EXAMPLE_TOKENS, geometry.max_tokens)
    values = {
        "x": torch.randn(2, model.config.in_channels, *geometry.latent, generator=generator),
        "time": torch.tensor([0.7, 0.7]),
        "fps": torch.tensor([geometry.fps, geometry.fps]),
        "y": torch.randn(1, count, model.config.caption_channels, generator=generator),
    }
    if merge is not None:
        if len(merge.positions) == 1 < geometry.latent[0]:  # a dimension of 1 would be taken for one that is always 1
            merge = frame_merge([[frame] for frame in range(geometry.latent[0])], merge.parts)
        cosines, sines = rotary_angles(merge.positions, frequencies)
        values |= {"merge": merge.merge, "unmerge": merge.unmerge, "cosines": cosines, "sines": sines}
    return blocks(), values


def time_decoder_chain(model: VideoAutoencoder, geometry: Geometry) -> tuple[Iterator[Block], dict[str, torch.Tensor]]:
    """Blocks and example inputs, for one chunk; programs take a shorter one where the clip ends with one."""

    def blocks() -> Iterator[Block]:
        for index, block in enumerate(decoder_blocks(model, stages=("time",))):
            module = block.module if index else nn.Sequential(_ChunkToPictures(), block.module).eval()
            yield Block(f"decoder_{block.name}", module, ("chunk" if index else "z",), ("chunk",), precise=None)

    shape = (1, model.config.latent_channels, geometry.chunk_latents[1], *geometry.latent[1:])
    return blocks(), {"z": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def frame_decoder_chain(model: VideoAutoencoder, geometry: Geometry) -> tuple[Iterator[Block], dict[str, torch.Tensor]]:
    """Blocks and example inputs, for the pictures of one call; programs take fewer where the clip ends with fewer."""

    def blocks() -> Iterator[Block]:
        parts = itertools.chain(decoder_blocks(model, stages=("frames",)), [None])
        for block, following in itertools.pairwise(parts):
            assert block is not None
            module = block.module if following else nn.Sequential(block.module, _PicturesToFrames()).eval()
            outputs = ("pictures" if following else "frames",)
            yield Block(f"decoder_{block.name}", module, ("pictures",), outputs, precise=None)

    shape = (geometry.call_frames[1], model.config.latent_channels, *geometry.latent[1:])
    return blocks(), {"pictures": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


class _ChunkToPictures(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z [1, C, t, h, w] → [t, C, h, w]."""
        return z.permute(2, 1, 0, 3, 4).flatten(1, 2)


class _PicturesToFrames(nn.Module):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """pictures [n, 3, H, W] → [3, n, H, W]."""
        return pictures.transpose(0, 1)
