"""Text that is on every machine with Python: the standard library's sources, and the part zoo:text never trained on.

One file in twenty, chosen by the hash of its last two path parts, is held out: the same split wherever Python lives.
bench/train_zoo_text.py reads the other side. The sources change with Python's version, so a text's hash is its name.
"""

from __future__ import annotations

import hashlib
import pathlib
import sysconfig

_SKIPPED = frozenset({"site-packages", "test", "tests", "idle_test", "lib2to3"})


def library_sources() -> list[pathlib.Path]:
    """Sources of this Python's standard library, sorted."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in library.rglob("*.py") if not _SKIPPED & set(p.relative_to(library).parts))


def is_held_out(path: pathlib.Path) -> bool:
    """Whether a file is one of the twentieth that is kept from training."""
    return hashlib.sha256("/".join(path.parts[-2:]).encode()).digest()[0] % 20 == 0


def held_out_sources() -> list[pathlib.Path]:
    """The held-out sources of this Python's standard library that every build of it has, sorted."""
    return [path for path in library_sources() if is_held_out(path) and not path.name.startswith("_sysconfigdata")]
