"""Needle Threading (Roberts, Han and Albanie, arXiv 2411.05000): retrieval from a JSON object of UUID keys and values.

single, multiple and conditional needles ask for values of given keys; in a thread the value of one key is the next key,
so hop k's key is unknown until hop k-1 resolves. Directions: forward (later hops stand later), backward, random. In
thread_branched a key of the thread has several values, of which one leads on and the others end early: the last value
of the longest thread is asked for. threads_concurrent asks for the last values of several threads at once.

Ours: the prompts' wording; a thread's answer is written hop by hop ("a -> b -> c") so that a small model need not
follow it in one step, while the score looks for the last value only, as the paper's does. The data that the paper
published has no branched threads, so their form is ours: a branching key's values are a JSON list in a random order,
and a branch that leaves the thread is at least one hop shorter. Three threads at once, at random places.
"""

from __future__ import annotations

import dataclasses
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

TASKS = (
    "single",
    "multiple",
    "conditional",
    "thread_forward",
    "thread_backward",
    "thread_random",
    "thread_branched",
    "threads_concurrent",
)
BRANCHES = 2  # values of a key at which a thread branches
CONCURRENT = 3  # threads that one question of threads_concurrent asks for
_CONDITION = "*"
_CONTEXT = "The JSON object below maps keys to values. A value may itself be a key of the object.\n{{{pairs}}}"
_SINGLE = "\nThe value of the key {keys} is:"
_MULTIPLE = "\nThe values of the keys {keys} are:"
_CONDITIONAL = "\nThe values of the keys that contain the character " + _CONDITION + " are:"
_BRANCHED = (
    "\nFollow the values that are keys again. A key with a list of values branches: follow each of them."
    " The longest thread from the key {keys} is:"
)
_CONCURRENT = (
    "\nFollow the threads of values that are keys again, up to their last values. The threads from the keys {keys} are:"
)
_THREAD = "\nFollow the thread of values that are keys again, up to its last value. The thread from the key {keys} is:"

Pair = tuple[str, tuple[str, ...]]  # a key and its values: one, or several where a thread branches


@dataclasses.dataclass(frozen=True)
class _Group:
    """What one question needs: pairs of the object in the order of the answer, and the question."""

    pairs: tuple[Pair, ...]
    question: Question


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

    needles: keys asked for (multiple, conditional) or hops of each thread; ignored for single.
    Raises ValueError for an unknown task, needles < 1 (2 for thread_branched), or a length too short.
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
    if task == "thread_branched" and needles < 2:
        raise ValueError(f"needles is {needles}; a branched thread must have at least 2 hops")
    rng = seeded_random(split, task, length, seed, index)
    needles = 1 if task == "single" else needles
    questions = 1 if task == "conditional" else questions
    groups = [_draw_group(rng, task, needles) for _ in range(questions)]
    fillers: list[Pair] = []
    asked = tuple(group.question for group in groups)
    placed = [
        (place, pair)
        for group in groups
        for place, pair in zip(_places(rng, task, len(group.pairs)), group.pairs, strict=True)
    ]

    def build(size: int) -> Document:
        while len(fillers) < size:
            fillers.append((random_token(rng, "uuids"), (random_token(rng, "uuids"),)))
        pairs = fillers[:size]
        for place, pair in sorted(placed, reverse=True):
            pairs.insert(int(place * (size + 1)), pair)
        text = ",\n".join(f'"{key}": {_json_value(values)}' for key, values in pairs)
        return Document(_CONTEXT.format(pairs=text), asked)

    return largest_fitting(build, length, count_tokens, unit=count_tokens('"": "",\n') + 72)


def score(sample: Sample, output: str) -> float:
    """Fraction of the answers that stand in `output`: of each thread asked for, its last value."""
    return fraction_found(sample, output)


def _json_value(values: tuple[str, ...]) -> str:
    quoted = ", ".join(f'"{value}"' for value in values)
    return quoted if len(values) == 1 else f"[{quoted}]"


def _draw_group(rng: random.Random, task: str, needles: int) -> _Group:
    """The pairs that one question needs, in the order of its answer, and the question."""
    if task == "thread_branched":
        return _draw_branched(rng, needles)
    if task == "threads_concurrent":
        return _draw_concurrent(rng, needles)
    keys = [random_token(rng, "uuids") for _ in range(needles + 1)]
    if task.startswith("thread"):
        question = Question(_THREAD.format(keys=keys[0]), (keys[-1],), " " + " -> ".join(keys[1:]))
        return _Group(_hops(keys), question)
    if task == "conditional":
        places = [rng.randrange(36) for _ in keys]
        keys = [key[:place] + _CONDITION + key[place + 1 :] for key, place in zip(keys, places, strict=True)]
    values = tuple(random_token(rng, "uuids") for _ in range(needles))
    template = {"single": _SINGLE, "multiple": _MULTIPLE, "conditional": _CONDITIONAL}[task]
    text = template.format(keys=", ".join(keys[:needles]))
    pairs = tuple((key, (value,)) for key, value in zip(keys[:needles], values, strict=True))
    return _Group(pairs, Question(text, values, " " + ", ".join(values)))


def _hops(keys: list[str]) -> tuple[Pair, ...]:
    """A thread through the keys: each one's value is the next."""
    return tuple((key, (value,)) for key, value in itertools.pairwise(keys))


def _draw_branched(rng: random.Random, hops: int) -> _Group:
    """A thread of `hops` hops that branches at every key but the last; no branch is as long as the thread."""
    keys = [random_token(rng, "uuids") for _ in range(hops + 1)]
    pairs: list[Pair] = []
    dead_ends: list[Pair] = []
    for hop, (key, value) in enumerate(itertools.pairwise(keys), start=1):
        values = [value]
        for _ in range(BRANCHES - 1 if hop < hops else 0):
            branch = [random_token(rng, "uuids") for _ in range(rng.randint(1, hops - hop))]
            values.append(branch[0])
            dead_ends += _hops(branch)
        rng.shuffle(values)
        pairs.append((key, tuple(values)))
    question = Question(_BRANCHED.format(keys=keys[0]), (keys[-1],), " " + " -> ".join(keys[1:]))
    return _Group((*pairs, *dead_ends), question)


def _draw_concurrent(rng: random.Random, hops: int) -> _Group:
    """CONCURRENT threads of `hops` hops each that do not meet, asked for together."""
    chains = [[random_token(rng, "uuids") for _ in range(hops + 1)] for _ in range(CONCURRENT)]
    text = _CONCURRENT.format(keys=", ".join(keys[0] for keys in chains))
    answer = " " + ", ".join(" -> ".join(keys[1:]) for keys in chains)
    pairs = tuple(pair for keys in chains for pair in _hops(keys))
    return _Group(pairs, Question(text, tuple(keys[-1] for keys in chains), answer))


def _places(rng: random.Random, task: str, count: int) -> list[float]:
    """Fractions of the object at which the group's pairs stand."""
    places = [rng.random() for _ in range(count)]
    if task in ("thread_forward", "conditional"):
        return sorted(places)
    if task == "thread_backward":
        return sorted(places, reverse=True)
    return places
