"""Work on parts of a volume by threads that each keep to one core.

torch splits every operation among threads and waits for all of them at its end. For thousands of small operations
beside busy data loaders, which keep a thread from its core for milliseconds, that is thousands of waits for the
scheduler: seconds for one loss, seen on two busy cores. Here a thread takes a part and does all operations on it alone;
nobody waits until the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

_MOST_THREADS = 8  # beyond, they wait for Python's lock


def in_threads(work: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
    """Return the results of `work` on all tasks, in order, by as many threads as torch would use; no gradients."""
    allowed = torch.get_num_threads()
    threads = min(allowed, _MOST_THREADS, len(tasks))

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
