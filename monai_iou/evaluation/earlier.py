"""What an output folder holds already: results of an earlier run are replaced, files of others never."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from monai_iou.evaluation.exports import EXPORTS
from monai_iou.evaluation.request import Request, RequestError
from monai_iou.files import OutputError

__all__ = ["MARKS", "begins_with", "check_earlier", "check_marks", "earlier_exports", "replaced_note"]

# How the results of an evaluation begin.
MARKS = {
    "cases.csv": b"case,label,",
    "lesions.csv": b"case,label,lesion,",
    "failures.csv": b"case,reason,",
    "summary.json": b'{\n "cases": {\n  "paired": ',
    "report.html": b"<title>Segmentation evaluation: ",
}
LOOKED_INTO = 4096  # bytes of a page until its title
# Between the cells of a table that a spreadsheet saved where numbers have a decimal comma.
OTHER_SEPARATORS = bytes.maketrans(b";\t", b",,")


def check_marks(output: Path, marks: Mapping[str, bytes], what: str) -> None:
    """Check that the files that would be replaced are of the same kind.

    Args:
        output: folder for the results.
        marks: name of a file -> what its beginning contains.
        what: the command that writes them, for the message.

    Raises:
        OutputError: one is not.
    """
    for name, mark in marks.items():
        path = output / name
        if os.path.lexists(path) and not begins_with(path, mark):
            raise _foreign(path, what)


def check_earlier(request: Request) -> None:
    """Check that an evaluation would replace nothing but results of an earlier one.

    Raises:
        RequestError: a file that it would replace was not written by an evaluation.
    """
    options = _options(request.output)
    known = earlier_exports(request.output)
    if options and "export" not in options:  # an earlier version did not list them
        known = [export.file for export in EXPORTS.values()]
    exported = [EXPORTS[kind].file for kind in request.export if EXPORTS[kind].file not in known]
    try:
        check_marks(request.output, MARKS, "an evaluation")
        foreign = next((name for name in exported if os.path.lexists(request.output / name)), None)
        if foreign is not None:
            raise _foreign(request.output / foreign, "an evaluation")
    except OutputError as error:
        raise RequestError(str(error)) from error


def earlier_exports(output: Path) -> list[str]:
    """Return the files in the formats of others that an earlier evaluation wrote."""
    kinds = _options(output).get("export")
    listed: Iterable[Any] = kinds if isinstance(kinds, list) else ()
    return [EXPORTS[kind].file for kind in listed if kind in EXPORTS]


def replaced_note(request: Request) -> list[str]:
    """Return a note if the folder holds an evaluation of other folders, whose results are about to be replaced."""
    options = _options(request.output)
    earlier = [options.get(name) for name in ("predictions", "references")]
    if not all(isinstance(name, str) for name in earlier):
        return []
    if [Path(str(name)).absolute() for name in earlier] == [
        request.predictions.absolute(),
        request.references.absolute(),
    ]:
        return []
    return [f"This folder held the evaluation of {earlier[0]} against {earlier[1]}, which this one has replaced."]


def _options(output: Path) -> dict[str, Any]:
    """The options of an earlier evaluation, as its summary.json has them; {} without one."""
    try:
        options = json.loads((output / "summary.json").read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return options if isinstance(options, dict) else {}


def begins_with(path: Path, mark: bytes) -> bool:
    """Whether the beginning of a file contains a mark; of a table, also if a spreadsheet has saved it since."""
    beginning = _beginning(path)
    if path.suffix == ".csv":
        beginning = beginning.partition(b"\n")[0].translate(OTHER_SEPARATORS, b'"')
    return mark in beginning


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(LOOKED_INTO)
    except OSError:
        return b""


def _foreign(path: Path, what: str) -> OutputError:
    return OutputError(
        f"Expected `--output` to be a folder for results, but `{path}` there was not written by {what} and would be "
        "replaced: name another folder."
    )
