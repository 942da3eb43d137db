"""The native module, imported at the first call of an op: registering ops with torch must not need it."""

from __future__ import annotations

import importlib
from types import ModuleType

from edgerun.errors import EdgerunError


def native_module() -> ModuleType:
    """`edgerun._native`. Raises EdgerunError, with the way to build it, when it does not load."""
    try:
        return importlib.import_module("edgerun._native")
    except ImportError as error:
        raise EdgerunError(
            f"edgerun's native module does not load ({error}): build it with `pip install --no-build-isolation -e .`, "
            "then see `edgerun doctor`"
        ) from error
