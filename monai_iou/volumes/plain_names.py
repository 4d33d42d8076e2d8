"""Names that every library accepts, for files with any name: at one that is not UTF-8, SimpleITK ends the process."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from monai_iou.volumes.header import refusal

__all__ = ["give_name", "is_plain", "plain_name", "plain_target", "temporary_folder"]

PREFIX = "monai_iou_"


@contextmanager
def plain_name(path: Path) -> Iterator[Path]:
    """A name of a file, to read it by: its own, or one in a temporary folder.

    Raises:
        VolumeError: see `temporary_folder`.
    """
    if is_plain(path):
        yield path
        return
    with temporary_folder(path) as folder:
        name = Path(folder) / f"file{_endings(path)}"
        give_name(name, path.resolve())
        yield name


@contextmanager
def plain_target(path: Path) -> Iterator[Path]:
    """A name to write a file by: its own, or one in a temporary folder, from which it is copied.

    Raises:
        OSError: it cannot be copied, or there is no such temporary folder.
    """
    if is_plain(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        if not is_plain(folder):
            message = f"the name of the temporary folder {folder!r} is not UTF-8"
            raise OSError(message)
        name = Path(folder) / f"file{_endings(path)}"
        yield name
        shutil.copyfile(name, path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[str]:
    """A folder with a plain name, which is removed afterwards.

    Raises:
        VolumeError: none can be made; the fault is not the volume's.
    """
    remedy = "set TMPDIR to a folder that you may write to"
    try:
        made = tempfile.TemporaryDirectory(prefix=PREFIX)
    except OSError as error:
        problem = f"the error '{error.strerror or error}'"
        raise refusal(path, "be read through a temporary folder", problem, remedy) from error
    with made as folder:
        if not is_plain(folder):
            raise refusal(path, "be read through a temporary folder with a name in UTF-8", repr(folder), remedy)
        yield folder


def give_name(name: Path, file: Path) -> None:
    """Let a name lead to a file, or to a copy of it where no link can be made, as by ordinary users of Windows.

    A protected file gets no second name: on Windows, taking that away would take the protection away too.
    """
    ways: list[Callable[[Path], None]] = [name.symlink_to]
    if os.access(file, os.W_OK):
        ways.append(name.hardlink_to)
    for link in ways:
        with suppress(OSError):
            link(file)
            return
    shutil.copyfile(file, name)


def _endings(path: Path) -> str:
    return "".join(ending for ending in path.suffixes if is_plain(ending))


def is_plain(path: Path | str) -> bool:
    """Return whether a path is UTF-8, which SimpleITK and torch's memory maps need."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
