"""A chain whose loading thread is ended from outside: one line or none, no hang, and the same bits again."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from tests.runtime.chains import Link, small_chain
from tests.runtime.loader_thread import TIMEOUT_SECONDS, run_script

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are found in /proc, and glibc unwinds them")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Link]:
    return small_chain(tmp_path_factory.mktemp("chain"))


def arguments(chain: list[Link]) -> str:
    """With room for the two largest blocks: at most the small first one stays, the others stream."""
    budget = int(2.5 * max(link.path.stat().st_size for link in chain)) + 200_000
    return json.dumps([[link.native() for link in chain], budget])


PRELUDE = """
import ctypes, json, os, pathlib, signal, sys, threading, time
import numpy as np
from edgerun import _native
from edgerun.errors import EdgerunError

process, (programs, budget) = ctypes.CDLL(None), json.loads(sys.argv[1])
loader = _native.BlockLoader(programs, 1, budget)
a = np.random.default_rng(0).standard_normal((5, 32), np.float32)

def run():
    loader.set("a", a)
    loader.run(True)
    return b"".join(loader.get(name).tobytes() for name in ("x", "y", "v"))

def threads():
    found = []
    for task in pathlib.Path("/proc/self/task").iterdir():
        try:
            found += [int(task.name)] if (task / "comm").read_text() == "edgerun-loader\\n" else []
        except OSError:
            pass
    return found

def descriptors():
    loader.clear()
    return len(os.listdir("/proc/self/fd"))

run()
expected = run()
assert loader.passes()[-1]["resident_blocks"] <= 1 and loader.passes()[-1]["prefetch"] == 1
"""

# Where a thread ends after its turn, for the next one, that one finds it.
ENDED_IN_A_LOAD = (
    PRELUDE
    + """
process.end_loader_at(0, 0)
run()
calls, loads, before, said = process.loader_calls(), loader.passes()[-1]["loads"], descriptors(), []
for place in range(1, calls + 1, max(calls // 200, 1)):
    process.end_loader_at(place, 0)
    for _ in range(4):
        ended = not process.loader_is_to_end()
        try:
            assert run() == expected, place
        except EdgerunError as error:
            said.append(str(error))
            break
        if ended:
            break
    assert not process.loader_is_to_end(), place
    process.end_loader_at(0, 0)
    assert run() == expected, place
print(json.dumps([calls, loads, said, descriptors() - before, len(threads())]))
"""
)


def test_a_thread_that_is_ended_at_any_place_of_a_load(chain: list[Link], tmp_path: pathlib.Path) -> None:
    done = run_script(ENDED_IN_A_LOAD, tmp_path, arguments(chain))
    assert (done.returncode, done.stderr) == (0, "")
    calls, loads, said, more_descriptors, threads = json.loads(done.stdout)
    assert calls > 100 and len(said) > 100
    allowed = {f"the thread that loads ahead ended while it loaded block '{link.name}': run again" for link in chain}
    assert set(said) <= allowed and len(set(said)) > 2
    # One place of a load loses its file: between the opening, and the making of the object that closes it.
    assert more_descriptors <= loads + 1 and threads == 1


ENDED_BY_A_SIGNAL = (
    PRELUDE
    + """
def end(after_ms):
    time.sleep(after_ms / 1e3)
    for thread in threads():
        ended.add(thread)
        process.tgkill(os.getpid(), thread, signal.SIGUSR1)

process.signal(signal.SIGUSR1, ctypes.cast(process.pthread_exit, ctypes.c_void_p))
before, ended, said, random = descriptors(), set(), [], np.random.default_rng(0)
for turn in range(100):
    assert run() == expected, turn
    if turn % 4 == 0:
        end(5)  # long after it had something to load
    other = threading.Thread(target=end, args=(3 * random.random(),))
    other.start()
    for _ in range(3):
        try:
            assert run() == expected, turn
        except EdgerunError as error:
            said.append(str(error))
    other.join()
    try:
        assert run() == expected, turn
    except EdgerunError as error:
        said.append(str(error))
print(json.dumps([len(ended), said, descriptors() - before]))
"""
)


def test_a_thread_that_a_signal_ends_at_any_time(chain: list[Link]) -> None:
    command = [sys.executable, "-c", ENDED_BY_A_SIGNAL, arguments(chain)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    ended, said, more_descriptors = json.loads(done.stdout)
    assert ended > 50 and len(said) <= ended and more_descriptors == 0
    assert set(said) == {"the thread that loads ahead was ended from outside: run again"}
