"""Cut a volume into tiles and let threads share them.

torch splits every operation among threads and waits for all of them at its end. For thousands of small operations
while data loaders are busy, which keep a thread from its core for milliseconds, that is thousands of waits for the
scheduler: seconds for one loss, seen on two busy cores. Here a thread takes a part and does all operations on it alone;
nobody waits until the end (:func:`run_tasks`).

On a machine with nothing else to do it is the other way round: torch's threads, which keep a core for some milliseconds
after each operation in the hope of the next, get in the way of ours. So passes of few and large operations ask the
system which of the two it is (:func:`run_large_tasks`).
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

_MAX_THREADS = 8  # beyond, they wait for Python's lock
_LOAD = Path("/proc/loadavg")  # its fourth field: threads that run or would, of all threads
_CORES = os.cpu_count() or 1


class _Helpers:
    """Threads that stay from call to call, as starting them takes longer than some of the work they do."""

    def __init__(self) -> None:
        self.forget()
        self.forked = False

    def forget(self) -> None:
        """Begin anew: no thread survives the fork of a worker process, and the lock may have been taken then."""
        self.forked = True
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[[], None], threads: int) -> list[Future[None]]:
        """Let so many threads run `work`."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_MAX_THREADS - 1, "monai_iou")
            return [self._pool.submit(work) for _ in range(threads)]


_helpers = _Helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.forget)


def in_threads(work: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
    """Return the results of `work` on all tasks, in order, by as many threads as torch would use; no gradients.

    The calling thread is one of them, and takes all tasks if the helpers are busy with another call's. All of them work
    in its inference mode, outside of which nothing may write to a tensor that was made in it.
    """
    allowed, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    threads = min(allowed, _MAX_THREADS, len(tasks))
    left, results = deque(enumerate(tasks)), dict[int, _Result]()

    def take_tasks() -> None:
        if threads > 1:
            torch.set_num_threads(1)
        try:
            with torch.inference_mode(inference), torch.no_grad():  # a thread starts with gradients on
                for index, task in _taken(left):
                    results[index] = work(task)
        finally:
            left.clear()  # after an error no other task begins

    helpers = _helpers.submit(take_tasks, threads - 1) if threads > 1 else []
    try:
        take_tasks()
    finally:
        errors = [None if helper.cancel() else helper.exception() for helper in helpers]
        if threads > 1:
            torch.set_num_threads(allowed)  # what a helper set is also the default of threads born later
    for error in filter(None, errors):
        raise error
    return [results[index] for index in range(len(tasks))]


def _taken(left: deque[_Task]) -> Iterator[_Task]:
    """Take what is left, one at a time, while other threads do."""
    while True:
        try:
            task = left.popleft()
        except IndexError:
            return
        yield task


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: a sum that is split has other last digits than the same sum in one piece."""
    allowed = torch.get_num_threads()
    if allowed == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(allowed)


def cores_suffice() -> bool:
    """Return whether no thread of the machine waits for a core at this moment; False where the system does not say."""
    file = _opened(_LOAD)
    try:
        return file is not None and int(os.pread(file, 64, 0).split()[3].partition(b"/")[0]) <= _CORES
    except (OSError, IndexError, ValueError):
        return False


@functools.cache
def _opened(path: Path) -> int | None:
    """Return the descriptor of a file that stays open: to open it takes 20 times as long as to read it."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None


Result = TypeVar("Result")
_Tile = TypeVar("_Tile")
Task = list[tuple[int, slice]]  # tiles, as (image, voxels)

# Elements (classes x voxels) of a tile: on a CPU a handful of temporaries of it stay inside the cache of a core.
TILE_ELEMENTS = {"cpu": 1 << 16}
_OTHER_TILE_ELEMENTS = 1 << 22  # of a GPU: 16 MiB a temporary, and still milliseconds of work
_MAX_VOXELS = 1 << 24  # up to which float32 counts every one
_TILES_PER_TASK = 4

_SPLIT = 1 << 15  # torch gives a thread no fewer elements of an operation than this, but for its last one
_VECTOR = 32  # of elements that torch computes at once, the most: two registers of sixteen float32


def tile_size(logits: Tensor, factor: int = 1) -> int:
    """Return the voxels of a tile of logits (B, C, N), `factor` times as many as usual."""
    elements = factor * TILE_ELEMENTS.get(logits.device.type, _OTHER_TILE_ELEMENTS)
    return max(1, min(elements // logits.shape[1], _MAX_VOXELS))


def tile_tasks(logits: Tensor, size: int) -> list[Task]:
    """Return runs of tiles of `size` voxels."""
    batch, _, voxels = logits.shape
    return in_runs([(b, slice(start, start + size)) for b in range(batch) for start in range(0, voxels, size)])


def lengths_of_tiles(voxels: int, size: int) -> list[int]:
    """Return the lengths of tiles of at most `size` voxels, in which torch splits operations at whole vectors alone.

    The elements behind the last whole vector of a thread's share are computed in another way, and may differ in the
    last digit. So a tile that torch would split is as long as it takes for the shares of any number of threads to
    consist of whole vectors, and what is left is a tile of its own.

    >>> lengths_of_tiles(150_001, 1 << 18)
    [149760, 241]
    >>> lengths_of_tiles(96**3, 1 << 18)
    [241920, 241920, 241920, 157440, 1536]
    """
    whole = size - size % _unit(size)
    tiles, rest = divmod(voxels, whole)
    last = rest % _unit(rest)
    return [length for length in (*[whole] * tiles, rest - last, last) if length]


def _unit(voxels: int) -> int:
    """Return what divides the length of a tile if each thread of torch has whole vectors."""
    shares = -(-voxels // _SPLIT)
    return _VECTOR * math.lcm(*range(1, shares + 1)) if shares > 1 else 1


def in_runs(tiles: list[_Tile], length: int = _TILES_PER_TASK) -> list[list[_Tile]]:
    """Return tiles in runs that are worth handing to a thread."""
    return [tiles[start : start + length] for start in range(0, len(tiles), length)]


def run_tasks(work: Callable[[_Tile], Result], logits: Tensor, tasks: list[_Tile]) -> list[Result]:
    """Return the results of `work`, in order; threads share it on a CPU."""
    return in_threads(work, tasks) if logits.device.type == "cpu" else [work(task) for task in tasks]


def run_large_tasks(work: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
    """Return the results of `work`, in order, whose operations are worth splitting; no gradients, on a CPU.

    The calling thread does one task after another, each operation split by torch, until a thread of this or another
    process waits for a core; then threads share what is left. So that the result is the same either way, `work` must
    sum in :func:`one_thread`. A forked process has no threads of torch's to split anything.
    """
    results: list[_Result] = []
    with torch.no_grad():
        for task in tasks:
            if torch.get_num_threads() == 1 or _helpers.forked or not cores_suffice():
                break
            results.append(work(task))
    return results + in_threads(work, tasks[len(results) :])
