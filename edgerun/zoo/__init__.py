"""The small trained models that ship with the package: one folder each, in Hugging Face format, with a card."""

from __future__ import annotations

import pathlib

_FOLDER = pathlib.Path(__file__).resolve().parent


def zoo_model_names() -> tuple[str, ...]:
    """Names that `zoo_model_path` knows, sorted."""
    return tuple(sorted(config.parent.name for config in _FOLDER.glob("*/config.json")))


def zoo_model_path(name: str) -> pathlib.Path:
    """Folder of a shipped model: config.json, model.safetensors, tokenizer.json and README.md (its card).

    Raises ValueError for a name that is not in `zoo_model_names()`.
    """
    names = zoo_model_names()
    if name not in names:
        raise ValueError(f"no zoo model is named {name!r}; there is {', '.join(names) or 'none'}: pass one of those")
    return _FOLDER / name
