"""The denoiser's blocks, one after another, against the model as a whole."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
import torch

from edgerun import compare
from edgerun.models.stdit import Stdit, StditConfig, rotary_angles
from edgerun.models.stdit_blocks import denoiser_blocks
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.techniques.temporal_token_merging import PARTS, FrameMerge, adjacent_groups, frame_merge
from tests.models import tiny_video_checkpoint
from tests.models.tiny_video_checkpoint import DENOISER, filled

LATENT, PIXELS, TOKENS = (5, 5, 7), (40, 56), 4
WAVES = (torch.ops.aten.cos.default, torch.ops.aten.sin.default)


def model_of(config: StditConfig = DENOISER) -> Stdit:
    model = Stdit(config)
    model.y_embedder.y_embedding = torch.randn(9, 16, generator=torch.Generator().manual_seed(4))
    filled(model, 1)
    return model


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "x": torch.randn(2, 4, *LATENT, generator=generator),
        "time": torch.tensor([0.6, 0.6]),
        "fps": torch.tensor([8.0, 8.0]),
        "y": torch.randn(1, TOKENS, 16, generator=generator),
    }


def whole(model: Stdit, values: dict[str, torch.Tensor], merge: FrameMerge | None = None) -> torch.Tensor:
    y = torch.cat([values["y"], model.null_caption(TOKENS)[None]])
    return model(values["x"], values["time"], y, fps=values["fps"], pixels=PIXELS, merge=merge)


def chained(model: Stdit, values: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    values = dict(values)
    with torch.no_grad():
        for block in denoiser_blocks(model, LATENT, PIXELS, **options):  # type: ignore[arg-type]
            results = block.module(*(values[name] for name in block.inputs))
            values |= dict(zip(block.outputs, results if isinstance(results, tuple) else (results,), strict=True))
    return values["v"]


def assert_same(measured: torch.Tensor, expected: torch.Tensor) -> None:
    assert compare.relative_l2(measured.numpy(), expected.numpy()) <= compare.tolerance("op_fp32")


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_the_chain_is_the_model(pairs: int) -> None:
    model, values = model_of(), inputs()
    assert_same(chained(model, values, pairs_per_block=pairs), whole(model, values))


def test_without_normalised_queries_and_other_patches() -> None:
    model, values = (
        model_of(dataclasses.replace(DENOISER, qk_norm=False, patch_size=(3, 2), pred_sigma=False)),
        inputs(),
    )
    assert_same(chained(model, values), whole(model, values))


def merge_inputs(parts: frozenset[str]) -> dict[str, torch.Tensor]:
    """What a chain that merges the frames of LATENT in pairs is given beside; nothing where it merges in no part."""
    if not parts:
        return {}
    merge, head_size = frame_merge(adjacent_groups(LATENT[0]), parts), DENOISER.head_size
    cosines, sines = rotary_angles(merge.positions, 10000.0 ** (-torch.arange(0, head_size, 2) / head_size))
    return {"merge": merge.merge, "unmerge": merge.unmerge, "cosines": cosines, "sines": sines}


@pytest.mark.parametrize("parts", [{"spatial"}, {"temporal"}, {"cross"}, {"mlp"}, set(PARTS)])
def test_merged_frames(parts: set[str]) -> None:
    model, values = model_of(), inputs()
    for groups in (adjacent_groups(LATENT[0]), [[i] for i in range(LATENT[0])]):
        merge = frame_merge(groups, frozenset(parts))
        cosines, sines = rotary_angles(merge.positions, model.rope.freqs)
        given = values | {"merge": merge.merge, "unmerge": merge.unmerge, "cosines": cosines, "sines": sines}
        assert_same(chained(model, given, merge_parts=frozenset(parts)), whole(model, values, merge))


@pytest.mark.parametrize(
    ("name", "parts"), [("head", set()), ("pairs_0", set()), ("pairs_0", set(PARTS)), ("tail", set())]
)
def test_an_exported_block_holds_what_a_device_can_run(name: str, parts: set[str]) -> None:
    """Of a checkpoint in bfloat16: float32 throughout, at most five dimensions, one convolution, of pictures."""
    config = dataclasses.replace(DENOISER, depth=1)
    weights = {name: value.bfloat16() for name, value in model_of(config).state_dict().items()}
    with torch.device("meta"):
        model = Stdit(config)
    values = inputs() | merge_inputs(frozenset(parts))
    with torch.no_grad():
        for block in denoiser_blocks(model, LATENT, PIXELS, merge_parts=frozenset(parts), weights=weights):
            arguments = tuple(values[one] for one in block.inputs)
            if block.name == name:
                break
            results = block.module(*arguments)
            values |= dict(zip(block.outputs, results if isinstance(results, tuple) else (results,), strict=True))
        program = torch.export.export(block.module, arguments, strict=False).run_decompositions()
    nodes = [node for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert max(node.meta["val"].dim() for node in nodes) <= 5
    dtypes = {node.meta["val"].dtype for node in nodes}
    assert {dtype for dtype in dtypes if dtype.is_floating_point} == {torch.float32}
    convolved = [node.all_input_nodes[1].meta["val"].dim() for node in nodes if "conv" in str(node.target)]
    assert convolved == ([4] if name == "head" else [])  # dimensions of their weights
    # Cosines and sines of the time and of the frames per second; a pair has those of its positions from outside.
    assert sum(node.target in WAVES for node in nodes) == (4 if name == "head" else 0)


def test_weights_come_from_the_file_block_by_block(tmp_path: pathlib.Path) -> None:
    source = VideoCheckpoint.open(tiny_video_checkpoint.write(tmp_path / "model"))
    with torch.device("meta"):
        model = Stdit(source.denoiser)
    loaded = chained(model, inputs(), weights=source.outline_denoiser()[1])
    assert all(value.device.type == "meta" for value in model.state_dict().values())
    assert_same(loaded, whole(source.load_denoiser(), inputs()))
