"""Tables of `edgerun eval`, worked by hand: the needle grid, both turns, and what a reader must know."""

from __future__ import annotations

import pathlib

from edgerun.commands.eval import make_jobs
from edgerun.commands.eval_tables import answer_table, needle_grid, needle_maps, notes
from edgerun.evaluation.answers import Answer, Contender, FirstTurn, Job
from edgerun.report import Estimate

ONE = Contender("one", pathlib.Path("nowhere"), None, "1")


def answers_of(scores: dict[Job, float], first: dict[Job, float] | None = None) -> dict[tuple[str, Job], Answer]:
    return {
        ("1", job): Answer("1", job, score, ("x",), "", 9, 1.0, 1.0, None, first and FirstTurn(first[job], ("y",), ""))
        for job, score in scores.items()
    }


def needle_job(depth: str, length: int, index: int) -> Job:
    return Job("needle", f"depth_{depth}", length, 0, index)


def test_the_needle_grid_is_the_share_found_by_depth_and_length() -> None:
    scores = {
        needle_job("100", 2048, 0): 1.0,
        needle_job("12.5", 4096, 0): 1.0,
        needle_job("12.5", 4096, 1): 0.0,
        needle_job("12.5", 2048, 0): 0.0,
        needle_job("12.5", 2048, 1): 0.5,  # a part of the needle is no needle
    }
    assert needle_grid(answers_of(scores), ONE, list(scores)) == (
        (2048, 4096),
        (12.5, 100.0),
        ((0.0, 50.0), (100.0, None)),
    )


def test_the_needle_grid_passes_other_suites_over() -> None:
    job = Job("ruler", "vt", 2048, 0, 0)
    assert needle_grid(answers_of({job: 1.0}), ONE, [job]) == ((), (), ())


def test_needle_has_a_map_of_depth_by_length_for_each_contender() -> None:
    jobs = make_jobs("needle", ("depth_0", "depth_100"), (2048, 4096), 1, 0)
    (grid,) = needle_maps(answers_of({job: float(job.length == 2048) for job in jobs}), [ONE], jobs)
    assert grid.title == "one" and grid.values == ((100.0, 0.0), (100.0, 0.0))
    assert (grid.x.ticks, grid.y.ticks) == (("2,048", "4,096"), ("0", "100"))
    assert needle_maps({}, [ONE], make_jobs("ruler", ("vt",), (2048,), 1, 0)) == ()


def test_right_is_of_the_second_turn_and_the_first_stands_last() -> None:
    jobs = make_jobs("multi-turn", ("vt",), (2048,), 4, 0)
    second = dict(zip(jobs, (1.0, 0.0, 0.0, 0.0), strict=True))
    first = dict(zip(jobs, (1.0, 1.0, 0.5, 1.0), strict=True))
    table = answer_table(answers_of(second, first), [ONE], jobs)
    (row,) = table.rows
    assert table.columns[-1].name == "first turn right"
    assert isinstance(row[4], Estimate) and isinstance(row[-1], Estimate)
    assert (row[4].value, row[-1].value, row[-1].n) == (25.0, 75.0, 4)


def test_ruler_says_which_haystacks_are_substitutes_and_what_is_left_out() -> None:
    every, own = (notes(make_jobs("ruler", tasks, (2048,), 1, 0)) for tasks in (None, ("vt", "niah_single_1")))
    for task in ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"):
        assert task in every[0]
    assert "niah_single_1" not in every[0] and "essays" in every[0]
    assert len(own) == 1 and "qa_1 and qa_2" in own[0] == every[-1]
    assert notes(make_jobs("threads", None, (2048,), 1, 0)) == ()
