"""Golden cases: prompts, forced continuations, and the logits of the model itself, that every device is judged by.

The truth is the recipe's own model (its attention, its rounded or quantised weights, a cache narrower than its
activations) run eagerly in float32. What quantising costs against the original model is `edgerun eval`'s to say.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers
import torch

from edgerun.bundle import GoldenCase
from edgerun.checkpoint import Checkpoint
from edgerun.evaluation.fidelity import eager_logits
from edgerun.models.causal_lm import CausalLM
from edgerun.recipe import Recipe

FORCED_TOKENS = 20  # with the prompt's own: 21 rows, so that one near tie is within a 95 % gate
_RAGGED = 17  # tokens: more than a micro-block, and not a multiple of one
_MOST_WORK = 1e12  # multiply-adds a prompt may cost; a 1B model stays below 800 tokens
_PASSAGE = (
    "The harbour lay still under a thin fog. Twelve boats were tied to the old pier, and on each of them somebody was "
    'mending a net or counting crates. "Key 4417 opens the third shed," the keeper wrote in his book, then he closed '
    "it, walked past the lamp, and looked for the ferry that had left at 6:45. def total(items): return sum(items)\n"
)


def golden_cases(model: CausalLM, recipe: Recipe, checkpoint: Checkpoint) -> list[tuple[str, GoldenCase]]:
    """Named cases: a short prompt, one of several slices, and one long enough for sparse selection where it fits.

    `model` is the recipe's model in float32 arithmetic; its state is overwritten.
    """
    assert recipe.max_context is not None
    room = recipe.max_context - FORCED_TOKENS
    weights = sum(tensor.numel() for tensor in (*model.parameters(), *_tables(model)))
    affordable = min(room, int(_MOST_WORK / max(weights, 1)))
    wanted = {"short": 5, "slices": recipe.prefill_slice + _RAGGED}
    # Long enough that every sparse layer selects; where that does not fit, that as many as can do.
    budgets = {one.budget for one in model.options if one.kind == "dhsa"}
    lengths = sorted(budget + 2 * recipe.dhsa.tile + _RAGGED for budget in budgets)
    if lengths:
        wanted["sparse"] = max((length for length in lengths if length <= affordable), default=lengths[0])
    cases: list[tuple[str, GoldenCase]] = []
    for name, tokens in wanted.items():
        if name != "sparse" or tokens <= affordable:
            length = max(1, min(tokens, affordable))
            ids = passage_ids(checkpoint, min(length + FORCED_TOKENS, recipe.max_context))
            cases.append((name, _case(model, recipe, ids)))
    return cases


def passage_ids(checkpoint: Checkpoint, count: int) -> list[int]:
    """`count` token ids of ordinary text, beginning with the model's start token when it has one."""
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    start = checkpoint.token_id("bos_token_id")[:1]
    once: Sequence[int] = tokenizer.encode(_PASSAGE, add_special_tokens=False).ids
    vocabulary = int(checkpoint.config.vocab_size)
    ids = [*start, *(list(once) * (count // max(len(once), 1) + 1))]
    return [token % vocabulary for token in ids[:count]]


def _case(model: CausalLM, recipe: Recipe, ids: list[int]) -> GoldenCase:
    forced = min(FORCED_TOKENS, len(ids) - 1)
    prompt, rest = ids[: len(ids) - forced], ids[len(ids) - forced :]
    logits = eager_logits(model, prompt, rest, recipe.prefill_slice)
    return GoldenCase(np.asarray(prompt, dtype=np.int64), np.asarray(rest, dtype=np.int64), logits)


def _tables(model: CausalLM) -> list[torch.Tensor]:
    """Weights that are buffers: the token table, and quantised layers."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith((".weight", ".table"))]
