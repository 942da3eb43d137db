"""Selectors inside a whole model, and what is measured of them: on a tiny checkpoint, against the op and by hand."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import torch

from edgerun import cli
from edgerun.commands import eval_selectors
from edgerun.commands.eval_contenders import eager_contender
from edgerun.errors import EdgerunError
from edgerun.evaluation import fidelity, record_lines
from edgerun.evaluation.answers import Contender, Job
from edgerun.evaluation.selector_fidelity import (
    Measurement,
    measure_all,
    pairs,
    read_record,
    recall,
)
from edgerun.evaluation.selector_picture import attention_and_choice
from edgerun.models import causal_lm
from edgerun.ops.dhsa_attention import count_attention, count_pairs
from edgerun.recipe import DhsaOptions, Recipe
from edgerun.report import Estimate, Report
from edgerun.selectors import attention, registry
from edgerun.selectors.estimates import Oracle, exact_mass
from edgerun.selectors.simple import Recent
from tests.models.tiny_checkpoints import save_tiny_checkpoint
from tests.selectors.calls import make_call

BUDGET = 192
RECIPE = Recipe(dhsa=DhsaOptions(budget=BUDGET, tile=32), prefill_slice=64, max_context=512)
TOKENS = [256, *((7 * i * i + 3 * i) % 251 for i in range(399))]
FORCED = [5, 250, 17]
JOBS = [Job("ruler", "niah_multikey_2", 500, 0, index) for index in range(2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), weight_scale=1.5)


@pytest.fixture(scope="module")
def contender(checkpoint: pathlib.Path) -> Contender:
    return eager_contender("dhsa", checkpoint, RECIPE)


def logits_of(checkpoint: pathlib.Path, recipe: Recipe, name: str | None, prefill_slice: int = 64) -> np.ndarray:
    model = causal_lm.load(checkpoint, recipe)
    if name is not None:
        attention.install(model, registry.make(name, recipe.dhsa))
    return fidelity.eager_logits(model, TOKENS, FORCED, prefill_slice)


def test_the_shipped_selector_gives_the_shipped_models_logits(checkpoint: pathlib.Path) -> None:
    assert np.array_equal(logits_of(checkpoint, RECIPE, "shipped"), logits_of(checkpoint, RECIPE, None))


def test_dense_lists_give_dense_logits(checkpoint: pathlib.Path) -> None:
    dense = logits_of(checkpoint, dataclasses.replace(RECIPE, attention="dense"), None)
    assert np.allclose(logits_of(checkpoint, RECIPE, "dense"), dense, atol=1e-5)
    assert not np.allclose(logits_of(checkpoint, RECIPE, "recent"), dense, atol=1e-3)


@pytest.mark.parametrize("name", ["oracle", "moments", "quest", "recent/shipped", "paper-v1-cosine"])
def test_a_prompt_after_another_starts_afresh(checkpoint: pathlib.Path, name: str) -> None:
    """What a selector remembers of one prompt says nothing about the next."""
    recipe = dataclasses.replace(RECIPE, dhsa=dataclasses.replace(RECIPE.dhsa, budget=256))
    model = causal_lm.load(checkpoint, recipe)
    attention.install(model, registry.make(name, recipe.dhsa))
    fidelity.eager_logits(model, TOKENS[::-1], FORCED, 512)
    again = fidelity.eager_logits(model, TOKENS, FORCED, 512)
    assert np.array_equal(again, logits_of(checkpoint, recipe, name, 512))


def test_what_is_attended_is_counted(checkpoint: pathlib.Path) -> None:
    """The same pairs as the op counts for its own lists."""
    model = causal_lm.load(checkpoint, RECIPE)
    with count_attention() as own:
        fidelity.eager_logits(model, TOKENS, FORCED, 64)
    attention.install(model, registry.make("shipped", RECIPE.dhsa))
    with count_attention() as counters:
        fidelity.eager_logits(model, TOKENS, FORCED, 64)
    assert counters == own


@pytest.mark.parametrize(("tokens", "input_pos"), [(200, 0), (100, 333), (1, 401)])
def test_pairs_are_those_of_the_reference(tokens: int, input_pos: int) -> None:
    call = make_call(tokens, input_pos=input_pos, budget=192, loud=True)
    lists = Oracle().lists(call)
    assert pairs(lists, call) == count_pairs(lists, tokens, input_pos, call.options)


def test_recall_of_everything_is_one_and_of_few_blocks_theirs() -> None:
    call = make_call(64, input_pos=400, budget=256, loud=True)
    mass = exact_mass(call)
    whole = recall([[list(range(end)) for _, _, end in call.ranges]] * 2, call, mass)
    assert whole is not None
    assert whole[0] == pytest.approx([1.0, 1.0]) and whole[1] == pytest.approx([1.0, 1.0])
    lists = Recent().lists(call)
    some = recall(lists, call, mass)
    assert some is not None
    rows = sum(last - first for first, last in call.groups) * call.query.shape[1]
    wanted = sum(float(mass[0, g, blocks].sum()) for g, blocks in enumerate(lists[0])) / rows
    assert some[0][0] == pytest.approx(wanted)
    assert all(held <= best + 1e-6 for held, best in zip(some[0], some[1], strict=True))


def test_tiles_within_the_budget_are_left_out() -> None:
    call = make_call(128, budget=256)
    assert recall(Oracle().lists(call), call, exact_mass(call)) is None


@pytest.fixture(scope="module")
def measured(contender: Contender, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Measurement], pathlib.Path]:
    record = tmp_path_factory.mktemp("record") / "measured.jsonl"
    names = ("shipped", "oracle", "shuffled", "paper-v1-cosine", "recent/shipped", "antidiagonal")
    return measure_all(contender, JOBS, names, (256, 4096), processes=1, record=record), record


def test_every_kind_is_measured_for_every_prompt(measured: tuple[list[Measurement], pathlib.Path]) -> None:
    """A mixture has no recall of its own, a rule with dense decode none there; 4,096 tokens hold every prompt."""
    found = [one for one in measured[0] if one.density is not None]
    kinds = {name: {one.kind for one in found if one.selector == name} for name in {one.selector for one in found}}
    everything = {"prefill", "decode", "divergence"}
    assert kinds == {
        "shipped": everything,
        "oracle": everything,
        "shuffled": everything,
        "paper-v1-cosine": everything,
        "recent/shipped": {"divergence"},
        "antidiagonal": {"prefill", "divergence"},
    }
    assert {one.budget for one in found} == {256}
    assert all(len([o for o in found if (o.kind, o.selector) == ("divergence", n)]) == len(JOBS) for n in kinds)


def test_the_verb_measures_reports_and_goes_on(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    record, page = tmp_path / "with a space.jsonl", tmp_path / "page.html"
    asked = [
        "eval",
        str(checkpoint),
        "selectors",
        "--selectors",
        "shipped,recent",
        "--budgets",
        "256",
        "--lengths",
        "500",
    ]
    asked += ["--samples", "2", "--tile", "32", "--max-context", "512", "--output", str(record), "--html", str(page)]
    assert cli.main([*asked, "--processes", "1"]) == 0
    first = record.read_text()
    assert len(first.splitlines()) == 2 * 2 * 3  # selectors, prompts, kinds
    assert "Blocks chosen over exact attention" in page.read_text()
    assert cli.main([*asked, "--processes", "1"]) == 0
    assert record.read_text() == first


def test_options_that_say_nothing_of_selectors_are_refused(checkpoint: pathlib.Path) -> None:
    assert cli.main(["eval", str(checkpoint), "selectors", "--against", "dense"]) == 2


def test_a_record_is_gone_on_from(
    measured: tuple[list[Measurement], pathlib.Path], contender: Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, record = measured
    assert list(read_record(record).values())
    monkeypatch.setattr("edgerun.evaluation.selector_fidelity.measure", lambda task: pytest.fail("measured again"))
    names = ("shipped", "oracle", "recent/shipped")
    again = measure_all(contender, JOBS, names, (256,), processes=1, record=record)
    assert again == [one for one in again if one in found] and again


def test_a_cut_line_is_dropped_and_a_damaged_one_named(tmp_path: pathlib.Path) -> None:
    line = Measurement("b", "divergence", "mean", 256, JOBS[0], 0.5, kl_nats=0.1, top1=1.0)
    path = tmp_path / "record.jsonl"
    import json

    path.write_text(json.dumps(line.to_json()) + "\n" + '{"build": ')
    assert list(read_record(path).values()) == [line]
    path.write_text('{"build": 3}\n')
    with pytest.raises(EdgerunError, match="line 1 is not a measurement"):
        read_record(path)


def test_a_record_that_another_run_writes_is_refused(contender: Contender, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "record.jsonl"
    with record_lines.writer(path), pytest.raises(EdgerunError, match="written by another run"):
        measure_all(contender, JOBS, ("shipped",), (256,), processes=1, record=path)


def test_the_report_shows_intervals_and_the_oracle_first(
    measured: tuple[list[Measurement], pathlib.Path], contender: Contender
) -> None:
    report = eval_selectors.selectors_report(measured[0], contender, "edgerun eval")
    table, by_task = report.tables
    rows = {row[0]: row for row in table.rows}
    oracle, chance = rows["oracle"][6], rows["shuffled"][6]
    assert isinstance(oracle, Estimate) and isinstance(chance, Estimate)
    assert oracle.value == pytest.approx(100.0) and chance.value < 99.0 and chance.low is not None
    assert rows["recent/shipped"][5] is None and rows["antidiagonal"][6] is None
    assert [rows[n][1] for n in ("shipped", "recent/shipped", "antidiagonal")] == ["own", "shipped", "dense"]
    assert [column.name for column in by_task.columns] == ["selector", "niah_multikey_2"]
    assert [(m.title, m.y.ticks) for m in report.heat_maps] == [("prefill", ("0", "1")), ("decode", ("0", "1"))]
    assert Report.from_json(report.to_json()) == report


def test_a_picture_shows_what_was_chosen(contender: Contender) -> None:
    seen = attention_and_choice(contender, JOBS[0], "shipped", 256)
    known = ~torch.isnan(seen.attention)
    assert torch.allclose(seen.attention.nan_to_num().sum(dim=1), torch.tensor(100.0), atol=1e-3)
    assert not bool((seen.chosen & ~known).any())
    assert int(seen.chosen[-1].sum()) * 16 <= 256 < int(known[-1].sum()) * 16
    # Every selector lists as many tokens: the density is the budget's, in every layer and head, but for partial blocks.
    length = seen.attention.shape[0] * seen.tile
    wanted = (256 / length) * (2 - 256 / length)
    assert len(seen.densities) == len(seen.layers) == 2
    assert all(abs(one - wanted) < 0.05 for row in seen.densities for one in row)
    picture, densities = eval_selectors.picture_of(contender, JOBS[0], "shipped", 256)
    assert picture.png and densities.y.ticks == ("0", "1")


def test_names_of_the_op_are_the_labs_too() -> None:
    names = eval_selectors.selector_names(("chunk", "window-sink", "oracle", "recent"))
    assert names == (
        "shipped",
        "recent",
        "oracle",
    )
    with pytest.raises(EdgerunError, match="no selector"):
        eval_selectors.selector_names(("magic",))


def test_prompts_take_the_tasks_in_turns() -> None:
    jobs = eval_selectors.selector_jobs(("vt", "niah_single_1"), (1024,), 3, 5)
    assert [(j.task, j.index) for j in jobs] == [("vt", 0), ("niah_single_1", 0), ("vt", 1)]
    with pytest.raises(EdgerunError, match="no task"):
        eval_selectors.selector_jobs(("qa_1",), (1024,), 1, 0)
