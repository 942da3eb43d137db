"""Jobs over Ray: a local cluster of two workers answers as this process does, and what goes wrong is one line."""

from __future__ import annotations

import os
import pathlib
import sys
import types

import pytest

from edgerun.commands.eval import make_jobs
from edgerun.commands.eval_contenders import eager_contender
from edgerun.errors import EdgerunError
from edgerun.evaluation import ray_workers
from edgerun.evaluation.answers import Answer, Contender, Job, _answer, _describe, answer_all
from edgerun.recipe import DhsaOptions, Recipe
from tests.models.tiny_checkpoints import save_tiny_checkpoint

RECIPE = Recipe(max_context=1024, prefill_slice=64, dhsa=DhsaOptions(budget=112, tile=16))
JOBS = make_jobs("ruler", ("niah_single_1",), (900,), 3, 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Contender:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("ray") / "tiny", max_position_embeddings=1024)
    return eager_contender("tiny", folder, RECIPE)


def work_on(tiny: Contender) -> list[Answer]:
    """One job, in a local cluster of one worker."""
    return list(ray_workers.run_tasks(_answer, [(tiny, JOBS[0])], "local", 1, _describe))


def timeless(answers: dict[tuple[str, Job], Answer]) -> dict[tuple[str, Job], object]:
    return {key: (answer.score, answer.output, answer.prompt_tokens, answer.density) for key, answer in answers.items()}


def test_two_workers_answer_as_this_process_does(
    tiny: Contender, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'edgerun[ray]')")
    monkeypatch.chdir(tiny.path.parent)
    near = Contender(tiny.name, pathlib.Path(tiny.path.name), tiny.recipe, tiny.build)  # workers are elsewhere
    record = tmp_path / "answers.jsonl"
    over_ray = answer_all([near], JOBS, ray="local", processes=2, record=record)
    assert timeless(over_ray) == timeless(answer_all([tiny], JOBS, processes=1))
    assert len(record.read_text().splitlines()) == 3
    assert answer_all([near], JOBS, ray="no such cluster", record=record) == over_ray  # nothing is left to ask


def test_a_worker_that_dies_is_one_line(tiny: Contender, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'edgerun[ray]')")
    monkeypatch.setattr(ray_workers, "_Worker", _Dies)
    with pytest.raises(EdgerunError, match="worker died at tiny, niah_single_1 at 900 tokens, sample 0") as caught:
        work_on(tiny)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (EdgerunError("the context holds 16"), "the context holds 16 (a Ray worker, at tiny, niah_single_1 at 900"),
        (ZeroDivisionError("by zero"), "sample 0: ZeroDivisionError: by zero"),
    ],
)
def test_a_job_that_fails_is_one_line(cause: Exception, said: str, tiny: Contender) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'edgerun[ray]')")

    def get(reference: object) -> None:
        raise ray.exceptions.RayTaskError("answer", "Traceback\nof the worker", cause).as_instanceof_cause()

    with pytest.raises(EdgerunError) as caught:
        ray_workers._result(types.SimpleNamespace(get=get, exceptions=ray.exceptions), None, _describe((tiny, JOBS[0])))
    assert said in str(caught.value) and "\n" not in str(caught.value)


class _Dies:
    """A worker whose process ends at its first job."""

    def do(self, function: object, task: object) -> None:
        os._exit(1)


def test_without_ray_one_line_says_what_to_install(tiny: Contender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EdgerunError, match=r"pip install 'edgerun\[ray\]'"):
        answer_all([tiny], JOBS[:1], ray="local")


def test_a_cluster_that_is_not_there_is_one_line(tiny: Contender) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'edgerun[ray]')")
    with pytest.raises(EdgerunError, match="no Ray cluster at 'localhost:1'") as caught:
        answer_all([tiny], JOBS[:1], ray="localhost:1")
    assert "\n" not in str(caught.value)
