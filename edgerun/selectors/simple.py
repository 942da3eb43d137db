"""Selectors that read neither queries nor keys: the baselines that a real one must beat."""

from __future__ import annotations

import random

import torch

from edgerun.ops.dhsa_attention import Lists
from edgerun.selectors.interface import BlockSelector, Call, RankedSelector, everything


class Dense(BlockSelector):
    """Everything, whatever the budget."""

    def lists(self, call: Call) -> Lists:
        return everything(call)


class Recent(RankedSelector):
    """Window and sink (StreamingLLM, arXiv 2309.17453): the most recent blocks."""

    def scores(self, call: Call) -> torch.Tensor:
        recent = torch.arange(call.blocks, dtype=torch.float32)
        return recent.expand(call.query.shape[0], len(call.groups), -1)


class Shuffled(RankedSelector):
    """The ranking of another selector, shuffled among the candidates of each list: what chance alone reaches."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, call: Call) -> torch.Tensor:
        rng = random.Random(f"shuffled/{self.seed}/{call.layer}/{call.input_pos}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        return torch.rand(call.query.shape[0], len(call.groups), call.blocks, generator=generator)
