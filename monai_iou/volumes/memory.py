"""Memory for volumes: what a header claims must fit into what is free, also when several volumes are read at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from monai_iou.volumes.header import refusal

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

GIB = 2**30
# Left to the rest of the program: without it the last reader would push the process over its limit.
RESERVE = 64 * 2**20
WAIT_SECONDS = 600.0
_CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class _Budget:
    """The bytes that readers of this process have been promised and not yet given back."""

    def __init__(self) -> None:
        self.promised = 0
        self.changed = threading.Condition()


_BUDGET = _Budget()


def free_memory() -> int | None:
    """Bytes that this process may still take, by the kernel, the container and `ulimit -v`; None if unknown."""
    found = [*_of_kernel(), *_of_container(), *_of_process()]
    return max(0, min(found)) if found else None


@contextmanager
def room_for(path: Path, size: int, shape: tuple[int, ...]) -> Iterator[None]:
    """Hold `size` bytes for reading one volume; wait while others are read, and refuse what cannot fit.

    Raises:
        VolumeError: the volume does not fit into the free memory, though nothing else is being read.
    """
    with _BUDGET.changed:
        while not _fits(size):
            if _BUDGET.promised == 0 or not _BUDGET.changed.wait(WAIT_SECONDS):
                text = "x".join(map(str, shape))
                found = f"{size / GIB:.3g} GiB for shape {text} with {(free_memory() or 0) / GIB:.3g} GiB free"
                remedy = "correct its header, free memory, or read it on a larger machine"
                raise refusal(path, "fit into the free memory", found, remedy)
        _BUDGET.promised += size
    try:
        yield
    finally:
        with _BUDGET.changed:
            _BUDGET.promised -= size
            _BUDGET.changed.notify_all()


def _fits(size: int) -> bool:
    if size < RESERVE and _BUDGET.promised + size < RESERVE:
        return True  # small volumes: asking the system costs more than it saves
    free = free_memory()
    return free is None or _BUDGET.promised + size <= free - RESERVE


def _of_kernel() -> list[int]:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return [int(lines["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError):
        pass
    try:
        # Systems without /proc say what there is in all; half of it may be taken.
        return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    except (AttributeError, OSError, ValueError):
        return []


def _of_container() -> list[int]:
    found = []
    for limit, usage in _CGROUP_LIMITS:
        try:
            found.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):
            continue
    return found


def _of_process() -> list[int]:
    if resource is None:
        return []
    try:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return []
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return [limit - pages * resource.getpagesize()]
    except (OSError, ValueError):
        return []
