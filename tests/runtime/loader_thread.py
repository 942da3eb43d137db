"""A process in which the block loader's thread can be ended at any place of a load (end_loader.cpp)."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SOURCE = _ROOT / "tests/runtime/end_loader.cpp"
TIMEOUT_SECONDS = 120  # what takes longer hangs


def run_script(script: str, folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that calls `ctypes.CDLL(None).end_loader_at`. folder: for what is compiled."""
    library = folder / "end_loader.so"
    if not library.exists():
        subprocess.run(["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-o", library, _SOURCE], check=True)
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=_ROOT,
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
