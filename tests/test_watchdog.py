"""The guard against tests that hang, shown on tests that hang on purpose."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests import conftest, watchdog

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFTEST = """
from tests import watchdog
from tests.watchdog import pytest_runtest_protocol
watchdog.SECONDS, watchdog.SLOW_SECONDS = {seconds}, {slow_seconds}
"""
IN_A_FIXTURE = """
import threading, pytest
@pytest.fixture
def never():
    threading.Event().wait()
def test_hangs(never):
    pass
"""
IN_NATIVE_CODE = """
import ctypes, pytest
@pytest.mark.slow
def test_hangs():
    ctypes.PyDLL(None).sleep(3600)  # holds the interpreter's lock
"""


@pytest.mark.parametrize(
    ("body", "seconds", "slow_seconds", "stood"),
    [(IN_A_FIXTURE, 0.5, 3600, "line 5 in never"), (IN_NATIVE_CODE, 3600, 0.5, "line 5 in test_hangs")],
    ids=["in a fixture", "a slow test in native code"],
)
def test_a_test_that_hangs_is_ended(
    body: str, seconds: float, slow_seconds: float, stood: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.format(seconds=seconds, slow_seconds=slow_seconds))
    (tmp_path / "test_hanging.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "passed" not in done.stdout
    assert done.stderr.startswith("Timeout (0:00:00.500000)!") and f'test_hanging.py", {stood}' in done.stderr


def test_every_test_is_guarded() -> None:
    assert conftest.pytest_runtest_protocol is watchdog.pytest_runtest_protocol
