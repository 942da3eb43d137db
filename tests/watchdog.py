"""No test hangs for ever: one that takes far too long is ended with its process, and its threads say where they stood.

The clock is a thread of C: it also ends a test that sits in native code and holds the interpreter's lock. Of several
workers another takes the place of the one that ended, and the test has failed; without workers the whole run ends.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator

import pytest

# For a test with its fixtures. On two busy cores the bundle that many tests share took two minutes.
SECONDS, SLOW_SECONDS = 900.0, 7200.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    seconds = SLOW_SECONDS if item.get_closest_marker("slow") else SECONDS
    stderr = os.dup(2)  # what pytest captures later is lost when the process ends
    faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.close(stderr)
