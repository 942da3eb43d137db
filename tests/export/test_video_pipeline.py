"""Video export: every program of a tiny model, its manifest, and what is refused."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
import torch

from edgerun import compare
from edgerun.bundle import Bundle
from edgerun.errors import BundleError, EdgerunError, ExportError, ParityError
from edgerun.export import export_video_bundle, video_pipeline
from edgerun.models import rectified_flow
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.techniques.temporal_token_merging import adjacent_groups
from edgerun.video_recipe import VideoRecipe
from tests import shared_video_bundle
from tests.export.programs import run_chain

RECIPE = shared_video_bundle.RECIPE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return shared_video_bundle.checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return shared_video_bundle.bundle(tmp_path_factory)


@pytest.mark.parametrize("prompt", ["a red circle moves left", "", "red " * 8])
def test_programs_are_the_model_for_any_prompt(checkpoint: pathlib.Path, bundle: Bundle, prompt: str) -> None:
    source = VideoCheckpoint.open(checkpoint)
    encoder, denoiser, vae = source.load_text_encoder(), source.load_denoiser(), source.load_autoencoder()
    y = run_chain(bundle, "text_encoder", {"tokens": encoder.tokenizer.encode(prompt)})["y"]
    assert compare.relative_l2(y.numpy(), encoder.encode(prompt).numpy()) <= compare.tolerance("logits_fp32")

    x = torch.randn(1, 4, 6, 6, 8, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1, 1)
    time, fps = torch.tensor([0.4, 0.4]), torch.tensor([8.0, 8.0])
    both = torch.cat([y, denoiser.null_caption(y.shape[1])[None]])
    identity, frames = torch.eye(6), torch.arange(6.0)
    for merge in (None, video_pipeline.merge_of(video_pipeline.Geometry.of(source, RECIPE), RECIPE)):
        positions = frames if merge is None else merge.positions
        angles = positions[:, None] * denoiser.rope.freqs
        values = {
            "x": x,
            "time": time,
            "fps": fps,
            "y": y,
            "merge": identity if merge is None else merge.merge,
            "unmerge": identity if merge is None else merge.unmerge,
            "cosines": angles.repeat_interleave(2, dim=-1).cos(),
            "sines": angles.repeat_interleave(2, dim=-1).sin(),
        }
        with torch.no_grad():
            expected = denoiser(x, time, both, fps=fps, pixels=(12, 16), merge=merge)
        measured = run_chain(bundle, "denoiser", values)["v"]
        assert compare.relative_l2(measured.numpy(), expected.numpy()) <= compare.tolerance("logits_fp32")

    z = x[:1, :, :3]
    with torch.no_grad():
        video = vae.decode(z, 5)
    decoded = run_chain(bundle, "decoder", {"z": z})["frames"]
    assert compare.relative_l2(decoded[:, -5:].numpy(), video[0].numpy()) <= compare.tolerance("logits_fp32")


def test_the_manifest_has_what_a_session_needs(bundle: Bundle) -> None:
    video, chains = bundle.manifest["video"], bundle.manifest["chains"]
    assert bundle.kind == "video" and VideoRecipe.from_json(bundle.manifest["recipe"]) == RECIPE
    assert chains["denoiser"] == ["denoiser_head", "denoiser_pairs_0", "denoiser_tail"]
    assert video["latent"] == {"channels": 4, "frames": 6, "height": 6, "width": 8}
    assert video["merge"]["positions"] == [sum(group) / len(group) for group in adjacent_groups(6)]
    assert video["leap"]["kind"] == "fixed" and video["leap"]["evaluations"] == 3
    assert max(bundle.manifest["parity"].values()) <= compare.tolerance("logits_fp32")


def test_the_same_build_is_not_made_again(checkpoint: pathlib.Path, bundle: Bundle) -> None:
    before = (bundle.path / "manifest.json").stat().st_mtime_ns
    again = export_video_bundle(checkpoint, RECIPE, bundle.path)
    assert (again.build, (bundle.path / "manifest.json").stat().st_mtime_ns) == (bundle.build, before)
    with pytest.raises(BundleError, match="--overwrite"):
        export_video_bundle(checkpoint, dataclasses.replace(RECIPE, steps=5), bundle.path)


def test_a_video_bundle_is_not_a_text_bundle(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="is a video bundle, this needs a text bundle"):
        _ = bundle.recipe


def test_a_program_that_is_not_its_module_is_not_published(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_pipeline, "_worst_error", lambda *_: float("nan"))
    with pytest.raises(ParityError, match="text_embedding is not its module"):
        export_video_bundle(checkpoint, RECIPE, tmp_path / "tiny.edgerun")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def stop(stage: str, fraction: float) -> None:
        if stage.endswith("text_layer_0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_video_bundle(checkpoint, RECIPE, tmp_path / "tiny.edgerun", progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"leap": "fixed"}, "after 0 evaluations"),
        ({"leap_latest_time": 0.0}, "leap_latest_time is 0.0"),
        ({"merge_steps": -1}, "merge_steps is -1"),
        ({"guidance": float("nan")}, "must be finite"),
        ({"leap": "cosin"}, "leap is 'cosin'"),
        ({"merge_parts": ("norm",)}, "choose of spatial"),
    ],
)
def test_recipes_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        VideoRecipe(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 12}, "give a multiple, as 10"),
        ({"height": 13}, "multiples of 2"),
        ({"max_prompt_tokens": 10}, "9 tokens"),
    ],
)
def test_sizes_that_do_not_fit_the_checkpoint(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, options: dict, message: str
) -> None:
    with pytest.raises(EdgerunError, match=message):
        export_video_bundle(checkpoint, VideoRecipe(**options), tmp_path / "no.edgerun")
    assert list(tmp_path.iterdir()) == []


def test_times_are_the_schedules(bundle: Bundle) -> None:
    ratio = (12 * 16) ** 0.5 / 16 * 6**0.5  # two chunks of three latents
    assert bundle.manifest["video"]["times"] == pytest.approx(rectified_flow.times(4, ratio))
