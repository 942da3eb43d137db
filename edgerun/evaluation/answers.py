"""Answer evaluation samples greedily, with eager models or bundles, in several processes, and remember every answer.

A job names a sample by what decides it, so that workers make their own. A contender is a model with a recipe (eager:
our torch model with the native op) or a bundle. Answers go to a JSONL file as they come; the same call resumes there.
In the suite multi-turn a second question follows the model's own answer; in perplexity nothing is asked, and what
held-out text costs is kept in the answer's place.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from edgerun.errors import EdgerunError
from edgerun.evaluation import fidelity, multi_turn, needle, perplexity, ruler, threads
from edgerun.evaluation.sample import Sample, TokenCounter, count_utf8_bytes, share_found
from edgerun.library_noise import quiet_libraries
from edgerun.machine import available_cores
from edgerun.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import tokenizers

    from edgerun.sessions.text import TextStats

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


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who answers. recipe: of the eager model of the checkpoint `path`; None: `path` is a bundle. build: identity."""

    name: str
    path: pathlib.Path
    recipe: Recipe | None
    build: str


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


class EagerAnswerer:
    """Greedy decoding of edgerun's torch model with the native op; the tokenizer is the checkpoint's own."""

    def __init__(self, contender: Contender) -> None:
        import tokenizers

        from edgerun.checkpoint import Checkpoint
        from edgerun.models import causal_lm

        assert contender.recipe is not None
        self._build = contender.build
        checkpoint = Checkpoint.open(contender.path)
        self._slice, self._tile = contender.recipe.prefill_slice, contender.recipe.dhsa.tile
        self._model = causal_lm.load(checkpoint, contender.recipe)
        self._tokenizer = tokenizers.Tokenizer.from_file(str(contender.path / "tokenizer.json"))
        self._ends = end_tokens(checkpoint.config, checkpoint.generation)

    def answer(self, job: Job) -> Answer:
        """Answer one job. Raises EdgerunError when prompt and answer do not fit the context."""
        from edgerun.ops.dhsa_attention import count_attention

        with count_attention() as counters:
            if job.suite == "perplexity":
                answer = _predicted(self._build, job, self._tokenizer, self._model.max_context, self._forward)
            else:
                answer = self._ask(job)
        return dataclasses.replace(answer, density=counters.density)

    def _ask(self, job: Job) -> Answer:
        sample, ids = _prompt(job, self._tokenizer, self._model.max_context)
        run = fidelity.greedy(
            self._model, ids, max_new_tokens=sample.max_new_tokens, ends=self._ends, prefill_slice=self._slice
        )
        outputs, decode_s = [self._tokenizer.decode(list(run.tokens))], run.decode_s
        if sample.follow_up is not None:
            second = fidelity.greedy(
                self._model,
                [run.tokens[-1], *_bare_ids(self._tokenizer, sample.follow_up.text)],
                max_new_tokens=sample.follow_up.max_new_tokens,
                ends=self._ends,
                prefill_slice=self._slice,
                position=len(ids) + len(run.tokens) - 1,
                tile=self._tile,
            )
            outputs.append(self._tokenizer.decode(list(second.tokens)))
            decode_s += second.prefill_s + second.decode_s
        return _scored(self._build, job, sample, outputs, len(ids), run.prefill_s, decode_s)

    def _forward(self, ids: Sequence[int], position: int) -> npt.NDArray[np.float32]:
        return fidelity.append(self._model, ids, position, self._slice)


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
        self._attended = self._causal = 0  # pairs of the job at hand

    def answer(self, job: Job) -> Answer:
        """Answer one job. Raises EdgerunError when prompt and answer do not fit the context."""
        self._attended = self._causal = 0
        self._session.reset()
        if job.suite == "perplexity":
            answer = _predicted(self._build, job, self._tokenizer, self._context, self._forward)
        else:
            answer = self._ask(job)
        return dataclasses.replace(answer, density=self._attended / self._causal if self._causal else None)

    def _ask(self, job: Job) -> Answer:
        sample, ids = _prompt(job, self._tokenizer, self._context)
        generation = self._session.generate(ids, max_new_tokens=sample.max_new_tokens)
        stats = self._counted(generation.stats)
        outputs = [generation.text]
        prefill_s = (stats.prompt_eval_end_ms - stats.inference_start_ms) / 1e3
        decode_s = (stats.inference_end_ms - stats.prompt_eval_end_ms) / 1e3
        if sample.follow_up is not None:
            second = self._session.generate(
                _bare_ids(self._tokenizer, sample.follow_up.text), max_new_tokens=sample.follow_up.max_new_tokens
            )
            stats = self._counted(second.stats)
            outputs.append(second.text)
            decode_s += (stats.inference_end_ms - stats.inference_start_ms) / 1e3
        return _scored(self._build, job, sample, outputs, len(ids), prefill_s, decode_s)

    def _forward(self, ids: Sequence[int], position: int) -> npt.NDArray[np.float32]:
        logits = self._session.forward(ids, position)
        self._counted(self._session.stats)
        return logits

    def _counted(self, stats: TextStats) -> TextStats:
        self._attended += stats.attended_pairs
        self._causal += stats.causal_pairs
        return stats


def end_tokens(config: Any, generation: dict[str, Any]) -> frozenset[int]:
    """Token ids that end an answer: those of the generation settings, else of the configuration."""
    ends = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


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
    answers instead, by default with one worker a CPU of it. Raises EdgerunError for a damaged record or a failed job.
    """
    answers = read_record(record) if record is not None else {}
    wanted = [(contender, job) for contender in contenders for job in jobs]
    missing = [(contender, job) for contender, job in wanted if (contender.build, job) not in answers]
    done = len(wanted) - len(missing)
    for answer in _work(missing, processes or available_cores()) if ray is None else _over_ray(missing, ray, processes):
        if record is not None:
            with record.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(answer.to_json()) + "\n")
        answers[answer.build, answer.job] = answer
        done += 1
        if on_answer is not None:
            on_answer(done, len(wanted))
    return answers


def read_record(path: pathlib.Path) -> dict[tuple[str, Job], Answer]:
    """The answers of a JSONL file, by (build, job). A last line cut short, as a killed run leaves it, is dropped.

    Raises EdgerunError for another line that is not an answer.
    """
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    answers = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            answer = Answer.from_json(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise EdgerunError(f"{path} line {number} is not an answer ({error}): pass another --output") from error
        answers[answer.build, answer.job] = answer
    return answers


def _work(tasks: Sequence[tuple[Contender, Job]], processes: int) -> Iterable[Answer]:
    if processes <= 1 or len(tasks) <= 1:
        yield from (_answer(task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(tasks)), context, _start_process) as pool:
        try:
            yield from (
                future.result() for future in concurrent.futures.as_completed([pool.submit(_answer, t) for t in tasks])
            )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _over_ray(tasks: Sequence[tuple[Contender, Job]], address: str, processes: int | None) -> Iterable[Answer]:
    from edgerun.evaluation import ray_workers  # it imports this module

    return ray_workers.work(tasks, address, processes)


def _start_process() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start_worker()


def start_worker() -> None:
    """Make this process a worker among others: quiet, and with one torch thread."""
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
    return answer_one(*task)


def answer_one(contender: Contender, job: Job) -> Answer:
    """One contender's answer to one job, in this process, which keeps the contender loaded until another answers."""
    return _answerer(contender).answer(job)


@functools.lru_cache(maxsize=1)
def _answerer(contender: Contender) -> _Answerer:
    """The contender, loaded. Tasks come contender by contender, so a process loads each about once."""
    return BundleAnswerer(contender) if contender.recipe is None else EagerAnswerer(contender)


def _require_room(tokens: int, max_context: int) -> None:
    if tokens > max_context:
        raise EdgerunError(f"prompt and answer need {tokens} tokens, the context holds {max_context}: lower --lengths")


def _bare_ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _prompt(job: Job, tokenizer: tokenizers.Tokenizer, max_context: int) -> tuple[Sample, list[int]]:
    """The job's sample and its first prompt's tokens. Raises EdgerunError when the context cannot hold all of it."""
    sample = job.sample(lambda text: len(_bare_ids(tokenizer, text)))
    ids: list[int] = tokenizer.encode(sample.prompt).ids
    more = sample.follow_up
    later = 0 if more is None else len(_bare_ids(tokenizer, more.text)) + more.max_new_tokens
    _require_room(len(ids) + sample.max_new_tokens + later, max_context)
    return sample, ids


def _scored(
    build: str,
    job: Job,
    sample: Sample,
    outputs: Sequence[str],
    prompt_tokens: int,
    prefill_s: float,
    decode_s: float,
) -> Answer:
    """The last output with its score, and the first beside it where there are two; the density is added later."""
    score = share_found(sample.answers, outputs[0])
    if sample.follow_up is None:
        return Answer(build, job, score, sample.answers, outputs[0], prompt_tokens, prefill_s, decode_s, None)
    first, expected = FirstTurn(score, sample.answers, outputs[0]), sample.follow_up.answers
    score = share_found(expected, outputs[1])
    return Answer(build, job, score, expected, outputs[1], prompt_tokens, prefill_s, decode_s, None, first)


def _predicted(
    build: str,
    job: Job,
    tokenizer: tokenizers.Tokenizer,
    max_context: int,
    forward: Callable[[Sequence[int], int], npt.NDArray[np.float32]],
) -> Answer:
    """What the window's last tokens cost, in an answer; the density is added later."""
    _require_room(job.length, max_context)
    text = perplexity.tokenized(job.files, job.task, tokenizer)
    window = text.window(perplexity.parse_task(job.task), job.length, job.seed, job.index)
    found = perplexity.measure(window, forward)
    tokens = len(window.prompt)
    return Answer(build, job, 0.0, (), "", tokens, found.prefill_s, found.decode_s, None, loss=found.loss)
