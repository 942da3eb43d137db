"""The texts that a calibration is made on: files cut into windows of tokens, some to choose by and some held out.

A file that is long enough is cut from its end backwards, so that a generated document's question and answer stand at
a window's end, where tokens are decoded; shorter files are joined. A shorter length sees the end of the same windows,
so what is held out at one length is held out at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import random
from collections.abc import Sequence

from edgerun.checkpoint import Checkpoint
from edgerun.errors import EdgerunError

Window = tuple[int, ...]  # token ids, the model's start token first when it has one


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """Windows of the longest length. sha256: of the files' text."""

    chosen_by: tuple[Window, ...]
    held_out: tuple[Window, ...]
    start_tokens: int  # of every window, that are no text
    sha256: str

    def shortened(self, window: Window, length: int) -> Window:
        """The window's end of `length` tokens, behind the start token."""
        return window[: self.start_tokens] + window[len(window) - (length - self.start_tokens) :]


def read_texts(paths: Sequence[pathlib.Path]) -> list[str]:
    """The files' text. Raises EdgerunError for a file that is not UTF-8, OSError for one that cannot be read."""
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise EdgerunError(f"{path} is no UTF-8 text ({error.reason}, byte {error.start}): leave it out") from None
    return texts


def make_text(checkpoint: Checkpoint, texts: Sequence[str], length: int, samples: int, seed: int) -> CalibrationText:
    """`samples` windows of `length` tokens to choose by and as many held out, drawn by `seed`.

    Raises EdgerunError when the text is too short for them.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    start = checkpoint.token_id("bos_token_id")[:1]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    windows = [(*start, *body) for body in cut(ids, length - len(start))]
    if len(windows) < 2 * samples:
        raise EdgerunError(
            f"the text gives {len(windows)} windows of {length} tokens, {2 * samples} are needed ({samples} to choose "
            f"by, {samples} held out): give more text, or lower --lengths or --samples"
        )
    random.Random(f"calibration/{seed}").shuffle(windows)
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text.encode())}\0".encode() + text.encode())
    return CalibrationText(
        tuple(windows[:samples]), tuple(windows[samples : 2 * samples]), len(start), digest.hexdigest()
    )


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
