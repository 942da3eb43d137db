"""Frozen dataclasses as plain JSON values and back, by their type hints: what a report's file holds.

A value is taken only as the type that its field names, so that a damaged report is refused where it is damaged.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any


def plain(value: Any) -> Any:
    """A dataclass, tuple, dict or plain value as JSON has them; a number that is not finite as None."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no such number; what is not finite was not measured
    return value


def decode(kind: Any, value: Any) -> Any:
    """`value` of plain JSON as `kind`: a dataclass, tuple, dict, union or plain type. Raises TypeError, ValueError."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise TypeError(f"{kind.__name__} is {value!r}, not an object")
        hints = typing.get_type_hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise TypeError(f"{kind.__name__} has no field {unknown[0]!r}")
        return kind(**{name: decode(hints[name], item) for name, item in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{value!r} is not a list")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(decode(arguments[0], item) for item in value)
        return tuple(decode(item_kind, item) for item_kind, item in zip(arguments, value, strict=True))
    if origin is dict:
        return {key: decode(arguments[1], item) for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            if isinstance(value, dict) and dataclasses.is_dataclass(option):
                return decode(option, value)
            if isinstance(option, type) and type(value) is option:
                return value
        return decode(float, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
