"""TextSession: a text bundle, loaded and generating in this process; thin over csrc/runtime/text_session.

    session = TextSession(Path("model.edgerun"))
    print(session.generate("Once upon a time", max_new_tokens=64).text)

A session holds one conversation: every `generate` appends its prompt to what came before, until `reset`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgerun.bundle import Bundle
from edgerun.errors import EdgerunError
from edgerun.ops.native import native_module

if TYPE_CHECKING:
    import tokenizers

Finish = Literal["length", "eos", "stop", "cancelled"]


@dataclasses.dataclass(frozen=True)
class TextStats:
    """The last call's statistics under ExecuTorch's names; milliseconds of a monotonic clock, NaN: has not happened."""

    prompt_tokens: int
    generated_tokens: int
    model_load_start_ms: float
    model_load_end_ms: float
    inference_start_ms: float
    inference_end_ms: float
    prompt_eval_end_ms: float
    first_token_ms: float
    aggregate_sampling_time_ms: float
    peak_rss_bytes: int  # of this process, so far; -1: unknown
    attended_pairs: int  # (query, key) pairs per KV head, summed over layers
    causal_pairs: int  # what dense attention would have attended


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one call of `generate` gave."""

    tokens: list[int]  # the token it stopped at included
    text: str  # the tokens decoded, special tokens left out
    stats: TextStats
    finish: Finish


class TextSession:
    """One text bundle, loaded. Calls from several threads must not overlap, except `cancel`."""

    def __init__(self, bundle: pathlib.Path, *, threads: int | None = None, verify: bool = True) -> None:
        """Load `bundle`. `threads` sets the process-wide pool and can differ only when no other session is open.

        Raises BundleError for a bundle that is damaged or needs an op that no library defines, else EdgerunError.
        """
        if threads is not None and threads < 1:
            raise EdgerunError(f"threads is {threads}; it must be at least 1, or None for the pool as it is")
        self._path = pathlib.Path(bundle)
        native = native_module()
        self._native = native.TextSession(path=str(self._path), verify=verify, threads=threads or 0)
        self._tokenizer: tokenizers.Tokenizer | None = None

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The bundle's tokenizer. Raises BundleError when it cannot be read."""
        if self._tokenizer is None:
            self._tokenizer = Bundle.open(self._path, verify=False).tokenizer()
        return self._tokenizer

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Generation:
        """Append `prompt` to the conversation and generate until a stop token, `max_new_tokens` or a full context.

        A temperature of 0 is greedy. `stop_ids` replaces the bundle's end tokens; `[]` never stops. `on_token` gets
        each id as it comes; what it raises ends the call and is raised here, as Ctrl-C is. max_new_tokens=0 only reads.
        Raises EdgerunError for a prompt that is empty, does not fit the context or has an id outside the vocabulary.
        """
        ids = self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else [int(token) for token in prompt]
        if not 0 <= seed < 2**64:
            raise EdgerunError(f"seed is {seed}; it must be 0 to 2^64 - 1")
        tokens, finish, stats = self._native.generate(
            ids=ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_ids=None if stop_ids is None else [int(token) for token in stop_ids],
            on_token=on_token,
        )
        text = self.tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""
        return Generation(tokens, text, TextStats(**stats), finish)

    def forward(self, ids: Sequence[int], input_pos: int) -> np.ndarray:
        """Drop what is cached from `input_pos` on, append `ids`, and return the logits of the last: float32 [vocab].

        Raises EdgerunError when input_pos is beyond what is cached, or as `generate` does.
        """
        logits: np.ndarray = self._native.forward(ids=[int(token) for token in ids], input_pos=input_pos)
        return logits

    def reset(self) -> None:
        """Forget the conversation."""
        self._native.reset()

    def cancel(self) -> None:
        """End the running call before its next slice or token, from any thread; without one, do nothing."""
        self._native.cancel()

    @property
    def stats(self) -> TextStats:
        """Statistics of the last call."""
        return TextStats(**self._native.stats())

    @property
    def cached_tokens(self) -> int:
        """Tokens of the conversation that the program holds; the last one generated joins with the next call."""
        return int(self._native.cached_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self._native.vocab_size)

    @property
    def max_context(self) -> int:
        """Most tokens that a conversation can hold."""
        return int(self._native.max_context)

    @property
    def threads(self) -> int:
        """Threads of the process's pool."""
        return int(self._native.threads)
