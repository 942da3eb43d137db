"""Bits per token on held-out text: how well a model predicts the last tokens of a window whose rest it has prefilled.

A window of `length` tokens is read but for its last N; those are then fed one by one, and each is scored before it is
fed. In a prefill a query tile shares one selection, which sees the tile's later queries: a token scored there could be
helped by what follows it. A token that comes alone cannot. The same N tokens are scored for every length of window; a
window that begins before the text does goes on from the text's end.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import math
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgerun.errors import EdgerunError
from edgerun.evaluation.sample import EVALUATION_SPLIT, seeded_random
from edgerun.evaluation.text_files import read_texts

if TYPE_CHECKING:
    import tokenizers

LAST = 256  # tokens scored of each window
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, lie evenly for every count of them


@dataclasses.dataclass(frozen=True)
class Loss:
    """What the scored tokens of a window cost: bits of all of them, how many, and the bytes of text they stand for."""

    bits: float
    tokens: int
    text_bytes: int


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens to prefill, and those that are then scored and fed one by one."""

    prompt: tuple[int, ...]
    scored: tuple[int, ...]
    text_bytes: int  # of the scored tokens, in UTF-8


@dataclasses.dataclass(frozen=True)
class Measured:
    """A window's loss and the wall time of its two parts."""

    loss: Loss
    prefill_s: float
    decode_s: float


def read_text(files: Sequence[pathlib.Path]) -> str:
    """The files one after another. Raises EdgerunError for one that is not there or not UTF-8 text."""
    return "\n".join(read_texts(files))


def task_name(last: int, text: str) -> str:
    """The task of scoring the last tokens of windows of this text: "last_256_of_" and the start of its SHA-256."""
    return f"last_{last}_of_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def parse_task(task: str) -> int:
    """Tokens scored of each window of a task. Raises EdgerunError for another suite's task."""
    match = re.fullmatch(r"last_(\d+)_of_[0-9a-f]{12}", task)
    if match is None:
        raise EdgerunError(f"{task!r} is not a task of the suite perplexity; it is like last_{LAST}_of_0123456789ab")
    return int(match[1])


@functools.lru_cache(maxsize=1)
def tokenized(files: tuple[pathlib.Path, ...], task: str, tokenizer: tokenizers.Tokenizer) -> TokenizedText:
    """The task's text in a model's tokens. Raises EdgerunError when the files hold another text than the task's."""
    text = read_text(files)
    if task_name(parse_task(task), text) != task:
        raise EdgerunError(
            f"{', '.join(map(str, files))}: the text is not that of {task}; it must be the same everywhere"
        )
    return TokenizedText(text, tokenizer)


class TokenizedText:
    """A text as one model's tokens, from which windows are cut."""

    def __init__(self, text: str, tokenizer: tokenizers.Tokenizer) -> None:
        whole = tokenizer.encode(text, add_special_tokens=False)
        self.ids: list[int] = whole.ids
        self._ends = [end for _, end in whole.offsets]  # in characters
        self._starts = [start for start, _ in whole.offsets]
        self._bytes_before = _bytes_before(text)
        probe = tokenizer.encode("a")
        head = probe.special_tokens_mask.index(0) if 0 in probe.special_tokens_mask else 0
        self._head: tuple[int, ...] = tuple(probe.ids[:head])  # <bos> where the tokenizer puts one

    def window(self, last: int, length: int, seed: int, index: int) -> Window:
        """Window `index` of a seed. Raises EdgerunError when it does not fit the text or leaves nothing to prefill."""
        context = length - last - len(self._head)
        if context < 1:
            raise EdgerunError(f"--lengths has {length}, which leaves nothing to prefill before --last {last}")
        if context + last > len(self.ids):
            raise EdgerunError(
                f"the text has {len(self.ids)} tokens, a window needs {context + last}: pass more --text"
            )
        shift = seeded_random(EVALUATION_SPLIT, "perplexity", seed).random()
        end = last + int((shift + index * _GOLDEN) % 1.0 * (len(self.ids) - last + 1))
        begin = end - last
        before = self.ids[max(0, begin - context) : begin]
        before = self.ids[len(self.ids) - (context - len(before)) :] + before if len(before) < context else before
        text_bytes = self._bytes_before(self._ends[end - 1]) - self._bytes_before(self._starts[begin])
        return Window((*self._head, *before), tuple(self.ids[begin:end]), text_bytes)


def _bytes_before(text: str) -> Callable[[int], int]:
    """How many UTF-8 bytes come before a character of the text."""
    wide = [(place, len(character.encode()) - 1) for place, character in enumerate(text) if ord(character) > 127]
    places = [place for place, _ in wide]
    extra = [0]
    for _, more in wide:
        extra.append(extra[-1] + more)
    return lambda character: character + extra[bisect.bisect_left(places, character)]


def bits_of(logits: npt.NDArray[np.float32], token: int) -> float:
    """-log2 of the probability that logits [vocab] give a token."""
    row = logits.astype(np.float64)
    top = row.max()
    return float((top + np.log(np.exp(row - top).sum()) - row[token]) / math.log(2))


def measure(window: Window, forward: Callable[[Sequence[int], int], npt.NDArray[np.float32]]) -> Measured:
    """Prefill the window, then score and feed its last tokens in turn.

    forward: (ids, position) -> logits [vocab] after them; position 0 begins anew, others append.
    """
    begin = time.monotonic()
    logits = forward(window.prompt, 0)
    prefilled = time.monotonic()
    bits = [bits_of(logits, window.scored[0])]
    for offset, token in enumerate(window.scored[1:]):
        logits = forward(window.scored[offset : offset + 1], len(window.prompt) + offset)
        bits.append(bits_of(logits, token))
    loss = Loss(math.fsum(bits), len(bits), window.text_bytes)
    return Measured(loss, prefilled - begin, time.monotonic() - prefilled)
