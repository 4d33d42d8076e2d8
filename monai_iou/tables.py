"""Tables and JSON as text whose values are restored exactly when it is read, and the words that messages share."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The characters with which a spreadsheet recognises a formula, including their full-width forms.
FORMULA_STARTS = tuple("=+-@\t\r\n") + tuple("\uff1d\uff0b\uff0d\uff20")
# Where a spreadsheet may begin a cell: it may be set to separate them by semicolons or tabs, and does then not see the
# quotes around text that another cell precedes.
_CELL_START = r"(?:^|(?<=[;\t\r\n]))"
# One double quote may come before a formula: it opens a quoted cell there.
_FORMULA_FOLLOWS = rf"""(?='*(?:"'*)?[{re.escape("".join(FORMULA_STARTS))}])"""
_FORMULA = re.compile(_CELL_START + _FORMULA_FOLLOWS)
_MARKED_FORMULA = re.compile(f"{_CELL_START}'{_FORMULA_FOLLOWS}")


def table_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    r"""Return rows as the text of a CSV file with a header; see `csv_text`.

    >>> table_text(("case", "iou"), [{"case": "a", "iou": 0.5}, {"case": "b"}])
    'case,iou\na,0.5\nb,\n'
    """
    return csv_text([columns, *([row.get(column) for column in columns] for row in rows)])


def csv_text(rows: Iterable[Sequence[Any]], separator: str = ",") -> str:
    r"""Return rows of cells as the text of a table; every table of the package is written by this function.

    Floats are written with all their digits, NaN and None as empty cells. A cell is quoted if it contains a separator
    of any table that `read_csv` reads, a quote or a line break. Text that a spreadsheet would evaluate as a formula,
    whatever it takes for a separator, is prefixed with an apostrophe; numbers never are.

    >>> csv_text([["case", "iou"], ["=1+1", 0.5], ["a,b\r", float("nan")], ["-1", -1.0], ["x;=1+1", 1]])
    'case,iou\n\'=1+1,0.5\n"a,b\r",\n-1,-1.0\n"x;\'=1+1",1\n'
    """
    return "".join(separator.join(_quoted(_cell(value), separator) for value in row) + "\n" for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header, written by `write_csv` or a spreadsheet.

    Where the header has no comma, its cells and all others are separated by semicolons, as spreadsheets write them in
    countries with a decimal comma, or by tabs.

    Returns:
        One dictionary per row, from column to text.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8, or not a table.
    """
    limit = csv.field_size_limit(sys.maxsize)  # a cell may exceed the default of 131072 characters
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            separator = _separator(stream.readline())
            stream.seek(0)
            rows = list(csv.DictReader(stream, strict=True, delimiter=separator))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    finally:
        csv.field_size_limit(limit)
    # Blanks around a column's name are no part of it; a cell without a column has no name.
    return [{name.strip(): _plain_text(cell) for name, cell in row.items() if isinstance(cell, str)} for row in rows]


def _separator(header: str) -> str:
    """Return what separates the cells of a table."""
    return next((separator for separator in ",;\t" if separator in header), ",")


def _cell(value: Any) -> str:
    """Return a value as the text of a cell."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        return repr(float(value)) if isinstance(value, float) else str(value)
    return value if _is_number(value) else _FORMULA.sub("'", value)


def _plain_text(cell: str) -> str:
    """Return the text from which `_cell` made a cell."""
    return _MARKED_FORMULA.sub("", cell)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.strip() == text


def _quoted(cell: str, separator: str) -> str:
    special = cell.strip() != cell or any(character in cell for character in f'{separator};\t"\r\n\0')
    return '"' + cell.replace('"', '""') + '"' if special else cell


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    r"""Return a value as strict, indented JSON; NaN and infinities become null.

    Args:
        value: to be written.
        ascii_only: write other characters as escapes, for programs that read files in their system's encoding.

    >>> json_text({"iou": float("nan")})
    '{\n "iou": null\n}\n'
    """
    return json.dumps(_strict(value), indent=1, ensure_ascii=ascii_only, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun.

    Example:
        >>> counted(1, "case"), counted(2, "case"), counted(2, "patch", "patches")
        ('1 case', '2 cases', '2 patches')
    """
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def enumerated(noun: str, values: Iterable[Any]) -> str:
    """Return values behind their noun, which stands in the singular for one value.

    Example:
        >>> enumerated("label", [3]), enumerated("label", [1, 2]), enumerated("fold", (0, 1, 2))
        ('label 3', 'labels 1 and 2', 'folds 0, 1 and 2')
    """
    *others, last = map(str, values)
    return f"{noun}s {', '.join(others)} and {last}" if others else f"{noun} {last}"


def text_remedy(error: Exception, otherwise: str) -> str:
    """Return the remedy for a text file, such as a table or JSON, that could not be read.

    Args:
        error: that reading the file raised.
        otherwise: the remedy where the content is to blame, and neither the path nor the encoding.

    Example:
        >>> text_remedy(FileNotFoundError(), "correct it"), text_remedy(ValueError(), "correct it")
        ('check the path', 'correct it')
    """
    if isinstance(error, UnicodeError):
        return "save it in UTF-8"
    if isinstance(error, PermissionError):
        return "check its permissions"
    return "check the path" if isinstance(error, OSError) else otherwise
