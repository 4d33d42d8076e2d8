"""The files of inference's results: how they are called, and what none of them may replace."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from monai_iou.files import OutputError, check_outputs

__all__ = ["check_new", "check_results", "remove_result", "result_file"]

LONGEST_NAME = 255  # bytes that file systems allow; the name of an image may fit, but not with `_mask` behind it


def result_file(folder: Path, case: str, suffix: str, ending: str) -> Path:
    """Return the file of a result; the folders in a case's name are folders below `folder`.

    Args:
        folder: of the results.
        case: name of the case.
        suffix: what kind of result it is, "" for none.
        ending: of the format.

    Example:
        >>> result_file(Path("out"), "p1/image", "mask", ".mha").as_posix()
        'out/p1/image_mask.mha'
        >>> result_file(Path("out"), "a.b", "", ".nii.gz").as_posix()
        'out/a.b.nii.gz'
    """
    return folder / f"{case}{'_' if suffix else ''}{suffix}{ending}"


def check_results(results: Iterable[tuple[str, Path]], inputs: Mapping[str, Iterable[Path]]) -> None:
    """Check, before any work, that each result has a file of its own, which can be written and is not an input.

    Args:
        results: what each is, and its file.
        inputs: see `check_outputs`.

    Raises:
        OutputError: two results have one file, a file's name is too long, or a result would replace an input.
    """
    known: dict[Path, str] = {}
    for what, path in results:
        other = known.setdefault(path, what)
        if other != what:
            message = (
                f"Expected every result to have a file of its own, but {other} and {what} would both be `{path}`: "
                "segment the two images into different folders."
            )
            raise OutputError(message)
        _check_length(what, path)
    # Only a file that is there can be an input; most results are not, and every one is compared with every input.
    check_outputs({what: path for path, what in known.items() if os.path.lexists(path)}, inputs)


def _check_length(what: str, path: Path) -> None:
    length = len(os.fsencode(path.name))
    if length > LONGEST_NAME:
        message = (
            f"Expected {what} to have a file name of at most {LONGEST_NAME} bytes, but got {length} in `{path}`: give "
            "the image a shorter name."
        )
        raise OutputError(message)


def check_new(paths: Iterable[Path]) -> None:
    """Refuse to replace a file: a result that lies there may be somebody's work.

    Raises:
        OutputError: one is there.
    """
    for path in paths:
        if os.path.lexists(path):
            message = (
                f"Expected no file at {path}, where a result is to be written, but there is one: add --overwrite to "
                "replace it, or choose another folder with --output."
            )
            raise OutputError(message)


def remove_result(path: Path) -> None:
    """Remove a file that belonged to an earlier mask.

    Raises:
        OutputError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        message = (
            f"Expected to remove {path}, which belongs to an earlier mask, but got the error "
            f"'{error.strerror or error}': remove it, as it does not fit the new mask."
        )
        raise OutputError(message) from error
