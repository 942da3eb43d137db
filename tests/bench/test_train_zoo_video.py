"""What the trainer of the video zoo model computes by itself."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal

import pytest
import torch
import torch.nn.functional as F

from bench import zoo_video_autoencoder as autoencoder
from bench import zoo_video_common as common
from bench import zoo_video_denoiser as denoiser
from edgerun import compare
from edgerun.evaluation import clips
from edgerun.models.temporal_vae import VideoAutoencoder


@pytest.mark.parametrize("mask", [None, "boolean", "added"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_attention_by_products_is_torchs(mask: str | None, scale: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, count, 8, dtype=torch.float64) for count in (5, 7, 7))
    given = None
    if mask is not None:
        kept = torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None]
        given = kept[:, None, None] if mask == "boolean" else torch.where(kept, 0.0, -1e9).double()[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=given, scale=scale)
    measured = common.attention_by_products(q, k, v, attn_mask=given, scale=scale)
    assert compare.relative_l2(measured, expected) <= compare.tolerance("op_fp32")


def test_mixed_gives_torchs_attention_back() -> None:
    own = F.scaled_dot_product_attention
    with common.mixed("cpu"):
        assert F.scaled_dot_product_attention is common.attention_by_products
    assert F.scaled_dot_product_attention is own


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_after_the_step_and_is_given_back(number: signal.Signals) -> None:
    def own(*_: object) -> None:
        raise AssertionError("a step was cut short")

    before = signal.signal(number, own)
    try:
        clock, steps = common.Clock(minutes=10), 0
        for _ in clock.running():
            os.kill(os.getpid(), number)
            steps += 1
        assert steps == 1 and clock.stopped
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, before)


def test_means_are_of_what_was_added_since() -> None:
    means = common.Means(2, "cpu")
    for value in (1.0, 3.0):
        means.add(torch.tensor(value), torch.tensor(10.0))
    assert means.take() == [2.0, 10.0]
    means.add(torch.tensor(5.0), torch.tensor(0.0))
    assert means.take() == [5.0, 0.0]


def test_every_token_is_asked_for_all_that_its_caption_says() -> None:
    words = denoiser.Words()
    tokens, said = denoiser.read_captions(8, 0, words, "cpu")
    reader = denoiser.Reader(words)
    loss, right = reader.loss(tokens, said)
    assert 0.0 <= float(right) <= 1.0
    loss.backward()
    assert all(float(one.grad.abs().sum()) > 0 for one in reader.text.parameters() if one.grad is not None)
    ids = words.ids
    names = list(denoiser.SAID["colour"])
    for row, colour in zip(tokens.tolist(), said["colour"].tolist(), strict=True):
        assert ids[names[colour]] in row  # a caption has its colour's word


def test_one_way_leaves_out_half_of_the_directions() -> None:
    words = denoiser.Words()
    motions = [*clips.MOTIONS]
    captions = [
        clips.Clip("red", "square", motion, template=template).caption() for motion in motions for template in (0, 4)
    ]
    rows = [words.encode(caption) for caption in captions]
    longest = max(map(len, rows))
    tokens = torch.tensor([[ids + [0] * (longest - len(ids))] for ids in rows])
    kept = denoiser.one_way_clips(denoiser.Cache(torch.zeros(len(rows)), tokens), words)
    found = {motions[index // 2] for index in kept.tolist()}
    assert found == set(motions) - {"moves right", "moves down", "turns counterclockwise"}
    assert len(kept) == 2 * len(found)
    turning = denoiser.turning_clips(denoiser.Cache(torch.zeros(len(rows)), tokens), words)
    assert {motions[index // 2] for index in turning.tolist()} == {"turns clockwise", "turns counterclockwise"}


def test_the_text_stage_stays_near_what_a_denoiser_knows(tmp_path: pathlib.Path) -> None:
    words = denoiser.Words()
    known = denoiser.Networks(words)
    common.write_weights(tmp_path / "denoiser", known.denoiser.config.to_dict(), known.denoiser.state_dict())
    denoiser.write_text(tmp_path, known.text, words)
    before = (tmp_path / "denoiser" / "model.safetensors").read_bytes()
    denoiser.train_text(tmp_path, 0.02, 8, 1e-3, 0.5, "cpu")
    assert (tmp_path / "denoiser" / "model.safetensors").read_bytes() == before
    tokens, _ = denoiser.read_captions(8, 0, words, "cpu")
    with torch.no_grad():
        changed = denoiser.load_networks(tmp_path, words, "cpu").text
        far = compare.relative_l2(denoiser.encode_text(changed, tokens), denoiser.encode_text(known.text, tokens))
    assert 0.0 < far < 0.5


def test_the_decoder_stage_leaves_latents_as_they_are(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(common.VAE, scale=(0.9, 1.0, 1.1, 1.2))
    model = VideoAutoencoder(config)
    common.write_weights(tmp_path / "vae", dataclasses.asdict(config), model.state_dict())
    before, encoder = common.read_weights(tmp_path / "vae"), autoencoder.encoder_sha256(tmp_path)
    autoencoder.train_decoder(tmp_path, 0.01, 1, 1e-3, "cpu")
    after = common.read_weights(tmp_path / "vae")
    assert after[0] == before[0] and autoencoder.encoder_sha256(tmp_path) == encoder
    changed = {name for name, value in after[1].items() if not torch.equal(value, before[1][name])}
    assert changed and all("decoder" in name or "post_quant" in name for name in changed)
    changed_part = {name.split(".")[0] for name in changed}
    assert changed_part == {"temporal_vae", "spatial_vae"}
