"""Running independent tasks: in this process, on processes of this machine, or on a Dask cluster.

Processes are `concurrent.futures` with spawned workers: they need nothing installed and share no state. Dask is
for an existing cluster only. The function runs unchanged in each, so the results are the same to the bit.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from monai_iou.evaluation.case_files import describe_error
from monai_iou.evaluation.cluster import SchedulerError, dask_client, run_on_dask

__all__ = ["Run", "Runner", "SchedulerError", "TaskError", "Tasks", "end_unguarded_child", "runner"]

Tasks: TypeAlias = Mapping[str, tuple[Any, ...]]
Run: TypeAlias = Callable[[Callable[..., Any], Tasks], Iterator[tuple[str, Any]]]
"""Calls a function for every task and yields name and result, or name and `TaskError`, in order of completion."""

NO_GUARD = (
    'The script that started this has no `if __name__ == "__main__":` around its work, without which worker processes '
    "cannot start: the cases were scored one after the other."
)


@dataclass(frozen=True)
class TaskError:
    """A task that raised or whose worker died: the reason in one sentence."""

    reason: str


class Runner:
    """The means to run tasks; `notes` says what was not as asked for."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.notes: list[str] = []

    def __call__(self, function: Callable[..., Any], tasks: Tasks) -> Iterator[tuple[str, Any]]:
        """Call `function` for every task and yield name and result, or name and `TaskError`."""
        yield from self._run(function, tasks)


@contextmanager
def runner(workers: int = 1, scheduler: str | None = None) -> Iterator[Runner]:
    """Provide a function that runs tasks, and release its workers after use.

    Args:
        workers: number of processes on this machine, limited to the number of its processors; 1 uses this process.
        scheduler: address of a Dask scheduler, such as `tcp://host:8786`; replaces `workers`.

    Yields:
        `run(function, tasks)`, where `function` is a module-level function (workers import it by name) and `tasks`
        contains its arguments by task name. It can be called several times with the same workers.

    Raises:
        SchedulerError: Dask is not installed, or the scheduler or its workers do not answer.

    >>> with runner() as run:
    ...     results = dict(run(divmod, {"a": (7, 2), "b": (1, 0)}))
    >>> results["a"], results["b"].reason
    ((3, 1), 'ZeroDivisionError: integer division or modulo by zero')
    """
    if scheduler is not None:
        with dask_client(scheduler) as client:
            yield Runner(lambda function, tasks: _errors(run_on_dask(client, _guarded, function, tasks)))
        return
    cores = available_cores()
    count = min(workers, cores)
    if count < 2 or not _can_spawn():
        here = Runner(_here)
        if count < 2 < workers + 1 and workers > 1:
            here.notes.append(f"{workers} worker processes were asked for, but there is one processor.")
        elif count > 1:
            here.notes.append(NO_GUARD)
        yield here
        return
    pool = _Processes(count)
    running = Runner(pool.run)
    pool.notes = running.notes
    if count < workers:
        running.notes.append(f"{workers} worker processes were asked for, and {count} were used, one per processor.")
    try:
        yield running
    except BaseException:
        pool.end()
        raise
    finally:
        pool.close()


def available_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_unguarded_child() -> None:
    """End a worker process that comes here while it imports the main script: the script has no main guard.

    Without this it would start an evaluation of its own, and end in a traceback of `multiprocessing`.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)


def _can_spawn() -> bool:
    """Whether a new process can import the main module: not where it was read from a pipe."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    return getattr(main, "__spec__", None) is not None or file is None or Path(file).exists()


def _here(function: Callable[..., Any], tasks: Tasks) -> Iterator[tuple[str, Any]]:
    for name, arguments in tasks.items():
        yield name, _guarded(function, *arguments)


def _guarded(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # one broken case must not stop the others
        return TaskError(describe_error(error))


def _errors(outcomes: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for name, outcome in outcomes:
        yield name, TaskError(describe_error(outcome)) if isinstance(outcome, Exception) else outcome


class _Processes:
    """A pool of spawned processes that is replaced when a worker dies."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self.notes: list[str] = []

    def run(self, function: Callable[..., Any], tasks: Tasks) -> Iterator[tuple[str, Any]]:
        left = dict(tasks)
        if not left:
            return
        if not self._starts():
            self.notes.append(NO_GUARD)
            yield from _here(function, tasks)
            return
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

    def end(self) -> None:
        """End the workers in the middle of their tasks, for which the interpreter would wait before it exits."""
        if self._pool is not None:
            processes = list(self._pool._processes.values())  # Python 3.14 has `terminate_workers` for this
            self.close()
            for process in processes:
                process.terminate()

    def _starts(self) -> bool:
        """Whether a worker comes as far as doing nothing."""
        outcome = dict(self._round(os.getpid, {"": ()}))
        return bool(outcome)

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
                yield names.pop(future), future.result()  # with the pictures of a case, which nobody else should keep
        if broken:
            self.close()

    def _open(self) -> ProcessPoolExecutor:
        if self._pool is None:
            threads = max(1, available_cores() // self._workers)
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._workers, mp_context=context, initializer=_prepare_process, initargs=(threads,)
            )
        return self._pool


def _prepare_process(threads: int) -> None:
    torch.set_num_threads(threads)
    # Ctrl-C goes to every process of the terminal; the main one ends the pool, so the others need not complain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent has ended, however that ended; its results have nowhere to go."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
