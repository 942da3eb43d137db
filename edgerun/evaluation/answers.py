"""Answer evaluation samples greedily, with eager models or bundles, in several processes, and remember every answer.

A job names a sample by what decides it, so that workers make their own. A contender is a model with a recipe (eager:
our torch model with the native op) or a bundle. Answers go to a JSONL file as they come; the same call resumes there.
In the suite multi-turn a second question follows the model's own answer; in perplexity nothing is asked, and what
held-out text costs is kept in the answer's place.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from edgerun.errors import EdgerunError
from edgerun.evaluation import multi_turn, needle, perplexity, record_lines, ruler, threads
from edgerun.evaluation.processes import run_anywhere
from edgerun.evaluation.sample import Sample, TokenCounter, count_utf8_bytes
from edgerun.recipe import Recipe

SUITES = ("needle", "ruler", "threads", "multi-turn", "perplexity")


@dataclasses.dataclass(frozen=True)
class Job:
    """One sample: a task of a suite ("depth_50" in needle), a length in tokens, a seed and an index.

    files: where perplexity's text lies; the task holds its hash, so that they are no part of what the job is.
    """

    suite: str
    task: str
    length: int
    seed: int
    index: int
    files: tuple[pathlib.Path, ...] = dataclasses.field(default=(), compare=False)

    def sample(self, count_tokens: TokenCounter = count_utf8_bytes) -> Sample:
        """Make the sample; perplexity has none. Raises EdgerunError for an unknown task or a length too short."""
        try:
            if self.suite == "needle":
                depth = float(self.task.removeprefix("depth_"))
                return needle.generate(self.length, depth, self.seed, self.index, count_tokens=count_tokens)
            make = {"ruler": ruler.generate, "threads": threads.generate, "multi-turn": multi_turn.generate}
            return make[self.suite](self.task, self.length, self.seed, self.index, count_tokens=count_tokens)
        except ValueError as error:
            raise EdgerunError(str(error)) from error

    def absolute(self) -> Job:
        """With its paths in full."""
        return dataclasses.replace(self, files=tuple(path.absolute() for path in self.files))


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who answers. recipe: of the eager model of the checkpoint `path`; None: `path` is a bundle. build: identity.

    selector: of the lab (edgerun/selectors/registry.py), in place of the recipe's own; predictor: a calibration file.
    """

    name: str
    path: pathlib.Path
    recipe: Recipe | None
    build: str
    selector: str | None = None
    predictor: pathlib.Path | None = None

    def absolute(self) -> Contender:
        """With its paths in full: who answers may work in another folder."""
        predictor = None if self.predictor is None else self.predictor.absolute()
        return dataclasses.replace(self, path=self.path.absolute(), predictor=predictor)


@dataclasses.dataclass(frozen=True)
class FirstTurn:
    """What came of the first of two questions; the answer itself is the second's."""

    score: float
    expected: tuple[str, ...]
    output: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """One contender's answer. score: fraction of the expected strings found; density: attended of causal pairs.

    With two questions they are the second's, and prefill_s is that of the document with the first. loss: of perplexity,
    where no string is expected and the score is 0. Records of before these two had a place hold neither.
    """

    build: str
    job: Job
    score: float
    expected: tuple[str, ...]
    output: str
    prompt_tokens: int
    prefill_s: float
    decode_s: float
    density: float | None
    first_turn: FirstTurn | None = None
    loss: perplexity.Loss | None = None

    def to_json(self) -> dict[str, Any]:
        """A line of the JSONL file."""
        values = dataclasses.asdict(self)
        del values["job"]["files"]
        return {name: value for name, value in values.items() if value is not None or name == "density"}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Answer:
        """The answer that a line holds."""
        first, loss = values.get("first_turn"), values.get("loss")
        changed = {
            "job": Job(**values["job"]),
            "expected": tuple(values["expected"]),
            "first_turn": first and FirstTurn(**{**first, "expected": tuple(first["expected"])}),
            "loss": loss and perplexity.Loss(**loss),
        }
        return Answer(**{**values, **changed})


class _Answerer(Protocol):
    def answer(self, job: Job) -> Answer: ...


def answer_all(
    contenders: Sequence[Contender],
    jobs: Sequence[Job],
    *,
    processes: int | None = None,
    ray: str | None = None,
    record: pathlib.Path | None = None,
    on_answer: Callable[[int, int], None] | None = None,
) -> dict[tuple[str, Job], Answer]:
    """Every contender's answer to every job, by (build, job).

    record: JSONL that is read first and appended to. on_answer: told (done, all) as answers come. One process works
    here; more are started with one torch thread each, by default one a core. ray: the address of a Ray cluster that
    answers instead, by default with one worker a CPU of it. Raises EdgerunError for a damaged record, one that another
    run writes, or a failed job.
    """
    with record_lines.writer(record) as append:
        answers = read_record(record) if record is not None else {}
        wanted = [(contender, job) for contender in contenders for job in jobs]
        missing = [(contender, job) for contender, job in wanted if (contender.build, job) not in answers]
        done = len(wanted) - len(missing)
        tasks = [(contender.absolute(), job.absolute()) for contender, job in missing]
        work = run_anywhere(_answer, tasks, processes, ray, _describe)
        for answer in work:
            append(answer.to_json())
            answers[answer.build, answer.job] = answer
            done += 1
            if on_answer is not None:
                on_answer(done, len(wanted))
    return answers


def read_record(path: pathlib.Path) -> dict[tuple[str, Job], Answer]:
    """The answers of a JSONL file, by (build, job). A last line cut short, as a killed run leaves it, is none.

    Raises EdgerunError for another line that is not an answer.
    """
    answers = record_lines.read(path, Answer.from_json, "an answer")
    return {(answer.build, answer.job): answer for answer in answers}


def _describe(task: tuple[Contender, Job]) -> str:
    contender, job = task
    return f"{contender.name}, {job.task} at {job.length} tokens, sample {job.index}"


def _answer(task: tuple[Contender, Job]) -> Answer:
    contender, job = task
    return _answerer(contender).answer(job)


@functools.lru_cache(maxsize=1)
def _answerer(contender: Contender) -> _Answerer:
    """The contender, loaded. Tasks come contender by contender, so a process loads each about once."""
    from edgerun.evaluation.answerers import BundleAnswerer, EagerAnswerer  # it imports this module

    return BundleAnswerer(contender) if contender.recipe is None else EagerAnswerer(contender)
