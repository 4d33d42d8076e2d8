"""The lock of the folder that a run writes to: taken before it writes or caches anything, and held until it ends.

A config makes a run in steps: it checks, prepares the data, which may take hours, and trains. The check takes the lock
and leaves it to the training.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from monai_iou.locks import NAME_ANOTHER, folder_lock
from monai_iou.workflow.settings import exit_with_message

__all__ = ["alone_in", "locked_for_run", "release_unused"]

_left: dict[Path, tuple[threading.Thread, contextlib.ExitStack]] = {}  # by the folder: who prepares a run, its lock


@contextlib.contextmanager
def locked_for_run(folder: Path, purpose: str) -> Iterator[None]:
    """Lock a folder; after a block without an error, the lock is left to the `alone_in` that follows in this process.

    A lock that was left in this thread, or by one that has ended, is released first: its run never began.

    Args:
        folder: the existing folder to which the run writes.
        purpose: what the run does, for the message that another run gets.

    Raises:
        OutputError: another run holds the folder.
    """
    path = folder.resolve()
    if path in _left and (_left[path][0] is threading.current_thread() or not _left[path][0].is_alive()):
        _left.pop(path)[1].close()
    with contextlib.ExitStack() as held:
        held.enter_context(folder_lock(folder, purpose))
        yield
        _left[path] = (threading.current_thread(), held.pop_all())


@contextlib.contextmanager
def alone_in(folder: Path, purpose: str, remedy: str = NAME_ANOTHER) -> Iterator[None]:
    """Hold a folder in a `with` block, by the lock that `locked_for_run` left, if it did.

    Args:
        folder: see `locked_for_run`.
        purpose: likewise.
        remedy: see `folder_lock`.

    Raises:
        OutputError: another run holds the folder. Under `python -m monai.bundle` the program ends with that sentence.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     with locked_for_run(Path(name), "training"):
        ...         "checks"
        ...     with alone_in(Path(name), "training"):
        ...         [path.name for path in Path(name).iterdir()]
        'checks'
        ['.monai_iou.lock']
    """
    left = _left.pop(folder.resolve(), None)
    with contextlib.ExitStack() if left is None else left[1] as held:
        if left is None:
            with exit_with_message():
                held.enter_context(folder_lock(folder, purpose, remedy=remedy))
        yield


def release_unused() -> None:
    """Release what this thread left to runs that have not begun: something between has failed."""
    for path, (thread, _) in list(_left.items()):
        if thread is threading.current_thread():
            _left.pop(path)[1].close()


atexit.register(release_unused)
