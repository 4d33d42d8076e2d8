"""Running independent tasks: in this process, on processes of this machine, or on a Dask cluster.

Processes are `concurrent.futures` with spawned workers: they need nothing installed and share no state. Dask is
for an existing cluster only. The function runs unchanged in each, so the results are the same to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")

CONNECT_SECONDS = 30
# A worker that dies takes its task with it; a task that has killed this many workers is given up.
RETRIES = 3


class SchedulerError(RuntimeError):
    """The cluster cannot be used; the message says what to do."""


@dataclass(frozen=True)
class TaskError:
    """A task that raised or whose worker died: the reason in one sentence."""

    reason: str


def run_tasks(
    function: Callable[..., Result],
    tasks: Mapping[str, tuple[Any, ...]],
    workers: int = 1,
    scheduler: str | None = None,
) -> Iterator[tuple[str, Result | TaskError]]:
    """Call `function(*arguments)` for every task and yield each outcome as soon as it is there.

    Args:
        function: a module-level function (workers import it by name).
        tasks: arguments by task name; all of them must pickle.
        workers: processes of this machine; 1 runs the tasks here, without starting any.
        scheduler: address of a Dask scheduler, such as `tcp://host:8786`; replaces `workers`.

    Yields:
        Task name and result, or `TaskError` for a task that raised; in order of completion.

    Raises:
        SchedulerError: Dask is not installed, or the scheduler or its workers do not answer.

    >>> dict(run_tasks(divmod, {"a": (7, 2), "b": (1, 0)}))["a"]
    (3, 1)
    """
    if not tasks:
        return
    if scheduler is not None:
        yield from _on_dask(function, tasks, scheduler)
    elif workers > 1:
        yield from _on_processes(function, tasks, workers)
    else:
        for name, arguments in tasks.items():
            yield name, _guarded(function, *arguments)


def _guarded(function: Callable[..., Result], *arguments: Any) -> Result | TaskError:
    try:
        return function(*arguments)
    except Exception as error:  # one broken case must not stop the others
        return TaskError(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _on_processes(
    function: Callable[..., Result], tasks: Mapping[str, tuple[Any, ...]], workers: int
) -> Iterator[tuple[str, Result | TaskError]]:
    left = dict(tasks)
    for name, outcome in _one_pool(function, tasks, min(workers, len(tasks))):
        del left[name]
        yield name, outcome
    # A worker that dies (killed for memory, say) breaks its whole pool and does not tell which task it had. What is
    # left therefore runs one task at a time: the innocent ones finish, the guilty one is named.
    for name, arguments in left.items():
        alone = list(_one_pool(function, {name: arguments}, 1))
        reason = "The worker process died twice in this case, perhaps for lack of memory: run it with fewer workers."
        yield alone[0] if alone else (name, TaskError(reason))


def _one_pool(
    function: Callable[..., Result], tasks: Mapping[str, tuple[Any, ...]], workers: int
) -> Iterator[tuple[str, Result | TaskError]]:
    """Yield the outcomes of the tasks that finished; those missing were lost with a dying worker."""
    import multiprocessing

    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_limit_threads, initargs=(threads,)
    )
    try:
        names: dict[Future[Result | TaskError], str] = {}
        try:
            for name, arguments in tasks.items():
                names[pool.submit(_guarded, function, *arguments)] = name
        except BrokenProcessPool:
            pass
        for future in as_completed(names):
            if not isinstance(future.exception(), BrokenProcessPool):
                yield names[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _on_dask(
    function: Callable[..., Result], tasks: Mapping[str, tuple[Any, ...]], address: str
) -> Iterator[tuple[str, Result | TaskError]]:
    with _dask_client(address) as client:
        from distributed import as_completed

        futures = {
            client.submit(_guarded, function, *arguments, pure=False, retries=RETRIES): name
            for name, arguments in tasks.items()
        }
        for future in as_completed(list(futures)):
            if future.status == "finished":
                yield futures[future], future.result()
            else:
                yield futures[future], TaskError(f"The cluster gave the case up: {future.exception()}")
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
