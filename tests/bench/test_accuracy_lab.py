"""The accuracy lab: what its stages ask, and that its page counts right. No model is run here."""

from __future__ import annotations

import dataclasses
import html
import json
import pathlib

import pytest

from bench import accuracy_lab_plans as plans
from bench.accuracy_lab_page import (
    answers_table,
    lab_report,
    maps_of_needles,
    planned,
    solved_by_dense,
    verdict,
)
from bench.accuracy_lab_selectors import boundary_table, boundary_verdict, is_above, rivals_table
from edgerun.commands.common import checkpoint_path
from edgerun.evaluation.answers import Answer, Job, read_record
from edgerun.evaluation.selector_fidelity import Measurement
from edgerun.report import Estimate
from edgerun.report_html import to_html


@pytest.fixture
def lab(tmp_path: pathlib.Path) -> plans.Lab:
    return plans.Lab(checkpoint_path("zoo:text"), tmp_path, 1)


def answer(build: str, job: Job, right: bool, density: float) -> Answer:
    return Answer(build, job, float(right), ("1",), "", 10, 0.5, 0.25, density)


def answer_everything(lab: plans.Lab, plan: plans.Plan, wrong: dict[str, set[int]]) -> dict[tuple[str, Job], Answer]:
    """Everyone is right but for the samples named; the record is written too."""
    found = {}
    for contender in plan.contenders:
        for job in plan.jobs:
            right = job.index not in wrong.get(contender.name, set())
            found[contender.build, job] = answer(
                contender.build, job, right, 1.0 if contender.name == "dense" else 0.12
            )
    lines = [json.dumps(one.to_json()) + "\n" for one in found.values()]
    lab.answers.write_text("".join(lines), encoding="utf-8")
    return found


def test_budgets_give_the_densities_that_are_said() -> None:
    for length, budgets in plans.BUDGETS.items():
        densities = [(b / length) * (2 - b / length) for b in budgets]
        assert densities == pytest.approx([0.125, 0.25, 0.4375][-len(budgets) :], abs=0.002)


def test_what_needs_a_predictor_waits_for_a_calibration(lab: plans.Lab, tmp_path: pathlib.Path) -> None:
    assert "paper-v1" not in lab.usable(plans.FINALISTS)
    calibrated = dataclasses.replace(lab, predictor=tmp_path / "any")
    assert calibrated.usable(plans.FINALISTS) == plans.FINALISTS


def test_stage_2_asks_all_finalists_the_same_samples(lab: plans.Lab) -> None:
    (plan,) = plans.stage_2(lab, 100)
    alone = [name for name in lab.usable(plans.FINALISTS) if "/" not in name]
    assert len(plan.contenders) == 1 + 3 * len(alone) + 1  # dense, and the mixture at one budget
    assert len({c.build for c in plan.contenders}) == len(plan.contenders)
    assert len(plan.jobs) == 100 * len(plans.SOLVED)


def test_stage_3_goes_on_from_the_samples_of_stage_2(lab: plans.Lab) -> None:
    (second,), (third, *shorter) = plans.stage_2(lab, 100), plans.stage_3(lab, 400)
    assert {c.build for c in third.contenders} <= {c.build for c in second.contenders}
    assert set(second.jobs) <= set(third.jobs)
    assert [len(plan.contenders) for plan in shorter] == [1 + 3, 1 + 2]
    assert [2 * len(plan.jobs) for plan in shorter] == [len(third.jobs)] * 2


def test_a_table_pools_the_tasks_sample_by_sample(lab: plans.Lab) -> None:
    """Of 10 samples of two tasks the default misses one sample index: 2 of 20 answers, 10 points."""
    plan = plans.stage_3(lab, 10, plans.SOLVED[:2])[0]
    answers = answer_everything(lab, plan, {plan.contenders[1].name: {3}})
    table = answers_table(answers, [plan], "t", "")
    pooled = [row for row in table.rows if row[1] == "all"]
    assert [row[4] for row in pooled] == [20, 20]
    share, difference = pooled[1][5], pooled[1][6]
    assert isinstance(share, Estimate) and isinstance(difference, Estimate)
    assert share.value == pytest.approx(90.0)
    assert difference.value == pytest.approx(-10.0)
    assert difference.low is not None and difference.low <= -10.0


def test_samples_that_not_everyone_has_answered_do_not_count(lab: plans.Lab) -> None:
    plan = plans.stage_3(lab, 4, plans.SOLVED[:1])[0]
    answers = answer_everything(lab, plan, {})
    del answers[plan.contenders[1].build, plan.jobs[0]]
    assert [row[4] for row in answers_table(answers, [plan], "t", "").rows] == [3, 3]


def test_the_verdict_says_the_figures(lab: plans.Lab) -> None:
    plan = plans.stage_3(lab, 50)[0]
    answer_everything(lab, plan, {plan.contenders[1].name: {1}})
    report = lab_report(lab, {"1": 0, "2": 0, "3": 50, "others": 0, "needle": 0}, "command")
    assert report.verdict.startswith(
        "DHSA as it ships loses more than is asked: at 12 % of all pairs it answers 98.0 %"
    )
    assert "250 paired samples" in report.verdict
    assert report.verdict in html.unescape(to_html(report))


def test_the_verdict_names_what_is_as_good(lab: plans.Lab) -> None:
    (second,), third = plans.stage_2(lab, 60), plans.stage_3(lab, 60)[0]
    wrong = {c.name: set(range(40)) for c in second.contenders if c.name.startswith("window-sink")}
    answer_everything(lab, second, wrong)
    text = verdict(read_record(lab.answers), second, third)
    assert text.startswith("Use DHSA as it ships") and "300 paired samples" in text
    assert "window + sink: +66.7 points [" in text
    assert "window + sink in prefill, DHSA in decode: +0.0 points [-" in text


def test_the_papers_mode_must_be_beaten_beyond_the_interval(lab: plans.Lab) -> None:
    """The same answers for both: kept, but no better."""
    third = plans.stage_3(lab, 60)[0]
    paper = dataclasses.replace(third.contenders[1], name=f"{plans.PAPER} 529", build="paper")
    second = plans.Plan((*third.contenders, paper), third.jobs)
    answers = answer_everything(lab, second, {})
    assert verdict(answers, second, third).startswith(
        "DHSA as it ships keeps dense attention's answers, but is not shown"
    )
    assert verdict(answers, plans.Plan(third.contenders, ()), third, needs_paper=True).startswith(
        "DHSA as it ships keeps"
    )
    worse = answer_everything(lab, second, {paper.name: set(range(20))})
    assert verdict(worse, second, third).startswith("Use DHSA as it ships")


def test_what_dense_solves_is_counted(lab: plans.Lab) -> None:
    plan = plans.stage_3(lab, 10, plans.SOLVED[:2])[0]
    answers = answer_everything(lab, plan, {})
    for job in plan.jobs:
        if job.task == plans.SOLVED[1] and job.index < 2:
            answers[plan.contenders[0].build, job] = answer(plan.contenders[0].build, job, False, 1.0)
    assert solved_by_dense(answers, plan) == (
        f"dense attention solves {plans.SOLVED[0]} (100 %); dense attention does not solve {plans.SOLVED[1]} (80 %). "
        "Solved: 90 % right or more."
    )


def test_needle_maps_stand_side_by_side(lab: plans.Lab) -> None:
    grids = plans.needle_grid(lab, 2)
    answers: dict[tuple[str, Job], Answer] = {}
    for plan in grids:
        answers |= answer_everything(lab, plan, {plan.contenders[2].name: {0}})
    maps = maps_of_needles(answers, grids)
    assert len({m.group for m in maps}) == 1 and len(maps) == 3
    assert maps[0].values == ((100.0,) * 3,) * 5
    assert maps[2].values == ((50.0,) * 3,) * 5


def measurement(kind: str, selector: str, job: Job, value: float, **more: float) -> Measurement:
    """Of one layer and head; the best blocks hold all."""
    grid = ((), ()) if kind == "divergence" else (((value,),), ((1.0,),))
    kl = {"kl_nats": value, "top1": 1.0} if kind == "divergence" else {}
    return Measurement("b", kind, selector, 274, job, 0.2, (0,), *grid, **kl, **more)


def test_boundaries_are_compared_at_like_length_prompt_by_prompt() -> None:
    jobs = [Job("ruler", "vt", 2048, 0, index) for index in range(3)]
    rules = (("moments-learned", 0.9, 30.0), ("moments-fixed@16", 0.7, 16.0), ("moments-fixed@32", 0.8, 32.0))
    found = [measurement("prefill", name, job, held, chunk_tokens=size) for name, held, size in rules for job in jobs]
    found += [measurement("divergence", name, job, 1 - held) for name, held, _ in rules for job in jobs]
    table = boundary_table(found)
    (row,) = table.rows
    assert row[2:6] == ("moments-learned", 30.0, "moments-fixed@32", 32.0)
    assert isinstance(row[6], Estimate) and row[6].value == pytest.approx(10.0)
    assert isinstance(row[8], Estimate) and row[8].value == pytest.approx(-0.1)
    assert row[7] is None and row[9] == 3
    said = boundary_verdict(table)
    won = "1 won, 0 lost and 0 undecided of 1 against fixed chunks"
    assert said.startswith("Learned boundaries are a gain: ")
    assert f"by attention held, {won}; by KL at the answer, {won}." in said
    assert "moments-learned less moments-fixed@32 +10.00 [10.00, 10.00], -0.100 [-0.100, -0.100]" in said


def test_chunks_of_other_lengths_are_not_compared() -> None:
    jobs = [Job("ruler", "vt", 2048, 0, index) for index in range(3)]
    rules = (("moments-learned", 0.9, 30.0), ("moments-fixed", 0.7, 64.0))
    found = [measurement("prefill", name, job, held, chunk_tokens=size) for name, held, size in rules for job in jobs]
    assert boundary_table(found).rows == ()


def test_the_verdict_on_boundaries_counts_what_intervals_decide() -> None:
    rows = tuple(
        (
            *(8192, budget, "moments-learned@2", 60.0, "moments-fixed", 64.0),
            *(Estimate((low + high) / 2, low, high), None, Estimate(-(low + high) / 2, -high, -low), 20),
        )
        for budget, low, high in ((529, 0.1, 0.3), (1098, -0.3, -0.1), (2048, -0.1, 0.1))
    )
    said = boundary_verdict(dataclasses.replace(boundary_table([]), rows=rows))
    counts = "1 won, 1 lost and 1 undecided of 3 against fixed chunks"
    assert said.startswith("Learned boundaries are no gain: ")
    assert f"by attention held, {counts}; by KL at the answer, {counts}. At 529 (" in said


def test_dense_decode_and_no_budget_are_not_held_against_chance() -> None:
    jobs = [Job("ruler", "vt", 2048, 0, index) for index in range(3)]
    found = []
    for job in jobs:
        for name, held, kl in (("shuffled", 0.5, 1.0), ("antidiagonal", 0.9, 0.0), ("blasst@-4", 0.4, 2.0)):
            found += [measurement("prefill", name, job, held), measurement("divergence", name, job, kl)]
    table, said = rivals_table(found)
    rows = {row[0]: row for row in table.rows}
    assert rows["antidiagonal"][5:] == (None, None, None) and rows["antidiagonal"][3] is not None
    assert said.startswith("Of 1 selectors by length and budget, 1 are better than chance")


def test_a_rule_is_held_against_chance_prompt_by_prompt() -> None:
    jobs = [Job("ruler", "vt", 2048, 0, index) for index in range(4)]
    found = []
    for i, job in enumerate(jobs):
        for name, held, kl in (("shuffled", 0.5, 1.0), ("shipped", 0.9, 0.1), ("recent", 0.4, 1.0 + 0.2 * (-1) ** i)):
            found += [measurement("prefill", name, job, held + 0.01 * i), measurement("divergence", name, job, kl)]
    table, said = rivals_table(found)
    rows = {row[0]: row for row in table.rows}
    prefill, kl = rows["shipped"][3], rows["shipped"][5]
    assert isinstance(prefill, Estimate) and prefill.value == pytest.approx(40.0) and prefill.n == 4
    assert isinstance(kl, Estimate) and kl.value == pytest.approx(-0.9)
    assert said.startswith("Of 2 selectors by length and budget, 1 are better than chance")
    assert said.endswith("not so: recent at 2,048/274.")


def test_one_measure_that_may_be_chance_is_enough_to_say_so() -> None:
    good, doubtful, kl = Estimate(1.0, 0.5, 1.5), Estimate(1.0, -0.1, 2.1), Estimate(-1.0, -1.5, -0.5)
    assert is_above((good, good, kl)) and is_above((good, None, kl)) and is_above((None, None, kl))
    assert not is_above((doubtful, good, kl)) and not is_above((good, good, good))
    assert not is_above((good, good, Estimate(-1.0, -2.1, 0.1)))


def test_what_another_selector_left_on_record_is_not_shown(lab: plans.Lab) -> None:
    base = lab.base()
    job = plans.selector_jobs((2048,), 1)[0]
    now = Measurement(base.build, "divergence", "mean", 529, job, 0.4, kl_nats=0.1, top1=1.0)
    others = (
        dataclasses.replace(now, build="another"),
        dataclasses.replace(now, selector="shuffled"),  # its revision is another now
        dataclasses.replace(now, job=dataclasses.replace(job, seed=9)),
    )
    lines = [json.dumps(one.to_json()) + "\n" for one in (now, *others)]
    lab.measurements.write_text("".join(lines), encoding="utf-8")
    assert planned(lab, 1) == [now]
