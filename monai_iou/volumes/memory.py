"""Memory for volumes: the size given by a header must fit into the free memory, also for concurrent readers."""

from __future__ import annotations

import ctypes
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
# Reserved for the rest of the program, which would otherwise exceed its limit while the last volume is read.
RESERVE = 64 * 2**20
WAIT_SECONDS = 600.0
_CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class _Budget:
    """The memory that readers of this process have reserved and not yet released, in bytes."""

    def __init__(self) -> None:
        self.promised = 0
        self.changed = threading.Condition()


_BUDGET = _Budget()


def free_memory() -> int | None:
    """Return the bytes that the kernel, the container and `ulimit -v` still allow this process; None if unknown."""
    limits = [*_of_kernel(), *_of_container(), *_of_process()]
    return max(0, min(limits)) if limits else None


@contextmanager
def room_for(path: Path, size: int, shape: tuple[int, ...]) -> Iterator[None]:
    """Reserve memory for reading one volume, and wait for it while other volumes are being read.

    Args:
        path: the volume, for the error message.
        size: the number of bytes to reserve.
        shape: the shape of the volume, for the error message.

    Raises:
        VolumeError: if the volume does not fit into the free memory although no other volume is being read.
    """
    with _BUDGET.changed:
        while not _fits(size):
            if _BUDGET.promised == 0 or not _BUDGET.changed.wait(WAIT_SECONDS):
                text = "x".join(map(str, shape))
                sizes = f"{size / GIB:.3g} GiB for shape {text} with {(free_memory() or 0) / GIB:.3g} GiB free"
                remedy = "correct its header, free memory, or read it on a machine with more memory"
                raise refusal(path, "fit into the free memory", sizes, remedy)
        _BUDGET.promised += size
    try:
        yield
    finally:
        with _BUDGET.changed:
            _BUDGET.promised -= size
            _BUDGET.changed.notify_all()


def _fits(size: int) -> bool:
    if size < RESERVE and _BUDGET.promised + size < RESERVE:
        return True  # for small volumes, asking the system would take too long
    free = free_memory()
    return free is None or _BUDGET.promised + size <= free - RESERVE


def _of_kernel() -> list[int]:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return [int(lines["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError):
        pass
    try:
        # Systems without /proc only report the total memory; assume that half of it is free.
        return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    except (AttributeError, OSError, ValueError):
        return _of_windows()


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX, in bytes."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("percent_used", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("total_with_swap", ctypes.c_uint64),
        ("available_with_swap", ctypes.c_uint64),  # to this process
        ("total_addresses", ctypes.c_uint64),
        ("available_addresses", ctypes.c_uint64),
        ("reserved", ctypes.c_uint64),
    )


def _of_windows() -> list[int]:
    libraries = getattr(ctypes, "windll", None)  # of Windows alone
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if libraries is None or not libraries.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return []
    return [status.available, status.available_with_swap]


def _of_container() -> list[int]:
    limits = []
    for limit, usage in _CGROUP_LIMITS:
        try:
            used = int(Path(usage).read_text()) - _file_cache(Path(usage).with_name("memory.stat"))
            limits.append(int(Path(limit).read_text()) - max(0, used))
        except (OSError, ValueError):
            continue
    return limits


def _file_cache(statistics: Path) -> int:
    """Return the bytes of files that a container keeps in memory until a process needs it: reading fills it with them.

    The first version of the kernel's interface gives those of the containers within apart, as a total.
    """
    try:
        lines = dict(line.split() for line in statistics.read_text().splitlines())
        return sum(int(lines.get(f"total_{kind}", lines.get(kind, 0))) for kind in ("inactive_file", "active_file"))
    except (OSError, ValueError):
        return 0


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
