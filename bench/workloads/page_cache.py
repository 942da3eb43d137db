"""What the system keeps of files in memory: dropped before a measurement, and counted after it. Linux."""

from __future__ import annotations

import ctypes
import mmap
import os
import pathlib
from collections.abc import Iterable

import numpy as np


def evict(paths: Iterable[pathlib.Path]) -> None:
    """Take the files out of the page cache, but for pages that a process has mapped."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # pages that are not on the disk yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_bytes(paths: Iterable[pathlib.Path]) -> int:
    """How much of the files the page cache holds, in bytes of whole pages. Reads nothing of them.

    Raises OSError. Of files that this process may not write, Linux says that all is there.
    """
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    pages = 0
    for path in paths:
        size = path.stat().st_size
        if size == 0:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
            bytes_of_file = np.frombuffer(mapped, np.uint8)
            present = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            status = mincore(bytes_of_file.ctypes.data, size, present.ctypes.data)
            del bytes_of_file  # the mapping can be closed only then
        if status != 0:
            raise OSError(ctypes.get_errno(), f"mincore of {path}: {os.strerror(ctypes.get_errno())}")
        pages += int((present & 1).sum())
    return pages * mmap.PAGESIZE
