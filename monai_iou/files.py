"""Writing results: a file is written completely or not at all, and no input is overwritten."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.tables import FORMULA_STARTS, csv_text, json_text, read_csv, table_text

__all__ = [
    "FORMULA_STARTS",
    "TEMPORARY_PREFIX",
    "OutputError",
    "check_outputs",
    "csv_text",
    "is_running",
    "json_text",
    "prepare",
    "read_csv",
    "remove_stale",
    "replaced_file",
    "table_text",
    "temporary_file",
    "temporary_name",
    "write_csv",
    "write_json",
    "write_text",
    "write_texts",
]

TEMPORARY_PREFIX = ".monai_iou-"
STALE_SECONDS = 24 * 3600  # a temporary file of another machine that is older was left by a killed run
TRIAL_BYTES = 1 << 16  # a full disk may still have room for an empty file


class OutputError(RuntimeError):
    """An output cannot be written; the message names it, the reason and the remedy."""


def prepare(folder: Path, option: str = "--output") -> None:
    """Create an output folder, check that files can be written to it, and remove temporary files of killed runs.

    Args:
        folder: the folder.
        option: the name of the option that gives the folder, for the error message.

    Raises:
        OutputError: if `folder` is not a folder, cannot be created or written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_file(folder) as path:
            _write_through(path, b"\0" * TRIAL_BYTES)
        remove_stale(folder)
    except OSError as error:
        message = (
            f"Expected `{option}` to be a folder that can be written, but got `{folder}` "
            f"({error.strerror or error}): choose another folder."
        )
        raise OutputError(message) from error


@contextlib.contextmanager
def temporary_file(folder: Path, suffix: str = "") -> Iterator[Path]:
    """Create a new, empty file in a folder, and remove it at the end if it still exists.

    The name is random and must not exist, so that nobody can place a link there beforehand. It also identifies the
    process, so that `prepare` can remove the files of a killed one.

    Args:
        folder: an existing folder.
        suffix: the end of the name, for writers that choose the format by it.

    Raises:
        OSError: if the file cannot be created.
    """
    path = folder / f"{temporary_name()}{secrets.token_hex(8)}{suffix}"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_file(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary file to write, which then replaces `path`, so that `path` is complete at all times.

    The data are flushed to the disk before the file is renamed. If writing fails, the previous file remains.

    Args:
        path: the file to replace; a link is replaced, not followed.
        suffix: the end of the temporary name, such as ".nii.gz".

    Raises:
        OSError: if the file cannot be written.
    """
    with temporary_file(path.parent, suffix) as temporary:
        yield temporary
        with temporary.open("r+b") as stream:  # Windows flushes no file that is open for reading alone
            os.fsync(stream.fileno())
        temporary.replace(path)


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def temporary_name() -> str:
    """Return the beginning of the names of this process's temporary files and folders."""
    return f"{TEMPORARY_PREFIX}{_machine()}-{os.getpid()}-"


def remove_stale(folder: Path) -> None:
    """Remove temporary files and folders of processes that have ended, and those of other machines after a day."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*-*-*"):
        machine, process = path.name.removeprefix(TEMPORARY_PREFIX).split("-")[:2]
        with contextlib.suppress(OSError, ValueError):
            here = machine == _machine()
            if not is_running(int(process)) if here else time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def is_running(process: int) -> bool:
    """Return whether a process is running on this machine; on Windows, always True."""
    if os.name == "nt":  # there, a signal would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _machine() -> str:
    """Return a hash of the scope in which process numbers are unique: the machine, its boot, and the container."""
    facts = [os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with contextlib.suppress(OSError):
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("|".join(facts).encode()).hexdigest()[:8]


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it, so that a reader never sees an incomplete file.

    Raises:
        OutputError: if the file cannot be written, for example because the disk is full.
    """
    write_texts({path: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write text files that belong together: all under temporary names first, then renamed.

    Raises:
        OutputError: if one of them cannot be written; the message names it, and all previous files remain.
    """
    path = Path()
    try:
        with contextlib.ExitStack() as stack:
            written = {}
            for path, text in texts.items():
                written[path] = stack.enter_context(temporary_file(path.parent))
                # A table may contain file names that are not UTF-8; their invalid bytes are written as escapes.
                _write_through(written[path], text.encode("utf-8", "backslashreplace"))
            for path, temporary in written.items():
                if len(written) > 1:
                    stack.enter_context(put_back_after_errors(path))
                temporary.replace(path)
    except OSError as error:
        message = (
            f"Expected to write `{path}`, but got the error '{error.strerror}': free space or choose another folder."
        )
        raise OutputError(message) from error


@contextlib.contextmanager
def put_back_after_errors(path: Path) -> Iterator[None]:
    """Keep the file at a path under a temporary name, from which an error puts it back; a new one is removed."""
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with temporary_file(path.parent) as previous:
        previous.unlink()
        if os.path.lexists(path):
            try:
                os.link(path, previous, follow_symlinks=False)
            except (OSError, NotImplementedError):  # not on every file system
                shutil.copy2(path, previous, follow_symlinks=False)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                previous.replace(path) if os.path.lexists(previous) else path.unlink()
            raise


def check_outputs(outputs: Mapping[str, Path], inputs: Mapping[str, Iterable[Path]]) -> None:
    """Check, before any work, that no output would overwrite an input.

    An output file must not be an input. An output folder must not directly contain an input file, be an input folder,
    or lie inside one. Paths are compared after following links.

    Args:
        outputs: for each option, the file or folder to write.
        inputs: for each description, such as "the predictions", the files and folders to read; a folder includes
            everything below it.

    Raises:
        OutputError: if an output would overwrite an input; the message names both.

    Example:
        >>> check_outputs({"--output": Path("scores")}, {"the predictions": [Path("predictions")]})
        >>> check_outputs({"--output": Path("a/../predictions")}, {"the predictions": [Path("predictions")]})
        Traceback (most recent call last):
            ...
        monai_iou.files.OutputError: Expected `--output` to be apart from the predictions, but `a/../predictions` is ...
    """
    known = [(what, path, path.resolve()) for what, paths in inputs.items() for path in paths]
    for option, output in outputs.items():
        target = output.resolve()
        for what, path, resolved in known:
            relation = _relation(target, resolved)
            if relation:
                message = (
                    f"Expected `{option}` to be apart from {what}, but `{output}` {relation} `{path}`, which would be "
                    "both read and written: name another path."
                )
                raise OutputError(message)


def _relation(output: Path, source: Path) -> str:
    """Return in words how a resolved output conflicts with a resolved input; "" if it does not."""
    if output == source or _is_same(output, source):
        return "is"
    if source.is_dir():
        return "lies in" if source in output.parents and not output.is_file() else ""
    return "is the folder of" if output == source.parent or _is_same(output, source.parent) else ""


def _is_same(one: Path, other: Path) -> bool:
    try:  # finds hard links, and names that differ in case on a file system that ignores case
        return one.samefile(other)
    except OSError:
        return False


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV, from which `read_csv` restores the text of every cell; NaN and None become empty cells.

    Args:
        path: the file to write.
        columns: the columns, in order.
        rows: dictionaries with a value for each column; missing values become empty cells.

    Raises:
        OutputError: if the file cannot be written.
    """
    write_text(path, table_text(columns, rows))


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON; NaN and infinities, which JSON does not support, become null.

    It is plain ASCII: MONAI reads configs in the system's encoding, which is not UTF-8 everywhere.

    Raises:
        OutputError: if the file cannot be written.
    """
    write_text(path, json_text(value, ascii_only=True))
