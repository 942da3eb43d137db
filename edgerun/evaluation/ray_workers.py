"""Do evaluation's tasks on a Ray cluster: the same tasks and results as in processes here, over many machines.

Ray places and moves what is computed; ours is only one actor a worker, which keeps one model loaded and takes the next
task when it is done. Every machine needs edgerun, Ray in the same version, and the model under the same path. A
cluster that asks for a token takes it as Ray's own documentation says, from RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from edgerun.errors import EdgerunError
from edgerun.evaluation.processes import start_worker

LOCAL = "local"
_CONNECT_S = 5.0
_T = TypeVar("_T")
_R = TypeVar("_R")


class _Worker:
    """One process of the cluster."""

    def __init__(self) -> None:
        start_worker()

    def do(self, function: Callable[[Any], Any], task: Any) -> Any:
        return function(task)


def run_tasks(
    function: Callable[[_T], _R],
    tasks: Sequence[_T],
    address: str,
    processes: int | None,
    describe: Callable[[_T], str],
) -> Iterator[_R]:
    """What `function` gives for each task, as it comes; paths in a task must be absolute, as workers are elsewhere.

    address: of a cluster, "auto" for the one that runs on this machine, "local" for a new one. processes: most workers;
    None: one for each CPU of the cluster. describe: a task in words, for a message. Raises EdgerunError without Ray or
    a cluster, for a task that fails, and for a worker that dies.
    """
    if not tasks:
        return
    with _cluster(address, processes) as (ray, cpus):
        actor = ray.remote(num_cpus=1, max_restarts=0)(_Worker)
        workers = [actor.remote() for _ in range(min(len(tasks), processes or cpus, cpus))]
        waiting = iter(tasks)
        running: dict[Any, tuple[Any, _T]] = {}

        def begin(worker: Any) -> None:
            task = next(waiting, None)
            if task is not None:
                running[worker.do.remote(function, task)] = worker, task

        for worker in workers:
            begin(worker)
        while running:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            worker, task = running.pop(done)
            yield _result(ray, done, describe(task))
            begin(worker)


@contextlib.contextmanager
def _cluster(address: str, processes: int | None) -> Iterator[tuple[Any, int]]:
    """Ray, connected, and the cluster's CPUs; disconnected at the end, and stopped where it was started here."""
    try:
        import ray
    except ImportError as error:
        raise EdgerunError("--ray needs Ray, which is not installed: pip install 'edgerun[ray]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to its makers otherwise
    own: dict[str, Any] = {"num_cpus": processes, "include_dashboard": False} if address == LOCAL else {}
    try:
        _require_listener(address)
        with _kept_sigterm():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EdgerunError(
            f"no Ray cluster at {address!r} ({reason}): start one, set RAY_AUTH_MODE=token and its token where it asks "
            "for one, or pass --ray local"
        ) from error
    try:
        yield ray, int(ray.cluster_resources().get("CPU", 1))
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise OSError when nobody answers at HOST:PORT: Ray would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


@contextlib.contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts; ours ends the verb with the status that a caller expects."""
    ours = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)


def _result(ray: Any, reference: Any, what: str) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayActorError as error:
        raise EdgerunError(
            f"a Ray worker died at {what}: look for its memory; with --output the same command goes on from here"
        ) from error
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, EdgerunError):
            raise EdgerunError(f"{cause} (a Ray worker, at {what})") from error
        raise EdgerunError(f"a Ray worker failed at {what}: {type(cause).__name__}: {cause}") from error
