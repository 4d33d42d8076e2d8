"""Writing results: whole files under their names or nothing, numbers that read back the same."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".monai_iou-"
STALE_SECONDS = 24 * 3600  # after which a temporary file of another machine is left over from a run that was killed
TRIED_BYTES = 1 << 16  # a full disk may still have room for an empty file


class OutputError(RuntimeError):
    """The output folder cannot be written; the message names it and says why."""


def prepare(folder: Path, option: str = "--output") -> None:
    """Create the output folder, make sure that files can be written there, and remove what killed runs left.

    Args:
        folder: the folder.
        option: what the user calls it, for the error.

    Raises:
        OutputError: it is not a folder, cannot be made or cannot be written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_file(folder) as path:
            _write_through(path, b"\0" * TRIED_BYTES)
        _remove_stale(folder)
    except OSError as error:
        message = (
            f"Expected `{option}` to be a folder that can be written, but got `{folder}` "
            f"({error.strerror or error}): choose another."
        )
        raise OutputError(message) from error


@contextlib.contextmanager
def temporary_file(folder: Path, suffix: str = "") -> Iterator[Path]:
    """Make an empty file of this process alone in `folder`, and remove it at the end if it is still there.

    Nobody can plant a link under its name, which is random and must be new. The name also says which process made it,
    so that `prepare` can remove what a killed one left.

    Args:
        folder: of the file.
        suffix: end of its name, for writers that choose a format by it.
    """
    path = folder / f"{TEMPORARY_PREFIX}{_machine()}-{os.getpid()}-{secrets.token_hex(8)}{suffix}"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_file(path: Path, suffix: str = "") -> Iterator[Path]:
    """Give a temporary file to write; when that is done, it takes the place of `path`, which is whole at any moment.

    The data reach the disk before the rename. If writing fails, the earlier file stays.

    Args:
        path: the file to write; a link there is replaced, not followed.
        suffix: end of the temporary name, such as ".nii.gz".
    """
    with temporary_file(path.parent, suffix) as temporary:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _remove_stale(folder: Path) -> None:
    """Remove temporary files of processes that are gone; those of other machines when they are a day old."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*-*-*"):
        machine, process = path.name.removeprefix(TEMPORARY_PREFIX).split("-")[:2]
        with contextlib.suppress(OSError, ValueError):
            here = machine == _machine()
            if not is_running(int(process)) if here else time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def is_running(process: int) -> bool:
    """Return whether a process of this machine exists."""
    if os.name == "nt":  # a signal would end it there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _machine() -> str:
    """Name where a process number means something: the machine since its start, and the container."""
    facts = [os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with contextlib.suppress(OSError):
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("|".join(facts).encode()).hexdigest()[:8]


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that a reader never finds half of it.

    Raises:
        OutputError: the file cannot be written (disk full, folder removed).
    """
    try:
        with replaced_file(path) as temporary:
            temporary.write_bytes(text.encode())
    except OSError as error:
        message = (
            f"Expected to write `{path}`, but got the error '{error.strerror}': free space or choose another folder."
        )
        raise OutputError(message) from error


def check_outputs(outputs: Mapping[str, Path], inputs: Mapping[str, Iterable[Path]]) -> None:
    """Make sure that nothing which is read would be replaced by what is written, before any work.

    Paths are compared with their links followed. A file must not be an input. A folder must not hold an input file
    directly, be an input folder, or lie inside one.

    Args:
        outputs: option -> file or folder to be written.
        inputs: what it is, in words -> the files that are read, and the folders that are read with all that is below.

    Raises:
        OutputError: one of them would; the message names the option, and the input.

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
                    "read and written: name another one."
                )
                raise OutputError(message)


def _relation(output: Path, source: Path) -> str:
    """Say how an output touches an input, both resolved; "" if it does not."""
    if output == source or _is_same(output, source):
        return "is"
    if source.is_dir():
        return "lies in" if source in output.parents and not output.is_file() else ""
    return "is the folder of" if output == source.parent or _is_same(output, source.parent) else ""


def _is_same(one: Path, other: Path) -> bool:
    try:  # a second name of the same file, or capitals on a file system that knows none
        return one.samefile(other)
    except OSError:
        return False


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV: NaN and None are empty cells, floats keep every bit."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    write_text(path, buffer.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON: NaN and infinities, which JSON does not have, become null."""
    write_text(path, json.dumps(_strict(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(float(value)) if isinstance(value, float) else str(value)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
