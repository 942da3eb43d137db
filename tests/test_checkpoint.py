"""Bad checkpoints are refused in one clear line, before any work."""

from __future__ import annotations

import json
import pathlib
import struct
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edgerun.checkpoint import Checkpoint
from edgerun.errors import CheckpointError
from edgerun.models.causal_lm import load
from edgerun.recipe import Recipe
from tests.models.tiny_checkpoints import save_tiny_checkpoint

RECIPE = Recipe(max_context=256, prefill_slice=32)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return save_tiny_checkpoint(tmp_path / "model")


def change_config(folder: pathlib.Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: pathlib.Path) -> str:
    """The message with which opening or loading fails; always one line."""
    with pytest.raises(CheckpointError) as caught:
        load(Checkpoint.open(folder), RECIPE)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_tensors_are_those_of_the_safetensors_library(folder: pathlib.Path) -> None:
    from safetensors.torch import load_file

    checkpoint = Checkpoint.open(folder)
    expected = load_file(folder / "model.safetensors")
    assert set(checkpoint.entries) == set(expected)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in expected.items())


def test_released_pages_read_the_same_again(folder: pathlib.Path) -> None:
    checkpoint = Checkpoint.open(folder)
    tensor = checkpoint.tensor("model.embed_tokens.weight")
    before = tensor.clone()
    checkpoint.release_pages()
    assert torch.equal(tensor, before)


def test_missing_folder(tmp_path: pathlib.Path) -> None:
    assert "is not a folder" in refused(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "neither model.safetensors nor"),
        ("tokenizer.json", "has no tokenizer.json"),
    ],
)
def test_missing_file(name: str, words: str, folder: pathlib.Path) -> None:
    (folder / name).unlink()
    assert words in refused(folder)


@pytest.mark.parametrize("keep", [4, 300, -1])
def test_truncated_safetensors(keep: int, folder: pathlib.Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "is truncated" in refused(folder)


def test_safetensors_header_that_is_not_json(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 16) + b"{" * 16)
    assert "damaged header" in refused(folder)


def test_tensor_whose_bytes_do_not_fit_its_shape(folder: pathlib.Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "'x' does not fit its bytes" in refused(folder)


def test_missing_shard(tmp_path: pathlib.Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, max_shard_bytes=100_000)
    next(iter(sorted(folder.glob("model-00002*")))).unlink()
    assert "is missing from" in refused(folder)


def test_index_that_names_a_file_elsewhere(tmp_path: pathlib.Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, max_shard_bytes=100_000)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    assert "not a file of the folder itself" in refused(folder)


def rewrite(folder: pathlib.Path, name: str, tensor: torch.Tensor | None) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors if tensor is None else tensors | {name: tensor}, folder / "model.safetensors")


def test_missing_tensor(folder: pathlib.Path) -> None:
    rewrite(folder, "model.layers.1.mlp.up_proj.weight", None)
    assert "'model.layers.1.mlp.up_proj.weight' is missing" in refused(folder)


def test_tensor_of_the_wrong_shape(folder: pathlib.Path) -> None:
    rewrite(folder, "model.norm.weight", torch.ones(63))
    message = refused(folder)
    assert "has shape [63]" in message
    assert "asks for [64]" in message


def test_config_that_is_not_json(folder: pathlib.Path) -> None:
    (folder / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused(folder)


def test_config_with_a_field_of_the_wrong_type(folder: pathlib.Path) -> None:
    change_config(folder, hidden_size="wide")
    assert "does not describe a valid LlamaForCausalLM" in refused(folder)


def test_unknown_rope_type(folder: pathlib.Path) -> None:
    change_config(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0})
    assert "rope type 'spiral'" in refused(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.BertConfig(architectures=["BertForMaskedLM"]), "not a decoder-only text model"),
        (transformers.BertConfig(), "encoder-only"),
        (transformers.T5Config(architectures=["T5ForConditionalGeneration"]), "encoder-decoder"),
        (transformers.MambaConfig(architectures=["MambaForCausalLM"]), "AttentionInterface"),
        (transformers.MixtralConfig(architectures=["MixtralForCausalLM"]), "mixture of 8 experts"),
        (transformers.BloomConfig(architectures=["BloomForCausalLM"]), "AttentionInterface"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_model_that_is_not_supported(config: transformers.PretrainedConfig, words: str, folder: pathlib.Path) -> None:
    config.save_pretrained(folder)
    assert words in refused(folder)


def test_unknown_model_type(folder: pathlib.Path) -> None:
    change_config(folder, model_type="nothing", architectures=["NothingForCausalLM"])
    assert "NothingForCausalLM is not a decoder-only text model" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_hash_changes_with_every_file(name: str, folder: pathlib.Path) -> None:
    before = Checkpoint.open(folder).sha256()
    assert Checkpoint.open(folder).sha256() == before
    data = bytearray((folder / name).read_bytes())
    if name == "model.safetensors":
        data[-1] ^= 1
    else:
        data += b"\n"
    (folder / name).write_bytes(bytes(data))
    assert Checkpoint.open(folder).sha256() != before


def test_hash_reports_progress(folder: pathlib.Path) -> None:
    seen: list[float] = []
    Checkpoint.open(folder).sha256(lambda stage, fraction: seen.append(fraction))
    assert seen == sorted(seen)
    assert np.isclose(seen[-1], 1.0)


def test_end_tokens_come_from_the_generation_config_first(folder: pathlib.Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 10]}))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.token_id("eos_token_id") == [257, 10]
    assert checkpoint.token_id("bos_token_id") == [256]
