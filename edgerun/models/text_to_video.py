"""A text-to-video checkpoint: a folder of three models, and how they are sampled.

    FOLDER/  denoiser/      config.json, model.safetensors or shards    STDiT3, as hpcai-tech/OpenSora-STDiT-v3
             vae/           config.json, model.safetensors              as hpcai-tech/OpenSora-VAE-v1.2
             text_encoder/  config.json, weights, tokenizer.json        T5 v1.1, encoder
             video.json     frames, height, width, fps, steps, guidance, schedule_base; Open-Sora's where it is missing

Opening reads configurations and headers, never weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
from typing import Any

import torch

from edgerun.checkpoint import Progress
from edgerun.errors import CheckpointError, EdgerunError
from edgerun.models.rectified_flow import OFFICIAL_BASE
from edgerun.models.stdit import Stdit, StditConfig
from edgerun.models.temporal_vae import VideoAutoencoder, VideoAutoencoderConfig, load_video_autoencoder
from edgerun.models.text_encoder import MAX_TOKENS, TextEncoder, load_text_encoder, outline_text_encoder
from edgerun.tensor_files import TensorFiles, read_json

_HASH_STEP_BYTES = 1 << 23
PARTS = ("denoiser", "vae", "text_encoder")


@dataclasses.dataclass(frozen=True)
class VideoSettings:
    """How a checkpoint is sampled unless a recipe says otherwise; the defaults are Open-Sora v1.2's at 256 x 256."""

    frames: int = 51
    height: int = 256  # pixels
    width: int = 256  # pixels
    fps: float = 24.0
    steps: int = 30
    guidance: float = 7.0
    schedule_base: int = OFFICIAL_BASE  # pixels

    def __post_init__(self) -> None:
        """Raise ValueError for a value of another kind, or out of its range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = field.name not in ("fps", "guidance")
            right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not right or not math.isfinite(value) or (value < 1 if whole else value <= 0):
                raise ValueError(f"{field.name} is {value!r}; it must be a {'whole ' if whole else ''}number above 0")


@dataclasses.dataclass(frozen=True)
class VideoCheckpoint:
    """An opened folder."""

    path: pathlib.Path
    denoiser: StditConfig
    autoencoder: VideoAutoencoderConfig
    settings: VideoSettings

    @staticmethod
    def open(path: pathlib.Path) -> VideoCheckpoint:
        """Raises CheckpointError, in one line, when a part is missing, damaged or of another architecture."""
        path = pathlib.Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder: give a folder with {', '.join(PARTS)}")
        missing = [part for part in PARTS if not (path / part).is_dir()]
        if missing:
            raise CheckpointError(
                f"{path} has no folder {missing[0]}/: a video checkpoint has {', '.join(f'{part}/' for part in PARTS)}"
            )
        TensorFiles.open(path / "denoiser")
        if not (path / "vae" / "model.safetensors").is_file():
            raise CheckpointError(f"{path / 'vae'} has no model.safetensors: fetch the checkpoint again")
        denoiser_values = read_json(path / "denoiser" / "config.json")
        vae = path / "vae" / "config.json"
        values = read_json(vae) if vae.is_file() else {}
        try:
            denoiser = StditConfig.from_dict(denoiser_values)
            # OpenSora-VAE-v1.2 states none of its sizes: they are the defaults.
            official = values.get("model_type") == "VideoAutoencoderPipeline"
            autoencoder = VideoAutoencoderConfig() if official else VideoAutoencoderConfig.from_json(values)
            settings = VideoSettings(**(read_json(path / "video.json") if (path / "video.json").is_file() else {}))
        except (TypeError, KeyError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{path}: a configuration has what edgerun cannot read ({error})") from None
        if autoencoder.latent_channels != denoiser.in_channels:
            raise CheckpointError(
                f"{path}: the denoiser takes {denoiser.in_channels} channels, the autoencoder's latents have "
                f"{autoencoder.latent_channels}: they are not of one model"
            )
        return VideoCheckpoint(path, denoiser, autoencoder, settings)

    def files(self) -> list[pathlib.Path]:
        """All that count."""
        found = [file for part in PARTS for file in sorted((self.path / part).iterdir()) if file.is_file()]
        return [*found, self.path / "video.json"] if (self.path / "video.json").is_file() else found

    def sha256(self, progress: Progress | None = None) -> str:
        """Over the names and bytes of every file that counts, hex."""
        digest = hashlib.sha256()
        files = self.files()
        total, done = sum(file.stat().st_size for file in files) or 1, 0
        for file in files:
            digest.update(f"{file.relative_to(self.path).as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as opened:
                while block := opened.read(_HASH_STEP_BYTES):
                    digest.update(block)
                    done += len(block)
                    if progress is not None:
                        progress("hash the checkpoint", done / total)
        return digest.hexdigest()

    def outline_denoiser(self) -> tuple[Stdit, TensorFiles]:
        """The denoiser on the meta device, and its tensors.

        Raises CheckpointError when they are not those of its config.json.
        """
        with torch.device("meta"):
            model = Stdit(self.denoiser)
        weights = TensorFiles.open(self.path / "denoiser")
        weights.check({name: tuple(value.shape) for name, value in model.state_dict().items()})
        return model.eval().requires_grad_(False), weights

    def load_denoiser(self) -> Stdit:
        """The whole denoiser in float32. Raises CheckpointError when its tensors are not those of its config.json."""
        model, weights = self.outline_denoiser()
        model.load_state_dict({name: weights[name].float() for name in model.state_dict()}, assign=True)
        return model.eval().requires_grad_(False)

    def load_autoencoder(self) -> VideoAutoencoder:
        """The autoencoder in float32. Raises CheckpointError."""
        model = load_video_autoencoder(self.path / "vae" / "model.safetensors", self.autoencoder)
        return model.eval().requires_grad_(False)

    def outline_text_encoder(self) -> tuple[Any, TensorFiles]:
        """transformers' T5EncoderModel on the meta device, and its tensors. Raises CheckpointError."""
        model, weights = outline_text_encoder(self.path / "text_encoder")
        self._check_width(int(model.config.d_model))
        return model, weights

    def load_text_encoder(self, max_tokens: int | None = None) -> TextEncoder:
        """The text encoder in float32. Raises CheckpointError."""
        limit = min(MAX_TOKENS, self.denoiser.model_max_length)
        encoder = load_text_encoder(self.path / "text_encoder", max_tokens or limit)
        self._check_width(encoder.width)
        return encoder

    def _check_width(self, width: int) -> None:
        if width != self.denoiser.caption_channels:
            raise CheckpointError(
                f"{self.path}: the text encoder gives {width} channels, the denoiser takes "
                f"{self.denoiser.caption_channels}: they are not of one model"
            )


def check_size(checkpoint: VideoCheckpoint, frames: int, height: int, width: int) -> None:
    """Raises EdgerunError for a video that the autoencoder cannot decode. Any number of frames from 1 on will do."""
    factor = checkpoint.autoencoder.spatial_factor
    if frames < 1:
        raise EdgerunError(f"{frames} frames: a clip has at least 1")
    if min(height, width) < factor or height % factor or width % factor:
        near = " x ".join(str(max(factor, round(size / factor) * factor)) for size in (height, width))
        raise EdgerunError(f"{height} x {width} pixels: both must be multiples of {factor}; the nearest is {near}")
