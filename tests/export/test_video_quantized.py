"""A video model in int8: what is quantised, how far it is from float32, and that it runs."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from edgerun import compare
from edgerun.bundle import BundleWriter
from edgerun.errors import ExportError, ParityError
from edgerun.export import export_video_bundle
from edgerun.export.video_blocks import Block, Geometry, denoiser_chain, text_chain
from edgerun.export.video_chain import check, export_chain, results_of, worst_error
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.sessions.video import VideoSession
from edgerun.video_recipe import VideoRecipe
from tests import shared_video_bundle
from tests.export.programs import portable_calls, run_chain

RECIPE = VideoRecipe(quantize="int8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> VideoCheckpoint:
    return VideoCheckpoint.open(shared_video_bundle.checkpoint(tmp_path_factory))


def chain(source: VideoCheckpoint, name: str) -> tuple[Iterator[Block], dict[str, torch.Tensor]]:
    geometry = Geometry.of(source, RECIPE)
    if name == "text_encoder":
        return text_chain(*source.outline_text_encoder(), geometry)
    return denoiser_chain(*source.outline_denoiser(), geometry, RECIPE)


@pytest.fixture(scope="module")
def exported(
    source: VideoCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[pathlib.Path, list[tuple[dict[str, Any], dict[str, float]]]]]:
    """The programs of the text encoder's embedding and first layer, and what the export says of them."""
    with BundleWriter(tmp_path_factory.mktemp("int8") / "tiny.edgerun") as writer:
        writer.subfolder("programs")
        blocks, values = chain(source, "text_encoder")
        two, geometry = itertools.islice(blocks, 2), Geometry.of(source, RECIPE)
        found = export_chain(two, values, geometry, RECIPE, "build", writer.folder, "text_encoder")
        yield writer.folder, list(found)


def test_programs_are_their_modules_and_near_to_float(exported: tuple[pathlib.Path, list[Any]]) -> None:
    for _, errors in exported[1]:
        assert errors["parity"] <= compare.tolerance("quantized_parity_logits")
        assert compare.tolerance("logits_fp32") < errors["quantization"] <= compare.tolerance("quantized_block")
    assert [facts["operators"] for facts, _ in exported[1]] == [["edgerun::embedding_lookup"], ["edgerun::rms_norm"]]
    assert portable_calls(exported[0] / "programs/text_layer_0.pte") == []


def test_no_float_weight_of_a_matrix_is_stored(
    source: VideoCheckpoint, exported: tuple[pathlib.Path, list[Any]]
) -> None:
    """By their bytes: the first row of a quantised matrix is in no program, that of another is."""
    weights, programs = source.outline_text_encoder()[1], exported[0] / "programs"
    embedding, layer = ((programs / f"text_{name}.pte").read_bytes() for name in ("embedding", "layer_0"))
    prefix = "encoder.block.0.layer.0"
    for name, program, stored in (
        ("shared.weight", embedding, False),
        (f"{prefix}.SelfAttention.relative_attention_bias.weight", embedding, True),
        (f"{prefix}.SelfAttention.q.weight", layer, False),
        (f"{prefix}.layer_norm.weight", layer, True),
    ):
        row = weights[name][0] if weights[name].dim() > 1 else weights[name]
        assert (row.numpy().tobytes() in program) == stored, name


@pytest.mark.parametrize("name", ["text_encoder", "denoiser"])
def test_every_block_is_near_to_float_and_let_go_of(source: VideoCheckpoint, name: str) -> None:
    blocks, values = chain(source, name)
    quantized = {}
    for block in blocks:
        arguments = tuple(values[one] for one in block.inputs)
        with torch.no_grad():
            exact = results_of(block, arguments)
            before = [one for one in block.module.modules() if isinstance(one, nn.Linear)]
            quantized[block.name] = block.quantize()
            results = results_of(block, arguments)
        after = [part for part, one in block.module.named_modules() if isinstance(one, nn.Linear)]
        assert all(part.startswith(block.precise) for part in after)
        assert sum(not one.weight.is_meta for one in before) == len(after)
        error = worst_error(results, exact)
        assert (compare.tolerance("logits_fp32") < error) == quantized[block.name]
        assert error <= compare.tolerance("quantized_block")
        values |= dict(zip(block.outputs, results, strict=True))
    assert [part for part, done in quantized.items() if not done] == [
        "text_norm" if name == "text_encoder" else "denoiser_tail"
    ]


@pytest.mark.slow
def test_a_whole_bundle_runs(source: VideoCheckpoint, tmp_path: pathlib.Path) -> None:
    bundle = export_video_bundle(source.path, RECIPE, tmp_path / "tiny.edgerun")
    quantized = bundle.manifest["quantization"]
    assert set(quantized) == {"text_embedding", "text_layer_0", "text_layer_1", "denoiser_head", "denoiser_pairs_0"}
    for name, error in bundle.manifest["parity"].items():
        assert error <= compare.tolerance("quantized_parity_logits" if name in quantized else "logits_fp32")
    assert VideoRecipe.from_json(bundle.manifest["recipe"]) == RECIPE
    encoder = source.load_text_encoder()
    tokens = encoder.tokenizer.encode("a red circle")
    y = run_chain(bundle, "text_encoder", {"tokens": tokens})["y"]
    error = compare.relative_l2(y.numpy(), encoder.encode("a red circle").numpy())
    assert compare.tolerance("logits_fp32") < error <= compare.tolerance("quantized_block")
    clip = VideoSession(bundle.path, threads=1).generate(tokens[0].tolist(), seed=1)
    assert clip.frames.shape == (10, 12, 16, 3) and clip.frames.std() > 0


def test_a_recipe_in_int8_is_another_build() -> None:
    assert VideoRecipe().hash("0" * 64) != RECIPE.hash("0" * 64)
    assert VideoRecipe.from_json(json.loads(json.dumps(RECIPE.to_json()))) == RECIPE


def test_other_formats_are_refused() -> None:
    with pytest.raises(ExportError, match="quantize is '8da4w'; a video model's weights can be none or int8"):
        VideoRecipe(quantize="8da4w")  # type: ignore[arg-type]


def test_a_block_that_int8_ruins_is_not_published() -> None:
    block = Block("text_layer_0", nn.Identity(), ("text",), ("text",))
    check(block, {"parity": 0.04, "quantization": 0.09})
    for errors in ({"parity": 0.0, "quantization": 0.11}, {"parity": 0.0, "quantization": float("nan")}):
        with pytest.raises(ParityError, match="text_layer_0 in int8 is too far from float32"):
            check(block, errors)
    with pytest.raises(ParityError, match="is not its module"):
        check(block, {"parity": 0.04})
