"""Who answers: edgerun's torch model of a checkpoint, or the native session of a bundle. Both decode greedily."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgerun.errors import EdgerunError
from edgerun.evaluation import fidelity, perplexity
from edgerun.evaluation.answers import Answer, Contender, FirstTurn, Job
from edgerun.evaluation.sample import Sample, share_found

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import tokenizers

    from edgerun.sessions.text import TextStats


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
        self.model = causal_lm.load(checkpoint, contender.recipe)
        if contender.selector is not None:
            from edgerun.selectors import attention, registry

            attention.install(self.model, registry.make(contender.selector, contender.recipe.dhsa, contender.predictor))
            self._slice = self.model.max_context  # some rules read the whole prompt at once
        self._tokenizer = tokenizers.Tokenizer.from_file(str(contender.path / "tokenizer.json"))
        self._ends = end_tokens(checkpoint.config, checkpoint.generation)

    def answer(self, job: Job) -> Answer:
        """Answer one job. Raises EdgerunError when prompt and answer do not fit the context."""
        from edgerun.ops.dhsa_attention import count_attention

        with count_attention() as counters:
            if job.suite == "perplexity":
                answer = _predicted(self._build, job, self._tokenizer, self.model.max_context, self._forward)
            else:
                answer = self._ask(job)
        return dataclasses.replace(answer, density=counters.density)

    def _ask(self, job: Job) -> Answer:
        sample, ids = _prompt(job, self._tokenizer, self.model.max_context)
        run = fidelity.greedy(
            self.model, ids, max_new_tokens=sample.max_new_tokens, ends=self._ends, prefill_slice=self._slice
        )
        outputs, decode_s = [self._tokenizer.decode(list(run.tokens))], run.decode_s
        if sample.follow_up is not None:
            second = fidelity.greedy(
                self.model,
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
        return fidelity.append(self.model, ids, position, self._slice)

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, special ones included."""
        return list(self._tokenizer.encode(text).ids)

    def encode_more(self, text: str) -> list[int]:
        """Tokens of what follows a prompt."""
        return _bare_ids(self._tokenizer, text)

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` without special ones."""
        return len(self.encode_more(text))


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
