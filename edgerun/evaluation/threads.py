"""Needle Threading (Roberts, Han and Albanie, arXiv 2411.05000): retrieval from a JSON object of UUID keys and values.

single, multiple and conditional needles ask for values of given keys; in a thread the value of one key is the next key,
so hop k's key is unknown until hop k-1 resolves. Directions: forward (later hops stand later), backward, random. Ours:
the prompts' wording, and a thread's answer is written hop by hop ("a -> b -> c") so that a small model need not follow
it in one step; the score looks for the last value only, as the paper's does. Branched threads are not here.
"""

from __future__ import annotations

import itertools
import random

from edgerun.evaluation.needle import random_token
from edgerun.evaluation.sample import (
    EVALUATION_SPLIT,
    Document,
    Question,
    Sample,
    TokenCounter,
    as_sample,
    count_utf8_bytes,
    fraction_found,
    largest_fitting,
    seeded_random,
)

TASKS = ("single", "multiple", "conditional", "thread_forward", "thread_backward", "thread_random")
_CONDITION = "*"
_CONTEXT = "The JSON object below maps keys to values. A value may itself be a key of the object.\n{{{pairs}}}"
_SINGLE = "\nThe value of the key {keys} is:"
_MULTIPLE = "\nThe values of the keys {keys} are:"
_CONDITIONAL = "\nThe values of the keys that contain the character " + _CONDITION + " are:"
_THREAD = "\nFollow the thread of values that are keys again, up to its last value. The thread from the key {keys} is:"


def generate(
    task: str,
    length: int,
    seed: int,
    index: int,
    *,
    needles: int = 3,
    count_tokens: TokenCounter = count_utf8_bytes,
) -> Sample:
    """Sample `index` of `task`: prompt, answer and a beginning-of-sequence token within `length` tokens.

    needles: keys asked for (multiple, conditional) or hops of the thread; ignored for single.
    Raises ValueError for an unknown task, needles < 1, or a length too short.
    """
    document = generate_document(task, length, seed, index, needles=needles, count_tokens=count_tokens)
    return as_sample(task, document, length, index, count_tokens)


def generate_document(
    task: str,
    length: int,
    seed: int,
    index: int,
    *,
    split: str = EVALUATION_SPLIT,
    needles: int = 3,
    questions: int = 1,
    count_tokens: TokenCounter = count_utf8_bytes,
) -> Document:
    """The same object with several questions (what training reads); conditional has one. Raises as `generate` does."""
    if task not in TASKS:
        raise ValueError(f"unknown threads task {task!r}; there are {', '.join(TASKS)}")
    if needles < 1 or questions < 1:
        raise ValueError(f"needles is {needles} and questions {questions}; both must be at least 1")
    rng = seeded_random(split, task, length, seed, index)
    needles = 1 if task == "single" else needles
    questions = 1 if task == "conditional" else questions
    groups = [_draw_group(rng, task, needles) for _ in range(questions)]
    fillers: list[tuple[str, str]] = []
    asked = tuple(_ask(task, group) for group in groups)
    placed = [(place, pair) for group in groups for place, pair in zip(_places(rng, task, needles), group, strict=True)]

    def build(size: int) -> Document:
        while len(fillers) < size:
            fillers.append((random_token(rng, "uuids"), random_token(rng, "uuids")))
        pairs = fillers[:size]
        for place, pair in sorted(placed, reverse=True):
            pairs.insert(int(place * (size + 1)), pair)
        text = ",\n".join(f'"{key}": "{value}"' for key, value in pairs)
        return Document(_CONTEXT.format(pairs=text), asked)

    return largest_fitting(build, length, count_tokens, unit=count_tokens('"": "",\n') + 72)


def score(sample: Sample, output: str) -> float:
    """Fraction of the answers that stand in `output`; a thread has one answer, its last value."""
    return fraction_found(sample, output)


def _draw_group(rng: random.Random, task: str, needles: int) -> list[tuple[str, str]]:
    """The pairs that one question needs, in the order of its answer."""
    keys = [random_token(rng, "uuids") for _ in range(needles + 1)]
    if task.startswith("thread"):
        return list(itertools.pairwise(keys))
    if task == "conditional":
        places = [rng.randrange(36) for _ in keys]
        keys = [key[:place] + _CONDITION + key[place + 1 :] for key, place in zip(keys, places, strict=True)]
    return [(key, random_token(rng, "uuids")) for key in keys[:needles]]


def _places(rng: random.Random, task: str, needles: int) -> list[float]:
    """Fractions of the object at which the group's pairs stand."""
    places = [rng.random() for _ in range(needles)]
    if task in ("thread_forward", "conditional"):
        return sorted(places)
    if task == "thread_backward":
        return sorted(places, reverse=True)
    return places


def _ask(task: str, group: list[tuple[str, str]]) -> Question:
    keys = [key for key, _ in group]
    values = tuple(value for _, value in group)
    if task.startswith("thread"):
        return Question(_THREAD.format(keys=keys[0]), values[-1:], " " + " -> ".join(values))
    if task == "conditional":
        return Question(_CONDITIONAL, values, " " + ", ".join(values))
    template = _SINGLE if task == "single" else _MULTIPLE
    return Question(template.format(keys=", ".join(keys)), values, " " + ", ".join(values))
