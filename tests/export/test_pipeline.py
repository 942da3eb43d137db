"""The pipeline as a whole: what it publishes, what it reuses, and that nothing is left of an export that fails."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
import torch

from edgerun import compare
from edgerun.bundle import Bundle
from edgerun.checkpoint import Checkpoint
from edgerun.errors import BundleError, CheckpointError, EdgerunError, ExportError, ParityError
from edgerun.evaluation.fidelity import Fidelity
from edgerun.export import export_bundle, pipeline
from edgerun.export import verify as verify_module
from edgerun.export.golden import golden_cases, passage_ids
from edgerun.export.program import export_program
from edgerun.models.causal_lm import load
from edgerun.recipe import DhsaOptions, Recipe
from tests.models.tiny_checkpoints import save_tiny_checkpoint

SPARSE = Recipe(max_context=256, prefill_slice=32, dhsa=DhsaOptions(budget=112, tile=16))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    # The vocabulary makes the token table nearly all of the model, so that a second copy of it cannot hide.
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=1, vocab_size=16384)


@pytest.fixture(scope="module")
def published(checkpoint: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(checkpoint, SPARSE, tmp_path_factory.mktemp("bundle") / "model.edgerun")


def test_sparse_bundle_is_verified_where_it_selects(published: Bundle) -> None:
    parity = published.manifest["parity"]
    assert set(parity) == {"short", "slices", "sparse"}
    assert parity["sparse"]["mean_kl_nats"] <= compare.tolerance("sparse_kl_nats")


def test_published_bundle_opens_and_knows_its_recipe(published: Bundle, checkpoint: pathlib.Path) -> None:
    bundle = Bundle.open(published.path)
    assert bundle.recipe == SPARSE
    assert bundle.build == SPARSE.hash(Checkpoint.open(checkpoint).sha256())
    assert [len(case.prompt) for case in bundle.golden_cases()] == [5, 49, 161]


def test_same_build_is_reused_and_another_refused(published: Bundle, checkpoint: pathlib.Path) -> None:
    before = published.program_path.stat().st_mtime_ns
    again = export_bundle(checkpoint, SPARSE, published.path)
    assert again.program_path.stat().st_mtime_ns == before
    with pytest.raises(BundleError, match="another build"):
        export_bundle(checkpoint, dataclasses.replace(SPARSE, attention="dense"), published.path)


def test_context_left_open_is_the_models_own(checkpoint: pathlib.Path) -> None:
    recipe = pipeline.resolve(Checkpoint.open(checkpoint).config, dataclasses.replace(SPARSE, max_context=None))
    assert recipe.max_context == 512


@pytest.mark.parametrize("stop_at", ["hash checkpoint", "load weights", "golden cases", "export program"])
def test_interrupt_leaves_nothing(stop_at: str, checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def progress(stage: str, fraction: float) -> None:
        if stage == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, SPARSE, tmp_path / "model.edgerun", progress=progress)
    assert list(tmp_path.iterdir()) == []


def without_lowering(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
    def lower(program: object, path: pathlib.Path, constant_methods: object) -> pipeline.LoweredProgram:
        path.write_bytes(b"half a program")
        if error is not None:
            raise error
        return pipeline.LoweredProgram(operators=(), planned_bytes=0, arena_bytes=0, table_bytes=0)

    monkeypatch.setattr(pipeline, "lower", lower)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_lowering_that_fails_leaves_nothing(
    error: BaseException, checkpoint: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_lowering(monkeypatch, error)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else BundleError):
        export_bundle(checkpoint, SPARSE, tmp_path / "model.edgerun")
    assert list(tmp_path.iterdir()) == []


def test_program_that_does_not_load_is_not_published(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_lowering(monkeypatch)
    with pytest.raises(EdgerunError, match=r"text\.pte' cannot be loaded"):
        export_bundle(checkpoint, SPARSE, tmp_path / "model.edgerun")
    assert list(tmp_path.iterdir()) == []


def test_program_that_is_not_the_model_is_refused(published: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = verify_module.fidelity.measure

    def wrong(measured: object, reference: object) -> Fidelity:
        return dataclasses.replace(measure(measured, reference), mean_kl_nats=1.0)

    monkeypatch.setattr(verify_module.fidelity, "measure", wrong)
    with pytest.raises(ParityError, match="mean KL, nats"):
        verify_module.verify(published)


def test_program_without_the_attention_op_is_refused(checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgerun.models import cached_attention

    model = load(checkpoint, SPARSE)
    monkeypatch.setattr(
        cached_attention, "attend", lambda query, *rest: torch.nn.functional.relu(query).transpose(1, 2).contiguous()
    )
    with pytest.raises(ExportError, match=r"has 0 calls of edgerun\.dhsa_attention\.default, expected 1"):
        export_program(model, SPARSE.prefill_slice)


def test_bad_checkpoint_leaves_nothing(tmp_path: pathlib.Path, checkpoint: pathlib.Path) -> None:
    with pytest.raises(CheckpointError):
        export_bundle(checkpoint / "nothing", SPARSE, tmp_path / "model.edgerun")
    assert list(tmp_path.iterdir()) == []


def test_golden_prompts_are_the_models_own_tokens(checkpoint: pathlib.Path) -> None:
    ids = passage_ids(Checkpoint.open(checkpoint), 700)
    assert len(ids) == 700
    assert ids[0] == 256
    assert bytes(ids[1:12]).decode() == "The harbour"


def test_golden_cases_fit_a_small_context(checkpoint: pathlib.Path) -> None:
    recipe = dataclasses.replace(SPARSE, max_context=40)
    cases = dict(golden_cases(load(checkpoint, recipe), recipe, Checkpoint.open(checkpoint)))
    assert {name: len(case.prompt) for name, case in cases.items()} == {"short": 5, "slices": 20}
    assert all(len(case.prompt) + len(case.forced) <= 40 for case in cases.values())


@pytest.mark.parametrize("max_context", [1, 2, 16])
def test_golden_cases_fit_a_context_shorter_than_their_forced_tokens(
    checkpoint: pathlib.Path, max_context: int
) -> None:
    recipe = dataclasses.replace(SPARSE, max_context=max_context, prefill_slice=1)
    for _, case in golden_cases(load(checkpoint, recipe), recipe, Checkpoint.open(checkpoint)):
        assert (len(case.prompt), len(case.forced), len(case.logits)) == (1, max_context - 1, max_context)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"dtype": "fp16"}, id="fp16"),
        pytest.param({"quantize": "int8"}, id="int8", marks=pytest.mark.slow),
        pytest.param({"quantize": "8da4w", "embedding_dtype": "fp16"}, id="8da4w"),
    ],
)
def test_reduced_formats_pass_their_gate(
    changes: dict[str, str], checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    recipe = dataclasses.replace(SPARSE, **changes)
    bundle = export_bundle(checkpoint, recipe, tmp_path / "model.edgerun")
    assert Bundle.open(bundle.path).recipe == recipe


def test_tied_weights_are_stored_once(published: Bundle, checkpoint: pathlib.Path) -> None:
    unique = sum(entry.end - entry.start for entry in Checkpoint.open(checkpoint).entries.values())
    assert published.program_path.stat().st_size <= 1.05 * unique
