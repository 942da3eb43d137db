"""Text that a user gives as files, read the same way by everything that measures on it."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from edgerun.errors import EdgerunError


def read_texts(paths: Sequence[pathlib.Path]) -> list[str]:
    """The files' text. Raises EdgerunError for one that cannot be read or is not UTF-8."""
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise EdgerunError(f"{path} cannot be read ({error.strerror}): pass text files to --text") from error
        except UnicodeDecodeError as error:
            raise EdgerunError(f"{path} is not UTF-8 at byte {error.start}: pass text files to --text") from error
    return texts
