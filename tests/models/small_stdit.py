"""A small random STDiT3, and its formulas in float64 with loops over heads, frames and sites; merged frames too."""

from __future__ import annotations

import math

import numpy as np
import torch

from edgerun.models.stdit import Stdit, StditConfig

Arrays = dict[str, np.ndarray]
SMALL = StditConfig(
    in_channels=3, hidden_size=24, depth=2, num_heads=3, caption_channels=10, model_max_length=7, input_sq_size=64
)
PIXELS, FPS = (40, 56), 24.0


def random_model(config: StditConfig = SMALL) -> Stdit:
    torch.manual_seed(0)
    model = Stdit(config).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape) * (0.3 if "norm" not in name else 0.2) + ("norm" in name))
    return model


# ---------------------------------------------------------------- frames that are computed together


def pairs(frames: int) -> list[list[int]]:
    """[2j, 2j + 1]; of an odd count the first frame stays alone, and the pairs come after it."""
    return [[0]] * (frames % 2) + [[first, first + 1] for first in range(frames % 2, frames, 2)]


def merged_positions(frames: int) -> np.ndarray:
    """2j + 1/2, the middle of a pair; of an odd count 0, then one more than that."""
    middles = [2 * j + 0.5 for j in range(frames // 2)]
    return np.array([0.0, *(1 + middle for middle in middles)] if frames % 2 else middles)


def narrowed(x: np.ndarray) -> np.ndarray:
    """[T, ...] → [T', ...], means."""
    return np.stack([sum(x[frame] for frame in group) / len(group) for group in pairs(len(x))])


def widened(x: np.ndarray, frames: int) -> np.ndarray:
    """[T', ...] → [T, ...], every frame its pair's."""
    out = np.zeros((frames, *x.shape[1:]))
    for row, group in enumerate(pairs(frames)):
        for frame in group:
            out[frame] = x[row]
    return out


# ---------------------------------------------------------------- the model


def linear(w: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def layer_norm(x: np.ndarray) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = q @ k.T / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def rotate(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    size = x.shape[-1]
    out = x.copy()
    for pair in range(size // 2):
        # The official buffer of frequencies is float32.
        angle = positions * float(np.float32(10000.0 ** (-2 * pair / size)))
        even, odd = x[:, 2 * pair], x[:, 2 * pair + 1]
        out[:, 2 * pair] = even * np.cos(angle) - odd * np.sin(angle)
        out[:, 2 * pair + 1] = odd * np.cos(angle) + even * np.sin(angle)
    return out


def self_attention(w: Arrays, name: str, rows: np.ndarray, heads: int, positions: np.ndarray | None) -> np.ndarray:
    q, k, v = np.split(linear(w, f"{name}.qkv", rows), 3, axis=-1)
    size, out = q.shape[-1] // heads, np.zeros_like(q)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        a = rms_norm(q[:, part], w[f"{name}.q_norm.weight"])
        b = rms_norm(k[:, part], w[f"{name}.k_norm.weight"])
        if positions is not None:
            a, b = rotate(a, positions), rotate(b, positions)
        out[:, part] = attend(a, b, v[:, part])
    return linear(w, f"{name}.proj", out)


def cross_attention(w: Arrays, name: str, x: np.ndarray, y: np.ndarray, heads: int) -> np.ndarray:
    q = linear(w, f"{name}.q_linear", x)
    k, v = np.split(linear(w, f"{name}.kv_linear", y), 2, axis=-1)
    size, crossed = q.shape[-1] // heads, np.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for frame in range(x.shape[0]):
            crossed[frame, :, part] = attend(q[frame, :, part], k[:, part], v[:, part])
    return linear(w, f"{name}.proj", crossed)


def block(
    w: Arrays,
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    t6: np.ndarray,
    heads: int,
    temporal: bool,
    merged: frozenset[str] = frozenset(),
) -> np.ndarray:
    """One sample: x [T, S, C], y [M, C], t6 [6, C]; merged: the parts that see pairs of frames."""
    frames = len(x)
    shift1, scale1, gate1, shift2, scale2, gate2 = w[f"{name}.scale_shift_table"] + t6
    own = ("temporal" if temporal else "spatial") in merged
    inner = layer_norm(x) * (1 + scale1) + shift1
    inner = narrowed(inner) if own else inner
    attended = np.zeros_like(inner)
    if temporal:
        positions = merged_positions(frames) if own else np.arange(frames, dtype=np.float64)
        for site in range(x.shape[1]):
            attended[:, site] = self_attention(w, f"{name}.attn", inner[:, site], heads, positions)
    else:
        for row in range(len(inner)):
            attended[row] = self_attention(w, f"{name}.attn", inner[row], heads, None)
    x = x + gate1 * (widened(attended, frames) if own else attended)
    if "cross" in merged:
        x = x + widened(cross_attention(w, f"{name}.cross_attn", narrowed(x), y, heads), frames)
    else:
        x = x + cross_attention(w, f"{name}.cross_attn", x, y, heads)
    inner = layer_norm(x) * (1 + scale2) + shift2
    inner = narrowed(inner) if "mlp" in merged else inner
    inner = linear(w, f"{name}.mlp.fc2", gelu(linear(w, f"{name}.mlp.fc1", inner)))
    return x + gate2 * (widened(inner, frames) if "mlp" in merged else inner)


def waves(value: float) -> np.ndarray:
    """128 cosines, then 128 sines, at frequencies from 1 down to nearly 1/10,000."""
    frequencies = np.exp(-math.log(10000.0) * np.arange(128) / 128)
    return np.concatenate([np.cos(value * frequencies), np.sin(value * frequencies)])


def embedded(w: Arrays, name: str, value: float) -> np.ndarray:
    return linear(w, f"{name}.mlp.2", silu(linear(w, f"{name}.mlp.0", waves(value))))


def position(row: int, column: int, rows: int, columns: int, channels: int) -> np.ndarray:
    scale, base = math.sqrt(PIXELS[0] * PIXELS[1]) / SMALL.input_sq_size, round(math.sqrt(rows * columns))
    frequencies = 10000.0 ** (-np.arange(channels // 4) / (channels // 4))
    halves = []
    for index, count in ((column, columns), (row, rows)):
        angle = index / scale * base / count * frequencies
        halves += [np.sin(angle), np.cos(angle)]
    return np.concatenate(halves)


def formula(
    model: Stdit, x: np.ndarray, time: float, y: np.ndarray, merged: frozenset[str] = frozenset()
) -> np.ndarray:
    """One sample: x [C, T, H, W], y [M, caption channels] → velocity [C, T, H, W]; merged: as `block`'s."""
    w = {name: value.double().numpy() for name, value in model.state_dict().items()}
    config = model.config
    channels, frames, height, width = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    padded = np.zeros((channels, frames, 2 * rows, 2 * columns))
    padded[:, :, :height, :width] = x
    tokens = np.zeros((frames, rows * columns, config.hidden_size))
    for frame in range(frames):
        for row in range(rows):
            for column in range(columns):
                patch = padded[:, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                token = np.einsum("ocij,cij->o", w["x_embedder.proj.weight"][:, :, 0], patch)
                where = position(row, column, rows, columns, config.hidden_size)
                tokens[frame, row * columns + column] = token + w["x_embedder.proj.bias"] + where
    t = embedded(w, "t_embedder", 1000.0 * time) + embedded(w, "fps_embedder", FPS)
    t6 = linear(w, "t_block.1", silu(t)).reshape(6, -1)
    caption = linear(w, "y_embedder.y_proj.fc2", gelu(linear(w, "y_embedder.y_proj.fc1", y)))
    for index in range(config.depth):
        for kind, temporal in (("spatial_blocks", False), ("temporal_blocks", True)):
            tokens = block(w, f"{kind}.{index}", tokens, caption, t6, config.num_heads, temporal, merged)
    shift, scale = w["final_layer.scale_shift_table"] + t
    out = linear(w, "final_layer.linear", layer_norm(tokens) * (1 + scale) + shift)
    video = np.zeros((config.out_channels, frames, 2 * rows, 2 * columns))
    for frame in range(frames):
        for row in range(rows):
            for column in range(columns):
                patch = out[frame, row * columns + column].reshape(2, 2, config.out_channels)
                video[:, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch.transpose(2, 0, 1)
    return video[:channels, :, :height, :width]
