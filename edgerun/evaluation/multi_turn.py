"""Two questions about one document: the second is asked behind the model's answer to the first, with the state kept.

What serves the first question need not serve the second: whoever drops or compresses keys after the first question, or
selects for it alone, loses the other needle. Ours, on the needles and chains of RULER (arXiv 2404.06654): the questions
ask for different answers, and in the needle tasks their needles stand at least a quarter of the document apart.

- niah_two_needles: two needles in RULER's noise (niah_single_1 with a second needle).
- niah_multikey_2, niah_multikey_3: needles among needles, of words and numbers, of UUIDs.
- vt: two chains of variable assignments; each question wants every variable of one.
"""

from __future__ import annotations

import dataclasses
import random

from edgerun.evaluation.needle import NiahTask, niah_document
from edgerun.evaluation.ruler import NIAH_TASKS, variable_tracking
from edgerun.evaluation.sample import (
    EVALUATION_SPLIT,
    Document,
    FollowUp,
    Question,
    Sample,
    TokenCounter,
    answer_budget,
    as_sample,
    count_utf8_bytes,
    seeded_random,
)

_NEEDLE_TASKS = {
    "niah_two_needles": NiahTask("noise", keys=2),
    "niah_multikey_2": NIAH_TASKS["niah_multikey_2"],
    "niah_multikey_3": NIAH_TASKS["niah_multikey_3"],
}
TASKS = (*_NEEDLE_TASKS, "vt")
_LEAST_DISTANCE = 0.25  # of the document, between the two needles
_MOST_DRAWS = 200  # one in three to five is far enough apart


def generate(task: str, length: int, seed: int, index: int, *, count_tokens: TokenCounter = count_utf8_bytes) -> Sample:
    """Sample `index` of `task`, its second question as the follow-up.

    The document, both questions, both answers and a beginning-of-sequence token fit `length` tokens.
    Raises ValueError for an unknown task or a length too short for it.
    """
    document = generate_document(task, length, seed, index, count_tokens=count_tokens)
    second = document.questions[1]
    follow_up = FollowUp(second.text, second.answers, answer_budget(second.completion, count_tokens))
    return dataclasses.replace(as_sample(task, document, length, index, count_tokens), follow_up=follow_up)


def generate_document(
    task: str,
    length: int,
    seed: int,
    index: int,
    *,
    split: str = EVALUATION_SPLIT,
    count_tokens: TokenCounter = count_utf8_bytes,
) -> Document:
    """The document with its two questions. Raises as `generate` does."""
    if task not in TASKS:
        raise ValueError(f"unknown multi-turn task {task!r}; there are {', '.join(TASKS)}")
    room = length - answer_budget("", count_tokens)  # each answer has a slack, and the document is made for one
    for draw in range(_MOST_DRAWS):
        rng = seeded_random(split, "multi_turn", task, length, seed, index, draw)
        document = _draw(task, room, rng, count_tokens)
        if task == "vt" or _far_apart(document.text, *document.questions):
            return document
    raise ValueError(f"a length of {length} tokens is too short for two needles of {task} apart; pass a longer one")


def _draw(task: str, length: int, rng: random.Random, count_tokens: TokenCounter) -> Document:
    if task == "vt":
        return variable_tracking(length, rng, chains=2, count_tokens=count_tokens)
    return niah_document(_NEEDLE_TASKS[task], length, rng, questions=2, count_tokens=count_tokens)


def _far_apart(text: str, first: Question, second: Question) -> bool:
    """Whether the two needles are different ones and far from each other in the document."""
    places = [text.index(question.completion.lstrip()) for question in (first, second)]
    return first.answers != second.answers and abs(places[0] - places[1]) >= _LEAST_DISTANCE * len(text)
