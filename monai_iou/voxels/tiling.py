"""Cut a volume into tiles and let threads share them.

torch splits every operation among threads and waits for all of them at its end. For thousands of small operations
while data loaders are busy, which keep a thread from its core for milliseconds, that is thousands of waits for the
scheduler: seconds for one loss, seen on two busy cores. Here a thread takes a part and does all operations on it alone;
nobody waits until the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

_MAX_THREADS = 8  # beyond, they wait for Python's lock


def in_threads(work: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
    """Return the results of `work` on all tasks, in order, by as many threads as torch would use; no gradients."""
    allowed = torch.get_num_threads()
    threads = min(allowed, _MAX_THREADS, len(tasks))

    def without_graph(task: _Task) -> _Result:
        with torch.no_grad():  # a thread starts with gradients on
            return work(task)

    if threads <= 1:
        return [without_graph(task) for task in tasks]
    try:
        # A pool of its own for each call: a kept one would not survive the fork of a worker process.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(without_graph, tasks))
    finally:
        torch.set_num_threads(allowed)  # what the pool set is also the default of threads born later


Result = TypeVar("Result")
_Tile = TypeVar("_Tile")
Task = list[tuple[int, slice]]  # tiles, as (image, voxels)

# Elements (classes x voxels) of a tile: on a CPU a handful of temporaries of it stay inside the cache of a core.
TILE_ELEMENTS = {"cpu": 1 << 16}
_OTHER_TILE_ELEMENTS = 1 << 22  # of a GPU: 16 MiB a temporary, and still milliseconds of work
_MAX_VOXELS = 1 << 24  # up to which float32 counts every one
_TILES_PER_TASK = 4


def tile_size(logits: Tensor, factor: int = 1) -> int:
    """Return the voxels of a tile of logits (B, C, N), `factor` times as many as usual."""
    elements = factor * TILE_ELEMENTS.get(logits.device.type, _OTHER_TILE_ELEMENTS)
    return max(1, min(elements // logits.shape[1], _MAX_VOXELS))


def tile_tasks(logits: Tensor, size: int) -> list[Task]:
    """Return runs of tiles of `size` voxels."""
    batch, _, voxels = logits.shape
    return in_runs([(b, slice(start, start + size)) for b in range(batch) for start in range(0, voxels, size)])


def in_runs(tiles: list[_Tile]) -> list[list[_Tile]]:
    """Return tiles in runs that are worth handing to a thread."""
    return [tiles[start : start + _TILES_PER_TASK] for start in range(0, len(tiles), _TILES_PER_TASK)]


def run_tasks(work: Callable[[_Tile], Result], logits: Tensor, tasks: list[_Tile]) -> list[Result]:
    """Return the results of `work`, in order; threads share it on a CPU."""
    return in_threads(work, tasks) if logits.device.type == "cpu" else [work(task) for task in tasks]
