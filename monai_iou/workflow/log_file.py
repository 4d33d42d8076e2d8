"""The log of a training in its folder, `log.txt`: what is said, and the sentence that ends the training early."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

__all__ = ["close_log", "log_failure", "log_file", "open_log"]

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class _LogFile(logging.FileHandler):
    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.path = path  # as it was given, for a page that is sent to others

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say nothing of a disk that is full: the run ends with a sentence of its own, and not for the log's sake."""


_log: list[_LogFile] = []  # of this process: a process trains one model at a time


def open_log(folder: Path) -> logging.Logger:
    """Send the log of this package to `log.txt` in a folder as well, in the place of any before; return the logger."""
    close_log()
    logger = logging.getLogger("monai_iou")
    handler = _LogFile(folder / "log.txt")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    handler.setLevel(logging.INFO)
    logger.addHandler(handler)
    _log.append(handler)
    return logger


def close_log() -> None:
    """End the log of the training that is done: what a later run of this process says does not belong to it."""
    while _log:
        handler = _log.pop()
        logging.getLogger("monai_iou").removeHandler(handler)
        with contextlib.suppress(OSError):  # its disk is full
            handler.close()


def log_file() -> Path | None:
    """Return the `log.txt` that a run of this process writes; None without one."""
    return _log[-1].path if _log else None


def log_failure(error: BaseException, cause: BaseException | None = None) -> None:
    """Write the error that ends a run into `log.txt` alone: the terminal gets it anyway.

    Args:
        error: its sentence is written.
        cause: its traceback is written too.
    """
    sentence = str(error) or type(error).__name__
    traced = None if cause is None else (type(cause), cause, cause.__traceback__)
    for handler in _log:
        handler.handle(logging.LogRecord("monai_iou", logging.ERROR, __file__, 0, sentence, None, traced))
