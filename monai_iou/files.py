"""Writing results: whole files under their names or nothing, numbers that read back the same."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class OutputError(RuntimeError):
    """The output folder cannot be written; the message names it and says why."""


def prepare(folder: Path) -> None:
    """Create the output folder and make sure that files can be written there.

    Raises:
        OutputError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = (
            f"Expected `--output` to be a folder that can be written, but got `{folder}` "
            f"({error.strerror}): choose another."
        )
        raise OutputError(message) from error


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that a reader never finds half of it.

    Raises:
        OutputError: the file cannot be written (disk full, folder removed).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("w", encoding="utf-8", newline="") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        message = (
            f"Expected to write `{path}`, but got the error '{error.strerror}': free space or choose another folder."
        )
        raise OutputError(message) from error


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
