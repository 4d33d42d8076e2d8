"""A lock that admits one run at a time to a folder, names its holder, and ends with its process in every case."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from monai_iou.files import OutputError, is_running

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_NAME", "NAME_ANOTHER", "folder_lock", "is_locked"]

LOCK_NAME = ".monai_iou.lock"
CHECK = "a check"
NAME_ANOTHER = "name another folder"
SECONDS_BETWEEN_TRIES = 0.2
BRIEF_SECONDS = 10.0  # for a check, or until a holder has written who it is, which it cannot on a full disk
REMINDER_SECONDS = 300.0
# The system does not stop a process from locking its own file again, and lets a lock go as soon as its process closes
# the file anywhere: threads take turns to open one, and never open one that this process holds.
_held: dict[tuple[int, int], str] = {}  # the purpose for which each is held
_turn = threading.RLock()


@contextlib.contextmanager
def folder_lock(
    folder: Path,
    purpose: str,
    wait_for: Collection[str] = (),
    tell: Callable[[str], None] = lambda _: None,
    remedy: str = NAME_ANOTHER,
) -> Iterator[None]:
    """Lock a folder for one run; the lock file is removed at the end.

    The lock is held by the operating system and ends with the process, so that a killed run blocks no other. Worker
    processes do not inherit it. On a file system without locks, the process named in the lock file holds the lock as
    long as it is running or, if it runs on another machine, until the file is deleted.

    Args:
        folder: the existing folder to which the run writes.
        purpose: what the run does, such as "training", for the error message of a second run.
        wait_for: purposes of other processes that are soon done: while one of them holds the lock, wait.
        tell: called with a line that says whom it waits for, and once more, with a remedy, after some minutes.
        remedy: what a second run may do instead of waiting, for its error message.

    Raises:
        OutputError: if another run holds the lock, with its process, machine and start time in the message, or if the
            lock file cannot be written.

    Example:
        >>> import tempfile
        >>> from monai_iou.locks import folder_lock
        >>> with tempfile.TemporaryDirectory() as folder, folder_lock(Path(folder), "training"):
        ...     [path.name for path in Path(folder).iterdir()]
        ['.monai_iou.lock']
    """
    path = folder / LOCK_NAME
    descriptor = _wait(path, purpose, wait_for, tell, remedy)
    try:
        yield
    finally:
        _release(descriptor, path)


def is_locked(folder: Path) -> bool:
    """Return whether a run, of this process or another, holds the lock of a folder."""
    path = folder / LOCK_NAME
    here = _held_here(path)
    if here not in (None, CHECK) or not path.exists():
        return here not in (None, CHECK)
    try:
        with folder_lock(folder, CHECK):
            return False
    except OutputError:
        return True


def _wait(path: Path, purpose: str, wait_for: Collection[str], tell: Callable[[str], None], remedy: str) -> int:
    """Lock the file, once all holders that are to be waited for have let it go, and return its descriptor."""
    began = known = time.monotonic()
    notices = [(REMINDER_SECONDS, "Still waiting", f" If that process is dead, delete `{path}`."), (0.0, "Waiting", "")]
    while (descriptor := _try(path, purpose)) is None:
        holder = _other(path, remedy)  # looked up once, because it may let the lock go at any moment
        now, brief = time.monotonic(), _is_brief(holder)
        known = known if brief else now
        is_short = now - known < BRIEF_SECONDS if brief else holder.get("purpose") in wait_for
        if not is_short:
            raise _refusal(path, holder, remedy)
        if not brief and notices and now - began >= notices[-1][0]:
            _, start, hint = notices.pop()
            tell(f"{start} for {path.parent}: {_user(path, holder)}.{hint}")
        time.sleep(SECONDS_BETWEEN_TRIES)
    return descriptor


def _other(path: Path, remedy: str) -> dict[str, Any]:
    """Who holds the lock, {} if nobody knows; raise OutputError if it is this process, and for more than a look."""
    with _turn:
        here = _held_here(path)
        if here is None:
            return _holder(path)
    if here != CHECK:
        raise _refusal(path, {}, remedy)
    return {"purpose": CHECK}


def _release(descriptor: int, path: Path) -> None:
    with _turn:
        _held.pop(_key(os.fstat(descriptor)), None)
        _let_go(descriptor, path)


def _let_go(descriptor: int, path: Path) -> None:
    if fcntl is None:
        # Windows removes no open file, not even for its owner. Another run may have it open at this moment, so that it
        # stays: an empty one is nobody's.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)
    with contextlib.suppress(OSError):
        path.unlink()  # while it is still locked, so that no other run locks a file that is about to be removed
    if fcntl is not None:
        os.close(descriptor)


def _try(path: Path, purpose: str) -> int | None:
    """Lock the file and return its descriptor, None if another run holds it."""
    with _turn:
        while _held_here(path) is None:
            descriptor = _open(path)
            if not _lock(descriptor, path):
                os.close(descriptor)
                return None
            if _is_file_of(descriptor, path):  # or its holder removed it after we opened it and before we locked it
                _write_holder(descriptor, purpose)
                _held[_key(os.fstat(descriptor))] = purpose
                return descriptor
            os.close(descriptor)
        return None


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        message = (
            f"Expected to lock the folder `{path.parent}` with `{path.name}`, but got the error '{error.strerror}': "
            "choose another folder."
        )
        raise OutputError(message) from error


def _lock(descriptor: int, path: Path) -> bool:
    """Lock the open file; return whether this process now holds the lock."""
    if fcntl is None:
        return _is_abandoned(_holder(path))
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return _is_abandoned(_holder(path))
    return True


def _is_abandoned(holder: Mapping[str, Any]) -> bool:
    """Whether the holder, as a lock file that this process does not hold names it, is no running process."""
    process = holder.get("process", 0)
    is_here = holder.get("host") == socket.gethostname()
    return not holder or (is_here and (process == os.getpid() or not is_running(int(process))))


def _held_here(path: Path) -> str | None:
    """The purpose for which this process holds the lock, None if it does not."""
    with contextlib.suppress(OSError):
        return _held.get(_key(path.stat()))
    return None


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int, purpose: str) -> None:
    since = datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
    holder = {"purpose": purpose, "process": os.getpid(), "host": socket.gethostname(), "since": since}
    with contextlib.suppress(OSError):  # on a full disk, the lock works without the name of its holder
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())


def _holder(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_brief(holder: Mapping[str, Any]) -> bool:
    """Whether the holder only looks, or has just let the lock go or not yet written who it is."""
    return _is_abandoned(holder) or holder.get("purpose") == CHECK


def _user(path: Path, holder: Mapping[str, Any]) -> str:
    if not holder:
        return "another run is using it"
    return "{purpose} by process {process} on {host} has been using it since {since}".format_map(_Known(holder))


def _refusal(path: Path, holder: Mapping[str, Any], remedy: str) -> OutputError:
    message = (
        f"Expected `{path.parent}` to be used by one run at a time, but {_user(path, holder)}: wait until that run has "
        f"ended, or {remedy}."
    )
    return OutputError(message)


class _Known(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return f"an unknown {key}"
