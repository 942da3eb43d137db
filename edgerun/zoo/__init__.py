"""The small trained models that ship with the package: one folder each with a card, in the layout of its kind."""

from __future__ import annotations

import pathlib

_FOLDER = pathlib.Path(__file__).resolve().parent
_KINDS = ("config.json", "video.json")


def zoo_model_names() -> tuple[str, ...]:
    """Names that `zoo_model_path` knows, sorted."""
    return tuple(sorted(path.parent.name for kind in _KINDS for path in _FOLDER.glob(f"*/{kind}")))


def zoo_model_path(name: str) -> pathlib.Path:
    """Folder of a shipped model, README.md is its card.

    A text model's is in Hugging Face format: config.json, model.safetensors, tokenizer.json. A video model's has
    denoiser/, vae/, text_encoder/ and video.json.

    Raises ValueError for a name that is not in `zoo_model_names()`.
    """
    names = zoo_model_names()
    if name not in names:
        raise ValueError(f"no zoo model is named {name!r}; there is {', '.join(names) or 'none'}: pass one of those")
    return _FOLDER / name
