"""Chains of small programs for the tests of the block loader, exported as every bundle's programs are."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from edgerun.export.lower.executorch import lower

WIDTH = 32


@dataclasses.dataclass(frozen=True)
class Link:
    """One program of a chain: its module, and the names of what it takes and gives."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    path: pathlib.Path

    def native(self, path: pathlib.Path | None = None) -> tuple[str, str, int, list[str], list[str]]:
        """What _native.BlockLoader takes."""
        return self.name, str(path or self.path), self.path.stat().st_size, list(self.inputs), list(self.outputs)


class First(nn.Module):
    """[n, WIDTH] → two values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.linear(a)
        return x, torch.tanh(x).mean(0, keepdim=True)


class Middle(nn.Module):
    """Feed-forward of x, shifted by y."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.up(x + y)))


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.layer_norm(x, (WIDTH,)))


def export(module: nn.Module, examples: Sequence[torch.Tensor], path: pathlib.Path, dynamic: Sequence[bool]) -> None:
    """Write `module` as a program whose first dimension is free, 1 to 16, for the inputs marked `dynamic`."""
    rows = torch.export.Dim("rows", min=1, max=16)
    shapes = tuple({0: rows} if free else None for free in dynamic)
    lower(torch.export.export(module.eval(), tuple(examples), dynamic_shapes=shapes), path, {})


def small_chain(folder: pathlib.Path, middle: int = 4) -> list[Link]:
    """first: a → x, y; middle_i: x, y → x; last: x → v."""
    torch.manual_seed(0)
    links = []
    x, y = torch.randn(8, WIDTH), torch.randn(1, WIDTH)
    modules: list[tuple[str, nn.Module, tuple[str, ...], tuple[str, ...]]] = [
        ("first", First(), ("a",), ("x", "y")),
        *((f"middle_{i}", Middle(64 * (i + 1)), ("x", "y"), ("x",)) for i in range(middle)),
        ("last", Last(), ("x",), ("v",)),
    ]
    for name, module, inputs, outputs in modules:
        module.requires_grad_(False)
        examples = (x, y) if len(inputs) == 2 else (x,)
        export(module, examples, folder / f"{name}.pte", [True, False][: len(inputs)])
        links.append(Link(name, module, inputs, outputs, folder / f"{name}.pte"))
    return links


def run_eager(links: Sequence[Link], values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the chain leaves in its table."""
    table = dict(values)
    with torch.inference_mode():
        for link in links:
            given = link.module(*(table[name] for name in link.inputs))
            table.update(zip(link.outputs, given if isinstance(given, tuple) else (given,), strict=True))
    return table


class Wide(nn.Module):
    """A program that is nearly all weights: `megabytes` of them."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        hidden = megabytes * (1 << 20) // (2 * 4 * 1024)
        self.up, self.down = nn.Linear(1024, hidden, bias=False), nn.Linear(hidden, 1024, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.tanh(self.down(torch.tanh(self.up(x))))
