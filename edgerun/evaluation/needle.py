"""Needles in a haystack (RULER, arXiv 2404.06654, section 3.1): statements with a key and a value, hidden in filler.

`generate` makes the length x depth grid with one needle; `niah_document` is the builder behind RULER's niah tasks too.
Wording, key and value kinds are RULER's. Ours: a stand-in word list (words.py), a "prose" haystack of generated
sentences where RULER has essays to download, and needles at random fractions of the filler's lines.
A trained answer restates the needle's words around the value; RULER's score looks for the value anywhere in the output.
"""

from __future__ import annotations

import dataclasses
import random
import uuid
from collections.abc import Callable, Sequence

from edgerun.evaluation import words
from edgerun.evaluation.sample import (
    EVALUATION_SPLIT,
    Document,
    Question,
    Sample,
    TokenCounter,
    as_sample,
    count_utf8_bytes,
    fraction_found,
    insert_at_fractions,
    largest_fitting,
    seeded_random,
)

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_STATEMENT = "One of the special magic {plural} for {key} is: {value}."
_ONE_VALUE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text is",
)
_SEVERAL_VALUES = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text are",
)


@dataclasses.dataclass(frozen=True)
class NiahTask:
    """haystack: noise | prose | needles. Kinds: words | numbers | uuids. `keys` hide, `queries` are asked for."""

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


def random_token(rng: random.Random, kind: str) -> str:
    """A key or value: an adjective-noun pair, a number of seven digits, or a version-4 UUID."""
    if kind == "words":
        return words.compound(rng.randrange(words.COMPOUND_COUNT))
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    raise ValueError(f"unknown kind {kind!r}; use words, numbers or uuids")


def prose(rng: random.Random) -> str:
    """One generated sentence: the stand-in for RULER's essays."""
    adjectives, nouns, verb = rng.choices(words.ADJECTIVES, k=2), rng.choices(words.NOUNS, k=3), rng.choice(words.VERBS)
    patterns = (
        "The {0} {2} may {5} the {3} near the {1} {4}.",
        "Nobody could {5} such a {0} {2} without the {3}.",
        "When the {2} is {0}, we {5} the {3} by the {4}.",
        "To {5} a {2} is {0}, and to do it twice is {1}.",
        "They {5} every {0} {2} that the {3} has left behind.",
    )
    return rng.choice(patterns).format(*adjectives, *nouns, verb)


def niah_document(
    task: NiahTask,
    length: int,
    rng: random.Random,
    *,
    questions: int = 1,
    count_tokens: TokenCounter = count_utf8_bytes,
    filler: Sequence[str] | None = None,
    fractions: Sequence[float] | None = None,
    make_token: Callable[[random.Random, str], str] = random_token,
) -> Document:
    """A haystack with needles and `questions` questions, within `length` tokens, answers included.

    filler: lines to use in place of the task's own haystack, repeated as needed. fractions: where in the haystack each
    needle goes, 0 to 1, one for each key and value; random by default. make_token: draws keys and values.
    The first question asks for the first `task.queries` keys; later ones ask for any statement of the document.
    Raises ValueError when `length` is too short for one needle and its question.
    """
    plural = task.value_kind
    kind = plural if task.queries * task.values > 1 else plural[:-1]
    instruction, question = _SEVERAL_VALUES if task.queries * task.values > 1 else _ONE_VALUE
    seen: set[str] = set()

    def draw_pair() -> tuple[str, tuple[str, ...]]:
        key = make_token(rng, task.key_kind)
        while key in seen:
            key = make_token(rng, task.key_kind)
        seen.add(key)
        return key, tuple(make_token(rng, task.value_kind) for _ in range(task.values))

    needles = [draw_pair() for _ in range(max(task.keys, task.queries))]
    statements = [_STATEMENT.format(plural=plural, key=key, value=value) for key, values in needles for value in values]
    places = list(fractions) if fractions is not None else [rng.random() for _ in statements]
    if len(places) != len(statements):
        raise ValueError(f"{len(places)} fractions for {len(statements)} needles; give one for each")
    picks = [rng.random() for _ in range(questions - 1)]
    distractors: list[tuple[str, tuple[str, ...]]] = []
    sentences: list[str] = []

    def haystack_lines(size: int) -> list[str]:
        if filler is not None:
            return [filler[i % len(filler)] for i in range(size)]
        if task.haystack == "noise":
            return [NOISE] * size
        if task.haystack == "prose":
            sentences.extend(prose(rng) for _ in range(size - len(sentences)))
            return sentences[:size]
        if task.haystack == "needles":
            distractors.extend(draw_pair() for _ in range(size - len(distractors)))
            return [_STATEMENT.format(plural=plural, key=k, value=v) for k, vs in distractors[:size] for v in vs]
        raise ValueError(f"unknown haystack {task.haystack!r}; use noise, prose or needles")

    def ask(pairs: Sequence[tuple[str, tuple[str, ...]]]) -> Question:
        keys = [key for key, _ in pairs]
        query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
        answers = tuple(value for _, values in pairs for value in values)
        restated = "".join(f" for {key} is: {value}." for key, values in pairs for value in values)
        return Question(question.format(kind=kind, query=query), answers, restated)

    def build(size: int) -> Document:
        lines = insert_at_fractions(haystack_lines(size), list(zip(places, statements, strict=True)))
        separator = " " if task.haystack == "prose" else "\n"
        everything = needles + (distractors[:size] if task.haystack == "needles" and filler is None else [])
        asked = [needles[: task.queries]] + [[everything[int(pick * len(everything))]] for pick in picks]
        return Document(instruction.format(kind=kind) + separator.join(lines), tuple(ask(pairs) for pairs in asked))

    return largest_fitting(build, length, count_tokens, unit=count_tokens(NOISE))


def generate(
    length: int,
    depth_percent: float,
    seed: int,
    index: int,
    *,
    haystack: str = "noise",
    split: str = EVALUATION_SPLIT,
    count_tokens: TokenCounter = count_utf8_bytes,
) -> Sample:
    """One needle at `depth_percent` of the haystack (0: first line, 100: last); fits `length` tokens with its answer.

    haystack: noise or prose. Raises ValueError for a depth outside 0 to 100 or a length that is too short.
    """
    if not 0 <= depth_percent <= 100:
        raise ValueError(f"depth_percent is {depth_percent}; it must lie in 0 to 100")
    name = f"needle_{haystack}_depth_{depth_percent:g}"
    rng = seeded_random(split, name, length, seed, index)
    document = niah_document(
        NiahTask(haystack), length, rng, count_tokens=count_tokens, fractions=(depth_percent / 100,)
    )
    return as_sample(name, document, length, index, count_tokens)


def score(sample: Sample, output: str) -> float:
    """1.0 when the needle's value stands in `output`, else 0.0."""
    return fraction_found(sample, output)
