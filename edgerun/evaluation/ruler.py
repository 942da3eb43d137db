"""RULER's synthetic tasks that need no data (arXiv 2404.06654; templates and settings of github.com/NVIDIA/RULER).

Retrieval: niah_*; multi-hop tracing: vt; aggregation: cwe and fwe. Lengths are in tokens of the caller's counter, UTF-8
bytes by default, and hold prompt and answer. Departures, each marked "ours:": the word list (words.py), generated prose
for the essays of the tasks in SUBSTITUTE_HAYSTACK, and smaller examples where RULER's would not fit a short context.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections import Counter

from edgerun.evaluation import words
from edgerun.evaluation.needle import NOISE, NiahTask, niah_document
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

NIAH_TASKS = {
    "niah_single_1": NiahTask("noise"),
    "niah_single_2": NiahTask("prose"),
    "niah_single_3": NiahTask("prose", value_kind="uuids"),
    "niah_multikey_1": NiahTask("prose", keys=4),
    "niah_multikey_2": NiahTask("needles"),
    "niah_multikey_3": NiahTask("needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": NiahTask("prose", values=4),
    "niah_multiquery": NiahTask("prose", keys=4, queries=4),
}
TASKS = (*NIAH_TASKS, "vt", "cwe", "fwe")
SUBSTITUTE_HAYSTACK = frozenset(name for name, task in NIAH_TASKS.items() if task.haystack == "prose")

_VT_CONTEXT = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}"
_VT_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {query} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the"
    " value {query}, they are: "
)
_VT_HOPS = 4
_VT_EXAMPLE_TOKENS = 500

_CWE_CONTEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}"
)
_CWE_QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
_CWE_COMMON = 10
# (words, repeats of the common ones, repeats of the others) of the example; repeats in the list itself.
_CWE_LARGE = ((40, 10, 3), (30, 3))
_CWE_SMALL = ((20, 3, 1), (6, 1))

_FWE_CONTEXT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}"
)
_FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'."
    " What are the three most frequently appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
_FWE_WORD_LETTERS = 6
_FWE_ALPHA = 2.0
_ZETA_OF_ALPHA = math.pi**2 / 6  # zeta(2)


def generate(task: str, length: int, seed: int, index: int, *, count_tokens: TokenCounter = count_utf8_bytes) -> Sample:
    """Sample `index` of `task`: prompt, answer and a beginning-of-sequence token within `length` tokens.

    Drawn from the evaluation split: `generate_document` with another split never meets it.
    Raises ValueError for an unknown task or a length too short for it.
    """
    document = generate_document(task, length, seed, index, count_tokens=count_tokens)
    return as_sample(task, document, length, index, count_tokens)


def generate_document(
    task: str,
    length: int,
    seed: int,
    index: int,
    *,
    split: str = EVALUATION_SPLIT,
    questions: int = 1,
    count_tokens: TokenCounter = count_utf8_bytes,
) -> Document:
    """The task's haystack with several questions: what training reads. cwe and fwe have one question at most.

    vt hides one chain for each question. Raises ValueError as `generate` does.
    """
    rng = seeded_random(split, task, length, seed, index)
    if task in NIAH_TASKS:
        return niah_document(NIAH_TASKS[task], length, rng, questions=questions, count_tokens=count_tokens)
    if task == "vt":
        return variable_tracking(length, rng, chains=questions, count_tokens=count_tokens)
    if task == "cwe":
        return common_words(length, rng, count_tokens=count_tokens)
    if task == "fwe":
        return frequent_words(length, rng, count_tokens=count_tokens)
    raise ValueError(f"unknown RULER task {task!r}; there are {', '.join(TASKS)}")


def score(sample: Sample, output: str) -> float:
    """RULER's string match: the fraction of the sample's answers that stand in `output`, case ignored."""
    return fraction_found(sample, output)


def variable_tracking(
    length: int,
    rng: random.Random,
    *,
    chains: int = 1,
    hops: int = _VT_HOPS,
    example: bool = True,
    count_tokens: TokenCounter = count_utf8_bytes,
) -> Document:
    """Chains `VAR B = VAR A` among noise, after a worked example; each question wants every variable of one chain."""
    shown = _tracking(_VT_EXAMPLE_TOKENS, rng, 1, hops, 3, count_tokens, "") if example else None
    head = "" if shown is None else shown.text + shown.questions[0].text + shown.questions[0].completion + "\n\n\n\n"
    return _tracking(length, rng, chains, hops, 5, count_tokens, head)


def _tracking(
    length: int, rng: random.Random, chains: int, hops: int, letters: int, count_tokens: TokenCounter, head: str
) -> Document:
    names = _distinct_words(rng, chains * (hops + 1), letters, string.ascii_uppercase)
    values = rng.sample(range(10000, 100000), chains)
    statements: list[tuple[float, str]] = []
    questions = []
    for chain, value in enumerate(values):
        members = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        lines = [f"VAR {members[0]} = {value}"]
        lines += [f"VAR {later} = VAR {earlier} " for earlier, later in itertools.pairwise(members)]
        statements += zip(sorted(rng.random() for _ in lines), lines, strict=True)
        text = _VT_QUESTION.format(query=value, count=hops + 1)
        questions.append(Question(text, tuple(members), " ".join(members)))

    def build(size: int) -> Document:
        lines = insert_at_fractions([NOISE + "\n"] * size, statements)
        return Document(head + _VT_CONTEXT.format(context=" ".join(lines)), tuple(questions))

    if head:
        return largest_fitting(build, length, count_tokens, unit=count_tokens(NOISE))
    try:
        return largest_fitting(build, length, count_tokens, unit=count_tokens(NOISE))
    except ValueError:
        if letters == 5:
            raise
        return build(0)  # ours: a byte-level counter leaves the example no room for noise


def common_words(length: int, rng: random.Random, *, count_tokens: TokenCounter = count_utf8_bytes) -> Document:
    """A numbered list in which ten words appear more often than the others, after an example of the same kind.

    Ours: RULER takes the frequent setting (30 against 3 times) from 4,096 tokens on; here it is taken when it fits.
    """
    try:
        return _common_words(length, rng, _CWE_LARGE, count_tokens)
    except ValueError:
        return _common_words(length, rng, _CWE_SMALL, count_tokens)


def _common_words(
    length: int,
    rng: random.Random,
    setting: tuple[tuple[int, int, int], tuple[int, int]],
    count_tokens: TokenCounter,
) -> Document:
    (example_words, example_common, example_other), (common, other) = setting
    pool = rng.sample(words.ALL_WORDS, len(words.ALL_WORDS))
    example, example_answer = _word_list(pool[:example_words], example_common, example_other, rng.getrandbits(32))
    head = _CWE_CONTEXT.format(context=example) + _CWE_QUESTION + _numbered(example_answer) + "\n"
    vocabulary = rng.sample(words.ALL_WORDS, len(words.ALL_WORDS))
    order_seed = rng.getrandbits(32)

    def build(size: int) -> Document:
        while len(vocabulary) < _CWE_COMMON + size:
            vocabulary.append(words.compound(rng.randrange(words.COMPOUND_COUNT)))
        text, answer = _word_list(vocabulary[: _CWE_COMMON + size], common, other, order_seed)
        question = Question(_CWE_QUESTION, answer, _numbered(answer))
        return Document(head + _CWE_CONTEXT.format(context=text), (question,))

    return largest_fitting(build, length, count_tokens, unit=12 * other)


def _word_list(chosen: list[str], common: int, other: int, seed: int) -> tuple[str, tuple[str, ...]]:
    """The numbered list, and its ten common words in the order in which they first appear."""
    entries = chosen[:_CWE_COMMON] * common + chosen[_CWE_COMMON:] * other
    random.Random(seed).shuffle(entries)
    answer = tuple(sorted(chosen[:_CWE_COMMON], key=entries.index))
    return " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1)), answer


def _numbered(answer: tuple[str, ...]) -> str:
    return "".join(f" {i}. {word}" for i, word in enumerate(answer, start=1))


def frequent_words(length: int, rng: random.Random, *, count_tokens: TokenCounter = count_utf8_bytes) -> Document:
    """Coded words with counts of a zeta distribution; the most frequent is the noise "...", the next three count."""
    vocabulary = ["...", *_distinct_words(rng, max(4, length // 50), _FWE_WORD_LETTERS, string.ascii_lowercase)]
    order_seed = rng.getrandbits(32)
    answer = tuple(vocabulary[1:4])
    question = Question(_FWE_QUESTION, answer, " " + " ".join(answer))

    def build(size: int) -> Document:
        total = size + 56  # the least number of words at which ranks two to five have counts 8, 3, 2, 1
        counts = [int(total * rank**-_FWE_ALPHA / _ZETA_OF_ALPHA) for rank in range(1, len(vocabulary) + 1)]
        coded = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        random.Random(order_seed).shuffle(coded)
        return Document(_FWE_CONTEXT.format(context=" ".join(coded)), (question,))

    return largest_fitting(build, length, count_tokens, unit=4)


def _distinct_words(rng: random.Random, count: int, letters: int, alphabet: str) -> list[str]:
    found: Counter[str] = Counter()
    while len(found) < count:
        found["".join(rng.choices(alphabet, k=letters))] += 1
    return list(found)
