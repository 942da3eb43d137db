"""What one layer attends exactly, and what a selector chooses there: the data of a picture."""

from __future__ import annotations

import dataclasses

import torch

from edgerun.errors import EdgerunError
from edgerun.evaluation import fidelity
from edgerun.evaluation.answers import Contender, Job
from edgerun.evaluation.selector_fidelity import loaded, prompt_and_answer
from edgerun.ops.dhsa_attention import Lists
from edgerun.selectors import attention, registry
from edgerun.selectors.attention import Engine
from edgerun.selectors.estimates import exact_mass
from edgerun.selectors.interface import BlockSelector, Call, everything


@dataclasses.dataclass(frozen=True)
class Seen:
    """One KV head's exact attention and a selector's choice over one prompt.

    attention: float32 [groups, blocks], %, of a row, NaN where no row sees the block; chosen: bool of the same shape.
    """

    layer: int
    head: int
    tile: int
    attention: torch.Tensor
    chosen: torch.Tensor


class _Sketch(BlockSelector):
    """Attends everything and keeps one layer's attention and choice."""

    def __init__(self, selector: BlockSelector, layer: int) -> None:
        self.selector, self.layer = selector, layer
        self.seen: tuple[Call, torch.Tensor, Lists] | None = None

    def lists(self, call: Call) -> Lists:
        if call.layer == self.layer and self.seen is None:
            self.seen = (call, exact_mass(call), self.selector.lists(call))
        return everything(call)


def attention_and_choice(contender: Contender, job: Job, name: str, budget: int, depth: float) -> Seen:
    """What a selector chooses near a depth of the model (0 first layer, 1 last), in its sharpest KV head.

    Raises EdgerunError for a selector that lists tokens, as the paper's mode does.
    """
    answerer, _ = loaded(contender)
    assert contender.recipe is not None
    dhsa = dataclasses.replace(contender.recipe.dhsa, budget=budget)
    selector = registry.make(name, dhsa, contender.predictor).prefill
    if not isinstance(selector, BlockSelector):
        raise EdgerunError(f"{name} lists tokens, not blocks: draw another selector")
    kinds = [options.kind for options in answerer.model.options]
    sparse = [layer for layer, kind in enumerate(kinds) if kind == "dhsa"]
    sketch = _Sketch(selector, min(sparse, key=lambda layer: abs(layer - depth * (len(kinds) - 1))))
    attention.use(answerer.model, Engine(sketch, sketch), budget)
    fidelity.feed(answerer.model, answerer.encode(prompt_and_answer(job, answerer.count_tokens)[0]), 0)
    assert sketch.seen is not None, "a layer with a budget asks its selector"
    call, mass, lists = sketch.seen
    rows = torch.tensor([last - first for first, last in call.groups]) * call.query.shape[1]
    share = 100 * mass / rows[:, None]  # [Hkv, groups, blocks]
    ends = torch.tensor([end for _, _, end in call.ranges])
    concentrated = share.square().sum(dim=(1, 2))
    head = int(concentrated.argmax())
    chosen = torch.zeros_like(share[head], dtype=torch.bool)
    for group, blocks in enumerate(lists[head]):
        chosen[group, blocks] = True
    unseen = torch.arange(call.blocks) >= ends[:, None]
    return Seen(sketch.layer, head, call.options.tile, share[head].masked_fill(unseen, torch.nan), chosen)
