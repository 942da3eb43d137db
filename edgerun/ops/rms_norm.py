"""edgerun::rms_norm: each row divided by its root mean square, times one weight a column.

    out[..., d] = x[..., d] / sqrt(mean_d(x[..., d]^2) + eps) * weight[d]

Schema, fake, CPU implementation, reference and decomposition. csrc/ops/rms_norm/rms_norm.h is the contract. The op
exists because no delegate takes the mean inside a norm: in plain operators each norm cuts a program in two.
"""

from __future__ import annotations

import torch

from edgerun.errors import EdgerunError
from edgerun.ops.native import native_module

# The numbers of Dtype in csrc/ops/rms_norm/rms_norm.h.
_DTYPES = {torch.float32: 0, torch.float16: 1}
_ARGUMENTS = "Tensor x, Tensor? weight, float eps"
_LIBRARY = torch.library.Library("edgerun", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"rms_norm({_ARGUMENTS}) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"rms_norm.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")  # type: ignore[no-untyped-call]


def normalize(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`x` [..., size] in float32 or float16, each row of `size` normalised; the result has the dtype of `x`.

    weight: float32 [size], or None for 1. eps >= 0 is added to the mean square. Sums are float32.
    Raises EdgerunError for what does not fit.
    """
    result: torch.Tensor = torch.ops.edgerun.rms_norm(x, weight, eps)
    return result


def reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The same in float64."""
    return _plain(x.to(torch.float64), weight, eps)


def decomposition(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The same in plain torch operators, for targets without custom ops."""
    return _plain(x.to(torch.float32), weight, eps).to(x.dtype)


def _plain(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    normalized = x * torch.rsqrt(torch.mean(x * x, -1, keepdim=True) + eps)
    return normalized if weight is None else normalized * weight


def _fake(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_out(x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, out: torch.Tensor) -> torch.Tensor:
    return out


def _implementation(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return _implementation_out(x, weight, eps, out=_fake(x, weight, eps))


def _implementation_out(x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, out: torch.Tensor) -> torch.Tensor:
    if x.dtype not in _DTYPES or x.dim() == 0:
        raise EdgerunError(f"x is {list(x.shape)} {x.dtype}; expected [..., size] in float32 or float16")
    size = x.shape[-1]
    if weight is not None and (weight.dtype != torch.float32 or list(weight.shape) != [size]):
        raise EdgerunError(f"the weight is {list(weight.shape)} {weight.dtype}; expected [{size}] in float32")
    if not eps >= 0.0:
        raise EdgerunError(f"eps is {eps}; it cannot be below 0")
    if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
        raise EdgerunError(f"out is {list(out.shape)} {out.dtype}; expected contiguous {list(x.shape)} in {x.dtype}")
    x = x.contiguous()
    weight = None if weight is None else weight.contiguous()
    native_module().rms_norm(
        x.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        _DTYPES[x.dtype],
        x.numel() // size if size else 0,
        size,
        eps,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


_LIBRARY.impl("rms_norm", _implementation, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("rms_norm.out", _implementation_out, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("edgerun::rms_norm", _fake, lib=_LIBRARY)
torch.library.register_fake("edgerun::rms_norm.out", _fake_out, lib=_LIBRARY)
