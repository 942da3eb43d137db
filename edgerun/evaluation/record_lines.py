"""A record of measurements as JSON lines: written as they come, read when a run goes on where another stopped.

`read` changes nothing. A run that appends reads first, so that a file which is no record is refused before anything of
it is touched, and holds the file for itself through `writer`, so that no other run's lines are lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from edgerun.errors import EdgerunError

Item = TypeVar("Item")
Append = Callable[[dict[str, Any]], None]


def read(path: pathlib.Path, parse: Callable[[dict[str, Any]], Item], what: str) -> list[Item]:
    """The items of a file; none when it is not there. A last line cut short, as a killed run leaves it, is none either.

    what: an item in words, for the message. Raises EdgerunError for a file that is not UTF-8 or has no whole line, and
    for a line that is no JSON object or that `parse` does not take.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: _end_of_lines(content)]
    if content and not whole:
        raise EdgerunError(f"{path} has {len(content)} bytes but no whole line of a record: pass another --output")
    try:
        lines = whole.decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise EdgerunError(f"{path} is not UTF-8 at byte {error.start}, so no record: pass another --output") from None
    items = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise TypeError(f"{type(values).__name__} where an object should be")
            items.append(parse(values))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise EdgerunError(f"{path} line {number} is not {what} ({error}): pass another --output") from error
    return items


@contextlib.contextmanager
def writer(path: pathlib.Path | None) -> Iterator[Append]:
    """Hold a record for one run; gives what appends an item to it as a whole line. None: what is appended is not kept.

    `read` the file before the first item is appended: that is when a last line cut short is dropped. A file that was
    not there and got no line is not left behind. Raises EdgerunError when another run holds the record, OSError when it
    cannot be written.
    """
    if path is None:
        yield lambda item: None
        return
    is_new = not path.exists()
    with _held(path) as file:
        started = False

        def append(item: dict[str, Any]) -> None:
            nonlocal started
            if not started:
                os.truncate(file.fileno(), _end_of_lines(path.read_bytes()))
                started = True
            file.write(json.dumps(item).encode() + b"\n")
            file.flush()

        try:
            yield append
        finally:
            if is_new and os.fstat(file.fileno()).st_size == 0:
                path.unlink(missing_ok=True)


def _end_of_lines(content: bytes) -> int:
    """Bytes up to and with the last line's end."""
    return content.rfind(b"\n") + 1


def _held(path: pathlib.Path) -> BinaryIO:
    """The file at its end, locked until it is closed."""
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise EdgerunError(
                f"{path} is being written by another run: wait for its end, or pass another --output"
            ) from None
        except BaseException:
            file.close()
            raise
        file.close()  # another run removed it, empty, between our opening and our lock
