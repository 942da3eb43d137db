"""Answer evaluation jobs on a Ray cluster: the same jobs and answers as in processes here, over many machines.

Ray places and moves what is computed; ours is only one actor a worker, which keeps one contender loaded and takes the
next job when it is done. Every machine needs edgerun, Ray in the same version, and the model under the same path. A
cluster that asks for a token takes it as Ray's own documentation says, from RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from edgerun.errors import EdgerunError
from edgerun.evaluation.answers import Answer, Contender, Job, answer_one
from edgerun.evaluation.processes import start_worker

LOCAL = "local"
_CONNECT_S = 5.0
Task = tuple[Contender, Job]


class _Worker:
    """One process of the cluster."""

    def __init__(self) -> None:
        start_worker()

    def answer(self, contender: Contender, job: Job) -> Answer:
        return answer_one(contender, job)


def work(tasks: Sequence[Task], address: str, processes: int | None) -> Iterator[Answer]:
    """The answers to (contender, job) pairs, as they come.

    address: of a cluster, "auto" for the one that runs on this machine, "local" for a new one. processes: most workers;
    None: one for each CPU of the cluster. Raises EdgerunError without Ray or a cluster, for a job that fails, and for a
    worker that dies.
    """
    if not tasks:
        return
    with _cluster(address, processes) as (ray, cpus):
        actor = ray.remote(num_cpus=1, max_restarts=0)(_Worker)
        workers = [actor.remote() for _ in range(min(len(tasks), processes or cpus, cpus))]
        waiting = iter(tasks)
        running: dict[Any, tuple[Any, Task]] = {}

        def begin(worker: Any) -> None:
            task = next(waiting, None)
            if task is not None:
                running[worker.answer.remote(_absolute(task[0]), _absolute(task[1]))] = worker, task

        for worker in workers:
            begin(worker)
        while running:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            worker, task = running.pop(done)
            yield _result(ray, done, task)
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


def _result(ray: Any, reference: Any, task: Task) -> Answer:
    contender, job = task
    what = f"{contender.name}, {job.task} at {job.length} tokens, sample {job.index}"
    try:
        answer: Answer = ray.get(reference)
    except ray.exceptions.RayActorError as error:
        raise EdgerunError(
            f"a Ray worker died at {what}: look for its memory; with --output the same command goes on from here"
        ) from error
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, EdgerunError):
            raise EdgerunError(f"{cause} (a Ray worker, at {what})") from error
        raise EdgerunError(f"a Ray worker failed at {what}: {type(cause).__name__}: {cause}") from error
    return answer


def _absolute(part: Any) -> Any:
    """A contender or a job with its paths in full: a worker's current folder is another."""
    if isinstance(part, Contender):
        return dataclasses.replace(part, path=part.path.absolute())
    return dataclasses.replace(part, files=tuple(path.absolute() for path in part.files))
