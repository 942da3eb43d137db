"""STDiT3 against its formulas in float64, against the official layout of weights, and as pieces."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from edgerun import compare
from edgerun.errors import CheckpointError
from edgerun.models.stdit import Stdit, StditConfig, initialize, positions_2d
from edgerun.techniques.temporal_token_merging import PAPER_PARTS, PARTS, adjacent_groups, frame_merge
from tests.models.small_stdit import FPS, PIXELS, SMALL, formula, random_model, waves


def inputs(frames: int = 5, height: int = 5, width: int = 7, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = draw(batch, SMALL.in_channels, frames, height, width)
    return x, torch.tensor([0.3, 0.9], dtype=torch.float64)[:batch], draw(batch, 4, SMALL.caption_channels)


def run(model: Stdit, x: torch.Tensor, time: torch.Tensor, y: torch.Tensor, **more: object) -> torch.Tensor:
    fps = torch.full((len(x),), FPS, dtype=x.dtype)
    return model(x, time, y, fps=fps, pixels=PIXELS, **more)


def test_the_model_is_its_formulas() -> None:
    model, (x, time, y) = random_model(), inputs()
    measured = run(model, x, time, y)
    expected = np.stack([formula(model, x[i].numpy(), float(time[i]), y[i].numpy()) for i in range(2)])
    assert compare.relative_l2(measured.numpy(), expected) <= compare.tolerance("formula_fp64")


@pytest.mark.parametrize(("height", "width", "frames"), [(1, 1, 1), (4, 6, 2), (5, 4, 1)])
def test_other_sizes(height: int, width: int, frames: int) -> None:
    model, (x, time, y) = random_model(), inputs(frames, height, width, batch=1)
    expected = formula(model, x[0].numpy(), float(time[0]), y[0].numpy())
    assert compare.relative_l2(run(model, x, time, y)[0].numpy(), expected) <= compare.tolerance("formula_fp64")


def test_masked_caption_tokens_do_not_count() -> None:
    model, (x, time, y) = random_model(), inputs()
    mask = torch.tensor([[True, True, True, False], [True, True, True, False]])
    short = run(model, x, time, y[:, :3])
    masked = run(model, x, time, y, mask=mask)
    assert compare.relative_l2(masked.numpy(), short.numpy()) <= compare.tolerance("formula_fp64")
    assert compare.relative_l2(run(model, x, time, y).numpy(), short.numpy()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_takes_the_waves_of_its_time_in_float32(dtype: torch.dtype) -> None:
    """At 900 radians bfloat16 has steps of 4, float16 of 1/2: only the waves are rounded, for the layers after them."""
    model, (x, _, y) = random_model().to(dtype), inputs()
    taken: dict[str, torch.Tensor] = {}
    for name in ("t_embedder", "fps_embedder"):
        mlp = model.get_submodule(name).get_submodule("mlp")
        mlp.register_forward_pre_hook(lambda _, given, name=name: taken.update({name: given[0]}))
    time, fps = torch.tensor([0.3001, 0.9003]), torch.tensor([FPS, 59.94])
    velocity = model(x.to(dtype), time, y.to(dtype), fps=fps, pixels=PIXELS)
    assert velocity.dtype == torch.float32 and bool(velocity.isfinite().all())
    for name, values in (("t_embedder", 1000.0 * time.double()), ("fps_embedder", fps.double())):
        expected = np.stack([waves(float(value)) for value in values])
        assert taken[name].dtype == dtype
        assert compare.relative_l2(taken[name].float(), expected) <= compare.tolerance("op_fp16")


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


@pytest.mark.parametrize("frames", [1, 4, 5])
@pytest.mark.parametrize("parts", [*({part} for part in PARTS), PAPER_PARTS, PARTS])
def test_merged_frames_follow_the_formulas(frames: int, parts: Iterable[str]) -> None:
    """Pairs, of an odd count after a first frame by itself; positions of their middles; replicated afterwards.

    Attention feels differences of positions alone: the 1/2 shows where the count is odd.
    """
    model, (x, time, y), merged = random_model(), inputs(frames, batch=1), frozenset(parts)
    measured = run(model, x, time, y, merge=frame_merge(adjacent_groups(frames), merged))
    expected = formula(model, x[0].numpy(), float(time[0]), y[0].numpy(), merged)
    assert compare.relative_l2(measured[0].numpy(), expected) <= compare.tolerance("formula_fp64")


def test_groups_of_one_frame_change_nothing() -> None:
    model, (x, time, y) = random_model(), inputs()
    alone = frame_merge([[i] for i in range(5)], frozenset(PARTS))
    measured = run(model, x, time, y, merge=alone)
    assert compare.relative_l2(measured.numpy(), run(model, x, time, y).numpy()) <= compare.tolerance("op_fp32")


@pytest.mark.parametrize("part", PARTS)
def test_merging_equal_frames_changes_only_what_time_distinguishes(part: str) -> None:
    """Frames that are equal stay so, and all parts but the temporal one then compute what they would alone."""
    model, (x, time, y) = random_model(SMALL), inputs(frames=4)
    x = x[:, :, [0, 0, 0, 0]]
    for block in model.temporal_blocks:  # without its positions the temporal part, too, sees equal frames
        block.attn.q_norm.weight.zero_()
    merged = run(model, x, time, y, merge=frame_merge(adjacent_groups(4), frozenset({part})))
    assert compare.relative_l2(merged.numpy(), run(model, x, time, y).numpy()) <= compare.tolerance("op_fp32")


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_merged(part: str) -> None:
    model, (x, time, y) = random_model(), inputs()
    merged = run(model, x, time, y, merge=frame_merge(adjacent_groups(5), frozenset({part})))
    assert compare.relative_l2(merged.numpy(), run(model, x, time, y).numpy()) > 1e-3
