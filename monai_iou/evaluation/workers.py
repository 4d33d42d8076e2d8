"""Running independent tasks: in this process, on processes of this machine, or on a Dask cluster.

Processes are `concurrent.futures` with spawned workers: they need nothing installed and share no state. Dask is
for an existing cluster only. The function runs unchanged in each, so the results are the same to the bit.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

Tasks: TypeAlias = Mapping[str, tuple[Any, ...]]
Run: TypeAlias = Callable[[Callable[..., Any], Tasks], Iterator[tuple[str, Any]]]
"""Calls a function for every task and yields name and result, or name and `TaskError`, in order of completion."""

CONNECT_SECONDS = 30
# How often a case may lose its worker before it is given up.
RETRIES = 3


class SchedulerError(RuntimeError):
    """The cluster cannot be used; the message says what to do."""


@dataclass(frozen=True)
class TaskError:
    """A task that raised or whose worker died: the reason in one sentence."""

    reason: str


@contextmanager
def runner(workers: int = 1, scheduler: str | None = None) -> Iterator[Run]:
    """Open the means to run tasks, and close them after use.

    Args:
        workers: processes of this machine; 1 runs the tasks here, without starting any.
        scheduler: address of a Dask scheduler, such as `tcp://host:8786`; replaces `workers`.

    Yields:
        `run(function, tasks)`, where `function` is a module-level function (workers import it by name) and `tasks`
        holds its arguments by task name. It can be called again: the workers stay.

    Raises:
        SchedulerError: Dask is not installed, or the scheduler or its workers do not answer.

    >>> with runner() as run:
    ...     results = dict(run(divmod, {"a": (7, 2), "b": (1, 0)}))
    >>> results["a"], results["b"].reason
    ((3, 1), 'ZeroDivisionError: integer division or modulo by zero')
    """
    if scheduler is not None:
        with _dask_client(scheduler) as client:
            yield lambda function, tasks: _on_dask(client, function, tasks)
    elif workers > 1:
        pool = _Processes(workers)
        try:
            yield pool.run
        finally:
            pool.close()
    else:
        yield _here


def _here(function: Callable[..., Any], tasks: Tasks) -> Iterator[tuple[str, Any]]:
    for name, arguments in tasks.items():
        yield name, _guarded(function, *arguments)


def _guarded(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # one broken case must not stop the others
        reason = " ".join(str(error).split())
        # Messages of this package are sentences; others need their type to be understood.
        return TaskError(reason if reason.startswith("Expected ") else f"{type(error).__name__}: {reason}")


class _Processes:
    """A pool of spawned processes that is replaced when a worker dies."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[..., Any], tasks: Tasks) -> Iterator[tuple[str, Any]]:
        left = dict(tasks)
        for name, outcome in self._round(function, tasks):
            del left[name]
            yield name, outcome
        # A worker that dies (killed for memory, say) breaks its whole pool and does not tell which task it had. What
        # is left therefore runs one task at a time: the innocent ones finish, the guilty one is named.
        for name, arguments in left.items():
            alone = dict(self._round(function, {name: arguments}))
            reason = "Expected the worker process to finish this case, but it died twice: give it more memory."
            yield name, alone.get(name, TaskError(reason))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _round(self, function: Callable[..., Any], tasks: Tasks) -> Iterator[tuple[str, Any]]:
        """Yield the outcomes of the tasks that finished; those missing were lost with a dying worker."""
        pool = self._open()
        names: dict[Future[Any], str] = {}
        try:
            for name, arguments in tasks.items():
                names[pool.submit(_guarded, function, *arguments)] = name
        except BrokenProcessPool:
            pass  # those already submitted carry the same error
        broken = len(names) < len(tasks)
        for future in as_completed(names):
            if isinstance(future.exception(), BrokenProcessPool):
                broken = True
            else:
                yield names[future], future.result()
        if broken:
            self.close()

    def _open(self) -> ProcessPoolExecutor:
        if self._pool is None:
            threads = max(1, (os.cpu_count() or 1) // self._workers)
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._workers, mp_context=context, initializer=_prepare_process, initargs=(threads,)
            )
        return self._pool


def _prepare_process(threads: int) -> None:
    torch.set_num_threads(threads)
    # Ctrl-C goes to every process of the terminal; the main one closes the pool, so the others need not complain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _on_dask(client: Any, function: Callable[..., Any], tasks: Tasks) -> Iterator[tuple[str, Any]]:
    from distributed import as_completed as as_completed_there

    futures = {
        client.submit(_guarded, function, *arguments, pure=False, retries=RETRIES): name
        for name, arguments in tasks.items()
    }
    for future in as_completed_there(list(futures)):
        if future.status == "finished":
            yield futures[future], future.result()
        else:
            reason = f"Expected the cluster to finish this case, but its workers died: {future.exception()}"
            yield futures[future], TaskError(" ".join(reason.split()))
        future.release()


def _dask_client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        message = (
            "Expected Dask for `--scheduler`, but it is not installed: "
            'pip install "monai-iou[cluster]", here and on the workers.'
        )
        raise SchedulerError(message) from error
    try:
        client = Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        message = f"Expected a Dask scheduler at `{address}`, but got no answer: start one with `dask scheduler`."
        raise SchedulerError(message) from error
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except Exception as error:  # distributed raises its own TimeoutError, whose place has moved between versions
        client.close()
        message = f"Expected workers on the scheduler at `{address}`, but got none: start some with `dask worker`."
        raise SchedulerError(message) from error
    return client
