"""Files leave the page cache, and the kernel is asked whether they did."""

from __future__ import annotations

import mmap
import os
import pathlib

import pytest

from bench.workloads.page_cache import cached_bytes, evict

PAGES = 40


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    """A file that is no whole number of pages, on a disk."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGES * mmap.PAGESIZE - 1))
    evict([path])
    if cached_bytes([path]) > 0:
        pytest.skip("the folder for temporary files is in memory")
    return path


def test_a_file_that_was_read_is_cached_until_it_is_evicted(file: pathlib.Path) -> None:
    empty = file.with_name("empty")
    empty.touch()
    file.read_bytes()
    assert cached_bytes([file, empty]) == PAGES * mmap.PAGESIZE
    evict([file, empty])
    assert cached_bytes([file, empty]) == 0


def test_asking_reads_nothing(file: pathlib.Path) -> None:
    assert cached_bytes([file]) == cached_bytes([file]) == 0


def test_what_was_just_written_is_evicted_too(file: pathlib.Path) -> None:
    file.write_bytes(os.urandom(PAGES * mmap.PAGESIZE))
    evict([file])
    assert cached_bytes([file]) == 0
