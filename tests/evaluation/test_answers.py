"""Answers: both engines give the same, a record is gone on from, and the verb's table counts them right."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

from edgerun import cli
from edgerun.commands.eval import evaluate, make_jobs
from edgerun.commands.eval_contenders import budget_contenders, eager_contender
from edgerun.errors import EdgerunError
from edgerun.evaluation import record_lines
from edgerun.evaluation.answers import Answer, Contender, Job, answer_all, read_record
from edgerun.evaluation.sample import Sample
from edgerun.report import Estimate, Report
from tests.shared_bundle import RECIPE, SharedBundle, shared_bundle

JOBS = [Job("ruler", "niah_single_1", 1024, 0, index) for index in range(2)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SharedBundle:
    return shared_bundle(tmp_path_factory, "tiny", RECIPE)


@pytest.fixture
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of 200 bytes: the tiny bundle's context of 256 is too short for any real task."""

    def sample(job: Job, count_tokens: object) -> Sample:
        prompt = "".join(f"{(job.index + 3) * i % 97} " for i in range(80))[:200]
        return Sample(job.task, prompt, ("1",), 12, job.length, job.index)

    monkeypatch.setattr(Job, "sample", sample)


def nobody(build: str) -> Contender:
    """A contender that cannot be loaded."""
    return Contender(build, pathlib.Path("nowhere"), None, build)


def answer(build: str, job: Job, score: float) -> Answer:
    return Answer(build, job, score, ("1",), "1", 10, 0.5, 0.25, None)


def record_of(path: pathlib.Path, answers: list[Answer]) -> pathlib.Path:
    path.write_text("".join(json.dumps(one.to_json()) + "\n" for one in answers))
    return path


def test_needle_threads_and_ruler_jobs_make_samples() -> None:
    for job in (
        Job("needle", "depth_50", 900, 0, 0),
        Job("threads", "single", 900, 0, 0),
        Job("ruler", "vt", 900, 0, 0),
    ):
        assert job.sample().answers


def test_a_length_too_short_for_a_task_is_refused() -> None:
    with pytest.raises(EdgerunError, match="too short"):
        Job("ruler", "niah_single_1", 20, 0, 0).sample()


def test_a_line_is_the_answer_it_was(tmp_path: pathlib.Path) -> None:
    one = answer("a", JOBS[0], 0.5)
    assert read_record(record_of(tmp_path / "r.jsonl", [one])) == {("a", JOBS[0]): one}


def test_a_line_of_an_older_record_is_an_answer(tmp_path: pathlib.Path) -> None:
    """As it was written before answers had first turns and losses."""
    line = (
        '{"build": "a", "job": {"suite": "ruler", "task": "niah_single_1", "length": 1024, "seed": 0, "index": 0}, '
        '"score": 0.5, "expected": ["1"], "output": "1", "prompt_tokens": 10, "prefill_s": 0.5, "decode_s": 0.25, '
        '"density": null}'
    )
    (tmp_path / "r.jsonl").write_text(line + "\n")
    assert read_record(tmp_path / "r.jsonl") == {("a", JOBS[0]): answer("a", JOBS[0], 0.5)}
    assert json.dumps(answer("a", JOBS[0], 0.5).to_json()) == line


def test_a_line_cut_short_is_dropped_and_the_rest_is_kept(tmp_path: pathlib.Path) -> None:
    path = record_of(tmp_path / "r.jsonl", [answer("a", job, 1.0) for job in JOBS])
    cut = path.read_text()[:-30]
    path.write_text(cut)
    assert list(read_record(path)) == [("a", JOBS[0])]
    assert path.read_text() == cut


def test_a_line_that_is_no_answer_is_refused(tmp_path: pathlib.Path) -> None:
    path = record_of(tmp_path / "r.jsonl", [answer("a", JOBS[0], 1.0)])
    path.write_text('{"build": "a"}\n' + path.read_text())
    with pytest.raises(EdgerunError, match="line 1"):
        read_record(path)


def test_what_the_record_holds_is_not_asked_again(tmp_path: pathlib.Path) -> None:
    path = record_of(tmp_path / "r.jsonl", [answer("a", job, 1.0) for job in JOBS])
    assert len(answer_all([nobody("a")], JOBS, processes=1, record=path)) == 2


def test_a_record_that_another_run_writes_is_refused(tmp_path: pathlib.Path) -> None:
    with (
        record_lines.writer(tmp_path / "r.jsonl"),
        pytest.raises(EdgerunError, match=r"r\.jsonl is being written by another run"),
    ):
        answer_all([nobody("a")], JOBS, processes=1, record=tmp_path / "r.jsonl")


def test_another_build_is_asked_again(tmp_path: pathlib.Path) -> None:
    path = record_of(tmp_path / "r.jsonl", [answer("a", job, 1.0) for job in JOBS])
    with pytest.raises(EdgerunError, match="nowhere"):
        answer_all([nobody("b")], JOBS, processes=1, record=path)


def test_the_table_counts_whole_answers_and_pairs_samples(tmp_path: pathlib.Path) -> None:
    jobs = make_jobs("ruler", ("vt",), (512,), 4, 0)
    scores = {"a": (1.0, 1.0, 0.5, 0.0), "b": (1.0, 0.0, 1.0, 1.0)}
    answers = [answer(build, job, score) for build in scores for job, score in zip(jobs, scores[build], strict=True)]
    record = record_of(tmp_path / "r.jsonl", answers)
    first, second = evaluate([nobody("a"), nobody("b")], jobs, processes=1, record=record).tables[0].rows
    assert isinstance(first[4], Estimate) and (first[4].value, first[4].n) == (50.0, 4)
    assert first[5] == 62.5 and first[6] is None
    assert isinstance(second[6], Estimate) and second[6].value == 25.0


def test_budgets_give_dense_first_and_a_build_each(tiny: SharedBundle) -> None:
    base = dataclasses.replace(RECIPE, attention="dense")
    contenders = budget_contenders(tiny.checkpoint, base, (112, 128), ("chunk", "window-sink"))
    assert [c.name for c in contenders] == ["dense", "chunk 112", "chunk 128", "window-sink 112", "window-sink 128"]
    assert len({c.build for c in contenders}) == 5


@pytest.mark.usefixtures("short_samples")
def test_eager_and_bundle_give_the_same_answers(tiny: SharedBundle) -> None:
    eager = eager_contender("eager", tiny.checkpoint, RECIPE)
    bundle = Contender("bundle", tiny.path, None, "bundle")
    answers = answer_all([eager, bundle], JOBS, processes=1)
    for job in JOBS:
        assert answers[eager.build, job].output == answers["bundle", job].output
        density = answers["bundle", job].density
        assert density is not None and density < 1


@pytest.mark.usefixtures("short_samples")
def test_the_verb_keeps_a_record_and_plots_budgets(
    tiny: SharedBundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "answers.jsonl"
    arguments = ["eval", str(tiny.checkpoint), "ruler", "--tasks", "vt", "--lengths", "256", "--samples", "1"]
    arguments += [
        "--budgets",
        "112",
        "--tile",
        "16",
        "--max-context",
        "256",
        "--prefill-slice",
        "64",
        "--processes",
        "1",
    ]
    assert cli.main([*arguments, "--output", str(record), "--json"]) == 0
    report = Report.from_json(json.loads(capsys.readouterr().out))
    assert [series.name for series in report.plots[0].series] == ["dense", "DHSA"]
    assert len(record.read_text().splitlines()) == 2


@pytest.mark.usefixtures("short_samples")
def test_eager_for_a_bundle_checks_that_both_agree(tiny: SharedBundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(tiny.path), "ruler", "--tasks", "vt", "--lengths", "256", "--samples", "1"]
    arguments += ["--engine", "eager", "--checkpoint", str(tiny.checkpoint), "--processes", "1", "--json"]
    assert cli.main(arguments) == 0
    report = Report.from_json(json.loads(capsys.readouterr().out))
    assert report.passed and {check.name for check in report.checks} >= {"bundle and eager: mean KL, nats"}
