"""What every generated task hands out: a document with questions, and one question of it as a sample.

A sample is decided by (task, length, seed, index, split) alone, through a string seed of `random.Random` (SHA-512 of
the string, the same on every machine). The split's name is part of that string: training draws from split "train",
evaluation from "evaluation", text to calibrate on from "calibration", so no seed and index can make two of them meet.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

TokenCounter = Callable[[str], int]

EVALUATION_SPLIT = "evaluation"
TRAINING_SPLIT = "train"
CALIBRATION_SPLIT = "calibration"
# Tokens kept free beside prompt and answer: one for the beginning-of-sequence token, the rest for an answer that starts
# with a colon or a line break. Ours: RULER keeps 128, 30, 120 and 50 tokens, more than a short byte-level context has.
_ANSWER_SLACK = 16


@dataclasses.dataclass(frozen=True)
class FollowUp:
    """A second question, put behind the model's own answer to the first, and what a right output holds."""

    text: str
    answers: tuple[str, ...]
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt and what a right output holds. `length` is the budget in tokens for everything asked and answered."""

    task: str
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    length: int
    index: int
    follow_up: FollowUp | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """What follows the document's text, the strings a right answer holds, and the answer as training writes it."""

    text: str
    answers: tuple[str, ...]
    completion: str


@dataclasses.dataclass(frozen=True)
class Document:
    """A haystack and its questions. Several questions share it in training; a sample has one."""

    text: str
    questions: tuple[Question, ...]


def count_utf8_bytes(text: str) -> int:
    """Length of `text` in UTF-8 bytes: the token count of a byte-level model."""
    return len(text.encode("utf-8"))


def seeded_random(*parts: object) -> random.Random:
    """A generator that depends on `parts` only, the same on every machine."""
    return random.Random("/".join(str(part) for part in parts))


def answer_budget(completion: str, count_tokens: TokenCounter) -> int:
    """Tokens to generate for an answer written as `completion`."""
    return count_tokens(completion) + _ANSWER_SLACK


def largest_fitting(build: Callable[[int], Document], length: int, count_tokens: TokenCounter, unit: int) -> Document:
    """The document of the largest size that fits.

    build: makes the document of a size; more size is never shorter. unit: a guess of the tokens one step of size adds.
    length: budget in tokens for text, all questions and all answers. Raises ValueError when size 0 does not fit.
    """

    def fits(document: Document) -> bool:
        whole = document.text + "".join(q.text + q.completion for q in document.questions)
        return count_tokens(whole) + _ANSWER_SLACK + 1 <= length

    best = build(0)
    if not fits(best):
        raise ValueError(f"a length of {length} tokens is too short for this task; its smallest prompt needs more")
    low, high = 0, max(1, length // max(1, unit))
    while fits(candidate := build(high)):
        low, best, high = high, candidate, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        candidate = build(middle)
        if fits(candidate):
            low, best = middle, candidate
        else:
            high = middle
    return best


def as_sample(task: str, document: Document, length: int, index: int, count_tokens: TokenCounter) -> Sample:
    """The document with its first question as a sample."""
    question = document.questions[0]
    return Sample(
        task=task,
        prompt=document.text + question.text,
        answers=question.answers,
        max_new_tokens=answer_budget(question.completion, count_tokens),
        length=length,
        index=index,
    )


def insert_at_fractions(lines: Sequence[str], inserts: Sequence[tuple[float, str]]) -> list[str]:
    """`lines` with each (fraction, line) put at that fraction of the lines, 0 first, 1 last; ties keep their order."""
    placed = sorted(((min(len(lines), int(f * (len(lines) + 1))), i, line) for i, (f, line) in enumerate(inserts)))
    result: list[str] = []
    position = 0
    for where, _, line in placed:
        result.extend(lines[position:where])
        result.append(line)
        position = where
    return result + list(lines[position:])


def fraction_found(sample: Sample, output: str) -> float:
    """RULER's string match: the fraction of the answers that stand in `output`, upper and lower case alike."""
    return share_found(sample.answers, output)


def share_found(answers: Sequence[str], output: str) -> float:
    """The fraction of `answers` that stand in `output`, upper and lower case alike."""
    lowered = output.lower()
    return sum(answer.lower() in lowered for answer in answers) / len(answers)
