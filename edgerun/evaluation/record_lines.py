"""A record of measurements as JSON lines: written as they come, read when a run goes on where another stopped."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

from edgerun.errors import EdgerunError

Item = TypeVar("Item")


def read(path: pathlib.Path, parse: Callable[[dict[str, Any]], Item], what: str) -> list[Item]:
    """The items of a file, none when it is not there. A last line cut short, as a killed run leaves it, is dropped.

    what: an item in words, for the message. Raises EdgerunError for another line that `parse` does not take.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    items = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            items.append(parse(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise EdgerunError(f"{path} line {number} is not {what} ({error}): pass another --output") from error
    return items


def append(path: pathlib.Path, item: dict[str, Any]) -> None:
    """Add one item to the file's end, complete with its line's end."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(item) + "\n")
