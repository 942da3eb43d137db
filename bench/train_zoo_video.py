"""Train the video zoo model on generated clips: the autoencoder of frames, the one over time, then text encoder and
denoiser on their latents.

Clips and captions come from edgerun.evaluation.clips, drawn and rendered on the training device; combinations of
colour, shape and motion that are held out are never trained on. The denoiser learns Open-Sora's rectified flow: times
logit-normal, shifted as they are when sampling, one caption in ten replaced by the null caption.

Each stage runs for a given time: warm-up, constant, then the learning rate falls to zero over the last part. A CUDA
device needs minutes a stage, two CPU cores hours; SIGTERM saves, and the same command goes on.

    python bench/train_zoo_video.py frames --out RUN --minutes 30
    python bench/train_zoo_video.py time --out RUN --minutes 30
    python bench/train_zoo_video.py denoiser --out RUN --minutes 240
    python bench/train_zoo_video.py check --out RUN                 # 200 prompts, read back from the pixels
    python bench/train_zoo_video.py export --out RUN --to edgerun/zoo/video
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from edgerun.evaluation import clips
from edgerun.models import rectified_flow
from edgerun.models.stdit import Stdit, StditConfig, initialize
from edgerun.models.temporal_vae import VideoAutoencoder, VideoAutoencoderConfig
from edgerun.models.text_encoder import build_word_tokenizer

FRAMES, SIDE, FPS = clips.FRAMES, clips.SIDE, 17
BASE = 96  # pixels: the schedule's base, so that its ratio is Open-Sora's at 256 x 256 and 51 frames
CHUNK = 17  # frames
MAX_TOKENS = 32
GUIDANCE, STEPS = 4.0, 30
NULL_SHARE = 0.1  # of captions in training
VAE = VideoAutoencoderConfig(
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    spatial_norm_groups=8,
    temporal_filters=24,
    temporal_multipliers=(1, 2, 2),
    temporal_downsample=(True, True),
    temporal_residual_blocks=1,
    temporal_norm_groups=8,
    scaling_factor=1.0,
    scale=(1.0,) * 4,
    shift=(0.0,) * 4,
    micro_batch=None,
)
DENOISER = StditConfig(
    hidden_size=144,
    depth=6,
    num_heads=6,
    patch_size=(3, 3),
    caption_channels=128,
    model_max_length=MAX_TOKENS,
    input_sq_size=SIDE,
)
TEXT = {
    "d_model": 128,
    "d_kv": 32,
    "num_heads": 4,
    "num_layers": 3,
    "d_ff": 256,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 64,
}
SHAPE_WEIGHT = 10.0
STILLS = 8  # single frames instead of one clip: about as much work
KL_WEIGHT = 1e-4  # of the mean divergence in nats, against the error of pixels in [-1, 1]


# ---------------------------------------------------------------- training, common


class Clock:
    """The share of the time that is used, and whether to stop."""

    def __init__(self, minutes: float, used_seconds: float = 0.0) -> None:
        self.limit = minutes * 60
        self.before = used_seconds
        self.begin = time.monotonic()
        self.stopped = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)

    def _stop(self, *_: object) -> None:
        self.stopped = True

    @property
    def used(self) -> float:
        return self.before + time.monotonic() - self.begin

    @property
    def share(self) -> float:
        return min(1.0, self.used / self.limit)

    @property
    def over(self) -> bool:
        return self.stopped or self.share >= 1.0

    def rate(self, step: int, peak: float, warm_up: int, decay: float) -> float:
        falling = min(1.0, (1.0 - self.share) / decay) if decay > 0 else 1.0
        return peak * min(1.0, (step + 1) / warm_up) * falling


class Float32Attention(TorchFunctionMode):
    """Attention in float32 under autocast: its gradient in bfloat16 is slow on a CPU, and takes half of a step."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        if function is not F.scaled_dot_product_attention:
            return function(*arguments, **named)
        with torch.autocast("cpu", enabled=False):
            query, key, value = (tensor.float() for tensor in arguments[:3])
            return function(query, key, value, *arguments[3:], **named)


@contextlib.contextmanager
def mixed(device: str) -> Iterator[None]:
    """bfloat16 matrix products."""
    attention = Float32Attention() if device == "cpu" else contextlib.nullcontext()
    with torch.autocast(device, torch.bfloat16), attention:
        yield


def optimizer_for(parameters: list[torch.nn.Parameter], device: str) -> torch.optim.AdamW:
    matrices = [p for p in parameters if p.dim() > 1]
    rest = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=device == "cuda")


class Optimizers:
    """Several optimizers, each of its own parameters, used as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


def muon_for(networks: Networks, device: str) -> Optimizers:
    """Muon (Jordan 2024) for the matrices of the blocks, whose updates it scales as AdamW's; AdamW for the rest."""
    blocks = [*networks.denoiser.spatial_blocks, *networks.denoiser.temporal_blocks, networks.text.encoder.block]
    linear = [module for block in blocks for module in block.modules() if isinstance(module, torch.nn.Linear)]
    inner = {id(module.weight) for module in linear}
    matrices = [p for p in networks.parameters() if id(p) in inner]
    rest = [p for p in networks.parameters() if id(p) not in inner]
    muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return Optimizers([muon, optimizer_for(rest, device)])


Optimizer = torch.optim.AdamW | Optimizers


def update(optimizer: Optimizer, parameters: list[torch.nn.Parameter], rate: float) -> torch.Tensor:
    for group in optimizer.param_groups:
        group["lr"] = rate
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)  # before a weight is spoilt
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def save_state(path: pathlib.Path, state: dict[str, object]) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def log(out: pathlib.Path, **values: object) -> None:
    line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
    print(line, flush=True)
    with (out / "log.jsonl").open("a") as file:
        file.write(line + "\n")


def write_weights(folder: pathlib.Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    halves = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in tensors.items()}
    save_file(halves, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_weights(folder: pathlib.Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    tensors = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    return json.loads((folder / "config.json").read_text()), tensors


# ---------------------------------------------------------------- the autoencoder


def some_frames(batch: clips.ClipBatch, first: int, count: int) -> clips.ClipBatch:
    """The same `count` frames of every clip."""
    return dataclasses.replace(
        batch, position=batch.position[:, first : first + count], angle=batch.angle[:, first : first + count]
    )


def near_the_shape(batch: clips.ClipBatch) -> torch.Tensor:
    """Weights of the pixels, [B, 1, T, H, W] with mean 1: what lies on a shape or near it counts SHAPE_WEIGHT more.

    A shape covers a few per cent of a frame; unweighted, an autoencoder learns its colour last.
    """
    shown = clips.coverage(
        batch.shape[:, None], batch.radius[:, None], batch.position, batch.angle, batch.height, batch.width
    )
    weights = 1.0 + SHAPE_WEIGHT * F.max_pool2d((shown > 0).float(), 5, 1, 2)
    return (weights / weights.mean())[:, None]


def pixel_error(video: torch.Tensor, truth: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean absolute plus mean squared error."""
    difference = video.float() - truth
    return (weights * difference.abs()).mean() + (weights * difference.square()).mean()


def train_frames(out: pathlib.Path, minutes: float, batch_size: int, peak: float, device: str) -> None:
    """The frames' autoencoder, from scratch, on single frames."""
    torch.manual_seed(0)
    model = VideoAutoencoder(VAE).to(device)
    part = model.spatial_vae
    parameters = list(part.parameters())
    optimizer = optimizer_for(parameters, device)
    path = out / "frames.state"
    step, used = load_state(path, part, optimizer, device)
    generator, rng = torch.Generator(device).manual_seed(1 + step), random.Random(2 + step)
    clock, saved, sums = Clock(minutes, used), time.monotonic(), torch.zeros(2, device=device)
    while not clock.over:
        batch = some_frames(clips.sample_batch(batch_size, generator, device), rng.randrange(FRAMES), 1)
        frames = clips.render(batch)[:, :, 0]
        with mixed(device):
            back = part.decode(part.moments(frames)[:, : VAE.latent_channels])
        pixel_error(back, frames, near_the_shape(batch)[:, :, 0]).backward()
        norm = update(optimizer, parameters, clock.rate(step, peak, 50, 0.4))
        sums += torch.stack([(back.detach().float() - frames).square().mean(), norm])
        step += 1
        if step % 100 == 0:
            squared, norm_mean = (sums / 100).tolist()
            sums.zero_()
            log(out, stage="frames", step=step, seconds=clock.used, mean_squared=squared, norm=norm_mean)
        if time.monotonic() - saved > 120:
            save_training(path, part, optimizer, step, clock)
            saved = time.monotonic()
    save_training(path, part, optimizer, step, clock)
    if clock.stopped:
        return
    with torch.no_grad():
        video = clips.render(clips.sample_batch(16, generator, device))
        deviation = float(model.eval().encode_frames(video).mean.std())
    write_vae(out, dataclasses.replace(VAE, scaling_factor=1.0 / deviation), model)


def train_time(out: pathlib.Path, minutes: float, batch_size: int, peak: float, device: str) -> None:
    """The autoencoder over time, around the frozen one of the frames: error of frame latents, and of some pixels."""
    model = load_vae(out / "vae", device)
    part = model.temporal_vae.train().requires_grad_(True)
    scale = model.config.scaling_factor
    with torch.no_grad():  # a posterior as wide as its prior would drown what the first steps learn
        part.quant_conv.conv.bias[VAE.latent_channels :] = -6.0
    parameters = list(part.parameters())
    optimizer = optimizer_for(parameters, device)
    path = out / "time.state"
    step, used = load_state(path, part, optimizer, device)
    generator, rng = torch.Generator(device).manual_seed(5 + step), random.Random(6 + step)
    clock, saved, sums = Clock(minutes, used), time.monotonic(), torch.zeros(4, device=device)
    while not clock.over:
        batch = some_frames(clips.sample_batch(batch_size, generator, device), CHUNK * rng.randrange(3), CHUNK)
        video, weights = clips.render(batch), near_the_shape(batch)
        coarse = F.avg_pool2d(weights[:, 0], VAE.spatial_factor)[:, None]
        seen = slice(rng.randrange(6), None, 6)  # the frames whose pixels are looked at
        with mixed(device):
            with torch.no_grad():
                frames = model.encode_frames(video).mean * scale
            posterior = model.encode_time(frames)
            back = model.decode_time(posterior.sample(), CHUNK)
            pixels = model.decode_frames(back[:, :, seen])
        error_latents = (coarse * (back.float() - frames).abs()).mean()
        error_pixels = pixel_error(pixels, video[:, :, seen], weights[:, :, seen])
        divergence = posterior.divergence().mean()
        (0.2 * error_latents + error_pixels + KL_WEIGHT * divergence).backward()
        norm = update(optimizer, parameters, clock.rate(step, peak, 50, 0.4))
        squared = (pixels.detach().float() - video[:, :, seen]).square().mean()
        sums += torch.stack([squared, error_latents.detach(), divergence.detach(), norm])
        step += 1
        if step % 50 == 0:
            squared, latents, nats, norm_mean = (sums / 50).tolist()
            sums.zero_()
            log(
                out,
                stage="time",
                step=step,
                seconds=clock.used,
                mean_squared=squared,
                latents=latents,
                nats=nats,
                norm=norm_mean,
            )
        if time.monotonic() - saved > 120:
            save_training(path, part, optimizer, step, clock)
            saved = time.monotonic()
    save_training(path, part, optimizer, step, clock)
    if not clock.stopped:
        finish_vae(model.eval(), out, generator, device)


def save_training(path: pathlib.Path, model: torch.nn.Module, optimizer: Optimizer, step: int, clock: Clock) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "used": clock.used}
    save_state(path, state)


def load_state(path: pathlib.Path, model: torch.nn.Module, optimizer: Optimizer, device: str) -> tuple[int, float]:
    """Step and seconds of a run that was stopped; 0 and 0 when there is none."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location=device)
    if set(state["optimizer"]) != set(optimizer.state_dict()):
        raise SystemExit(f"{path} was trained with another --optimizer: give the same, or another --out")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["used"]


@torch.no_grad()
def finish_vae(model: VideoAutoencoder, out: pathlib.Path, generator: torch.Generator, device: str) -> None:
    """Mean and deviation of each latent channel become the normalisation; the weights are written."""
    parts = []
    for _ in range(16):
        video = clips.render(clips.sample_batch(32, generator, device))
        with mixed(device):
            parts.append(model.encode_time(model.encode_frames(video).mean * model.config.scaling_factor).mean.float())
    latents = torch.cat(parts).transpose(0, 1).flatten(1)  # [C, all]
    scale, shift = tuple(latents.std(1).tolist()), tuple(latents.mean(1).tolist())
    write_vae(out, dataclasses.replace(model.config, scale=scale, shift=shift), model)


def write_vae(out: pathlib.Path, config: VideoAutoencoderConfig, model: VideoAutoencoder) -> None:
    model.scale.copy_(torch.tensor(config.scale).view(1, -1, 1, 1, 1))
    model.shift.copy_(torch.tensor(config.shift).view(1, -1, 1, 1, 1))
    write_weights(out / "vae", dataclasses.asdict(config), model.state_dict())
    log(out, stage="vae", scale=list(config.scale), shift=list(config.shift), scaling_factor=config.scaling_factor)


def load_vae(folder: pathlib.Path, device: str) -> VideoAutoencoder:
    config, tensors = read_weights(folder)
    tupled = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    model = VideoAutoencoder(VideoAutoencoderConfig(**tupled))  # type: ignore[arg-type]
    model.load_state_dict(tensors)
    model.micro_batch = None
    return model.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------- text encoder and denoiser


@dataclasses.dataclass(frozen=True)
class Cache:
    """Encoded clips."""

    latents: torch.Tensor  # [N, C, T', h, w], half precision
    tokens: torch.Tensor  # int64 [N, wordings, tokens of the longest], 0 after the caption


class Words:
    """Captions as token ids, fast."""

    def __init__(self) -> None:
        self.tokenizer = build_word_tokenizer(clips.caption_words())
        self.ids = self.tokenizer.get_vocab()

    def encode(self, caption: str) -> list[int]:
        return [self.ids[word] for word in caption.split()] + [1]


def make_cache(
    out: pathlib.Path, vae: VideoAutoencoder, words: Words, count: int, wordings: int, seed: int, device: str
) -> Cache:
    """`count` clips of the seen split; every clip has several wordings. What is encoded stays in out/latents."""
    size = 256 if device == "cuda" else 32
    weights = hashlib.sha256((out / "vae" / "model.safetensors").read_bytes()).hexdigest()[:12]
    folder = out / "latents" / weights
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in range(0, count, size):
        path = folder / f"{seed}_{wordings}_{size}_{first}.safetensors"
        if not path.exists():
            latents, tokens = encode_clips(vae, words, size, wordings, seed * 1_000_000 + first, device)
            save_file({"latents": latents.cpu(), "tokens": tokens}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        parts.append(load_file(path))
    latents = torch.cat([part["latents"] for part in parts])[:count]
    tokens = torch.cat([part["tokens"] for part in parts])[:count]
    longest = int((tokens != 0).sum(-1).max())  # what is masked everywhere costs, and changes nothing
    return Cache(latents.to(device), tokens[..., :longest].contiguous().to(device))


@torch.no_grad()
def encode_clips(
    vae: VideoAutoencoder, words: Words, count: int, wordings: int, seed: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and captions of new clips."""
    rng = random.Random(seed)
    batch = clips.sample_batch(count, torch.Generator(device).manual_seed(seed), device, split="seen")
    with mixed(device):
        encoded = vae.encode(clips.render(batch), sample=False)
    texts = [[words.encode(text) for text in clips.captions(batch, rng)] for _ in range(wordings)]
    rows = [[ids + [0] * (MAX_TOKENS - len(ids)) for ids in clip] for clip in zip(*texts, strict=True)]
    return encoded.to(torch.bfloat16 if device == "cuda" else torch.float16).contiguous(), torch.tensor(rows)


def text_encoder(vocabulary: int) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=vocabulary, **TEXT))


def encode_text(encoder: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return encoder(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state


def draw_times(count: int, ratio: float, generator: torch.Generator, device: str) -> torch.Tensor:
    """Times in 0..1 as Open-Sora draws them: logit-normal, then shifted."""
    return rectified_flow.shift_time(torch.randn(count, generator=generator, device=device).sigmoid(), ratio)


class Networks(torch.nn.Module):
    """What the second stage trains."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.text = text_encoder(len(words.ids))
        self.denoiser = Stdit(DENOISER)
        initialize(self.denoiser)

    def velocity(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, null: torch.Tensor) -> torch.Tensor:
        """null: bool [B], whose caption is left out; its tokens still tell how many null rows there are."""
        y = encode_text(self.text, tokens)
        empty = self.denoiser.null_caption(tokens.shape[1]).to(y.dtype)
        y = torch.where(null[:, None, None], empty[None], y)
        fps = torch.full((len(x),), float(FPS), device=x.device)
        return self.denoiser(x, t, y, fps=fps, pixels=(SIDE, SIDE), mask=tokens != 0)


def flow_loss(
    networks: Networks, x: torch.Tensor, tokens: torch.Tensor, ratio: float, generator: torch.Generator, device: str
) -> torch.Tensor:
    noise = torch.randn(x.shape, generator=generator, device=device)
    t = draw_times(len(x), ratio, generator, device)
    null = torch.rand(len(x), generator=generator, device=device) < NULL_SHARE
    wide = t[:, None, None, None, None]
    with mixed(device):
        v = networks.velocity((1 - wide) * x + wide * noise, t, tokens, null)
    return (v - (x - noise)).square().mean()


def train_denoiser(
    out: pathlib.Path,
    minutes: float,
    batch_size: int,
    count: int,
    peak: float,
    decay: float,
    device: str,
    compiled: bool,
    still: float,
    muon: bool,
) -> None:
    words = Words()
    vae = load_vae(out / "vae", device)
    begin = time.monotonic()
    cache = make_cache(out, vae, words, count, 4, 10, device)
    held = make_cache(out, vae, words, min(512, count), 1, 11, device)
    log(out, stage="cache", clips=count, seconds=time.monotonic() - begin)
    networks = Networks(words).to(device)
    parameters = list(networks.parameters())
    optimizer = muon_for(networks, device) if muon else optimizer_for(parameters, device)
    path = out / "denoiser.state"
    step, used = load_state(path, networks, optimizer, device)
    if not step and (out / "denoiser" / "model.safetensors").exists():  # weights alone: from a run on another machine
        networks.denoiser.load_state_dict(read_weights(out / "denoiser")[1])
        networks.text.load_state_dict(text_state(read_weights(out / "text_encoder")[1]))
    if compiled:
        for block in [*networks.denoiser.spatial_blocks, *networks.denoiser.temporal_blocks]:
            block.compile(dynamic=False)
    clock = Clock(minutes, used)
    generator = torch.Generator(device).manual_seed(20 + step)
    ratio = rectified_flow.shift_ratio((SIDE, SIDE), FRAMES, BASE)
    order = torch.randperm(count, generator=generator, device=device)
    at, sums = 0, torch.zeros(2, device=device)
    saved = time.monotonic()
    while not clock.over:
        stills = clock.share < still
        size = min(count, batch_size * STILLS if stills else batch_size)
        if at + size > count:
            order, at = torch.randperm(count, generator=generator, device=device), 0
        chosen = order[at : at + size]
        at += size
        wording = torch.randint(cache.tokens.shape[1], (size,), generator=generator, device=device)
        latents, tokens = cache.latents[chosen], cache.tokens[chosen, wording]
        if stills:
            frame = torch.randint(latents.shape[2], (size,), generator=generator, device=device)
            latents = latents[torch.arange(size, device=device), :, frame][:, :, None]
        loss = flow_loss(networks, latents.float(), tokens, ratio, generator, device)
        loss.backward()
        norm = update(optimizer, parameters, clock.rate(step, peak, 200, decay))
        sums += torch.stack([loss.detach(), norm])
        step += 1
        every = 100 if device == "cuda" else 50
        if step % every == 0:
            loss_mean, norm_mean = (sums / every).tolist()
            sums.zero_()
            log(out, stage="denoiser", step=step, seconds=clock.used, loss=loss_mean, norm=norm_mean)
        if time.monotonic() - saved > 300:
            save_training(path, networks, optimizer, step, clock)
            saved = time.monotonic()
    save_training(path, networks, optimizer, step, clock)
    write_networks(out, networks, words)
    with torch.no_grad():
        test = torch.Generator(device).manual_seed(30)
        losses = [
            float(
                flow_loss(networks, held.latents[i : i + 64].float(), held.tokens[i : i + 64, 0], ratio, test, device)
            )
            for i in range(0, len(held.tokens), 64)
        ]
    log(out, stage="denoiser", step=step, seconds=clock.used, new_clips_loss=sum(losses) / len(losses))


def text_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers ties its two names of the embedding; the file has one."""
    return tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}


def write_networks(out: pathlib.Path, networks: Networks, words: Words) -> None:
    write_weights(out / "denoiser", networks.denoiser.config.to_dict(), networks.denoiser.state_dict())
    text = {k: v for k, v in networks.text.state_dict().items() if k != "encoder.embed_tokens.weight"}
    config = networks.text.config.to_diff_dict() | {"architectures": ["T5EncoderModel"]}
    config.pop("transformers_version", None)
    write_weights(out / "text_encoder", config, text)
    words.tokenizer.save(str(out / "text_encoder" / "tokenizer.json"))


# ---------------------------------------------------------------- looking at the result


@torch.no_grad()
def generate(
    networks: Networks,
    vae: VideoAutoencoder,
    words: Words,
    captions: list[str],
    device: str,
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """Videos [B, 3, T, H, W] in [-1, 1]."""
    rows = [words.encode(caption) for caption in captions]
    tokens = torch.tensor([ids + [0] * (MAX_TOKENS - len(ids)) for ids in rows], device=device)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), 4, VAE.latent_frames(FRAMES), SIDE // VAE.spatial_factor, SIDE // VAE.spatial_factor)
    noise = torch.randn(shape, generator=generator).to(device)
    null = torch.arange(2 * len(rows), device=device) >= len(rows)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        with mixed(device):
            both = networks.velocity(
                torch.cat([x, x]), torch.full((len(null),), t, device=device), torch.cat([tokens, tokens]), null
            )
        return rectified_flow.guide(*both.chunk(2), guidance)

    ratio = rectified_flow.shift_ratio((SIDE, SIDE), FRAMES, BASE)
    latents = rectified_flow.sample(velocity, noise, rectified_flow.times(steps, ratio)).latents
    with mixed(device):
        return vae.decode(latents, FRAMES).float().clamp(-1, 1)


def load_networks(out: pathlib.Path, words: Words, device: str) -> Networks:
    networks = Networks(words)
    networks.denoiser.load_state_dict(read_weights(out / "denoiser")[1])
    networks.text.load_state_dict(text_state(read_weights(out / "text_encoder")[1]))
    return networks.to(device).eval().requires_grad_(False)


def score(
    name: str, videos: Callable[[list[clips.Clip]], torch.Tensor], wanted: list[clips.Clip], out: pathlib.Path
) -> None:
    from edgerun.evaluation import clip_detectors

    right = dict.fromkeys(("colour", "shape", "motion", "all"), 0)
    for first in range(0, len(wanted), 50):
        part = wanted[first : first + 50]
        for clip, video in zip(part, videos(part).cpu(), strict=True):
            agreed = dataclasses.asdict(clip_detectors.agreement(clip_detectors.detect(video), clip))
            both = all(agreed[key] for key in ("colour", "shape", "motion"))
            for key in right:
                right[key] += both if key == "all" else agreed[key]
    log(out, stage="check", what=name, **{key: value / len(wanted) for key, value in right.items()})


def check(out: pathlib.Path, count: int, device: str, guidance: float, steps: int) -> None:
    """Detectors on real clips, on what the autoencoder makes of them, and on what the model makes of captions."""
    words, vae = Words(), load_vae(out / "vae", device)
    wanted = clips.prompts(count, 40)

    def real(part: list[clips.Clip]) -> torch.Tensor:
        return clips.render(clips.enact(part, torch.Generator(device).manual_seed(41), device))

    def rebuilt(part: list[clips.Clip]) -> torch.Tensor:
        with torch.no_grad(), mixed(device):
            return vae.decode(vae.encode(real(part), sample=False), FRAMES).float()

    score("real", real, wanted, out)
    score("rebuilt", rebuilt, wanted, out)
    if not (out / "denoiser").exists():
        return
    networks = load_networks(out, words, device)
    for split in ("seen", "held_out"):
        chosen = clips.prompts(count, 42, split)  # type: ignore[arg-type]
        score(
            f"generated, {split}, guidance {guidance}, {steps} steps",
            lambda part: generate(networks, vae, words, [c.caption() for c in part], device, 43, steps, guidance),
            chosen,
            out,
        )


@torch.no_grad()
def show(out: pathlib.Path, device: str, path: pathlib.Path, guidance: float) -> None:
    """A sheet of clips as an image: six frames each of real, rebuilt and generated."""
    from PIL import Image

    words, vae = Words(), load_vae(out / "vae", device)
    wanted = clips.prompts(8, 44)
    real = clips.render(clips.enact(wanted, torch.Generator(device).manual_seed(45), device))
    rows = [real, vae.decode(vae.encode(real, sample=False), FRAMES).clamp(-1, 1)]
    if (out / "denoiser").exists():
        networks = load_networks(out, words, device)
        rows.append(generate(networks, vae, words, [c.caption() for c in wanted], device, 46, guidance=guidance))
    picked = torch.stack(rows, 1)[:, :, :, ::10]  # [clip, kind, 3, 6, H, W]
    sheet = picked.permute(0, 4, 1, 3, 5, 2).float().cpu()  # [clip, H, kind, 6, W, 3]
    sheet = sheet.reshape(len(wanted) * SIDE, -1, 3)
    Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy()).save(path)
    for clip in wanted:
        print(clip.caption())


def export(out: pathlib.Path, to: pathlib.Path) -> None:
    """The folder that ships."""
    for part in ("vae", "denoiser", "text_encoder"):
        (to / part).mkdir(parents=True, exist_ok=True)
        for file in (out / part).iterdir():
            (to / part / file.name).write_bytes(file.read_bytes())
    settings = {
        "frames": FRAMES,
        "height": SIDE,
        "width": SIDE,
        "fps": FPS,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "schedule_base": BASE,
    }
    (to / "video.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{sum(f.stat().st_size for f in to.rglob('*') if f.is_file()) / 1e6:.1f} MB in {to}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["frames", "time", "denoiser", "check", "show", "export"])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--batch", type=int, help="clips a step")
    parser.add_argument("--clips", type=int, default=32_000, help="clips in the cache of latents")
    parser.add_argument("--peak", type=float, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=0.5, help="share of the time over which the rate falls to zero")
    parser.add_argument(
        "--still", type=float, default=0.0, help="share of the time, first, that trains on single frames"
    )
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon", help="of the denoiser")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile the blocks (CUDA)")
    parser.add_argument("--count", type=int, default=200, help="prompts to check")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--to", type=pathlib.Path, help="export: folder to write; show: image to write")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if given.stage == "frames":
        train_frames(given.out, given.minutes, given.batch or 16, given.peak or 5e-4, given.device)
    elif given.stage == "time":
        train_time(given.out, given.minutes, given.batch or 8, given.peak or 5e-4, given.device)
    elif given.stage == "denoiser":
        train_denoiser(
            given.out,
            given.minutes,
            given.batch or 256,
            given.clips,
            given.peak or 5e-4,
            given.decay,
            given.device,
            given.compile,
            given.still,
            given.optimizer == "muon",
        )
    elif given.stage == "check":
        check(given.out, given.count, given.device, given.guidance, given.steps)
    elif given.stage == "show":
        show(given.out, given.device, given.to or given.out / "sheet.png", given.guidance)
    else:
        export(given.out, given.to or pathlib.Path("edgerun/zoo/video"))


if __name__ == "__main__":
    main()
