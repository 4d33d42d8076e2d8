"""Keep the memory that a step of a training frees for the next step.

Each step allocates and frees the same images. glibc gives what is freed at the end of its heap back to the system,
which has to clear every page of it when the next step asks for it again. What that costs is in docs/performance.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["kept_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as <malloc.h> names them: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_LARGEST = 32 << 20  # bytes; larger blocks are always the system's
_KEPT = 1 << 30  # bytes of the heap's end
_USUAL = 2 * _LARGEST  # what glibc itself arrives at, once such a block has been freed
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
_lock = threading.Lock()
_users = 0


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep up to 1 GiB of what this process frees, and give it back at the end.

    That is with glibc (Linux), unless the environment has settings of its own for the allocation of memory, or another
    library for it. Blocks above 32 MiB are the system's as before.

    Example:
        >>> with kept_memory():
        ...     image = bytearray(1 << 20)
    """
    library = _library()
    if library is None:
        yield
        return
    _change(library, 1)
    try:
        yield
    finally:
        _change(library, -1)


def _library() -> Any:
    """Return the C library if it is glibc and has no settings from the environment."""
    if any(os.environ.get(name) for name in _OWN_SETTINGS):
        return None
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    names = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return library if all(hasattr(library, name) for name in names) else None


def _change(library: Any, users: int) -> None:
    global _users  # the settings are of the process
    with _lock:
        had, _users = _users, _users + users
        if not had:
            library.mallopt(_MMAP_THRESHOLD, _LARGEST)
            library.mallopt(_TRIM_THRESHOLD, _KEPT)
        elif not _users:
            library.mallopt(_TRIM_THRESHOLD, _USUAL)
            library.malloc_trim(0)
