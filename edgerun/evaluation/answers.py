"""Answer evaluation samples greedily, with eager models or bundles, in several processes, and remember every answer.

A job names a sample by what decides it, so that workers make their own. A contender is a model with a recipe (eager:
our torch model with the native op) or a bundle. Answers go to a JSONL file as they come; the same call resumes there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from edgerun.errors import EdgerunError
from edgerun.evaluation import fidelity, needle, record_lines, ruler, threads
from edgerun.evaluation.sample import Sample, TokenCounter, count_utf8_bytes
from edgerun.library_noise import quiet_libraries
from edgerun.recipe import Recipe

SUITES = ("needle", "ruler", "threads")


@dataclasses.dataclass(frozen=True)
class Job:
    """One sample: a task of a suite ("depth_50" in needle), a length in tokens, a seed and an index."""

    suite: str
    task: str
    length: int
    seed: int
    index: int

    def sample(self, count_tokens: TokenCounter = count_utf8_bytes) -> Sample:
        """Make the sample. Raises EdgerunError for an unknown task or a length too short for it."""
        try:
            if self.suite == "needle":
                depth = float(self.task.removeprefix("depth_"))
                return needle.generate(self.length, depth, self.seed, self.index, count_tokens=count_tokens)
            make = {"ruler": ruler.generate, "threads": threads.generate}[self.suite]
            return make(self.task, self.length, self.seed, self.index, count_tokens=count_tokens)
        except ValueError as error:
            raise EdgerunError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who answers. recipe: of the eager model of the checkpoint `path`; None: `path` is a bundle. build: identity."""

    name: str
    path: pathlib.Path
    recipe: Recipe | None
    build: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """One contender's answer. score: fraction of the expected strings found; density: attended of causal pairs."""

    build: str
    job: Job
    score: float
    expected: tuple[str, ...]
    output: str
    prompt_tokens: int
    prefill_s: float
    decode_s: float
    density: float | None

    def to_json(self) -> dict[str, Any]:
        """A line of the JSONL file."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Answer:
        """The answer that a line holds."""
        return Answer(**{**values, "job": Job(**values["job"]), "expected": tuple(values["expected"])})


class _Answerer(Protocol):
    def answer(self, job: Job) -> Answer: ...


class EagerAnswerer:
    """Greedy decoding of edgerun's torch model with the native op; the tokenizer is the checkpoint's own."""

    def __init__(self, contender: Contender) -> None:
        import tokenizers

        from edgerun.checkpoint import Checkpoint
        from edgerun.models import causal_lm

        assert contender.recipe is not None
        self._build = contender.build
        checkpoint = Checkpoint.open(contender.path)
        self._slice = contender.recipe.prefill_slice
        self._model = causal_lm.load(checkpoint, contender.recipe)
        self._tokenizer = tokenizers.Tokenizer.from_file(str(contender.path / "tokenizer.json"))
        self._ends = end_tokens(checkpoint.config, checkpoint.generation)

    def answer(self, job: Job) -> Answer:
        """Answer one job. Raises EdgerunError when prompt and answer do not fit the context."""
        from edgerun.ops.dhsa_attention import count_attention

        sample = job.sample(self.count_tokens)
        ids = self._tokenizer.encode(sample.prompt).ids
        _require_room(len(ids) + sample.max_new_tokens, self._model.max_context)
        with count_attention() as counters:
            run = fidelity.greedy(
                self._model, ids, max_new_tokens=sample.max_new_tokens, ends=self._ends, prefill_slice=self._slice
            )
        return _scored(
            self._build,
            job,
            sample,
            self._tokenizer.decode(list(run.tokens)),
            prompt_tokens=len(ids),
            prefill_s=run.prefill_s,
            decode_s=run.decode_s,
            density=counters.density,
        )

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` without special ones."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


class BundleAnswerer:
    """Greedy decoding of a bundle by the native session in this process."""

    def __init__(self, contender: Contender) -> None:
        from edgerun.bundle import Bundle
        from edgerun.sessions.text import TextSession

        self._build = contender.build
        bundle = Bundle.open(contender.path, kind="text")
        self._context = int(bundle.manifest["context"]["max_context"])
        self._tokenizer = bundle.tokenizer()
        self._session = TextSession(contender.path, threads=1)

    def answer(self, job: Job) -> Answer:
        """Answer one job. Raises EdgerunError when prompt and answer do not fit the context."""
        sample = job.sample(lambda text: len(self._tokenizer.encode(text, add_special_tokens=False).ids))
        ids = self._tokenizer.encode(sample.prompt).ids
        _require_room(len(ids) + sample.max_new_tokens, self._context)
        self._session.reset()
        generation = self._session.generate(ids, max_new_tokens=sample.max_new_tokens)
        stats = generation.stats
        return _scored(
            self._build,
            job,
            sample,
            generation.text,
            prompt_tokens=len(ids),
            prefill_s=(stats.prompt_eval_end_ms - stats.inference_start_ms) / 1e3,
            decode_s=(stats.inference_end_ms - stats.prompt_eval_end_ms) / 1e3,
            density=stats.attended_pairs / stats.causal_pairs if stats.causal_pairs else None,
        )


def end_tokens(config: Any, generation: dict[str, Any]) -> frozenset[int]:
    """Token ids that end an answer: those of the generation settings, else of the configuration."""
    ends = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def answer_all(
    contenders: Sequence[Contender],
    jobs: Sequence[Job],
    *,
    processes: int,
    record: pathlib.Path | None = None,
    on_answer: Callable[[int, int], None] | None = None,
) -> dict[tuple[str, Job], Answer]:
    """Every contender's answer to every job, by (build, job).

    record: JSONL that is read first and appended to. on_answer: told (done, all) as answers come. One process works
    here; more are started with one torch thread each. Raises EdgerunError for a damaged record or a failed job.
    """
    answers = read_record(record) if record is not None else {}
    wanted = [(contender, job) for contender in contenders for job in jobs]
    missing = [(contender, job) for contender, job in wanted if (contender.build, job) not in answers]
    done = len(wanted) - len(missing)
    for answer in _work(missing, processes):
        if record is not None:
            record_lines.append(record, answer.to_json())
        answers[answer.build, answer.job] = answer
        done += 1
        if on_answer is not None:
            on_answer(done, len(wanted))
    return answers


def read_record(path: pathlib.Path) -> dict[tuple[str, Job], Answer]:
    """The answers of a JSONL file, by (build, job). A last line cut short, as a killed run leaves it, is dropped.

    Raises EdgerunError for another line that is not an answer.
    """
    answers = record_lines.read(path, Answer.from_json, "an answer")
    return {(answer.build, answer.job): answer for answer in answers}


def _work(tasks: Sequence[tuple[Contender, Job]], processes: int) -> Iterable[Answer]:
    if processes <= 1 or len(tasks) <= 1:
        yield from (_answer(task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(tasks)), context, _start_worker) as pool:
        try:
            yield from (
                future.result() for future in concurrent.futures.as_completed([pool.submit(_answer, t) for t in tasks])
            )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(task: tuple[Contender, Job]) -> Answer:
    contender, job = task
    return _answerer(contender).answer(job)


@functools.lru_cache(maxsize=1)
def _answerer(contender: Contender) -> _Answerer:
    """The contender, loaded. Tasks come contender by contender, so a process loads each about once."""
    return BundleAnswerer(contender) if contender.recipe is None else EagerAnswerer(contender)


def _require_room(tokens: int, max_context: int) -> None:
    if tokens > max_context:
        raise EdgerunError(f"prompt and answer need {tokens} tokens, the context holds {max_context}: lower --lengths")


def _scored(build: str, job: Job, sample: Sample, output: str, **measured: Any) -> Answer:
    return Answer(build, job, ruler.score(sample, output), sample.answers, output, **measured)
