"""The learned boundary predictor of DHSA (arXiv 2510.24606 v1): where does the attention's interest change?

For every gap i|i+1 it sees w = 4 keys on either side, x_j the keys of all KV heads after rotary embedding, C = Hkv D:

    E = LayerNorm(MultiHeadAttention(x_{i-w+1} .. x_{i+w}))        [2w, C], one layer, no residual, no positions
    l, r = mean of E's first and last w rows
    logit = Linear(ReLU(Linear([l, r, |l - r|, l * r, cos(l, r)])))   (4C + 1) -> 256 -> 1

Labels come from the frozen model's own dense attention A, the mean over heads: P_i = sum over q >= i+w of A[q, k] for
the w keys k up to i, F_i the same for the w keys after it; y_i = 1 where (max + 1e-6) / (min + 1e-6) >= 2. The loss is
focal (gamma 2) with positive weight 1.3. Ours: the local cut rule in place of a suppression over the whole prompt
(`learned_cuts`; the paper's is edgerun/ops/dhsa_attention_paper.py), which a growing text needs: a logit depends on its
8 keys alone. The number of heads is ours too: 8, or as many as divide C.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from edgerun.errors import EdgerunError
from edgerun.ops.dhsa_attention_types import BOUNDARY_SPAN, BOUNDARY_WINDOW
from edgerun.recipe import BOUNDARY_REACH, MAX_CHUNK, MICRO_BLOCK

HIDDEN = 256
BOUNDARY_LOGIT = 1.1  # the paper's threshold
_RATIO, _EPSILON = 2.0, 1e-6  # a gap is a boundary where attention to its sides differs so many times
_GAPS_AT_ONCE = 2048  # bounds the windows that are held at once


class BoundaryPredictor(nn.Module):
    """Logits of gaps from windows of keys [gaps, 2w, C] -> [gaps]. layer: whose keys these are; None: not known."""

    def __init__(self, kv_heads: int, head_dim: int, layer: int | None = None) -> None:
        super().__init__()
        self.kv_heads, self.head_dim, self.layer = kv_heads, head_dim, layer
        channels = kv_heads * head_dim
        self.heads = next(heads for heads in (8, 4, 2, 1) if channels % heads == 0)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.mixed = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.hidden = nn.Linear(4 * channels + 1, HIDDEN)
        self.logit = nn.Linear(HIDDEN, 1)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """windows [gaps, 2w, C] -> logits [gaps]."""
        return self._logits(self.query_key_value(windows))

    def of_text(self, keys: torch.Tensor) -> torch.Tensor:
        """keys [L, C] -> logits [L - 2w + 1] of the gaps with w keys on either side.

        A key's projections do not depend on the window that it is in, so each is made once, not 2w times.
        """
        projected = self.query_key_value(keys)  # [L, 3C]
        windows = projected.unfold(0, 2 * BOUNDARY_WINDOW, 1).transpose(1, 2)  # [gaps, 2w, 3C], a view
        return torch.cat([self._logits(part) for part in windows.split(_GAPS_AT_ONCE)])

    def _logits(self, projected: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of windows, [gaps, 2w, 3C] -> [gaps]."""
        split = projected.reshape(*projected.shape[:2], 3, self.heads, -1)
        parts = split.permute(2, 0, 3, 1, 4)  # [3, gaps, heads, 2w, C / heads]
        attended = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        encoded = self.norm(self.mixed(attended.transpose(1, 2).flatten(2)))  # [gaps, 2w, C]
        left, right = encoded[:, :BOUNDARY_WINDOW].mean(dim=1), encoded[:, BOUNDARY_WINDOW:].mean(dim=1)  # [gaps, C]
        cosine = functional.cosine_similarity(left, right, dim=1).unsqueeze(1)
        features = torch.cat([left, right, (left - right).abs(), left * right, cosine], dim=1)
        found: torch.Tensor = self.logit(functional.relu(self.hidden(features))).squeeze(1)
        return found

    @property
    def parameters_count(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def multiply_adds_per_token(self) -> int:
        """Of one more token in a text: its projections, and the gap whose window it completes."""
        channels, window = self.kv_heads * self.head_dim, 2 * BOUNDARY_WINDOW
        attention = window * channels**2 + 2 * window**2 * channels
        return 3 * channels**2 + attention + (4 * channels + 1) * HIDDEN + HIDDEN


def boundary_logits(predictor: BoundaryPredictor, keys: torch.Tensor) -> torch.Tensor:
    """keys [Hkv, L, D] after rotary embedding -> float32 logits [L - 1], entry i for the gap between i and i + 1.

    A gap without 4 keys on either side cannot be judged: its logit is -inf. `paper_attention` takes these logits, and
    so does `learned_cuts`. Raises EdgerunError for keys of another shape than the predictor's.
    """
    kv_heads, tokens, head_dim = keys.shape
    if (kv_heads, head_dim) != (predictor.kv_heads, predictor.head_dim):
        raise EdgerunError(
            f"keys have {kv_heads} heads of {head_dim}, the predictor is for {predictor.kv_heads} of "
            f"{predictor.head_dim}: train one for this model (`edgerun calibrate`)"
        )
    logits = torch.full((max(0, tokens - 1),), -torch.inf)
    if tokens >= 2 * BOUNDARY_WINDOW:
        with torch.no_grad():
            found = predictor.of_text(joined_heads(keys))
        logits[BOUNDARY_WINDOW - 1 : tokens - BOUNDARY_WINDOW] = found
    return logits


def joined_heads(keys: torch.Tensor) -> torch.Tensor:
    """keys [Hkv, L, D] -> float32 [L, C], as the predictor takes them."""
    return keys.transpose(0, 1).flatten(1).float()


def learned_cuts(logits: torch.Tensor, threshold: float = BOUNDARY_LOGIT) -> torch.Tensor:
    """logits [L - 1] of a text's gaps -> uint8 flags [ceil(L / 16) + 1], one for every edge of a micro-block.

    The rule of the op (csrc/ops/dhsa_attention/dhsa_attention.h), with logits for gap scores: edge e, at token 16 e, is
    cut where 16 e is a multiple of 64 or a gap within 8 tokens has more than `threshold`. An edge is decided once 12
    tokens after it are there; until then its flag is 0, and more text never changes a decided one.
    """
    tokens = len(logits) + 1
    flags = torch.zeros(-(-tokens // MICRO_BLOCK) + 1, dtype=torch.uint8)
    flags[0] = 1
    edges = torch.arange(1, max(1, (tokens - BOUNDARY_REACH) // MICRO_BLOCK + 1)) * MICRO_BLOCK
    gaps = edges[:, None] + torch.arange(-BOUNDARY_SPAN, BOUNDARY_SPAN + 1)  # gap g lies before token g
    cut = edges % MAX_CHUNK == 0
    if len(edges):
        cut = cut | (logits[gaps - 1].amax(dim=1) > threshold)
    flags[edges // MICRO_BLOCK] = cut.to(torch.uint8)
    return flags


# Labels


def gap_masses(
    query: torch.Tensor, key: torch.Tensor, scale: float, softcap: float = 0.0, *, rows: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """P and F of every gap, float64 [L - 1] each, from one layer's dense causal attention.

    query [Hq, L, D] and key [Hkv, L, D]. `rows` queries are attended at a time, so that memory is rows * L, not L * L.
    Beside a text's ends, where fewer than w keys are there, the sums are over those.
    """
    tokens, w = query.shape[1], BOUNDARY_WINDOW
    group = query.shape[0] // key.shape[0]
    before, after = torch.zeros(2, tokens - 1, dtype=torch.float64).unbind(0)
    gaps = torch.arange(tokens - 1)
    for first in range(0, tokens, rows):
        last = min(first + rows, tokens)
        positions = torch.arange(first, last)[:, None]
        hidden = torch.arange(last) > positions  # [rows, last]: what comes after each query
        attention = torch.zeros(last - first, last, dtype=torch.float64)
        for head in range(query.shape[0]):
            products = scale * (query[head, first:last] @ key[head // group, :last].T)
            if softcap > 0:
                products = softcap * torch.tanh(products / softcap)
            attention += products.masked_fill(hidden, -torch.inf).softmax(dim=1)
        attention /= query.shape[0]
        # sums[:, j]: attention to the w keys up to and with j, fewer at the ends
        padded = functional.pad(attention, (w - 1, tokens + w - 1 - last))  # [rows, tokens + 2 (w - 1)]
        sums = padded[:, : tokens + w - 1].clone()
        for offset in range(1, w):
            sums += padded[:, offset : offset + tokens + w - 1]
        counted = positions >= gaps + w
        before += (sums[:, : tokens - 1] * counted).sum(dim=0)
        after += (sums[:, w : w + tokens - 1] * counted).sum(dim=0)
    return before, after


def boundary_labels(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """P and F [L - 1] -> labels, float32 [L - 2w + 1], of the gaps that the predictor judges."""
    ratio = (torch.maximum(before, after) + _EPSILON) / (torch.minimum(before, after) + _EPSILON)
    return (ratio >= _RATIO).float()[BOUNDARY_WINDOW - 1 : len(before) + 1 - BOUNDARY_WINDOW]


def focal_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, gamma: float = 2.0, positive_weight: float = 1.3
) -> torch.Tensor:
    """Mean binary cross-entropy, positives weighted, each gap times (1 - probability of its label) ** gamma."""
    entropy = functional.binary_cross_entropy_with_logits(
        logits, labels, pos_weight=torch.tensor(positive_weight), reduction="none"
    )
    missed = torch.sigmoid(torch.where(labels > 0, -logits, logits))
    return (missed**gamma * entropy).mean()


# Training


@dataclasses.dataclass(frozen=True)
class BoundaryText:
    """One text to learn from: keys [L, C] of the first sparse layer, and labels [L - 2w + 1]."""

    keys: torch.Tensor
    labels: torch.Tensor


@dataclasses.dataclass(frozen=True)
class PredictorMetrics:
    """How well a predictor tells boundaries on text that it did not see. cosine_auc: the closed form's, as a peer."""

    layer: int | None  # whose keys it was trained on
    parameters: int
    multiply_adds_per_token: int
    gaps: int
    positives: float  # share of the gaps that are boundaries
    loss_before: float
    loss: float
    auc: float  # area under the ROC curve; 0.5 is chance
    cosine_auc: float
    precision: float | None  # at the paper's threshold; None: nothing is above it
    recall: float | None


def train_predictor(
    texts: Sequence[BoundaryText],
    kv_heads: int,
    head_dim: int,
    *,
    layer: int | None = None,
    steps: int = 600,
    gaps_per_step: int = 512,
    learning_rate: float = 1e-4,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> BoundaryPredictor:
    """A predictor trained on `texts` by Adam; one seed, one result on one machine.

    layer: whose keys the texts have. on_step: told (done, all).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = BoundaryPredictor(kv_heads, head_dim, layer)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=learning_rate)
    windows = [text.keys.unfold(0, 2 * BOUNDARY_WINDOW, 1).transpose(1, 2) for text in texts]  # views
    for step in range(steps):
        chosen = int(torch.randint(len(texts), (1,), generator=generator))
        gaps = torch.randint(len(texts[chosen].labels), (gaps_per_step,), generator=generator)
        optimizer.zero_grad()
        loss = focal_loss(predictor(windows[chosen][gaps]), texts[chosen].labels[gaps])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, steps)
    return predictor.eval().requires_grad_(False)


def measure_predictor(predictor: BoundaryPredictor, texts: Sequence[BoundaryText]) -> PredictorMetrics:
    """The predictor on texts that it was not trained on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = BoundaryPredictor(predictor.kv_heads, predictor.head_dim)
    labels = torch.cat([text.labels for text in texts])
    with torch.no_grad():
        logits, begun = (torch.cat([one.of_text(text.keys) for text in texts]) for one in (predictor, untrained))
    cosine = torch.cat([_cosine_scores(text.keys) for text in texts])
    said = logits > BOUNDARY_LOGIT
    right = float((said & (labels > 0)).sum())
    return PredictorMetrics(
        layer=predictor.layer,
        parameters=predictor.parameters_count,
        multiply_adds_per_token=predictor.multiply_adds_per_token,
        gaps=len(labels),
        positives=float(labels.mean()),
        loss_before=float(focal_loss(begun, labels)),
        loss=float(focal_loss(logits, labels)),
        auc=area_under_roc(logits, labels),
        cosine_auc=area_under_roc(cosine, labels),
        precision=right / float(said.sum()) if said.any() else None,
        recall=right / float(labels.sum()) if labels.any() else None,
    )


def area_under_roc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Chance that a positive scores above a negative, ties half; 0.5 where one of the kinds is not there."""
    positives, negatives = float(labels.sum()), float((1 - labels).sum())
    if positives == 0 or negatives == 0:
        return 0.5
    _, group, count = torch.unique(scores.double(), return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    rank = count.cumsum(0).double() - (count - 1) / 2  # the mean rank of equal scores, from 1
    sum_of_ranks = float(rank[group][labels > 0].sum())
    return (sum_of_ranks - positives * (positives + 1) / 2) / (positives * negatives)


def _cosine_scores(keys: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the mean keys on either side, for the gaps that the predictor judges: [L - 2w + 1]."""
    windows = keys.unfold(0, 2 * BOUNDARY_WINDOW, 1)  # [gaps, C, 2w]
    left, right = windows[..., :BOUNDARY_WINDOW].mean(dim=2), windows[..., BOUNDARY_WINDOW:].mean(dim=2)
    return 1.0 - functional.cosine_similarity(left, right, dim=1)
