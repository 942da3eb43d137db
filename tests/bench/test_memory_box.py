"""The memory box: what fits runs, what does not is stopped, whichever way the kernel enforces it."""

from __future__ import annotations

import pathlib
import sys

import pytest

from bench.memory_box import CgroupBox, memory_box, parents

LIMIT_BYTES = 100_000_000
TAKE = "import sys; taken = bytearray(int(sys.argv[1])); print(len(taken))"


def take(count: int) -> list[str]:
    """A command that needs so many bytes, and a few MB for itself."""
    return [sys.executable, "-S", "-c", TAKE, str(count)]


@pytest.mark.parametrize("cgroups", [True, False])
def test_what_fits_runs_and_what_does_not_is_stopped(cgroups: bool) -> None:
    with memory_box(LIMIT_BYTES, cgroups=cgroups) as box:
        if cgroups and not box.kind.startswith("cgroup"):
            pytest.skip("no memory cgroup can be made here")
        for _ in range(2):  # one run leaves the box as it was
            fits = box.run(take(LIMIT_BYTES // 2))
            assert (fits.status, fits.output, fits.errors, fits.killed) == (0, f"{LIMIT_BYTES // 2}\n", "", False)
            beyond = box.run(take(LIMIT_BYTES * 2))
            assert beyond.status != 0 and beyond.output == "" and beyond.killed == cgroups
        if isinstance(box, CgroupBox):
            assert fits.peak_bytes is not None and LIMIT_BYTES // 2 < fits.peak_bytes <= LIMIT_BYTES
    assert not isinstance(box, CgroupBox) or not box.folder.exists()


def test_no_box_stops_nothing() -> None:
    with memory_box(None) as box:
        assert box.run(take(LIMIT_BYTES * 2)).status == 0


def test_a_cgroup_of_version_1_is_made_below_ones_own(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    mounts = f"cgroup /elsewhere cgroup rw,cpu 0 0\ncgroup {tmp_path} cgroup rw,memory 0 0\n"
    found = list(parents("5:cpu:/c\n4:memory:/a/b\n0::/\n", mounts))
    assert found == [(1, tmp_path / "a" / "b"), (1, tmp_path / "a"), (1, tmp_path)]


def test_a_cgroup_of_version_2_is_made_where_memory_is_given_on(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for folder, given in ((tmp_path, "cpu memory"), (tmp_path / "a", "cpu memory pids"), (tmp_path / "a" / "b", "")):
        (folder / "cgroup.subtree_control").write_text(given + "\n")
    found = list(parents("0::/a/b\n", f"none {tmp_path} cgroup2 rw 0 0\n"))
    assert found == [(2, tmp_path / "a"), (2, tmp_path)]


def test_limits_of_version_2(tmp_path: pathlib.Path) -> None:
    """By the files' names and what is written: a hierarchy of version 2 with memory is not everywhere."""
    (tmp_path / "memory.swap.max").touch()
    (tmp_path / "memory.events").write_text("low 0\noom 0\noom_kill 0\n")
    done = CgroupBox(LIMIT_BYTES, tmp_path, 2).run(["sh", "-c", "echo $$"])
    assert (tmp_path / "memory.max").read_text() == str(LIMIT_BYTES)
    assert (tmp_path / "memory.swap.max").read_text() == "0"
    assert (tmp_path / "cgroup.procs").read_text() == done.output
    assert (done.status, done.killed) == (0, False)
