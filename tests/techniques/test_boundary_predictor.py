"""The boundary predictor against torch's own attention module, naive float64 loops, and cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from edgerun.errors import EdgerunError
from edgerun.ops.dhsa_attention_reference import find_boundaries, gap_scores
from edgerun.ops.dhsa_attention_types import AttentionOptions, AttentionState
from edgerun.techniques.boundary_predictor import (
    BoundaryPredictor,
    BoundaryText,
    area_under_roc,
    boundary_labels,
    boundary_logits,
    focal_loss,
    gap_masses,
    joined_heads,
    learned_cuts,
    measure_predictor,
    train_predictor,
)

KV_HEADS, HEAD_DIM, W = 2, 16, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def predictor() -> BoundaryPredictor:
    torch.manual_seed(0)
    return BoundaryPredictor(KV_HEADS, HEAD_DIM).eval().requires_grad_(False)


def test_logits_are_those_of_the_papers_layers(predictor: BoundaryPredictor) -> None:
    keys = random(KV_HEADS, 40, HEAD_DIM)
    attention = torch.nn.MultiheadAttention(KV_HEADS * HEAD_DIM, predictor.heads, batch_first=True).eval()
    with torch.no_grad():
        attention.in_proj_weight.copy_(predictor.query_key_value.weight)
        attention.in_proj_bias.copy_(predictor.query_key_value.bias)
        attention.out_proj.weight.copy_(predictor.mixed.weight)
        attention.out_proj.bias.copy_(predictor.mixed.bias)
    found = boundary_logits(predictor, keys)
    for gap in (3, 10, 35):
        window = torch.cat([keys[:, gap - W + 1 : gap + W + 1][head] for head in range(KV_HEADS)], dim=1)[None]
        encoded = predictor.norm(attention(window, window, window)[0])[0]
        left, right = encoded[:W].mean(0), encoded[W:].mean(0)
        cosine = (left @ right / (left.norm() * right.norm())).reshape(1)
        features = torch.cat([left, right, (left - right).abs(), left * right, cosine])
        expected = predictor.logit(predictor.hidden(features).clamp(min=0))
        assert float(found[gap]) == pytest.approx(float(expected.detach()), abs=1e-5)


def test_a_gap_without_four_keys_on_either_side_is_no_boundary(predictor: BoundaryPredictor) -> None:
    found = boundary_logits(predictor, random(KV_HEADS, 12, HEAD_DIM))
    assert len(found) == 11
    assert torch.isfinite(found).nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    for tokens in (0, 1, 7):
        assert torch.isinf(boundary_logits(predictor, random(KV_HEADS, tokens, HEAD_DIM))).all()


def test_a_logit_depends_on_its_eight_keys_alone(predictor: BoundaryPredictor) -> None:
    keys = random(KV_HEADS, 90, HEAD_DIM)
    whole = boundary_logits(predictor, keys)
    part = boundary_logits(predictor, keys[:, :70])
    assert torch.allclose(part[:66], whole[:66], atol=1e-5)  # 66: the last gap of the part with four keys after it
    changed = keys.clone()
    changed[:, 50] += 1.0
    moved = (boundary_logits(predictor, changed) - whole).abs() > 1e-4
    assert moved.nonzero().flatten().tolist() == list(range(46, 54))


def test_keys_of_another_model_are_refused(predictor: BoundaryPredictor) -> None:
    with pytest.raises(EdgerunError, match="keys have 3 heads of 16, the predictor is for 2 of 16"):
        boundary_logits(predictor, random(3, 20, HEAD_DIM))


@pytest.mark.parametrize("tokens", [1, 27, 28, 44, 64, 100, 301])
def test_cuts_of_cosine_scores_are_the_ops_own(tokens: int) -> None:
    keys = random(KV_HEADS, tokens, HEAD_DIM, seed=tokens)
    options = AttentionOptions(scale=1.0, budget=2048, boundary_threshold=1.0, finds_boundaries=True)
    state = AttentionState.allocate(KV_HEADS, HEAD_DIM, tokens, options)
    padded = functional.pad(keys, (0, 0, 0, state.capacity_tokens - tokens))
    state.key_cache.copy_(padded.unflatten(1, (-1, 16)).transpose(2, 3))
    find_boundaries(state, 0, tokens, options)
    scores = torch.full((tokens - 1,), -math.inf, dtype=torch.float64)
    if tokens >= 2 * W:
        gaps = torch.arange(W, tokens - W + 1)
        scores[gaps - 1] = gap_scores(keys, gaps)
    cuts = learned_cuts(scores, 1.0)
    assert torch.equal(cuts, state.boundaries)
    assert tokens < 64 or 1 < int(cuts.sum()) < len(cuts)


def test_more_text_never_moves_a_cut_that_was_decided() -> None:
    logits = 3 * random(299)
    whole = learned_cuts(logits, 2.0)
    for tokens in range(2, 300):
        decided = max(0, tokens - 12) // 16 + 1
        part = learned_cuts(logits[: tokens - 1], 2.0)
        assert torch.equal(part[:decided], whole[:decided]) and not part[decided:].any()


def test_a_cut_is_caused_by_a_gap_at_most_eight_tokens_away() -> None:
    for gap, cut in ((23, False), (24, True), (40, True), (41, False)):  # gap: the token that it lies before; edge 32
        logits = torch.zeros(99)
        logits[gap - 1] = 2.0
        assert bool(learned_cuts(logits)[2]) == cut


@pytest.mark.parametrize(("tokens", "softcap", "rows"), [(13, 0.0, 128), (40, 0.0, 7), (40, 2.0, 16)])
def test_masses_are_those_of_a_naive_loop(tokens: int, softcap: float, rows: int) -> None:
    query, key = random(4, tokens, 8, seed=1), random(2, tokens, 8, seed=2)
    before, after = gap_masses(query, key, 0.5, softcap, rows=rows)
    attention = torch.zeros(tokens, tokens, dtype=torch.float64)
    for head in range(4):
        for q in range(tokens):
            logits = [0.5 * float(query[head, q].double() @ key[head // 2, k].double()) for k in range(q + 1)]
            logits = [softcap * math.tanh(x / softcap) if softcap else x for x in logits]
            total = math.fsum(math.exp(x) for x in logits)
            for k in range(q + 1):
                attention[q, k] += math.exp(logits[k]) / total / 4
    for i in range(tokens - 1):
        rows_after = range(i + W, tokens)
        expected_before = sum(float(attention[q, k]) for q in rows_after for k in range(max(0, i - W + 1), i + 1))
        expected_after = sum(float(attention[q, k]) for q in rows_after for k in range(i + 1, min(tokens, i + W + 1)))
        assert float(before[i]) == pytest.approx(expected_before, rel=1e-5, abs=1e-9)
        assert float(after[i]) == pytest.approx(expected_after, rel=1e-5, abs=1e-9)


def test_labels_by_hand() -> None:
    before = torch.tensor([9.0, 9.0, 9.0, 1.0, 1.0, 0.0, 5.0, 0.5, 9.0, 9.0, 9.0], dtype=torch.float64)
    after = torch.tensor([1.0, 1.0, 1.0, 1.9, 2.1, 0.0, 2.0, 0.3, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert boundary_labels(before, after).tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_focal_loss_by_hand() -> None:
    logits, labels = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([1.0, 0.0, 0.0])
    p = [1 / (1 + math.exp(-x)) for x in (0.3, -1.2, 2.0)]
    expected = [
        -1.3 * (1 - p[0]) ** 2 * math.log(p[0]),
        -(p[1] ** 2) * math.log(1 - p[1]),
        -(p[2] ** 2) * math.log(1 - p[2]),
    ]
    assert float(focal_loss(logits, labels)) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_area_under_roc_by_hand() -> None:
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert area_under_roc(torch.tensor([0.9, 0.1, 0.4, 0.6]), labels) == pytest.approx(3 / 4)
    assert area_under_roc(torch.tensor([0.5, 0.5, 0.9, 0.1]), labels) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert area_under_roc(torch.tensor([0.5, 0.1]), torch.ones(2)) == 0.5


def text_with_topics(seed: int) -> BoundaryText:
    """Keys whose direction changes at known places, which alone are boundaries."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(12, KV_HEADS * HEAD_DIM, generator=generator).repeat_interleave(16, dim=0)
    keys = topics + 0.3 * torch.randn(topics.shape, generator=generator)
    labels = torch.zeros(len(keys) - 1)
    labels[15::16] = 1.0
    return BoundaryText(keys, labels[W - 1 : len(keys) - W])


def test_training_finds_changes_of_topic_in_a_text_it_has_not_seen() -> None:
    steps: list[int] = []
    trained = train_predictor(
        [text_with_topics(seed) for seed in range(6)],
        KV_HEADS,
        HEAD_DIM,
        steps=150,
        gaps_per_step=128,
        learning_rate=1e-3,
        on_step=lambda done, _: steps.append(done),
    )
    metrics = measure_predictor(trained, [text_with_topics(99)])
    assert steps == list(range(1, 151))
    assert metrics.auc > 0.95 and metrics.loss < 0.5 * metrics.loss_before
    assert metrics.positives == pytest.approx(11 / 185) and metrics.gaps == 185


def test_one_seed_gives_one_predictor() -> None:
    texts = [text_with_topics(0)]
    one, same, other = (train_predictor(texts, KV_HEADS, HEAD_DIM, steps=2, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.hidden.weight, other.hidden.weight)


def test_size_and_cost_by_hand(predictor: BoundaryPredictor) -> None:
    c = KV_HEADS * HEAD_DIM
    attention, norm, mlp = 4 * c * c + 4 * c, 2 * c, (4 * c + 1) * 256 + 256 + 256 + 1
    assert predictor.parameters_count == attention + norm + mlp
    assert predictor.multiply_adds_per_token == 3 * c * c + 8 * c * c + 2 * 64 * c + (4 * c + 1) * 256 + 256


def test_joined_heads_put_all_kv_heads_of_a_token_side_by_side() -> None:
    keys = random(KV_HEADS, 5, HEAD_DIM)
    assert torch.equal(joined_heads(keys)[3], torch.cat([keys[0, 3], keys[1, 3]]))
