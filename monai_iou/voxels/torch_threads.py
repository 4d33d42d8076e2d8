"""The threads of torch, lent to tasks that are not operations of torch.

After each of its operations they keep a core for some milliseconds, in the hope of the next. A thread of our own would
share that core with one of them; but they begin at once with whatever they are given. They are the threads of the
OpenMP library that torch has loaded: `GOMP_parallel_start` and `GOMP_parallel_end` are what older compilers made of
`#pragma omp parallel`, and stand in GCC's library and in those of Intel and LLVM. On a machine that is busy they are to
be left alone: whoever calls them waits until each of them has had a core.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_LOAD = Path("/proc/loadavg")  # its fourth field: threads that run or would, of all threads
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # of this process
_PROCESS = os.getpid()
_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return what has the functions of the OpenMP library that torch uses; None if they are not to be had."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        library.GOMP_parallel_start.argtypes = [_Work, ctypes.c_void_p, ctypes.c_uint]
        library.GOMP_parallel_end.argtypes = []
        library.GOMP_parallel_start.restype = library.GOMP_parallel_end.restype = None
        library.omp_get_max_threads.argtypes = []
    except (OSError, AttributeError):  # no C library of that name, or a torch without OpenMP
        return None
    return library


def are_free() -> bool:
    """Return whether the threads of torch can be had, and no thread of the machine waits for a core at this moment.

    A forked process has none: they exist in its parent only.
    """
    library = _openmp()
    return (
        library is not None
        and os.getpid() == _PROCESS
        and library.omp_get_max_threads() == torch.get_num_threads()  # else it is not the library that torch uses
        and cores_suffice()
    )


def run(work: Callable[[], None]) -> None:
    """Let each thread of torch call `work`, the calling thread among them; wait for all.

    No operation in it is split any further. In other threads `work` must not raise. The calling thread calls it as any
    function, not through C as `GOMP_parallel` does, where an interrupt (Ctrl-C) would be reported and forgotten.
    """
    library = _openmp()
    assert library is not None
    start, end, of_others = library.GOMP_parallel_start, library.GOMP_parallel_end, _Work(lambda _: work())
    try:
        start(of_others, None, 0)  # Python looks for interrupts after a call, so that one that comes here finds an end
        work()
    finally:
        end()


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
