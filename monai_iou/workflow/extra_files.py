"""Files for people beside a training, such as its table of epochs: one that cannot be used ends no training."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from monai_iou.files import OutputError, read_csv

__all__ = ["UNREADABLE", "earlier_epochs", "extra_file", "read_epochs"]

UNREADABLE = "epochs_unreadable.csv"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def extra_file(path: Path, told: set[Path] | None = None) -> Iterator[None]:
    """Go on where a file cannot be made, read or written, as a viewer may hold it, with one warning that names it.

    Args:
        path: of the file.
        told: the files of which the log has a warning already; this one is added.
    """
    try:
        yield
    except Exception as error:  # drawing libraries raise errors of any type
        if told is None or path not in told:
            held = isinstance(error, (OSError, OutputError))
            what = "read or replaced" if held else "made"
            why = str(error) if held else " ".join(f"{type(error).__name__}: {error}".split())
            logger.warning("%s cannot be %s now and stays as it is: %s", path, what, why)
        if told is not None:
            told.add(path)


def read_epochs(path: Path) -> tuple[list[dict[str, str]], int]:
    """Read the rows of an `epochs.csv`, which a spreadsheet may have saved in another form.

    Args:
        path: of the table.

    Returns:
        The rows whose cells are numbers, as text, or empty; and how many others there are, 1 where the whole file is
        none that can be read.

    Raises:
        OSError: the file cannot be opened.
    """
    try:
        rows = read_csv(path)
    except ValueError:  # of another encoding, or no table
        return [], 1
    readable = [row for row in rows if _has_numbers(row)]
    return readable, len(rows) - len(readable)


def _has_numbers(row: Mapping[str, str]) -> bool:
    """Whether this is the row of an epoch.

    >>> rows = {"epoch": "1", "val_mean_iou": ""}, {"epoch": "1", "train_loss": "0,9"}, {"train_loss": "0.9"}
    >>> [_has_numbers(row) for row in rows]
    [True, False, False]
    """
    try:
        _ = int(float(row["epoch"])), [float(cell) for cell in row.values() if cell]
    except (KeyError, ValueError, OverflowError):
        return False
    return True


def earlier_epochs(path: Path) -> list[dict[str, float]]:
    """Return the rows of an `epochs.csv` that a training goes on with; of others it keeps the file beside it.

    Args:
        path: of the table; there need not be one.

    Raises:
        OSError: the file cannot be opened, or not be kept.
    """
    if not path.is_file():
        return []
    rows, others = read_epochs(path)
    if others:
        kept = path.with_name(UNREADABLE)
        with kept.open("ab") as stream:  # behind what an earlier resumption kept
            stream.write(path.read_bytes())
        logger.warning(
            "%s has rows that cannot be read, perhaps since a spreadsheet saved it with decimal commas: they are left "
            "out of the table from now on, and %s keeps them.", path, kept,
        )  # fmt: skip
    return [{name: float(cell) for name, cell in row.items() if cell} for row in rows]
