"""The paper's own algorithm (arXiv 2510.24606 v1) as a layer of a whole model, to be measured beside ours.

edgerun/ops/dhsa_attention_paper.py has its steps; here they run call by call. Its cuts depend on the whole prompt, so
a prompt must come in one call. A generated token selects as a tile of its own, and all generated tokens are one more
chunk, as the paper has it.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from edgerun.errors import EdgerunError
from edgerun.ops.dhsa_attention_paper import PaperOptions, paper_boundaries, paper_scores, paper_tokens
from edgerun.selectors.interface import Call, products
from edgerun.selectors.pooled import BoundaryLogits, require_layer


@dataclasses.dataclass(frozen=True)
class PaperAttention:
    """Selects and attends for one call; `options.scale`, budget and window are the layer's, the rest the paper's."""

    options: PaperOptions
    logits: BoundaryLogits

    def __call__(self, call: Call, values: torch.Tensor) -> tuple[torch.Tensor, int]:
        """values [Hkv, n, D] -> output [1, S, Hq, D] and how many pairs of query and key were attended a KV head."""
        heads, group, tokens, width = call.query.shape
        query = call.query.flatten(0, 1)[None]  # [1, Hq, S, D]
        picked = self.tokens(call, query)
        out = torch.empty(heads, group, tokens, width)
        pairs = 0
        for (first, last), columns in picked:
            rows = torch.arange(call.input_pos + first, call.input_pos + last)
            visible = columns <= rows[:, None]
            logits = products(call.options.scale * call.query[:, :, first:last], call.keys[:, columns])
            if call.options.softcap > 0:
                logits = call.options.softcap * torch.tanh(logits / call.options.softcap)
            weights = logits.masked_fill(~visible, -math.inf).softmax(dim=-1)
            out[:, :, first:last] = weights @ values[:, None, columns]
            pairs += int(visible.sum())
        return out.flatten(0, 1).transpose(0, 1)[None].contiguous(), pairs

    def tokens(self, call: Call, query: torch.Tensor) -> list[tuple[tuple[int, int], torch.Tensor]]:
        """Rows [first, last) of the call and the key tokens that they attend, tile by tile."""
        stored, tokens = call.stored, query.shape[2]
        options = dataclasses.replace(self.options, scale=call.options.scale)
        if call.options.budget == 0:
            return [((0, tokens), torch.arange(stored))]
        starts = self.starts(call, options)
        scores = paper_scores(query, call.keys[None], starts, options)  # [tiles, n]
        found = []
        for tile, first in enumerate(range(0, tokens, options.tile)):
            last = min(first + options.tile, tokens)
            begin, end = call.input_pos + first, call.input_pos + last
            found.append(((first, last), paper_tokens(scores[tile], begin, end, options)))
        return found

    def starts(self, call: Call, options: PaperOptions) -> list[int]:
        """Chunk starts, found by the first layer in the last call of several tokens, and shared by the others."""
        known = call.shared.get("paper_starts")
        if call.query.shape[2] > 1 and (known is None or known[0] == call.layer):
            require_layer(self.logits, call)
            known = (call.layer, paper_boundaries(self.logits(call.keys), options), call.stored)
            call.shared["paper_starts"] = known
        if known is None:
            raise EdgerunError("the paper's mode cuts a prompt in its prefill: give it PREFILL too, not DECODE alone")
        _, starts, prompt = known
        return [*starts, prompt] if call.stored > prompt else starts
