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
_LARGEST = 32 << 20  # bytes; larger blocks are the system's, unless they fit into what is kept
_KEPT = 1 << 30  # bytes of the heap's end
_USUAL = 2 * _LARGEST  # what glibc itself arrives at, once such a block has been freed
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
_lock = threading.Lock()
_users = 0


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep up to 1 GiB of what this process frees, and give it back at the end.

    That is with glibc (Linux), unless the environment sets what it keeps (`MALLOC_TRIM_THRESHOLD_`,
    `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`) or loads another library (`LD_PRELOAD`). Blocks above 32 MiB are the
    system's as before, unless they fit into what is kept. A process that is forked meanwhile, as the workers that load
    images are, keeps no more than usual: there may be many.

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
        had, _users = _users, max(_users + users, 0)
        if users > 0 and not had:
            library.mallopt(_MMAP_THRESHOLD, _LARGEST)
            library.mallopt(_TRIM_THRESHOLD, _KEPT)
        elif had and not _users:
            library.mallopt(_TRIM_THRESHOLD, _USUAL)
            library.malloc_trim(0)


def _forget_in_child() -> None:
    """Keep no more than usual in a process that was forked, in which nobody would give it back."""
    global _lock, _users
    _lock = threading.Lock()  # another thread may have held it
    library = _library() if _users else None
    _users = 0
    if library is not None:
        library.mallopt(_TRIM_THRESHOLD, _USUAL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
