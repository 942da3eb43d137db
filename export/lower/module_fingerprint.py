"""What torch.export sees of a module, but for the values of its tensors: two modules with the same are one graph."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import types
from typing import Any

import torch
from torch import nn

_TENSORS = ("_parameters", "_buffers", "_modules")


class _UnknownError(Exception):
    """Of a value that might hold what the fingerprint would miss."""


def fingerprint(module: nn.Module) -> str | None:
    """SHA-256 of the classes, attributes and hooks of `module` and all in it, and of its tensors' names, dtypes, shapes
    and strides. None: it has an attribute that may decide what its code does and cannot be told by its text.
    """
    try:
        modules = module.named_modules(remove_duplicate=False)
        parts = [text for name, one in modules for text in (name, *_module_text(one))]
    except (_UnknownError, RecursionError):
        return None
    names = [
        f"{kind} {name} {type(tensor).__name__} {tensor.dtype} {tensor.device} {tuple(tensor.shape)} {tensor.stride()}"
        for kind, tensors in (
            ("parameter", module.named_parameters(remove_duplicate=False)),
            ("buffer", module.named_buffers(remove_duplicate=False)),
        )
        for name, tensor in tensors
    ]
    return hashlib.sha256("\n".join((*parts, *names)).encode()).hexdigest()


def _module_text(module: nn.Module) -> list[str]:
    own = {name: value for name, value in vars(module).items() if name not in _TENSORS}
    kept = [name for name, buffer in module.named_buffers(recurse=False) if buffer is not None]
    empty = [f"{kind} {name}" for kind in _TENSORS for name, value in vars(module)[kind].items() if value is None]
    text = [f"{name}={_text(value)}" for name, value in sorted(own.items())]
    return [_text(type(module)), *text, *kept, *empty]


def _text(value: Any) -> str:
    """A text that two values share only where a module's code cannot tell them apart. Raises _UnknownError."""
    plain = (bool, int, float, complex, str, bytes, types.NoneType, torch.dtype, torch.device, torch.layout, range)
    if isinstance(value, plain) and type(value) in plain:
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, enum.Enum):
        return f"{_text(type(value))}.{value.name}"
    if isinstance(value, type) or (isinstance(value, types.FunctionType) and not _has_own_values(value)):
        if "<" in value.__qualname__:  # <lambda>, or made in another function, which may make another of the name
            raise _UnknownError(value)
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType | types.NoneType):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{_text(type(value))}({_text(fields | getattr(value, '__dict__', {}))})"
    if isinstance(value, tuple | list):
        return f"{_text(type(value))}({', '.join(map(_text, value))})"
    if isinstance(value, set | frozenset):
        return f"{_text(type(value))}({', '.join(sorted(map(_text, value)))})"
    if isinstance(value, dict):
        return f"{_text(type(value))}({', '.join(f'{_text(key)}: {_text(one)}' for key, one in value.items())})"
    raise _UnknownError(type(value))


def _has_own_values(function: types.FunctionType) -> bool:
    """Beside its code."""
    return bool(function.__closure__ or function.__defaults__ or function.__kwdefaults__)
