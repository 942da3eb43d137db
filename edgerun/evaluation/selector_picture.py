"""What one layer attends exactly, and what a selector chooses there: the data of a picture."""

from __future__ import annotations

import dataclasses

import torch

from edgerun.errors import EdgerunError
from edgerun.evaluation import fidelity
from edgerun.evaluation.answers import Contender, Job
from edgerun.evaluation.selector_fidelity import loaded, pairs, prompt_and_answer
from edgerun.ops.dhsa_attention import Lists
from edgerun.selectors import attention, registry
from edgerun.selectors.attention import Engine
from edgerun.selectors.estimates import exact_mass
from edgerun.selectors.interface import BlockSelector, Call, everything


@dataclasses.dataclass(frozen=True)
class Seen:
    """One KV head's exact attention and a selector's choice over one prompt, and the choice's density in all of them.

    attention: float32 [groups, blocks], %, of a row, NaN where no row sees the block; chosen: bool of the same shape.
    layers: the sparse ones; densities: by these and KV head, attended of all causal pairs.
    """

    layer: int
    head: int
    tile: int
    attention: torch.Tensor
    chosen: torch.Tensor
    layers: tuple[int, ...]
    densities: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class _LayerSeen:
    """A layer's attention and choice. share: float32 [Hkv, groups, blocks], % of a row; ends: blocks of each group."""

    share: torch.Tensor
    lists: Lists
    ends: torch.Tensor
    far: torch.Tensor  # [Hkv]: share beyond sink and local blocks, mean over groups
    densities: tuple[float, ...]


class _Sketch(BlockSelector):
    """Attends everything and keeps every layer's attention and choice over the prompt, which is one call."""

    def __init__(self, selector: BlockSelector) -> None:
        self.selector = selector
        self.layers: dict[int, _LayerSeen] = {}

    def lists(self, call: Call) -> Lists:
        if call.layer not in self.layers:
            mass, lists = exact_mass(call), self.selector.lists(call)
            rows = torch.tensor([last - first for first, last in call.groups]) * call.query.shape[1]
            share = 100 * mass / rows[:, None]
            ends = torch.tensor([end for _, _, end in call.ranges])
            far = share.masked_fill(~call.candidates, 0.0).sum(dim=2).mean(dim=1)
            counted = [pairs([mine], call) for mine in lists]
            densities = tuple(attended / causal for attended, causal in counted)
            self.layers[call.layer] = _LayerSeen(share, lists, ends, far, densities)
        return everything(call)


def attention_and_choice(contender: Contender, job: Job, name: str, budget: int) -> Seen:
    """What a selector chooses in the KV head that looks farthest: with the most attention beyond sink and local blocks.

    Raises EdgerunError for a selector that lists tokens, as the paper's mode does.
    """
    answerer, _ = loaded(contender)
    assert contender.recipe is not None
    dhsa = dataclasses.replace(contender.recipe.dhsa, budget=budget)
    selector = registry.make(name, dhsa, contender.predictor).prefill
    if not isinstance(selector, BlockSelector):
        raise EdgerunError(f"{name} lists tokens, not blocks: draw another selector")
    sketch = _Sketch(selector)
    attention.use(answerer.model, Engine(sketch, sketch), budget)
    fidelity.feed(answerer.model, answerer.encode(prompt_and_answer(job, answerer.count_tokens)[0]), 0)
    layer = max(sketch.layers, key=lambda each: float(sketch.layers[each].far.max()))
    seen = sketch.layers[layer]
    head = int(seen.far.argmax())
    chosen = torch.zeros_like(seen.share[head], dtype=torch.bool)
    for group, blocks in enumerate(seen.lists[head]):
        chosen[group, blocks] = True
    unseen = torch.arange(seen.share.shape[2]) >= seen.ends[:, None]
    tile = contender.recipe.dhsa.tile
    layers = tuple(sorted(sketch.layers))
    densities = tuple(sketch.layers[each].densities for each in layers)
    return Seen(layer, head, tile, seen.share[head].masked_fill(unseen, torch.nan), chosen, layers, densities)
