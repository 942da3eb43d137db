"""The golden case of a video bundle against the checkpoint's whole models, which know of no blocks."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import torch

from edgerun import compare
from edgerun.bundle import Bundle, BundleWriter
from edgerun.errors import BundleError
from edgerun.export import video_golden, video_pipeline
from edgerun.export.video_blocks import Geometry
from edgerun.export.video_chain import run_chain
from edgerun.export.video_golden import FILE, GoldenPass
from edgerun.models import rectified_flow
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.techniques.temporal_token_merging import adjacent_groups, frame_merge
from edgerun.video_golden import VideoGolden, golden_of
from edgerun.video_recipe import VideoRecipe
from tests import shared_video_bundle

RECIPE = shared_video_bundle.RECIPE


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> VideoCheckpoint:
    return VideoCheckpoint.open(shared_video_bundle.checkpoint(tmp_path_factory))


def made(source: VideoCheckpoint, recipe: VideoRecipe, folder: pathlib.Path) -> VideoGolden:
    """The case of an export that writes no programs."""
    geometry = Geometry.of(source, recipe)
    golden = GoldenPass(source, geometry, recipe)
    with BundleWriter(folder / "v.edgerun") as writer:
        for chain, (blocks, values) in video_pipeline._chains(source, geometry, recipe):
            golden.begin(chain, values)
            run_chain(blocks, values)
            golden.end(chain, values)
        assert golden.save(writer) == [{"file": FILE}]
        return VideoGolden.load(writer.folder / FILE)


def assert_the_models(case: VideoGolden, source: VideoCheckpoint, recipe: VideoRecipe) -> None:
    settings, latents = source.settings, case.noise.shape[1]
    frames, guidance = recipe.frames or settings.frames, recipe.guidance or settings.guidance
    encoder, denoiser, vae = source.load_text_encoder(), source.load_denoiser(), source.load_autoencoder()
    with torch.no_grad():
        y = encoder(torch.from_numpy(case.tokens)[None])
    both = torch.cat([y, denoiser.null_caption(y.shape[1])[None]])
    steps = iter(range(len(case.times)))

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        merge = frame_merge(adjacent_groups(latents)) if next(steps) < case.merge_steps else None
        time, fps = torch.tensor([t, t]), torch.tensor([8.0, 8.0])
        with torch.no_grad():
            v = denoiser(torch.cat([x, x]), time, both, fps=fps, pixels=(settings.height, settings.width), merge=merge)
        return rectified_flow.guide(*v.chunk(2), guidance)

    assert case.solver == recipe.solver
    noise = torch.from_numpy(case.noise)[None]
    sampled = rectified_flow.sample(velocity, noise, case.times.tolist(), solver=case.solver)
    assert compare.relative_l2(case.latents, sampled.latents[0].numpy()) <= compare.tolerance("logits_fp32")
    with torch.no_grad():
        pixels = ((vae.decode(sampled.latents, frames)[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert np.abs(case.frames - pixels[: len(case.frames)]).max() <= 0.5 + 1e-2  # rounding


def test_an_export_keeps_what_the_models_make(
    source: VideoCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = shared_video_bundle.bundle(tmp_path_factory)
    case = golden_of(bundle)
    assert case.times.tolist() == bundle.manifest["video"]["times"][::2] and case.merge_steps == 1
    assert case.frames.shape == (5, 12, 16, 3) and case.frames.std() > 30  # a first chunk
    assert_the_models(case, source, RECIPE)


@pytest.mark.parametrize(
    "recipe",
    [
        VideoRecipe(steps=1),
        VideoRecipe(steps=3, guidance=3.0),
        VideoRecipe(merge_possible=True),
        VideoRecipe(solver="ab2"),
    ],
    ids=["one step", "no merging", "merging is possible", "second order"],
)
def test_any_recipe(source: VideoCheckpoint, recipe: VideoRecipe, tmp_path: pathlib.Path) -> None:
    case = made(source, recipe, tmp_path)
    assert len(case.times) == (1 if recipe.steps == 1 else 2) and case.merge_steps == recipe.merges
    assert_the_models(case, source, recipe)


def test_what_costs_too_much_is_left_out(
    source: VideoCheckpoint, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_golden, "_MOST_WORK", 1e6)
    monkeypatch.setattr(video_golden, "_MOST_FRAME_BYTES", 3 * 12 * 16 * 3 + 1)
    case = made(source, RECIPE, tmp_path)
    assert (len(case.times), case.merge_steps, len(case.frames)) == (1, 1, 3)
    assert_the_models(case, source, RECIPE)


def test_a_bundle_without_one_says_so(tmp_path_factory: pytest.TempPathFactory, tmp_path: pathlib.Path) -> None:
    bundle = shared_video_bundle.bundle(tmp_path_factory)
    with pytest.raises(BundleError, match="has no golden case, so nothing can be checked"):
        golden_of(Bundle(bundle.path, bundle.manifest | {"golden": []}))
    case = golden_of(bundle)
    (tmp_path / "cut.safetensors").write_bytes((bundle.path / FILE).read_bytes()[:-1])
    with pytest.raises(BundleError, match="cannot be read"):
        VideoGolden.load(tmp_path / "cut.safetensors")
    dataclasses.replace(case, merge_steps=0).save(tmp_path / "other.safetensors")
    assert VideoGolden.load(tmp_path / "other.safetensors").merge_steps == 0
