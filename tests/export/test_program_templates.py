"""Programs that are written from another's file, against what lowering itself writes for them."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgerun.export.lower import executorch, program_templates
from edgerun.export.lower.program_templates import ProgramTemplates
from edgerun.techniques.weight_quantization import quantize_linears

METHODS = {"edgerun_build": "0123456789abcdef" * 4}  # a SHA-256, like the names of weights


class Mixed(nn.Module):
    """Weights of every kind: of partitions and outside them, whole and in slices, in another order in the file."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(64, 96), nn.Linear(96, 64, bias=False), nn.LayerNorm(64)
        self.filters, self.table = nn.Conv2d(4, 8, 3, padding=1), nn.Embedding(50, 64)
        self.modulation, self.small = nn.Parameter(torch.randn(3, 64)), nn.Parameter(torch.full((1,), 0.5))
        self.register_buffer("index", torch.tensor([2, 0, 1]), persistent=False)
        self.scale = scale

    def forward(
        self, x: torch.Tensor, picture: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.relu(self.up(self.norm(x) + self.table(tokens)))
        y = self.down(hidden) * self.modulation[0] + self.modulation[self.index][1]
        return y * self.scale * self.small, self.filters(picture)


def exported(module: nn.Module) -> torch.export.ExportedProgram:
    arguments = (torch.randn(1, 5, 64), torch.randn(1, 4, 8, 8), torch.tensor([[1, 2, 3, 4, 5]]))
    return torch.export.export(module.eval().requires_grad_(False), arguments, strict=False)


def mixed(seed: int, *, quantize: bool = False) -> Mixed:
    torch.manual_seed(seed)
    module = Mixed()
    if quantize:
        quantize_linears(module, "int8")
    return module


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were lowered, one after another."""
    names: list[str] = []

    def counted(program: torch.export.ExportedProgram, path: pathlib.Path, methods: dict) -> executorch.LoweredProgram:
        names.append(path.stem)
        return executorch.lower(program, path, methods)

    monkeypatch.setattr(program_templates, "lower", counted)
    return names


@pytest.mark.parametrize("quantize", [False, True])
def test_files_are_those_that_lowering_writes(tmp_path: pathlib.Path, lowered: list[str], quantize: bool) -> None:
    templates = ProgramTemplates()
    for seed in range(3):
        path, alone = tmp_path / f"{seed}.pte", tmp_path / "alone.pte"
        facts = templates.lower(functools.partial(exported, mixed(seed, quantize=quantize)), path, METHODS)
        assert facts == executorch.lower(exported(mixed(seed, quantize=quantize)), alone, METHODS)
        assert path.read_bytes() == alone.read_bytes()
    assert lowered == ["0"]


def test_equal_weights_are_there_once(tmp_path: pathlib.Path, lowered: list[str]) -> None:
    templates = ProgramTemplates()
    for seed, equal in enumerate((True, True, False, False)):
        module = mixed(seed)
        module.norm.bias.data.copy_(torch.rand(64))
        module.norm.weight.data.copy_(module.norm.bias if equal else torch.rand(64))
        path, alone = tmp_path / f"{seed}.pte", tmp_path / "alone.pte"
        templates.lower(functools.partial(exported, module), path, METHODS)
        executorch.lower(exported(module), alone, METHODS)
        assert path.read_bytes() == alone.read_bytes()
    assert lowered == ["0", "2"]


@pytest.mark.parametrize("quantize", [False, True])
def test_a_module_like_another_is_not_traced(tmp_path: pathlib.Path, lowered: list[str], quantize: bool) -> None:
    templates, traced = ProgramTemplates(), []
    for seed in range(3):
        module = mixed(seed, quantize=quantize)

        def make(module: Mixed = module, seed: int = seed) -> torch.export.ExportedProgram:
            traced.append(seed)
            return exported(module)

        path, alone = tmp_path / f"{seed}.pte", tmp_path / "alone.pte"
        facts = templates.lower(make, path, METHODS, module.eval())
        assert facts == executorch.lower(exported(mixed(seed, quantize=quantize)), alone, METHODS)
        assert path.read_bytes() == alone.read_bytes()
    assert lowered == ["0"] and set(traced) == {0}


def changed_value(module: Mixed) -> None:
    module.small.add_(1.0)  # too small to be told from what else is in a file


def changed_code(module: Mixed) -> None:
    module.scale = 2.0


def changed_shape(module: Mixed) -> None:
    module.table = nn.Embedding(51, 64, _weight=torch.arange(51.0 * 64).reshape(51, 64))


def changed_index(module: Mixed) -> None:
    module.index.add_(1)


def changed_dtype(module: Mixed) -> None:
    module.modulation = nn.Parameter(module.modulation.double())


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("change", [changed_value, changed_code, changed_shape, changed_index, changed_dtype])
def test_what_differs_is_lowered_itself(
    tmp_path: pathlib.Path, lowered: list[str], change: Callable[[Mixed], None], told: bool
) -> None:
    templates, first = ProgramTemplates(), mixed(0)
    templates.lower(lambda: exported(first), tmp_path / "first.pte", METHODS, first if told else None)
    with torch.no_grad():
        one, same = mixed(1), mixed(1)
        change(one)
        change(same)
    templates.lower(lambda: exported(one), tmp_path / "other.pte", METHODS, one if told else None)
    executorch.lower(exported(same), tmp_path / "alone.pte", METHODS)
    assert lowered == ["first", "other"]
    assert (tmp_path / "other.pte").read_bytes() == (tmp_path / "alone.pte").read_bytes()


def test_a_weight_that_is_not_found_stays(
    tmp_path: pathlib.Path, lowered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is made again with its own values, and serves only who has the same."""
    own = program_templates._places

    def blind(path: pathlib.Path, random: dict, tensors: dict) -> tuple[list, set]:
        places, _ = own(path, random, tensors)
        return [place for place in places if place.tensor != "up.weight"], set()

    monkeypatch.setattr(program_templates, "_places", blind)
    templates, first, other, same = ProgramTemplates(), mixed(0), mixed(1), mixed(2)
    same.up.weight.data.copy_(first.up.weight)
    for name, module in (("first", first), ("other", other), ("same", same)):
        templates.lower(functools.partial(exported, module), tmp_path / f"{name}.pte", METHODS)
        executorch.lower(exported(module), tmp_path / "alone.pte", METHODS)
        assert (tmp_path / f"{name}.pte").read_bytes() == (tmp_path / "alone.pte").read_bytes()
    assert lowered == ["first", "first", "other"]


def test_a_file_with_what_was_computed_serves_no_other(
    tmp_path: pathlib.Path, lowered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a name that is no tensor's."""
    own = program_templates._places
    monkeypatch.setattr(program_templates, "_places", lambda *arguments: (own(*arguments)[0], {"0" * 64}))
    templates = ProgramTemplates()
    for seed in range(2):
        path, alone = tmp_path / f"{seed}.pte", tmp_path / "alone.pte"
        templates.lower(functools.partial(exported, mixed(seed)), path, METHODS)
        executorch.lower(exported(mixed(seed)), alone, METHODS)
        assert path.read_bytes() == alone.read_bytes()
    assert lowered == ["0", "0", "1"]


def test_a_name_that_is_no_tensors_is_found(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    weight, small = torch.rand(4, 8), torch.rand(4)
    path.write_bytes(weight.numpy().tobytes() + b"scale_" + b"0123456789abcdef" * 4 + small.numpy().tobytes())
    places, unknown = program_templates._places(path, {"weight": weight}, {"weight": weight, "small": small})
    assert [(place.tensor, place.offsets) for place in places] == [("weight", (0,))]
    assert unknown == {"0123456789abcdef" * 4}
