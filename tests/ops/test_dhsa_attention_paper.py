"""The paper-exact mode: a case worked by hand, and a brute-force formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgerun import compare
from edgerun.errors import EdgerunError
from edgerun.ops.dhsa_attention_paper import (
    PaperOptions,
    paper_attention,
    paper_boundaries,
    paper_scores,
    paper_tokens,
)

SMALL = PaperOptions(scale=0.5, budget=8, tile=4, recent=2, sink=2, suppression=2, chunks_per_tile=2)


def test_boundaries_worked_by_hand() -> None:
    """Of 15 gaps, 5 exceed 1.1. Best first: gap 6 (5.0); 5 is too near; 3 (3.0) is 3 away; 13 (2.0); 9 (1.2)."""
    logits = torch.zeros(15)
    logits[[3, 5, 6, 9, 13]] = torch.tensor([3.0, 4.0, 5.0, 1.2, 2.0])
    logits[12] = 1.1  # not above
    assert paper_boundaries(logits, SMALL) == [0, 4, 7, 10, 14]


def test_quota_keeps_the_best_boundaries() -> None:
    """16 tokens in tiles of 8 with one chunk a tile: two chunks, so one boundary, the best."""
    logits = torch.full((15,), 2.0)
    logits[10] = 3.0
    options = PaperOptions(scale=1.0, tile=8, chunks_per_tile=1)
    assert paper_boundaries(logits, options) == [0, 11]
    assert paper_boundaries(logits[:5], options) == [0]


def test_scores_and_tokens_worked_by_hand() -> None:
    """Two query heads (2, 0) and (0, 2) have the mean (1, 1); a tile of 4 scales it by 2. Chunks of 4, 9 and 3 tokens
    with constant keys (1, 0), (0, 2), (3, 1) become 2 (1, 0), 3 (0, 2), sqrt(3) (3, 1): scores 4, 12, 8 sqrt(3)."""
    query = torch.tensor([[2.0, 0.0], [0.0, 2.0]])[None, :, None].repeat(1, 1, 16, 1)
    key = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 2.0]] * 9 + [[3.0, 1.0]] * 3)[None, None]
    scores = paper_scores(query, key, [0, 4, 13], SMALL)
    expected = torch.tensor([4.0] * 4 + [12.0] * 9 + [8 * 3**0.5] * 3)
    torch.testing.assert_close(scores, expected.repeat(4, 1))
    # Last tile: 14 and 15 are recent. Best six of the rest: 13, then 4..8; the lowest, 7 and 8, give way to 0 and 1.
    assert paper_tokens(scores[3], 12, 16, SMALL).tolist() == [0, 1, 4, 5, 6, 13, 14, 15]
    # Third tile sees 12 tokens: 10 and 11 are recent, best six of the rest 4..9, of which 8 and 9 give way.
    assert paper_tokens(scores[2], 8, 12, SMALL).tolist() == [0, 1, 4, 5, 6, 7, 10, 11]
    # Second tile sees 8 tokens, which all fit.
    assert paper_tokens(scores[1], 4, 8, SMALL).tolist() == list(range(8))


@settings(max_examples=20)
@given(
    tokens=st.integers(1, 60), window=st.sampled_from([0, 20]), question=st.integers(0, 9), seed=st.integers(0, 9999)
)
def test_equals_attention_one_query_at_a_time(tokens: int, window: int, question: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, h, tokens, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    logits = 2 * torch.randn(tokens - 1, generator=generator)
    options = PaperOptions(
        scale=0.3, budget=14, tile=8, recent=4, sink=4, question_tokens=question, window=window, suppression=3
    )
    out = paper_attention(query, key, value, logits, options)
    starts = paper_boundaries(logits, options)
    mean_query, mean_key = query[0].mean(0), key[0].mean(0)
    chunk_of = [max(i for i, start in enumerate(starts) if start <= token) for token in range(tokens)]
    for row in range(tokens):
        tile = range(row // 8 * 8, min(tokens, row // 8 * 8 + 8))
        first = max(0, tile[0] - window + 1) if window else 0
        attended = set(range(first, tile[-1] + 1))
        if len(attended) > 14 and row < tokens - question:
            pooled = mean_query[list(tile)].sum(0) / len(tile) ** 0.5

            def score(token: int, pooled: torch.Tensor = pooled) -> float:
                chunk = [t for t in range(tokens) if chunk_of[t] == chunk_of[token]]
                return float(pooled @ (mean_key[chunk].sum(0) / len(chunk) ** 0.5))

            rest = sorted(range(first, tile[-1] - 3), key=lambda token: (-round(score(token), 9), token))
            attended = {*rest[:6], *range(first, first + 4), *range(tile[-1] - 3, tile[-1] + 1)}
        columns = [c for c in sorted(attended) if c <= row and (not window or c > row - window)]
        for head in range(4):
            weights = (0.3 * key[0, head // 2, columns] @ query[0, head, row]).softmax(0)
            assert compare.relative_l2(out[0, row, head], weights @ value[0, head // 2, columns]) < 1e-9


def test_budget_holds_recent_and_sink() -> None:
    with pytest.raises(EdgerunError, match="budget is 200 tokens"):
        PaperOptions(scale=1.0, budget=200)
