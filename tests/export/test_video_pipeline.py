"""Video export: every program of a tiny model, its manifest, and what is refused."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import torch

from edgerun import compare
from edgerun.bundle import Bundle
from edgerun.errors import BundleError, EdgerunError, ExportError, ParityError
from edgerun.export import export_video_bundle, video_chain, video_pipeline
from edgerun.export.lower import executorch, program_templates
from edgerun.models import rectified_flow
from edgerun.models.temporal_vae import VideoAutoencoderConfig
from edgerun.models.text_to_video import VideoCheckpoint, VideoSettings
from edgerun.sessions.video import VideoSession
from edgerun.techniques.temporal_token_merging import adjacent_groups
from edgerun.video_recipe import VideoRecipe
from tests import shared_video_bundle
from tests.export.programs import run_chain
from tests.models import tiny_video_checkpoint

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

    x = torch.randn(1, 4, 7, 6, 8, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1, 1)
    time, fps = torch.tensor([0.4, 0.4]), torch.tensor([8.0, 8.0])
    both = torch.cat([y, denoiser.null_caption(y.shape[1])[None]])
    identity, frames = torch.eye(7), torch.arange(7.0)
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

    with torch.no_grad():
        video = vae.decode(x[:1], 12)[0]
    parts = zip(x[:1].split(3, 2), (5, 5, 2), strict=True)
    pictures = torch.cat([run_chain(bundle, "time_decoder", {"z": z})["chunk"][-count:] for z, count in parts])
    frames = [run_chain(bundle, "frame_decoder", {"pictures": part})["frames"] for part in pictures.split(5)]
    assert compare.relative_l2(torch.cat(frames, 1).numpy(), video.numpy()) <= compare.tolerance("logits_fp32")


def test_the_manifest_has_what_a_session_needs(bundle: Bundle) -> None:
    video, chains = bundle.manifest["video"], bundle.manifest["chains"]
    assert bundle.kind == "video" and VideoRecipe.from_json(bundle.manifest["recipe"]) == RECIPE
    assert chains["denoiser"] == ["denoiser_head", "denoiser_pairs_0", "denoiser_tail"]
    assert video["latent"] == {"channels": 4, "frames": 7, "height": 6, "width": 8}
    assert video["merge"]["positions"] == [sum(group) / len(group) for group in adjacent_groups(7)]
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
    monkeypatch.setattr(video_chain, "worst_error", lambda *_: float("nan"))
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
        ({"height": 13, "width": 1}, "13 x 1 pixels: both must be multiples of 2; the nearest is 12 x 2"),
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


@pytest.mark.parametrize(
    ("frames", "latents", "chunk"),
    [(1, 1, (1, 1)), (16, 4, (4, 4)), (17, 5, (5, 5)), (51, 15, (5, 5)), (52, 16, (1, 5)), (60, 18, (3, 5))],
)
def test_the_last_chunk_of_open_sora(frames: int, latents: int, chunk: tuple[int, int], tmp_path: pathlib.Path) -> None:
    """What programs of the decoder take: the last chunk of a clip, and the others."""
    source = VideoCheckpoint(tmp_path, tiny_video_checkpoint.DENOISER, VideoAutoencoderConfig(), VideoSettings())
    geometry = video_pipeline.Geometry.of(source, VideoRecipe(frames=frames, height=144, width=256))
    assert geometry.latent == (latents, 18, 32) and geometry.chunk_latents == chunk
    assert geometry.limits("t", chunk[1]) == chunk and geometry.limits("p", 1) == (1, 1)
    assert geometry.limits("f", 20) == (20 // chunk[1] * chunk[0], 20)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_blocks_of_one_graph_are_lowered_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    lowered: list[str] = []

    def counted(program: torch.export.ExportedProgram, path: pathlib.Path, methods: dict) -> executorch.LoweredProgram:
        lowered.append(path.stem)
        return executorch.lower(program, path, methods)

    monkeypatch.setattr(program_templates, "lower", counted)
    source = tiny_video_checkpoint.write(tmp_path / "model", depth=3)
    bundle = export_video_bundle(source, VideoRecipe(quantize=quantize, merge_steps=1), tmp_path / "three.edgerun")
    assert [name for name in bundle.manifest["chains"]["denoiser"] if "pairs" in name] == [
        f"denoiser_pairs_{i}" for i in range(3)
    ]
    assert [name for name in lowered if "pairs" in name] == ["denoiser_pairs_0"]


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 3, 9])
def test_clips_of_any_number_of_frames(checkpoint: pathlib.Path, tmp_path: pathlib.Path, frames: int) -> None:
    """A picture, a clip below one chunk, and one that ends with a chunk of four frames."""
    bundle = export_video_bundle(checkpoint, VideoRecipe(frames=frames, merge_steps=1), tmp_path / "odd.edgerun")
    clip = VideoSession(bundle.path, threads=1).generate([1, 2], seed=1)
    with torch.no_grad():
        video = VideoCheckpoint.open(checkpoint).load_autoencoder().decode(torch.from_numpy(clip.latents)[None], frames)
    expected = ((video[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert clip.frames.shape == (frames, 12, 16, 3)
    assert np.abs(clip.frames - expected).max() <= 1.5  # rounding, and a level's edge
