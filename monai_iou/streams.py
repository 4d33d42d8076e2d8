"""The process's stdout and stderr: no work ends because nobody reads what it prints.

Nothing from the package is imported here: the command loads this file by its path.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["Output", "is_terminal", "outlast", "outlasting"]

NAMES = ("stdin", "stdout", "stderr")  # by their descriptors


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; None, which Python has for a stream that was closed at the start, is none.

    Example:
        >>> is_terminal(None), is_terminal(io.StringIO())
        (False, False)
    """
    return stream is not None and bool(stream.isatty())


class Output(io.FileIO):
    """A descriptor of text that is printed: from the first write that fails on, it leads nowhere.

    Attributes:
        failure: the error of that write, None if there was none or the reader is gone, as of `| head -1`.
    """

    failure: OSError | None = None
    _kept: int | None = None

    def write(self, data: Any, /) -> int:
        """Write bytes and return their number, also where they are lost; nothing is raised."""
        try:
            return super().write(data)
        except OSError as error:
            if not self._is_unread(error):
                self.failure = error
                self._kept = os.dup(self.fileno())
            # The descriptor itself, so that other streams on it and child processes do not fail either.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - no path
                os.dup2(nowhere.fileno(), self.fileno())
            return memoryview(data).nbytes

    def _is_unread(self, error: OSError) -> bool:
        """Whether the reader of a pipe or socket has ended, or a terminal was closed."""
        if os.name == "nt" and error.errno == errno.EINVAL:  # a pipe without a reader
            return True
        return isinstance(error, ConnectionError) or (
            error.errno == errno.EIO and stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
        )

    def restore(self) -> None:
        """Let the descriptor lead again where a write failed although somebody may read it, as on a full disk."""
        if self._kept is not None:
            os.dup2(self._kept, self.fileno())
            os.close(self._kept)
            self._kept = None


def outlast() -> dict[str, Output]:
    """Put streams that cannot fail in the place of the process's own stdout and stderr.

    Streams that were closed at the start become empty ones, as libraries write to them unasked; and the next file that
    is opened, such as a mask, would get their descriptor, to which C libraries write. Streams that are no more the
    process's own, as in a notebook or a test, stay.

    Returns:
        For "stdout" and "stderr", if replaced, the descriptor in use.
    """
    replaced = {}
    for name in NAMES:
        stream = getattr(sys, name)
        if stream is None:
            empty = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: PTH123, SIM115
            os.set_inheritable(empty.fileno(), True)
            setattr(sys, name, empty)
        elif name != "stdin" and stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            raw = getattr(stream.buffer, "raw", stream.buffer)  # `python -u` has no buffer
            if isinstance(raw, io.FileIO):
                replaced[name] = _replace(name, stream, is_buffered=raw is not stream.buffer)
    return replaced


def _replace(name: str, stream: io.TextIOWrapper, *, is_buffered: bool) -> Output:
    with contextlib.suppress(OSError):
        stream.flush()
    output = Output(stream.fileno(), "wb", closefd=False)
    text = io.TextIOWrapper(
        io.BufferedWriter(output) if is_buffered else output,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    setattr(sys, name, text)
    return output


@contextlib.contextmanager
def outlasting() -> Iterator[dict[str, Output]]:
    """Do `outlast` for a while; at the end, all that was printed has been written."""
    before, outputs = {name: getattr(sys, name) for name in NAMES}, dict[str, Output]()
    try:
        outputs = outlast()
        yield outputs
    finally:
        for name, stream in before.items():
            current = getattr(sys, name)
            if current is not stream:
                if not current.closed:
                    current.close() if stream is None else current.flush()
                setattr(sys, name, stream)
        for output in outputs.values():
            output.restore()
