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
    """Chance: a ranking of its own for every list, drawn by the call's keys, so that prompts differ in it."""

    def scores(self, call: Call) -> torch.Tensor:
        rng = random.Random(f"{call.layer}/{call.input_pos}/{call.stored}/{float(call.keys.sum()):.6g}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        return torch.rand(call.query.shape[0], len(call.groups), call.blocks, generator=generator)
