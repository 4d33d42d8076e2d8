"""One run at a time in a folder: a lock that says who holds it and that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from monai_iou.files import OutputError, is_running

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_NAME", "folder_lock"]

LOCK_NAME = ".monai_iou.lock"
_held: set[tuple[int, int]] = set()  # a process's own lock does not stop it a second time


@contextlib.contextmanager
def folder_lock(folder: Path, purpose: str) -> Iterator[None]:
    """Hold a folder for one run; its file goes with the lock.

    The system's own lock on the file ends when the process does, so that a killed run blocks nobody; it is not passed
    on to worker processes. Where the file system has no locks, the process that the file names counts as the holder as
    long as it is running; on another machine, until the file is deleted.

    Args:
        folder: that the run writes to; it must exist.
        purpose: what runs, for the message of whoever comes second, such as "training".

    Raises:
        OutputError: another run holds the folder; the message says which, where and since when.
    """
    path = folder / LOCK_NAME
    descriptor = _acquire(path, purpose)
    status = os.fstat(descriptor)
    _held.add((status.st_dev, status.st_ino))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is locked: nobody waits for a file that is about to go
        os.close(descriptor)
        _held.discard((status.st_dev, status.st_ino))


def _acquire(path: Path, purpose: str) -> int:
    while True:
        descriptor = None if _is_held_here(path) else _open(path)
        if descriptor is None or not _lock(descriptor, path):
            if descriptor is not None:
                os.close(descriptor)
            raise _refusal(path)
        if _is_file_of(descriptor, path):  # else its holder removed it between our opening and locking it
            _write_holder(descriptor, purpose)
            return descriptor
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        message = (
            f"Expected to lock the folder {path.parent} by `{path}`, but got the error '{error.strerror}': choose "
            "another folder."
        )
        raise OutputError(message) from error


def _lock(descriptor: int, path: Path) -> bool:
    """Lock the open file; return whether it is ours now."""
    if fcntl is None:
        return _is_abandoned(path)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return _is_abandoned(path)
    return True


def _is_abandoned(path: Path) -> bool:
    holder = _holder(path)
    return not holder or (holder.get("host") == socket.gethostname() and not is_running(int(holder.get("process", 0))))


def _is_held_here(path: Path) -> bool:
    # Not by opening it: closing any descriptor of the file would end this process's lock.
    with contextlib.suppress(OSError):
        status = path.stat()
        return (status.st_dev, status.st_ino) in _held
    return False


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int, purpose: str) -> None:
    since = datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
    holder = {"purpose": purpose, "process": os.getpid(), "host": socket.gethostname(), "since": since}
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())


def _holder(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refusal(path: Path) -> OutputError:
    holder = {} if _is_held_here(path) else _holder(path)
    who = "another run has it"
    if holder:
        who = "{purpose} by process {process} on {host} has used it since {since}".format_map(_Known(holder))
    message = (
        f"Expected {path.parent} to be used by one run at a time, but {who}: wait until that has ended, or name "
        "another folder."
    )
    return OutputError(message)


class _Known(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return f"an unknown {key}"
