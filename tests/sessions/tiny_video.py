"""A tiny random video model: its modules, its bundle, and the same sampling in torch."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgerun.bundle import SCHEMA_VERSION, sha256_of
from edgerun.export.lower.executorch import LoweredProgram, lower

CHANNELS, FRAMES, ROWS, COLUMNS = 4, 5, 4, 6  # of the latent
WIDTH, HEADS = 32, 2
HEAD_SIZE = WIDTH // HEADS
CAPTION, MAX_TOKENS, VOCABULARY = 16, 8, 40
LATENTS_PER_CHUNK, FRAMES_PER_CHUNK, VIDEO_FRAMES = 2, 3, 7  # a latent is two frames, a chunk's first is dropped
FRAMES_PER_CALL = 2
GUIDANCE, FPS = 3.0, 8.0
TIMES = [0.2 + 0.8 * (1 - i / 6) for i in range(6)]
MERGED = [[0], [1, 2], [3, 4]]


class TextEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, CAPTION)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens)


class TextLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CAPTION, CAPTION)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights = (hidden @ hidden.transpose(1, 2)).softmax(-1)
        return hidden + torch.tanh(self.linear(weights @ hidden))


class Embed(nn.Module):
    """Latents → tokens [2, T, S, C], time features, captions of prompt and of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.time, self.fps = nn.Linear(CHANNELS, WIDTH), nn.Linear(1, WIDTH), nn.Linear(1, WIDTH)
        self.caption = nn.Linear(CAPTION, WIDTH)
        self.register_buffer("null", torch.randn(1, MAX_TOKENS, CAPTION))

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, fps: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = self.patch(x.flatten(3).permute(0, 2, 3, 1))
        t = torch.tanh(self.time(time[:, None])) + 0.01 * self.fps(fps[:, None])
        return tokens, t, self.caption(torch.cat([y, self.null[:, : y.shape[1]]]))


class Pair(nn.Module):
    """Attention over merged frames at every site, attention to the caption, and a feed-forward part."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.query, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        merge: torch.Tensor,
        unmerge: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
    ) -> torch.Tensor:
        batch, frames, sites, width = x.shape
        inner = F.layer_norm(x, (width,)) * (1 + t[:, None, None])
        inner = (merge @ inner.reshape(batch, frames, sites * width)).reshape(batch, merge.shape[0], sites, width)
        across = inner.transpose(1, 2).reshape(batch * sites, merge.shape[0], width)
        q, k, v = self.qkv(across).view(batch * sites, -1, 3 * HEADS, HEAD_SIZE).transpose(1, 2).chunk(3, dim=1)
        out = F.scaled_dot_product_attention(_rotate(q, cosines, sines), _rotate(k, cosines, sines), v)
        out = self.proj(out.transpose(1, 2).reshape(batch * sites, -1, width))
        out = out.view(batch, sites, -1, width).transpose(1, 2)
        x = x + (unmerge @ out.reshape(batch, -1, sites * width)).reshape(batch, frames, sites, width)
        flat = x.reshape(batch, frames * sites, width)
        x = x + ((self.query(flat) @ y.transpose(1, 2)).softmax(-1) @ y).view(x.shape)
        return x + self.down(F.silu(self.up(F.layer_norm(x, (width,)))))


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    return x * cosines + torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2) * sines


class Finish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out = self.linear(F.layer_norm(x, (WIDTH,)) * (1 + t[:, None, None]))
        return out.permute(0, 3, 1, 2).unflatten(3, (ROWS, COLUMNS))


class DecodeTime(nn.Module):
    """[1, C, t, h, w] → two frames of features for each latent, [2 t, 8, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 16, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(z[0].transpose(0, 1))).reshape(-1, 8, ROWS, COLUMNS)


class DecodeFrames(nn.Module):
    """[f, 8, h, w] → [3, f, 2 h, 2 w], a little beyond [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        out = self.conv(features).reshape(-1, 3, 2, 2, ROWS * COLUMNS)
        out = out.reshape(-1, 6, 2, ROWS * COLUMNS).transpose(2, 3).reshape(-1, 3, 2, ROWS, 2 * COLUMNS)
        return 1.2 * torch.tanh(3 * out.transpose(2, 3).reshape(-1, 3, 2 * ROWS, 2 * COLUMNS)).transpose(0, 1)


@dataclasses.dataclass(frozen=True)
class Part:
    """A program: its module, the names of its values, and which dimensions of its inputs are free."""

    name: str
    module: nn.Module
    inputs: dict[str, tuple[torch.Tensor, dict[int, str]]]
    outputs: tuple[str, ...]


LIMITS = {"n": (1, MAX_TOKENS), "m": (1, FRAMES), "t": (1, LATENTS_PER_CHUNK), "f": (1, FRAMES_PER_CALL)}


def matrices(groups: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """merge [T', T], unmerge [T, T'] and positions [T'] of groups of frames."""
    merge = torch.zeros(len(groups), FRAMES)
    for row, group in enumerate(groups):
        merge[row, list(group)] = 1 / len(group)
    return merge, (merge > 0).float().T.contiguous(), merge @ torch.arange(FRAMES, dtype=torch.float32)


def angles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [T', head size]."""
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_SIZE, 2, dtype=torch.float64) / HEAD_SIZE)
    both = (positions[:, None] * frequencies.float()).repeat_interleave(2, dim=-1)
    return both.cos(), both.sin()


class TinyVideo:
    """The model as its parts, by chain.

    hidden: of the denoiser's feed-forward parts, which sets a block's size. repeats: how often each of its pairs runs.
    """

    def __init__(self, pairs: int = 3, hidden: int = 4 * WIDTH, repeats: int = 1) -> None:
        torch.manual_seed(0)
        tokens, text = torch.zeros(1, 5, dtype=torch.int64), torch.randn(1, 5, CAPTION)
        merge, unmerge, positions = matrices(MERGED)
        cosines, sines = angles(positions)
        latents = torch.randn(2, CHANNELS, FRAMES, ROWS, COLUMNS)
        x, t, y = torch.randn(2, FRAMES, ROWS * COLUMNS, WIDTH), torch.randn(2, WIDTH), torch.randn(2, 5, WIDTH)
        pair = {
            "x": (x, {}),
            "t": (t, {}),
            "y": (y, {1: "n"}),
            "merge": (merge, {0: "m"}),
            "unmerge": (unmerge, {1: "m"}),
            "cosines": (cosines, {0: "m"}),
            "sines": (sines, {0: "m"}),
        }
        times, fps = torch.rand(2), torch.rand(2)  # two tensors: export takes one given twice for one input
        embed = {"x": (latents, {}), "time": (times, {}), "fps": (fps, {}), "y": (text, {1: "n"})}
        z = torch.randn(1, CHANNELS, LATENTS_PER_CHUNK, ROWS, COLUMNS)
        pictures = torch.randn(FRAMES_PER_CALL, 8, ROWS, COLUMNS)
        self.chains: dict[str, list[Part]] = {
            "text_encoder": [
                Part("text_embedding", TextEmbedding(), {"tokens": (tokens, {1: "n"})}, ("hidden",)),
                Part("text_layer", TextLayer(), {"hidden": (text, {1: "n"})}, ("y",)),
            ],
            "denoiser": [
                Part("embed", Embed(), embed, ("x", "t", "y")),
                *(Part(f"pair_{i}", Pair(hidden), pair, ("x",)) for i in range(pairs)),
                Part("finish", Finish(), {"x": (x, {}), "t": (t, {})}, ("v",)),
            ],
            "time_decoder": [Part("decode_time", DecodeTime(), {"z": (z, {2: "t"})}, ("chunk",))],
            "frame_decoder": [Part("decode_frames", DecodeFrames(), {"pictures": (pictures, {0: "f"})}, ("frames",))],
        }
        middle = self.chains["denoiser"]
        middle[1:-1] = [part for part in middle[1:-1] for _ in range(repeats)]
        for part in self.parts:
            part.module.eval().requires_grad_(False)

    @property
    def parts(self) -> list[Part]:
        """Every program once."""
        return list({part.name: part for chain in self.chains.values() for part in chain}.values())

    def run(self, chain: str, **values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the chain leaves in its table."""
        table = dict(values)
        with torch.inference_mode():
            for part in self.chains[chain]:
                given = part.module(*(table[name] for name in part.inputs))
                table.update(zip(part.outputs, given if isinstance(given, tuple) else (given,), strict=True))
        return table

    def velocity(self, x: torch.Tensor, t: float, y: torch.Tensor, merged: bool, guidance: float) -> torch.Tensor:
        """Guided; x [C, T, h, w]."""
        merge, unmerge, positions = matrices(MERGED if merged else [[i] for i in range(FRAMES)])
        cosines, sines = angles(positions)
        values = {"x": torch.stack([x, x]), "time": torch.full((2,), t), "fps": torch.full((2,), FPS), "y": y}
        tables = {"merge": merge, "unmerge": unmerge, "cosines": cosines, "sines": sines}
        v = self.run("denoiser", **values, **tables)["v"]
        return v[1] + guidance * (v[0] - v[1])

    def encode(self, tokens: Sequence[int]) -> torch.Tensor:
        return self.run("text_encoder", tokens=torch.tensor([list(tokens)]))["y"]

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """x [C, T, h, w] → uint8 [frames, H, W, 3]."""
        kept = []
        for chunk, start in enumerate(range(0, FRAMES, LATENTS_PER_CHUNK)):
            pictures = self.run("time_decoder", z=x[None, :, start : start + LATENTS_PER_CHUNK])["chunk"]
            wanted = min(FRAMES_PER_CHUNK, VIDEO_FRAMES - chunk * FRAMES_PER_CHUNK)
            kept.append(pictures[len(pictures) - wanted :])
        pixels = (self.run("frame_decoder", pictures=torch.cat(kept))["frames"] + 1) / 2
        return (pixels * 255 + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0)

    def sample(
        self, tokens: Sequence[int], noise: torch.Tensor, merge_steps: int = 2, guidance: float = GUIDANCE
    ) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
        """Plain Euler: the time, the latent after each step, and its velocity."""
        x, y = noise, self.encode(tokens)
        for i, t in enumerate(TIMES):
            v = self.velocity(x, t, y, i < merge_steps, guidance)
            x = x + v * (t - (TIMES[i + 1] if i + 1 < len(TIMES) else 0.0))
            yield t, x, v

    def save(self, folder: pathlib.Path) -> pathlib.Path:
        """Write the bundle."""
        (folder / "programs").mkdir(parents=True)
        programs = []
        for part in self.parts:
            path = folder / "programs" / f"{part.name}.pte"
            dimensions = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in LIMITS.items()}
            shapes = tuple({i: dimensions[name] for i, name in free.items()} for _, free in part.inputs.values())
            examples = tuple(example for example, _ in part.inputs.values())
            lowered = lower(torch.export.export(part.module, examples, dynamic_shapes=shapes), path, {})
            programs.append(_entry(part, lowered))
        merge, unmerge, positions = matrices(MERGED)
        files = sorted(folder.glob("programs/*.pte"))
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": "video",
            "build": "f" * 64,
            "programs": programs,
            "chains": {name: [part.name for part in chain] for name, chain in self.chains.items()},
            "video": {
                "frames": VIDEO_FRAMES,
                "height": 2 * ROWS,
                "width": 2 * COLUMNS,
                "fps": FPS,
                "latent": {"channels": CHANNELS, "frames": FRAMES, "height": ROWS, "width": COLUMNS},
                "guidance": GUIDANCE,
                "times": TIMES,
                "leap": {"kind": "none"},
                "merge": {
                    "steps": 2,
                    "matrix": merge.tolist(),
                    "unmerge": unmerge.tolist(),
                    "positions": positions.tolist(),
                },
                "decoder": {
                    "latents_per_chunk": LATENTS_PER_CHUNK,
                    "frames_per_chunk": FRAMES_PER_CHUNK,
                    "frames_per_call": FRAMES_PER_CALL,
                },
            },
            "files": {
                file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
                for file in files
            },
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        return folder


def _entry(part: Part, lowered: LoweredProgram) -> dict[str, Any]:
    inputs = []
    for name, (example, free) in part.inputs.items():
        shape = [free.get(i, size) for i, size in enumerate(example.shape)]
        limits = {symbol: list(LIMITS[symbol]) for symbol in free.values()}
        kind = "int64" if example.dtype == torch.int64 else "float32"
        inputs.append({"name": name, "dtype": kind, "shape": shape, "limits": limits})
    outputs = [{"name": name, "dtype": "float32"} for name in part.outputs]
    file = f"programs/{part.name}.pte"
    return {"name": part.name, "file": file, "target": "executorch-xnnpack", "operators": [], "inputs": inputs} | {
        "outputs": outputs,
        "arena_bytes": lowered.arena_bytes,
        "table_bytes": lowered.table_bytes,
    }


# The wide model: a block of 4 MB runs ten times in the denoiser, each a program of its own to the loader.
WIDE_BLOCKS, WIDE_HIDDEN = 10, 1 << 14


def shared_bundle(factory: pytest.TempPathFactory, name: str, model: Callable[[], TinyVideo]) -> pathlib.Path:
    """The bundle of that name for this test run, made by the first worker that wants it."""
    base = factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / f"shared-{name}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "tiny.edgerun").is_dir():
            model().save(folder / "partial").rename(folder / "tiny.edgerun")
    return folder / "tiny.edgerun"


def wide_bundle(factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wide model's."""
    return shared_bundle(factory, "wide-video", lambda: TinyVideo(1, WIDE_HIDDEN, WIDE_BLOCKS))


def noise_of(seed: int) -> torch.Tensor:
    """The session's noise [C, T, h, w], from its description: SplitMix64, polar method."""
    count = CHANNELS * FRAMES * ROWS * COLUMNS
    mask, state = (1 << 64) - 1, seed
    numbers: list[float] = []

    def uniform() -> float:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & mask
        mixed = state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        return ((mixed ^ (mixed >> 31)) >> 11) * 2.0**-53

    while len(numbers) < count:
        a, b = 2 * uniform() - 1, 2 * uniform() - 1
        square = a * a + b * b
        if 0 < square < 1:
            scale = math.sqrt(-2 * math.log(square) / square)
            numbers += [a * scale, b * scale]
    return torch.tensor(numbers[:count]).view(CHANNELS, FRAMES, ROWS, COLUMNS)
