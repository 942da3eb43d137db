"""Rotary embeddings whose frequencies depend on the length of a call, frozen for one context length.

transformers picks the frequencies of "longrope" and "dynamic" from the largest position of each call, so a prompt fed
in slices differs from the same prompt fed at once. A bundle has one context length, and takes the frequencies that
transformers would use at that length, for every call.
"""

from __future__ import annotations

from typing import Any

import torch

_LENGTH_DEPENDENT = ("longrope", "dynamic")


def depends_on_length(rope_type: str) -> bool:
    """Whether transformers computes this rope type's frequencies from the length of a call."""
    return any(kind in rope_type for kind in _LENGTH_DEPENDENT)


def rope_types(config: Any) -> list[str]:
    """The rope types that a transformers configuration asks for, sorted; empty when it has no rotary embedding."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return sorted({str(one.get("rope_type", "default")) for one in nested or [parameters]} if parameters else set())


def freeze_rotary(model: torch.nn.Module, max_context: int) -> bool:
    """Freeze every length-dependent rotary embedding of a transformers `model` at `max_context` tokens, in place.

    Works on any transformers decoder, also one on the meta device. Returns whether anything was frozen.
    """
    frozen = False
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and depends_on_length(kinds):
            _freeze(module, kinds, None, max_context)
            module.rope_type = "default"  # type: ignore[assignment]
            frozen = True
        elif isinstance(kinds, dict):
            for layer_type, kind in list(kinds.items()):
                if depends_on_length(kind):
                    _freeze(module, kind, layer_type, max_context)
                    kinds[layer_type] = "default"
                    frozen = True
    return frozen


def _freeze(module: Any, kind: str, layer_type: str | None, max_context: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    initialise = ROPE_INIT_FUNCTIONS[kind]
    if layer_type is None:
        frequencies, scaling = initialise(module.config, device="cpu", seq_len=max_context)
        prefix = ""
    else:
        frequencies, scaling = initialise(module.config, device="cpu", seq_len=max_context, layer_type=layer_type)
        prefix = f"{layer_type}_"
    setattr(module, f"{prefix}inv_freq", frequencies)
    setattr(module, f"{prefix}original_inv_freq", frequencies.clone())
    setattr(module, f"{prefix}attention_scaling", float(scaling))
