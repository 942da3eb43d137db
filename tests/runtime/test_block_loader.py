"""The block loader on real programs: the same answer whatever is in memory when, and never more than the budget.

The order of loads, the ends of a pass and the threads are tested with made-up blocks in block_schedule_test.cpp.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from edgerun import _native, compare
from edgerun.errors import BundleError, EdgerunError
from edgerun.export.lower.executorch import lower
from tests.runtime.chains import Link, Wide, run_eager, small_chain
from tests.runtime.chains import export as export_link

WATCHDOG_SECONDS = 60
WIDE_BLOCKS, WIDE_MEGABYTES = 12, 8


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Link]:
    return small_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """Twelve programs of 8 MB: copies of one, each a file of its own."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    export_link(Wide(WIDE_MEGABYTES).requires_grad_(False), [torch.randn(4, 1024)], folder / "block_0.pte", [False])
    paths = [folder / f"block_{i}.pte" for i in range(WIDE_BLOCKS)]
    for path in paths[1:]:
        shutil.copy(paths[0], path)
    return paths


def loader(links: list[Link], prefetch: int = 1, budget_bytes: int | None = None) -> _native.BlockLoader:
    return _native.BlockLoader([link.native() for link in links], prefetch, budget_bytes)


def largest(links: list[Link]) -> int:
    return max(link.path.stat().st_size for link in links)


def assert_close(measured: np.ndarray, expected: np.ndarray) -> None:
    """Half a dozen small layers in float32: as a model's logits."""
    assert compare.relative_l2(measured, expected) <= compare.tolerance("logits_fp32")


def watched(call: Callable[[], object]) -> None:
    """Run `call` in a thread; a hang is a failure, what it raises is raised here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WATCHDOG_SECONDS)
    assert not thread.is_alive(), "the call hangs"
    if raised:
        raise raised[0]


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
@pytest.mark.parametrize("blocks_of_budget", [2.5, 4, 6, None])
def test_same_answer_as_one_program_after_another(
    chain: list[Link], prefetch: int, blocks_of_budget: float | None
) -> None:
    budget = None if blocks_of_budget is None else int(blocks_of_budget * largest(chain)) + 200_000
    native = loader(chain, prefetch, budget)
    for turn in range(4):
        a = torch.randn(3 + turn, 32, generator=torch.Generator().manual_seed(turn))
        native.set("a", a.numpy())
        watched(lambda turn=turn: native.run(turn < 3))
        expected = run_eager(chain, {"a": a})
        for name in ("x", "y", "v"):
            assert native.get(name).shape == tuple(expected[name].shape)
            assert_close(native.get(name), expected[name].numpy())
    assert native.used_bytes == 0
    if budget is not None:
        assert max(one["peak_bytes"] for one in native.passes()) <= budget


def test_the_first_streamed_block_of_the_next_pass_is_loaded_between_passes(wide: list[pathlib.Path]) -> None:
    native = _native.BlockLoader([(p.stem, str(p), -1, ["x"], ["x"]) for p in wide[:5]], 1, 45 << 20)
    native.set("x", np.ones((4, 1024), np.float32))
    for _ in range(3):
        native.run(True)
    passes = native.passes()
    assert [one["measuring"] for one in passes] == [True, False, False]
    resident = passes[2]["resident_blocks"]
    assert 1 <= resident < 4
    # Each block's cost was measured by itself: they are alike, not equal.
    expected = sum(one["loaded_bytes"] for one in native.blocks()[: resident + 1])
    deadline = time.monotonic() + WATCHDOG_SECONDS
    while native.used_bytes != expected:
        assert time.monotonic() < deadline, (native.used_bytes, expected)
        time.sleep(0.01)
    native.run(False)
    assert [one["loads"] for one in native.blocks()] == [2] * resident + [4] * (5 - resident)
    assert native.used_bytes == 0


def test_nothing_overlaps_without_prefetch(wide: list[pathlib.Path]) -> None:
    native = _native.BlockLoader([(p.stem, str(p), -1, ["x"], ["x"]) for p in wide], 0, 30 << 20)
    native.set("x", np.ones((4, 1024), np.float32))
    for turn in range(3):
        native.run(turn < 2)
    load, execute, wall = (sum(one[name] for one in native.passes()) for name in ("load_ms", "execute_ms", "wall_ms"))
    assert (load + execute - wall) / min(load, execute) < 0.1


MEASURE = """
import json, sys, threading, numpy as np
from edgerun import _native
paths, prefetch, budget, passes, shrink = json.loads(sys.argv[1])
loader = _native.BlockLoader([(str(i), path, -1, ["x"], ["x"]) for i, path in enumerate(paths)], prefetch, budget)
loader.set("x", np.ones((4, 1024), np.float32))
_native.BlockLoader([("warm", paths[0], -1, ["x"], ["x"])], 0, None)
base = sum(_native.resident_bytes())
done, peak = False, 0
def watch():
    global peak
    while not done:
        peak = max(peak, sum(_native.resident_bytes()) - base)
watcher = threading.Thread(target=watch)
watcher.start()
after = []
for turn in range(passes):
    if turn == passes // 2 and shrink:
        loader.set_budget(shrink)
    loader.run(turn < passes - 1)
    after.append(_native.resident_bytes()[0])
done = True
watcher.join()
print(json.dumps({"peak": peak, "after": after, "passes": loader.passes(), "blocks": loader.blocks(),
                  "activation": loader.activation_bytes}))
"""


def measure(paths: list[pathlib.Path], prefetch: int, budget: int, passes: int, shrink: int = 0) -> dict:
    """A chain in a process of its own, whose memory is looked at all the time."""
    arguments = json.dumps([list(map(str, paths)), prefetch, budget, passes, shrink])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, arguments], capture_output=True, text=True, timeout=4 * WATCHDOG_SECONDS
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# What Python and the C library's heap take for themselves meanwhile.
SLACK_BYTES = 3 << 20


@pytest.mark.parametrize(("prefetch", "megabytes"), [(0, 18), (1, 28), (1, 50), (2, 70)])
def test_the_process_stays_within_the_budget(wide: list[pathlib.Path], prefetch: int, megabytes: int) -> None:
    budget = megabytes << 20
    found = measure(wide, prefetch, budget, 5)
    assert found["peak"] <= budget + SLACK_BYTES
    assert max(one["peak_bytes"] for one in found["passes"]) <= budget
    assert found["passes"][-2]["prefetch"] == prefetch
    assert found["peak"] >= budget / 2  # what there is is used
    for block in found["blocks"]:
        assert abs(block["loaded_bytes"] - (WIDE_MEGABYTES << 20)) < 1 << 20


def test_shrinking_gives_memory_back(wide: list[pathlib.Path]) -> None:
    budget, low = 120 << 20, 28 << 20
    found = measure(wide, 1, budget, 6, shrink=low)
    assert found["after"][2] - found["after"][4] > 60 << 20
    assert found["passes"][2]["resident_blocks"] == WIDE_BLOCKS and found["passes"][4]["resident_blocks"] == 0
    assert found["passes"][4]["peak_bytes"] <= low


def test_no_leak_over_many_passes(wide: list[pathlib.Path]) -> None:
    few, many = (measure(wide[:3], 1, 28 << 20, passes)["after"][-1] for passes in (5, 55))  # nothing is loaded then
    assert abs(many - few) < 1 << 20


def test_shrinking_in_mid_run_does_not_change_the_answer(chain: list[Link]) -> None:
    budget = 8 * largest(chain) + 400_000
    native = loader(chain, 1, budget)
    a = torch.randn(5, 32)
    expected = run_eager(chain, {"a": a})["v"].numpy()
    native.set("a", a.numpy())
    stop = threading.Event()

    def squeeze() -> None:
        while not stop.is_set():
            for part in (1.0, 0.5, 0.7):
                native.set_budget(int(part * budget))
                time.sleep(0.001)

    thread = threading.Thread(target=squeeze)
    thread.start()
    try:
        for _ in range(30):
            watched(lambda: native.run(True))
            assert_close(native.get("v"), expected)
    finally:
        stop.set()
        thread.join()


def copied(chain: list[Link], folder: pathlib.Path) -> list[pathlib.Path]:
    return [pathlib.Path(shutil.copy(link.path, folder)) for link in chain]


def remove(path: pathlib.Path) -> None:
    path.unlink()


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: pathlib.Path) -> None:
    path.write_bytes(b"\x7f" * path.stat().st_size)


def damage(path: pathlib.Path) -> None:
    """The program's description is cut to pieces; the file's size and its first bytes stay."""
    content = bytearray(path.read_bytes())
    content[200:2000] = np.random.default_rng(0).bytes(1800)
    path.write_bytes(bytes(content))


def flip(path: pathlib.Path) -> None:
    """One bit of the last weights, and the time of writing is put back."""
    time.sleep(0.02)  # file systems tell times no better than this on older kernels
    facts = path.stat()
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def replace(path: pathlib.Path) -> None:
    """A file of the same size and content in its place."""
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("harm", [remove, truncate, overwrite, damage, flip, replace])
def test_a_program_that_goes_bad_in_mid_run(
    wide: list[pathlib.Path], tmp_path: pathlib.Path, harm: Callable[[pathlib.Path], None], prefetch: int
) -> None:
    blocks = [(path.stem, shutil.copy(path, tmp_path), -1, ["x"], ["x"]) for path in wide[:5]]
    native = _native.BlockLoader(blocks, prefetch, 27 << 20)
    whole = _native.BlockLoader([(p.stem, str(p), -1, ["x"], ["x"]) for p in wide[:5]], 0, None)
    x = np.random.default_rng(0).standard_normal((4, 1024), np.float32)
    for one in (native, whole):
        one.set("x", x)
    whole.run(False)
    for _ in range(2):
        native.run(True)
    assert native.passes()[-1]["resident_blocks"] < len(blocks)
    harmed = tmp_path / wide[4].name  # so it streams
    keep = harmed.read_bytes()
    harm(harmed)
    with pytest.raises(EdgerunError) as caught:
        for _ in range(2):  # it may have been loaded between passes
            watched(lambda: native.run(True))
    assert harmed.name in str(caught.value) and "\n" not in str(caught.value)
    assert (harm is remove) == ("changed since it was checked" not in str(caught.value))
    harmed.write_bytes(keep)  # it is whole again
    if harm is not remove:  # but nobody checked that
        with pytest.raises(BundleError, match="changed since it was checked"):
            watched(lambda: native.run(False))
        native = _native.BlockLoader(blocks, prefetch, 27 << 20)
    native.set("x", x)
    watched(lambda: native.run(False))
    assert (native.get("x") == whole.get("x")).all()


class Table(nn.Module):
    """A program whose weights stay mapped: rows of two megabytes, looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.randn(1 << 14, 32))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.rows[index]


def test_a_program_that_is_cut_short_while_it_is_loaded(tmp_path: pathlib.Path) -> None:
    """What is mapped and gone would end the process."""
    path, table = tmp_path / "table.pte", Table()
    index = torch.tensor([3, 9000])
    lower(torch.export.export(table, (index,)), path, {})
    native = _native.BlockLoader([("table", str(path), -1, ["index"], ["x"])], 0, None)
    native.set("index", index.numpy())
    native.run(True)
    assert (native.get("x") == table(index).numpy()).all()
    truncate(path)
    with pytest.raises(BundleError, match=r"table\.pte' was cut short while it was in use"):
        native.run(True)


def test_a_program_that_changes_while_it_is_loaded(tmp_path: pathlib.Path) -> None:
    """What is mapped is read when it is used."""
    path, index = tmp_path / "table.pte", torch.tensor([3, 9000])
    lower(torch.export.export(Table(), (index,)), path, {})
    native = _native.BlockLoader([("table", str(path), -1, ["index"], ["x"])], 0, None)
    native.set("index", index.numpy())
    native.run(True)
    flip(path)
    with pytest.raises(BundleError, match=r"block 'table' \('.*table\.pte'\) changed since it was checked"):
        native.run(True)


@pytest.mark.parametrize("harm", [remove, truncate, overwrite])
def test_a_bad_program_is_found_when_the_chain_is_opened(
    chain: list[Link], tmp_path: pathlib.Path, harm: Callable[[pathlib.Path], None]
) -> None:
    paths = copied(chain, tmp_path)
    harm(paths[-1])
    with pytest.raises(BundleError, match=r"last\.pte"):
        _native.BlockLoader([link.native(path) for link, path in zip(chain, paths, strict=True)], 1, None)


def test_budget_below_one_block(wide: list[pathlib.Path]) -> None:
    with pytest.raises(EdgerunError, match=r"^a budget of 1048576 bytes is below the \d+ that block 'block_0' needs"):
        _native.BlockLoader([(p.stem, str(p), -1, ["x"], ["x"]) for p in wide], 1, 1 << 20)
    native = _native.BlockLoader([(p.stem, str(p), -1, ["x"], ["x"]) for p in wide], 1, 60 << 20)
    with pytest.raises(EdgerunError, match="give at least"):
        native.set_budget(1 << 20)
    native.set("x", np.ones((4, 1024), np.float32))
    native.run(False)  # the old one holds


def test_cancel(chain: list[Link]) -> None:
    native = loader(chain, 1, int(3.2 * largest(chain)) + 150_000)
    native.set("a", np.ones((2, 32), np.float32))
    native.run(True)
    ended = threading.Event()

    def cancel() -> None:
        while not ended.wait(0.001):
            native.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(EdgerunError, match="cancelled"):
        while True:
            watched(lambda: native.run(True))
    ended.set()
    thread.join()
    native.run(False)
    assert native.used_bytes == 0


def test_a_value_that_nobody_gave(chain: list[Link]) -> None:
    native = loader(chain[1:])
    native.set("x", np.ones((2, 32), np.float32))
    with pytest.raises(EdgerunError, match=r"block 'middle_0' .* takes 'y', which no block before it gives"):
        native.run(False)


@pytest.mark.parametrize("shape", [(17, 32), (2, 31), (2, 32, 1)])
def test_a_value_of_a_shape_that_does_not_fit(chain: list[Link], shape: tuple[int, ...]) -> None:
    native = loader(chain)
    native.set("a", np.ones(shape, np.float32))
    with pytest.raises(EdgerunError, match=r"block 'first' .* (does not take 'a' of shape|failed: ExecuTorch says)"):
        native.run(False)
    native.set("a", np.ones((2, 32), np.float32))
    native.run(False)


def test_names_must_match_the_program(chain: list[Link]) -> None:
    name, path, size, _, outputs = chain[0].native()
    with pytest.raises(BundleError, match="has 1 inputs and 2 outputs, the manifest names 2 and 2"):
        _native.BlockLoader([(name, path, size, ["a", "b"], outputs)], 1, None)
