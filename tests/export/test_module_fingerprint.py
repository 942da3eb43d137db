"""What a fingerprint tells apart, what not, and where it does not commit itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgerun.export.lower.module_fingerprint import fingerprint


def block(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(approximate="tanh"), nn.LayerNorm(6), nn.Dropout(0.1)).eval()


def test_values_of_tensors_do_not_count() -> None:
    assert fingerprint(block(0)) == fingerprint(block(1)) is not None


def other_shape(module: nn.Sequential) -> None:
    module[0] = nn.Linear(4, 6, bias=False).eval()


def other_stride(module: nn.Sequential) -> None:
    module[0].weight = nn.Parameter(module[0].weight.detach().t().contiguous().t())


def other_dtype(module: nn.Sequential) -> None:
    module[2].double()


def other_attribute(module: nn.Sequential) -> None:
    module[2].eps = 1e-6


def other_text(module: nn.Sequential) -> None:
    module[1].approximate = "none"


def other_class(module: nn.Sequential) -> None:
    module[1] = nn.SiLU().eval()


def other_mode(module: nn.Sequential) -> None:
    module.train()


def more(module: nn.Sequential) -> None:
    module.append(nn.Identity().eval())


@pytest.mark.parametrize(
    "change", [other_shape, other_stride, other_dtype, other_attribute, other_text, other_class, other_mode, more]
)
def test_what_counts(change: Callable[[nn.Sequential], None]) -> None:
    changed = block(0)
    change(changed)
    assert fingerprint(changed) not in (fingerprint(block(0)), None)


def test_which_module_is_there_twice_counts() -> None:
    soft, hard = nn.Softplus().eval(), nn.ReLU().eval()
    first, second = (nn.Sequential(soft, hard, nn.Linear(2, 2), last).eval() for last in (soft, hard))
    assert fingerprint(first) != fingerprint(second)


def a_tensor(module: nn.Sequential) -> None:
    module[0].table = torch.arange(3)


def a_closure(module: nn.Sequential) -> None:
    factor = 2.0
    module[0].scaled = lambda x: factor * x


def a_hook(module: nn.Sequential) -> None:
    module[0].register_forward_hook(lambda *_: None)


def a_class_made_here(module: nn.Sequential) -> None:
    class Local:
        pass

    module[0].kind = Local


def defaults(module: nn.Sequential) -> None:
    module[0].scaled = scaled


def scaled(x: float, factor: float = 2.0) -> float:
    return factor * x


def a_method_of_data(module: nn.Sequential) -> None:
    module[0].look_up = {"a": 1}.get


def in_itself(module: nn.Sequential) -> None:
    module[0].settings = []
    module[0].settings.append(module[0].settings)


def an_object(module: nn.Sequential) -> None:
    module[0].settings = object()


@pytest.mark.parametrize(
    "change", [a_tensor, a_closure, a_hook, a_class_made_here, defaults, a_method_of_data, in_itself, an_object]
)
def test_what_it_cannot_tell(change: Callable[[nn.Sequential], None]) -> None:
    changed = block(0)
    change(changed)
    assert fingerprint(changed) is None
