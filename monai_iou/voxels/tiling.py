"""Cut a volume into tiles and let threads share them.

torch splits every operation among threads and waits for all of them at its end. For thousands of small operations
while data loaders are busy, which keep a thread from its core for milliseconds, that is thousands of waits for the
scheduler: seconds for one loss, seen on two busy cores. Here a thread takes a part and does all operations on it alone;
nobody waits until the end (:func:`run_tasks`). On a machine with nothing else to do, it is a thread of torch.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from monai_iou.voxels import torch_threads

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_Tile = TypeVar("_Tile")
Task = list[tuple[int, slice]]  # tiles, as (image, voxels)

_MAX_THREADS = 8  # beyond, they wait for Python's lock
# Elements (classes x voxels) of a tile: on a CPU a handful of temporaries of it stay inside the cache of a core.
TILE_ELEMENTS = {"cpu": 1 << 16}
_OTHER_TILE_ELEMENTS = 1 << 22  # of a GPU: 16 MiB a temporary, and still milliseconds of work
_MAX_VOXELS = 1 << 24  # up to which float32 counts every one
_TILES_PER_TASK = 4


class _Helpers:
    """Threads that stay from call to call, as starting them takes longer than some of the work they do."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew: no thread survives the fork of a worker process, and the lock may have been taken then."""
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[[], None], threads: int) -> list[Future[None]]:
        """Let so many threads run `work`, or as many as there can be: none while Python ends."""
        helpers: list[Future[None]] = []
        with self._lock, contextlib.suppress(RuntimeError):
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_MAX_THREADS - 1, "monai_iou")
            while len(helpers) < threads:
                helpers.append(self._pool.submit(work))
        return helpers


_helpers = _Helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.forget)


def in_threads(work: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
    """Return the results of `work` on all tasks, in order, by as many threads as torch would use; no gradients.

    The calling thread is one of them. All of them work in its inference mode, outside of which nothing may write to a
    tensor that was made in it. No operation of a task is split any further: the number of threads would change its last
    digits.
    """
    inference = torch.is_inference_mode_enabled()
    left, results, errors = deque(enumerate(tasks)), dict[int, _Result](), list[BaseException]()

    def take_tasks() -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():  # a thread starts with gradients on
                for index, task in _taken(left):
                    results[index] = work(task)
        except BaseException as error:  # is raised below, in the calling thread
            errors.append(error)
            left.clear()  # no other task begins

    if 1 < torch.get_num_threads() <= _MAX_THREADS and len(tasks) > 1 and torch_threads.are_free():
        torch_threads.run(take_tasks)
    else:
        _in_own_threads(take_tasks, len(tasks))
    if errors:
        raise errors.pop(0)  # which keeps what its task held in memory for no longer than the caller keeps it
    return [results[index] for index in range(len(tasks))]


def _in_own_threads(take_tasks: Callable[[], None], tasks: int) -> None:
    """Let the calling thread take tasks, and threads of our own; it takes all if they are busy with another call's."""
    allowed = torch.get_num_threads()
    if allowed == 1:
        take_tasks()
        return

    def take_alone() -> None:
        torch.set_num_threads(1)
        take_tasks()

    try:
        helpers = _helpers.submit(take_alone, min(allowed, _MAX_THREADS, tasks) - 1)
        take_alone()
        for helper in helpers:
            if not helper.cancel():
                helper.exception()
    finally:
        torch.set_num_threads(allowed)  # what a helper set is also the default of threads born later


def _taken(left: deque[_Task]) -> Iterator[_Task]:
    """Take what is left, one at a time, while other threads do."""
    while True:
        try:
            task = left.popleft()
        except IndexError:
            return
        yield task


def tile_size(logits: Tensor, factor: int = 1) -> int:
    """Return the voxels of a tile of logits (B, C, N), `factor` times as many as usual."""
    elements = factor * TILE_ELEMENTS.get(logits.device.type, _OTHER_TILE_ELEMENTS)
    return max(1, min(elements // logits.shape[1], _MAX_VOXELS))


def tile_tasks(logits: Tensor, size: int) -> list[Task]:
    """Return runs of tiles of `size` voxels."""
    batch, _, voxels = logits.shape
    return in_runs([(b, slice(start, start + size)) for b in range(batch) for start in range(0, voxels, size)])


def in_runs(tiles: list[_Tile]) -> list[list[_Tile]]:
    """Return tiles in runs that are worth handing to a thread; enough of them, if there are enough tiles."""
    length = max(1, min(_TILES_PER_TASK, len(tiles) // _MAX_THREADS))
    return [tiles[start : start + length] for start in range(0, len(tiles), length)]


def run_tasks(work: Callable[[_Task], _Result], logits: Tensor, tasks: list[_Task]) -> list[_Result]:
    """Return the results of `work`, in order; threads share it on a CPU."""
    return in_threads(work, tasks) if logits.device.type == "cpu" else [work(task) for task in tasks]
