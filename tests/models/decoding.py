"""How the family tests feed a model: ragged slices, then decode steps, against transformers' one eager run."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import torch
import transformers

from edgerun import compare

# Ragged lengths around a micro-block, a full slice, decode steps, and past the tiny Phi-3's original 64 tokens.
CALLS = (1, 15, 16, 17, 32, 1, 1, 30)
TOKENS = sum(CALLS)

Forward = Callable[[list[int], int], np.ndarray]  # (token ids, input_pos) -> logits [vocab]


def token_ids(seed: int = 0) -> list[int]:
    """TOKENS random ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 258, (TOKENS,), generator=generator).tolist()


def transformers_logits(folder: pathlib.Path) -> np.ndarray:
    """transformers' own eager float32 logits of `token_ids` in one call: [TOKENS, vocab]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([token_ids()]), use_cache=False).logits[0]
    return logits.numpy()


def worst_relative_l2(forward: Forward, expected: np.ndarray, calls: tuple[int, ...] = CALLS) -> float:
    """Largest relative L2 between the last token's logits of each call and the row that transformers has for it."""
    ids, position, worst = token_ids(), 0, 0.0
    for length in calls:
        logits = forward(ids[position : position + length], position)
        position += length
        worst = max(worst, compare.relative_l2(logits, expected[position - 1]))
    return worst
