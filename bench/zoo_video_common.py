"""What the stages of the video zoo model's training share: its shapes, optimizers, the clock, and how work is kept."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import time
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from edgerun.evaluation import clips
from edgerun.models.stdit import StditConfig
from edgerun.models.temporal_vae import VideoAutoencoderConfig

FRAMES, SIDE, FPS = clips.FRAMES, clips.SIDE, 17
BASE = 96  # pixels: of the times that are drawn in training, whose ratio is Open-Sora's at 256 x 256 and 51 frames
SAMPLING_BASE = 48  # of a sampler's times: tried on six captions, 30 steps came nearer to 200 with it than with BASE
CHUNK = 17  # frames
MAX_TOKENS = 32
GUIDANCE, STEPS = 4.0, 30
SPREAD = 0.25  # of what captions leave open, in the denoiser's clips: two cores cannot teach it every place in hours
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


class Clock:
    """The share of the time that is used, and whether to stop."""

    def __init__(self, minutes: float, used_seconds: float = 0.0) -> None:
        self.limit = minutes * 60
        self.before = used_seconds
        self.begin = time.monotonic()
        self.stopped = False

    def _stop(self, *_: object) -> None:
        self.stopped = True

    def running(self) -> Iterator[None]:
        """Goes on until the time is used; SIGTERM and SIGINT meanwhile end it when the step that is begun is done."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self.over:
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

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


def attention_by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention as two batched products: what `mixed` takes on a CPU.

    The fused one's gradient in bfloat16 is slow there, and over the few tokens that attend to each other here (15 or 16
    in the denoiser, 144 in the autoencoder) two products are faster than it is in float32 too.
    """
    assert dropout_p == 0.0 and not is_causal
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if hidden else scores + attn_mask
    return scores.softmax(-1) @ value


@contextlib.contextmanager
def mixed(device: str) -> Iterator[None]:
    """bfloat16 matrix products."""
    attention: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if device == "cpu":
        attention = unittest.mock.patch.object(F, "scaled_dot_product_attention", attention_by_products)
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


Optimizer = torch.optim.AdamW | Optimizers


def update(optimizer: Optimizer, parameters: list[torch.nn.Parameter], rate: float) -> torch.Tensor:
    for group in optimizer.param_groups:
        group["lr"] = rate
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)  # before a weight is spoilt
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class Means:
    """Means of some values since they were taken last; on the device, so that adding waits for nothing."""

    def __init__(self, count: int, device: str) -> None:
        self.sums, self.steps = torch.zeros(count, device=device), 0

    def add(self, *values: torch.Tensor) -> None:
        self.sums += torch.stack([value.detach() for value in values])
        self.steps += 1

    def take(self) -> list[float]:
        found: list[float] = (self.sums / self.steps).tolist()
        self.sums.zero_()
        self.steps = 0
        return found


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
    save_file(halves, folder / "model.safetensors.new")
    (folder / "model.safetensors.new").replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_weights(folder: pathlib.Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    tensors = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    return json.loads((folder / "config.json").read_text()), tensors


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
