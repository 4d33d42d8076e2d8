"""Writing results: whole files under their names or nothing, numbers that read back the same."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".monai_iou-"
STALE_SECONDS = 24 * 3600  # after which a temporary file of another machine is left over from a run that was killed
JSON_SUFFIXES = (".json", ".yaml", ".yml")
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
    write_texts({path: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write files that belong together: all under temporary names, and only then renamed.

    Raises:
        OutputError: one cannot be written; the earlier files stay.
    """
    try:
        with contextlib.ExitStack() as stack:
            for path, text in texts.items():
                temporary = stack.enter_context(replaced_file(path))
                # A file's name that is not UTF-8 must not lose a table: its odd bytes are written as escapes.
                temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
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


def check_replaceable(path: Path, key: str, option: str = "--output") -> None:
    """Make sure that a JSON file may be written: there is none yet, or one that this package wrote.

    Args:
        path: of the file.
        key: that only our own file of this kind has.
        option: what the user calls it, for the error.

    Raises:
        OutputError: the name has another extension, or another file is there, such as a dataset's own dataset.json.
    """
    if path.suffix not in JSON_SUFFIXES:
        message = (
            f"Expected `{option}` to be a .json file, but got `{path}`: name it so, MONAI reads it by its extension."
        )
        raise OutputError(message)
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or key not in content:
        message = (
            f"Expected `{option}` to be a new file or one that this command wrote, but `{path}` is another file: name "
            "another one."
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
    """Write rows as CSV: NaN and None are empty cells, floats keep every bit, and `read_csv` reads all of it back."""
    write_text(path, table_text(columns, rows))


def table_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """The text that `write_csv` writes."""
    return csv_text([columns, *([row.get(column) for column in columns] for row in rows)])


def csv_text(rows: Iterable[Sequence[Any]], separator: str = ",") -> str:
    r"""The one way that this package writes a table.

    A cell is quoted where it has to be: separators, quotes and line breaks of every kind. Text that a spreadsheet
    would run as a formula gets an apostrophe in front; numbers never do.

    >>> csv_text([["case", "iou"], ["=1+1", 0.5], ["a,b\r", float("nan")], ["-1", -1.0]])
    'case,iou\n\'=1+1,0.5\n"a,b\r",\n-1,-1.0\n'
    """
    return "".join(separator.join(_quoted(_cell(value), separator) for value in row) + "\n" for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table by column, as `write_csv` or a spreadsheet wrote it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8 or not a table.
    """
    limit = csv.field_size_limit(sys.maxsize)  # its default of 131072 characters is less than a case's name may have
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream, strict=True))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    finally:
        csv.field_size_limit(limit)
    return [{name: _plain_text(cell) for name, cell in row.items() if isinstance(cell, str)} for row in rows]


FORMULA_STARTS = tuple("=+-@\t\r\n") + tuple("\uff1d\uff0b\uff0d\uff20")


def _cell(value: Any) -> str:
    """A value as the text of a cell."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        return repr(float(value)) if isinstance(value, float) else str(value)
    return f"'{value}" if value.lstrip("'").startswith(FORMULA_STARTS) and not _is_number(value) else value


def _plain_text(cell: str) -> str:
    """The text that `_cell` made a cell of."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA_STARTS) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.strip() == text


def _quoted(cell: str, separator: str) -> str:
    special = separator in cell or any(character in cell for character in '"\r\n\0') or cell.strip() != cell
    return '"' + cell.replace('"', '""') + '"' if special else cell


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON: NaN and infinities, which JSON does not have, become null."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(_strict(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
