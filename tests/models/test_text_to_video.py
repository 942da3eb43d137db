"""Text-to-video checkpoints: what opens, and what is refused in one line."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import save_file

from edgerun.errors import CheckpointError, EdgerunError
from edgerun.models.text_to_video import VideoCheckpoint, VideoSettings, check_size
from tests.models import tiny_video_checkpoint


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tiny_video_checkpoint.write(tmp_path / "a model")


def test_opens_and_loads(folder: pathlib.Path) -> None:
    source = VideoCheckpoint.open(folder)
    assert source.settings.frames == 10 and source.denoiser.depth == 2
    assert source.load_denoiser().y_embedder.y_embedding.shape == (9, 16)
    assert source.load_autoencoder().decode(torch.zeros(1, 4, 6, 6, 8), 10).shape == (1, 3, 10, 12, 16)
    assert source.load_text_encoder().encode("a red circle").shape == (1, 4, 16)
    assert source.sha256() == VideoCheckpoint.open(folder).sha256()


def test_settings_are_open_soras_where_none_are_given(folder: pathlib.Path) -> None:
    (folder / "video.json").unlink()
    assert VideoCheckpoint.open(folder).settings == VideoSettings(51, 256, 256, 24.0, 30, 7.0, 512)


def test_the_hash_is_of_the_weights_too(folder: pathlib.Path) -> None:
    before = VideoCheckpoint.open(folder).sha256()
    file = folder / "vae" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert VideoCheckpoint.open(folder).sha256() != before


def broken(folder: pathlib.Path, part: str) -> None:
    if part == "no folder":
        shutil.rmtree(folder)
    elif part == "no part":
        shutil.rmtree(folder / "vae")
    elif part == "no weights":
        (folder / "denoiser" / "model.safetensors").unlink()
    elif part == "not JSON":
        (folder / "denoiser" / "config.json").write_text("{")
    elif part == "unknown setting":
        (folder / "video.json").write_text(json.dumps({"frames": 10, "speed": 3}))
    elif part == "no steps":
        (folder / "video.json").write_text(json.dumps({"steps": 0}))
    elif part == "frames of text":
        (folder / "video.json").write_text(json.dumps({"frames": "51"}))
    elif part == "no heads":
        config = json.loads((folder / "denoiser" / "config.json").read_text())
        (folder / "denoiser" / "config.json").write_text(json.dumps(config | {"num_heads": 0}))
    elif part == "channels":
        config = json.loads((folder / "denoiser" / "config.json").read_text())
        (folder / "denoiser" / "config.json").write_text(json.dumps(config | {"in_channels": 8}))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("no folder", "is not a folder"),
        ("no part", "no folder vae/"),
        ("no weights", "neither model.safetensors nor model.safetensors.index.json"),
        ("not JSON", "cannot be read"),
        ("unknown setting", "speed"),
        ("channels", "not of one model"),
        ("no steps", "steps is 0"),
        ("frames of text", "frames is '51'"),
        ("no heads", "cannot be read|cannot read"),
    ],
)
def test_refused_in_one_line(folder: pathlib.Path, part: str, message: str) -> None:
    broken(folder, part)
    with pytest.raises(CheckpointError, match=message) as found:
        VideoCheckpoint.open(folder)
    assert "\n" not in str(found.value)


def test_weights_of_another_size_are_refused(folder: pathlib.Path) -> None:
    config = json.loads((folder / "denoiser" / "config.json").read_text())
    (folder / "denoiser" / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(CheckpointError, match=r"has shape \[.*config.json says"):
        VideoCheckpoint.open(folder).load_denoiser()
    (folder / "denoiser" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match="is truncated"):
        VideoCheckpoint.open(folder).load_denoiser()


def test_a_denoiser_in_shards_is_the_same_model(folder: pathlib.Path) -> None:
    expected = VideoCheckpoint.open(folder).load_denoiser().state_dict()
    file = folder / "denoiser" / "model.safetensors"
    names = sorted(expected)
    shards = {f"model-{i}-of-2.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for shard, kept in shards.items():
        save_file({name: expected[name].bfloat16().contiguous() for name in kept}, file.with_name(shard))
    file.unlink()
    index = {"weight_map": {name: shard for shard, kept in shards.items() for name in kept}}
    file.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    loaded = VideoCheckpoint.open(folder).load_denoiser().state_dict()
    assert all(torch.equal(loaded[name], expected[name].bfloat16().float()) for name in names)
    file.with_name("model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2-of-2\.safetensors is missing"):
        VideoCheckpoint.open(folder)


@pytest.mark.parametrize(
    ("frames", "height", "width", "message"),
    [
        (0, 12, 16, "0 frames: a clip has at least 1"),
        (10, 13, 16, "multiples of 2; the nearest is 12 x 16"),
        (10, 0, 16, "0 x 16"),
    ],
)
def test_sizes_that_cannot_be_decoded(folder: pathlib.Path, frames: int, height: int, width: int, message: str) -> None:
    with pytest.raises(EdgerunError, match=message):
        check_size(VideoCheckpoint.open(folder), frames, height, width)
