"""The calibration file: what it keeps, and what is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import safetensors.torch
import torch

from edgerun.calibration import Achieved, Calibration, ModelShape, load_predictor
from edgerun.errors import EdgerunError
from edgerun.recipe import DhsaOptions, LayerChoice
from edgerun.techniques.boundary_predictor import BoundaryPredictor, PredictorMetrics, boundary_logits

PLAIN = Calibration(
    checkpoint_sha256="ab" * 32,
    model=ModelShape("llama", 2, 4, 2, 16),
    dhsa=DhsaOptions(tile=16).with_layers((LayerChoice(), LayerChoice(512, "block-topk", "fixed"))),
    max_kl_nats=0.02,
    achieved=(Achieved(4096, 6, 0.01, 0.005, 0.015, 0.4), Achieved(8192, 6, 0.011, 0.006, 0.016, 0.3)),
    text_sha256="cd" * 32,
    samples=6,
    decode_tokens=64,
    seed=3,
)
METRICS = PredictorMetrics(1, 10, 20, 30, 0.1, 0.5, 0.4, 0.9, 0.8, None, 0.25)


def test_what_is_saved_is_opened(tmp_path: pathlib.Path) -> None:
    saved = PLAIN.save(tmp_path / "a.calibration")
    assert len(saved.sha256) == 64 and dataclasses.replace(saved, sha256="") == PLAIN
    assert Calibration.open(tmp_path / "a.calibration") == saved
    assert [path.name for path in tmp_path.iterdir()] == ["a.calibration"]


def test_the_predictor_comes_back_with_its_logits(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    predictor = BoundaryPredictor(2, 16)
    dataclasses.replace(PLAIN, predictor=METRICS).save(tmp_path / "a", predictor)
    keys = torch.randn(2, 30, 16)
    assert torch.equal(boundary_logits(load_predictor(tmp_path / "a"), keys), boundary_logits(predictor, keys))
    assert Calibration.open(tmp_path / "a").predictor == METRICS
    assert load_predictor(tmp_path / "a").layer == METRICS.layer == 1


def test_a_file_without_a_predictor_says_so(tmp_path: pathlib.Path) -> None:
    PLAIN.save(tmp_path / "a")
    with pytest.raises(EdgerunError, match="--skip-predictor"):
        load_predictor(tmp_path / "a")


def test_another_predictor_than_the_metadata_says_is_refused(tmp_path: pathlib.Path) -> None:
    dataclasses.replace(PLAIN, predictor=METRICS).save(tmp_path / "a", BoundaryPredictor(2, 8))
    with pytest.raises(EdgerunError, match="another predictor than it says"):
        load_predictor(tmp_path / "a")


def test_another_checkpoint_is_refused_with_both_hashes() -> None:
    PLAIN.require("ab" * 32)
    with pytest.raises(EdgerunError, match=r"checkpoint abababababababab .*this one is efefefefefefefef"):
        PLAIN.require("ef" * 32)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_file_cut_short_is_refused(kept: int, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.calibration"
    dataclasses.replace(PLAIN, predictor=METRICS).save(path, BoundaryPredictor(2, 16))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EdgerunError, match=r"a\.calibration is cut short or no calibration"):
        Calibration.open(path)


def test_a_foreign_file_is_refused(tmp_path: pathlib.Path) -> None:
    weights, text = tmp_path / "weights", tmp_path / "text"
    weights.write_bytes(safetensors.torch.save({"w": torch.zeros(2)}))
    text.write_text("no calibration, but long enough to be one " * 10)
    with pytest.raises(EdgerunError, match="a safetensors file, but no calibration"):
        Calibration.open(weights)
    with pytest.raises(EdgerunError, match="no calibration"):
        Calibration.open(text)
    with pytest.raises(EdgerunError, match="is not a file"):
        Calibration.open(tmp_path / "nothing")
    with pytest.raises(EdgerunError, match="is not a file"):
        Calibration.open(tmp_path)


def changed(path: pathlib.Path, **changes: object) -> None:
    """A calibration file whose metadata says something else; None: leaves it out."""
    values = {"schema_version": 2, **dataclasses.asdict(PLAIN), "dhsa": PLAIN.dhsa.to_json(), **changes}
    del values["sha256"]
    metadata = {"edgerun_calibration": json.dumps({k: v for k, v in values.items() if v is not None})}
    path.write_bytes(safetensors.torch.save({}, metadata=metadata))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 3}, "schema 3, this edgerun reads 2: update edgerun"),
        ({"schema_version": 1}, "calibrate again"),
        ({"predictor": {**dataclasses.asdict(METRICS), "layer": 2}}, "predictor is of layer 2 of 2"),
        ({"predictor": {**dataclasses.asdict(METRICS), "layer": "first"}}, "predictor is of layer 'first' of 2"),
        ({"predictor": {"parameters": 10}}, "cannot be read"),
        ({"schema_version": None}, "cannot be read"),
        ({"schema_version": "one"}, "cannot be read"),
        ({"achieved": None}, "cannot be read"),
        ({"achieved": [{"length": 3}]}, "cannot be read"),
        ({"unknown": 3}, "cannot be read"),
        ({"dhsa": {"budget": 2}}, "cannot be read"),
        ({"dhsa": {"better": 2}}, "cannot be read"),
    ],
)
def test_metadata_that_is_not_understood_is_refused(
    changes: dict[str, object], message: str, tmp_path: pathlib.Path
) -> None:
    changed(tmp_path / "a", **changes)
    with pytest.raises(EdgerunError, match=message):
        Calibration.open(tmp_path / "a")


def test_a_write_that_fails_leaves_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        PLAIN.save(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
