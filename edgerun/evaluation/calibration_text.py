"""The texts that a calibration is made on: files cut into windows of tokens, for each of its three parts some.

A choice is made by one part and narrowed on the second, the held-out one, until it holds there; both have then chosen
it, so that only the third, which is measured once at the end, proves it. No window is in two parts.

A file that is long enough is cut from its end backwards, so that a generated document's question and answer stand at
a window's end, where tokens are decoded; shorter files are joined. A shorter length sees the end of the same windows,
so what is of one part at one length is of it at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence

from edgerun.checkpoint import Checkpoint
from edgerun.errors import EdgerunError

Window = tuple[int, ...]  # token ids, the model's start token first when it has one


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """Windows of the longest length. sha256: of the files' text, each once."""

    chosen_by: tuple[Window, ...]
    held_out: tuple[Window, ...]  # to narrow a choice by
    proof: tuple[Window, ...]  # measured once, when nothing is left to choose
    start_tokens: int  # of every window, that are no text
    sha256: str

    def shortened(self, window: Window, length: int) -> Window:
        """The window's end of `length` tokens, behind the start token."""
        return window[: self.start_tokens] + window[len(window) - (length - self.start_tokens) :]


def make_text(checkpoint: Checkpoint, texts: Sequence[str], length: int, samples: int, seed: int) -> CalibrationText:
    """`samples` windows of `length` tokens for each of the three parts, drawn by `seed`.

    Texts and windows that come again count once. Raises EdgerunError when the text is too short.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    start = checkpoint.token_id("bos_token_id")[:1]
    texts = list(dict.fromkeys(texts))
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    windows = list(dict.fromkeys((*start, *body) for body in cut(ids, length - len(start))))
    if len(windows) < 3 * samples:
        raise EdgerunError(
            f"the text gives {len(windows)} different windows of {length} tokens, {3 * samples} are needed ({samples} "
            "each to choose, narrow and prove by): give more text, or lower --lengths or --samples"
        )
    random.Random(f"calibration/{seed}").shuffle(windows)
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text.encode())}\0".encode() + text.encode())
    chosen_by, held_out, proof = (tuple(windows[part * samples :][:samples]) for part in range(3))
    return CalibrationText(chosen_by, held_out, proof, len(start), digest.hexdigest())


def cut(texts: Sequence[Sequence[int]], length: int) -> list[Window]:
    """Every window of `length` token ids: of long texts from their end backwards, of short ones joined in order."""
    windows: list[Window] = []
    joined: list[int] = []
    for ids in texts:
        if len(ids) < length:
            joined += ids
            continue
        windows += [tuple(ids[end - length : end]) for end in range(len(ids), length - 1, -length)]
    return windows + [tuple(joined[i : i + length]) for i in range(0, len(joined) - length + 1, length)]
