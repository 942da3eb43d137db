"""Keep what libraries say about themselves at import (missing GPU extensions, deprecations) from users of the verbs."""

from __future__ import annotations

import logging
import os
import warnings

_LOGGERS = ("torchao", "torch.utils._pytree", "transformers", "root")


def quiet_libraries() -> None:
    """Silence warnings of the libraries below; errors are still said. For a process that a verb owns."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it sets its logger's level when it is imported
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
