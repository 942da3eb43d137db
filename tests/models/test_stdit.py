"""STDiT3 against its formulas in float64, against the official layout of weights, and as pieces."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgerun import compare
from edgerun.errors import CheckpointError
from edgerun.models.stdit import Stdit, StditConfig, initialize, positions_2d
from edgerun.techniques.temporal_token_merging import adjacent_groups, frame_merge

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


def inputs(frames: int = 5, height: int = 5, width: int = 7, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = draw(batch, SMALL.in_channels, frames, height, width)
    return x, torch.tensor([0.3, 0.9], dtype=torch.float64)[:batch], draw(batch, 4, SMALL.caption_channels)


def run(model: Stdit, x: torch.Tensor, time: torch.Tensor, y: torch.Tensor, **more: object) -> torch.Tensor:
    fps = torch.full((len(x),), FPS, dtype=x.dtype)
    return model(x, time, y, fps=fps, pixels=PIXELS, **more)


# ---------------------------------------------------------------- the formulas, with loops over heads, frames and sites


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


def block(w: Arrays, name: str, x: np.ndarray, y: np.ndarray, t6: np.ndarray, heads: int, temporal: bool) -> np.ndarray:
    """One sample: x [T, S, C], y [M, C], t6 [6, C]."""
    shift1, scale1, gate1, shift2, scale2, gate2 = w[f"{name}.scale_shift_table"] + t6
    inner, attended = layer_norm(x) * (1 + scale1) + shift1, np.zeros_like(x)
    if temporal:
        for site in range(x.shape[1]):
            positions = np.arange(x.shape[0], dtype=np.float64)
            attended[:, site] = self_attention(w, f"{name}.attn", inner[:, site], heads, positions)
    else:
        for frame in range(x.shape[0]):
            attended[frame] = self_attention(w, f"{name}.attn", inner[frame], heads, None)
    x = x + gate1 * attended
    q = linear(w, f"{name}.cross_attn.q_linear", x)
    k, v = np.split(linear(w, f"{name}.cross_attn.kv_linear", y), 2, axis=-1)
    size, crossed = q.shape[-1] // heads, np.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for frame in range(x.shape[0]):
            crossed[frame, :, part] = attend(q[frame, :, part], k[:, part], v[:, part])
    x = x + linear(w, f"{name}.cross_attn.proj", crossed)
    inner = layer_norm(x) * (1 + scale2) + shift2
    return x + gate2 * linear(w, f"{name}.mlp.fc2", gelu(linear(w, f"{name}.mlp.fc1", inner)))


def embedded(w: Arrays, name: str, value: float) -> np.ndarray:
    frequencies = np.exp(-math.log(10000.0) * np.arange(128) / 128)
    waves = np.concatenate([np.cos(value * frequencies), np.sin(value * frequencies)])
    return linear(w, f"{name}.mlp.2", silu(linear(w, f"{name}.mlp.0", waves)))


def position(row: int, column: int, rows: int, columns: int, channels: int) -> np.ndarray:
    scale, base = math.sqrt(PIXELS[0] * PIXELS[1]) / SMALL.input_sq_size, round(math.sqrt(rows * columns))
    frequencies = 10000.0 ** (-np.arange(channels // 4) / (channels // 4))
    halves = []
    for index, count in ((column, columns), (row, rows)):
        angle = index / scale * base / count * frequencies
        halves += [np.sin(angle), np.cos(angle)]
    return np.concatenate(halves)


def formula(model: Stdit, x: torch.Tensor, time: float, y: torch.Tensor) -> np.ndarray:
    """One sample: x [C, T, H, W], y [M, caption channels] → velocity [C, T, H, W]."""
    w = {name: value.double().numpy() for name, value in model.state_dict().items()}
    config, latents = model.config, x.numpy()
    channels, frames, height, width = latents.shape
    rows, columns = -(-height // 2), -(-width // 2)
    padded = np.zeros((channels, frames, 2 * rows, 2 * columns))
    padded[:, :, :height, :width] = latents
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
    caption = linear(w, "y_embedder.y_proj.fc2", gelu(linear(w, "y_embedder.y_proj.fc1", y.numpy())))
    for index in range(config.depth):
        tokens = block(w, f"spatial_blocks.{index}", tokens, caption, t6, config.num_heads, temporal=False)
        tokens = block(w, f"temporal_blocks.{index}", tokens, caption, t6, config.num_heads, temporal=True)
    shift, scale = w["final_layer.scale_shift_table"] + t
    out = linear(w, "final_layer.linear", layer_norm(tokens) * (1 + scale) + shift)
    video = np.zeros((config.out_channels, frames, 2 * rows, 2 * columns))
    for frame in range(frames):
        for row in range(rows):
            for column in range(columns):
                patch = out[frame, row * columns + column].reshape(2, 2, config.out_channels)
                video[:, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch.transpose(2, 0, 1)
    return video[:channels, :, :height, :width]


def test_the_model_is_its_formulas() -> None:
    model, (x, time, y) = random_model(), inputs()
    measured = run(model, x, time, y)
    expected = np.stack([formula(model, x[i], float(time[i]), y[i]) for i in range(2)])
    assert compare.relative_l2(measured.numpy(), expected) <= compare.tolerance("formula_fp64")


@pytest.mark.parametrize(("height", "width", "frames"), [(1, 1, 1), (4, 6, 2), (5, 4, 1)])
def test_other_sizes(height: int, width: int, frames: int) -> None:
    model, (x, time, y) = random_model(), inputs(frames, height, width, batch=1)
    expected = formula(model, x[0], float(time[0]), y[0])
    assert compare.relative_l2(run(model, x, time, y)[0].numpy(), expected) <= compare.tolerance("formula_fp64")


def test_masked_caption_tokens_do_not_count() -> None:
    model, (x, time, y) = random_model(), inputs()
    mask = torch.tensor([[True, True, True, False], [True, True, True, False]])
    short = run(model, x, time, y[:, :3])
    masked = run(model, x, time, y, mask=mask)
    assert compare.relative_l2(masked.numpy(), short.numpy()) <= compare.tolerance("formula_fp64")
    assert compare.relative_l2(run(model, x, time, y).numpy(), short.numpy()) > 1e-4


# ---------------------------------------------------------------- the official layout


@pytest.fixture(scope="module")
def official() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Stdit(StditConfig()).state_dict().items()}


def test_official_names_and_shapes(official: dict[str, tuple[int, ...]]) -> None:
    expected = {
        "x_embedder.proj.weight": (1152, 4, 1, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_block.1.weight": (6912, 1152),
        "t_block.1.bias": (6912,),
        "y_embedder.y_embedding": (300, 4096),
        "y_embedder.y_proj.fc1.weight": (1152, 4096),
        "y_embedder.y_proj.fc2.weight": (1152, 1152),
        "y_embedder.y_proj.fc1.bias": (1152,),
        "y_embedder.y_proj.fc2.bias": (1152,),
        "rope.freqs": (36,),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.linear.bias": (32,),
        "final_layer.scale_shift_table": (2, 1152),
    }
    for name in ("t_embedder", "fps_embedder"):
        expected |= {f"{name}.mlp.0.weight": (1152, 256), f"{name}.mlp.0.bias": (1152,)}
        expected |= {f"{name}.mlp.2.weight": (1152, 1152), f"{name}.mlp.2.bias": (1152,)}
    parts = {
        "attn.qkv": (3456, 1152),
        "attn.proj": (1152, 1152),
        "cross_attn.q_linear": (1152, 1152),
        "cross_attn.kv_linear": (2304, 1152),
        "cross_attn.proj": (1152, 1152),
        "mlp.fc1": (4608, 1152),
        "mlp.fc2": (1152, 4608),
    }
    for kind in ("spatial_blocks", "temporal_blocks"):
        for index in range(28):
            name = f"{kind}.{index}"
            expected |= {f"{name}.{part}.weight": shape for part, shape in parts.items()}
            expected |= {f"{name}.{part}.bias": shape[:1] for part, shape in parts.items()}
            expected |= {f"{name}.attn.{norm}.weight": (72,) for norm in ("q_norm", "k_norm")}
            expected[f"{name}.scale_shift_table"] = (6, 1152)
    assert official == expected


def test_official_parameter_count() -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Stdit(StditConfig()).parameters())
    assert round(count / 1e9, 4) == 1.2076  # of STDiT3-XL/2


def test_config_round_trip_and_refusals() -> None:
    assert StditConfig.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(CheckpointError, match="STDiT2"):
        StditConfig.from_dict({"model_type": "STDiT2"})
    with pytest.raises(CheckpointError, match=r"patches of one frame"):
        StditConfig.from_dict({"patch_size": [2, 2, 2]})
    with pytest.raises(CheckpointError, match="one even size"):
        StditConfig.from_dict({"hidden_size": 30, "num_heads": 6})


def test_an_initialized_model_predicts_nothing_and_has_gradients_in_its_output() -> None:
    model = Stdit(SMALL)
    initialize(model)
    x, time, y = (value.float() for value in inputs())
    out = run(model, x, time, y)
    assert float(out.detach().abs().max()) == 0.0
    (out - x).square().mean().backward()
    assert float(model.final_layer.linear.weight.grad.abs().max()) > 0.0


def test_positions_differ_between_rows_and_columns() -> None:
    table = positions_2d(3, 4, 16, 1.0)
    assert len({tuple(row) for row in table.tolist()}) == 12


# ---------------------------------------------------------------- with merged frames


def test_groups_of_one_frame_change_nothing() -> None:
    model, (x, time, y) = random_model(), inputs()
    alone = frame_merge([[i] for i in range(5)], frozenset({"spatial", "temporal", "cross", "mlp"}))
    measured = run(model, x, time, y, merge=alone)
    assert compare.relative_l2(measured.numpy(), run(model, x, time, y).numpy()) <= compare.tolerance("op_fp32")


@pytest.mark.parametrize("part", ["spatial", "temporal", "cross", "mlp"])
def test_merging_equal_frames_changes_only_what_time_distinguishes(part: str) -> None:
    """Frames that are equal stay so, and all parts but the temporal one then compute what they would alone."""
    model, (x, time, y) = random_model(SMALL), inputs(frames=4)
    x = x[:, :, [0, 0, 0, 0]]
    for block in model.temporal_blocks:  # without its positions the temporal part, too, sees equal frames
        block.attn.q_norm.weight.zero_()
    merged = run(model, x, time, y, merge=frame_merge(adjacent_groups(4), frozenset({part})))
    assert compare.relative_l2(merged.numpy(), run(model, x, time, y).numpy()) <= compare.tolerance("op_fp32")


@pytest.mark.parametrize("part", ["spatial", "temporal", "cross", "mlp"])
def test_every_part_can_be_merged(part: str) -> None:
    model, (x, time, y) = random_model(), inputs()
    merged = run(model, x, time, y, merge=frame_merge(adjacent_groups(5), frozenset({part})))
    assert compare.relative_l2(merged.numpy(), run(model, x, time, y).numpy()) > 1e-3
