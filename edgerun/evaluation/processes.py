"""Work spread over processes of this machine, each with one torch thread and gone when its parent is."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from edgerun.library_noise import quiet_libraries
from edgerun.machine import available_cores

_T = TypeVar("_T")
_R = TypeVar("_R")


def run_tasks(work: Callable[[_T], _R], tasks: Sequence[_T], processes: int) -> Iterable[_R]:
    """What `work` gives for each task, as it comes. One process works here; more are started with one thread each."""
    if processes <= 1 or len(tasks) <= 1:
        yield from (work(task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(tasks)), context, _start_process) as pool:
        try:
            yield from (
                future.result() for future in concurrent.futures.as_completed([pool.submit(work, t) for t in tasks])
            )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_anywhere(
    work: Callable[[_T], _R],
    tasks: Sequence[_T],
    processes: int | None,
    ray: str | None,
    describe: Callable[[_T], str],
) -> Iterable[_R]:
    """`run_tasks`, one process a core by default, or the same on the Ray cluster of an address."""
    if ray is None:
        return run_tasks(work, tasks, processes or available_cores())
    from edgerun.evaluation import ray_workers  # it imports this module

    return ray_workers.run_tasks(work, tasks, ray, processes, describe)


def _start_process() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start_worker()


def start_worker() -> None:
    """Make this process a worker among others: quiet, and with one torch thread."""
    quiet_libraries()
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
