"""The zoo's video model: the folder is whole and small, and its clips show what their captions say."""

from __future__ import annotations

import functools
import json
import math
import pathlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from bench import zoo_video_denoiser as trainer
from bench.zoo_video_autoencoder import load_vae
from edgerun.commands.video import prompt_tokenizer, prompt_tokens
from edgerun.evaluation import clip_detectors, clips
from edgerun.export import export_video_bundle
from edgerun.sessions.video import VideoSession
from edgerun.video_recipe import VideoRecipe
from edgerun.zoo import zoo_model_path

VIDEO = zoo_model_path("video")


def parameters(part: str) -> int:
    with safe_open(VIDEO / part / "model.safetensors", "np") as weights:
        slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118
        assert {one.get_dtype() for one in slices} == {"F16"}
        return sum(math.prod(one.get_shape()) for one in slices)


def test_folder_is_whole_and_small() -> None:
    assert {path.name for path in VIDEO.iterdir()} == {"README.md", "video.json", "denoiser", "text_encoder", "vae"}
    assert sum(path.stat().st_size for path in VIDEO.rglob("*")) <= 25_000_000
    assert parameters("vae") <= 2_000_000
    assert parameters("denoiser") <= 8_000_000
    assert parameters("text_encoder") <= 1_000_000


def test_card_has_the_numbers() -> None:
    card = (VIDEO / "README.md").read_text()
    for part in ("vae", "denoiser", "text_encoder"):
        assert f"{parameters(part):,}" in card


def test_a_clip_is_large_and_long_enough() -> None:
    settings = json.loads((VIDEO / "video.json").read_text())
    assert min(settings["height"], settings["width"]) >= 48
    vae = load_vae(VIDEO / "vae", "cpu")
    assert vae.config.latent_frames(settings["frames"]) >= 12


def test_every_word_of_every_caption_is_a_token() -> None:
    tokenizer = Tokenizer.from_file(str(VIDEO / "text_encoder" / "tokenizer.json"))
    unknown = tokenizer.token_to_id("<unk>")
    words = clips.caption_words()
    ids = [tokenizer.encode(word).ids[0] for word in words]
    assert len(set(ids)) == len(words) and unknown not in ids


def share_right(videos: torch.Tensor, wanted: list[clips.Clip]) -> float:
    found = [clip_detectors.detect(video) for video in videos]
    return sum(clip_detectors.agreement(a, b).all for a, b in zip(found, wanted, strict=True)) / len(wanted)


def test_detectors_read_what_went_through_the_autoencoder() -> None:
    vae = load_vae(VIDEO / "vae", "cpu")
    wanted = clips.prompts(100, 40)
    video = clips.render(clips.enact(wanted, torch.Generator().manual_seed(41), "cpu"))
    with torch.no_grad():
        back = [vae.decode(vae.encode(part, sample=False), clips.FRAMES) for part in video.split(10)]
    assert share_right(torch.cat(back), wanted) >= 0.97


@pytest.mark.slow
def test_clips_are_what_their_captions_say(tmp_path: pathlib.Path) -> None:
    """All steps of the exported bundle, 200 captions of combinations that were trained on."""
    bundle = export_video_bundle(VIDEO, VideoRecipe(), tmp_path / "video.edgerun")
    tokens = functools.partial(prompt_tokens, prompt_tokenizer(bundle))
    wanted = clips.prompts(200, 42, "seen")
    session = VideoSession(bundle.path)
    made = [session.generate(tokens(clip.caption()), seed=seed).frames for seed, clip in enumerate(wanted)]
    videos = torch.from_numpy(np.stack(made)).permute(0, 4, 1, 2, 3)
    assert share_right(videos, wanted) >= 0.9


def test_a_few_clips_are_what_their_captions_say() -> None:
    words, vae = trainer.Words(), load_vae(VIDEO / "vae", "cpu")
    networks = trainer.load_networks(VIDEO, words, "cpu")
    wanted = clips.prompts(10, 42, "seen")
    videos = trainer.generate(networks, vae, words, [clip.caption() for clip in wanted], "cpu", 43)
    assert share_right(videos, wanted) >= 0.7  # of 200 the slow test wants 90 %
