"""Records of finished cases, so that an evaluation started again does only what is not done yet.

They lie in the folder `finished` of the output, one file per case: a line with the record and a line with its pictures,
each with a checksum, so that a damaged or older record is made again and never read as something else. A record names
what it depends on: the hashes of both files and a fingerprint of the options. What was counted in a case's probability
maps lies beside it, so that maps can be added or replaced later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from monai_iou import files as out
from monai_iou.evaluation.case_files import Settings
from monai_iou.versions import version_of

# Raised when the content of a record changes: older ones are then evaluated again.
VERSION = 9


def settings_hash(settings: Settings) -> str:
    """What a record depends on besides its files: the options, and the versions of this package and of its record."""
    text = json.dumps([VERSION, version_of("monai-iou"), asdict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write(output: Path, record: Mapping[str, Any]) -> None:
    """Keep the record of a case.

    Raises:
        OutputError: it cannot be written.
    """
    path = _path(output, record["case"])
    kept = {name: value for name, value in record.items() if name != "pictures"}
    _make(path.parent)
    out.write_text(path, _line(kept) + _line(record.get("pictures", {})))


def read(output: Path, case: str) -> dict[str, Any] | None:
    """The record of a case without its pictures, or None if there is none that is whole."""
    record = _content(_path(output, case), 0)
    return record if record is not None and record.get("case") == case else None


def read_picture(output: Path, case: str, label: str) -> dict[str, Any] | None:
    """The picture of a structure in a case, or None if there is none."""
    pictures = _content(_path(output, case), 1) or {}
    picture = pictures.get(label)
    return picture if isinstance(picture, dict) else None


def write_maps(output: Path, case: str, content: Mapping[str, Any]) -> None:
    """Keep the counts of a case's probability maps.

    Raises:
        OutputError: they cannot be written.
    """
    path = _path(output, case, ".maps")
    _make(path.parent)
    out.write_text(path, _line(content))


def read_maps(output: Path, case: str) -> dict[str, Any] | None:
    """The counts of a case's probability maps, or None if there are none that are whole."""
    content = _content(_path(output, case, ".maps"), 0)
    return content if content is not None and content.get("case") == case else None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = (
            f"Expected `{folder}` to be the folder of the finished cases, but got the error '{error.strerror}': remove "
            "what lies there, or choose another output folder."
        )
        raise out.OutputError(message) from error


def _line(content: Mapping[str, Any]) -> str:
    # Python's own NaN and Infinity, unlike summary.json: only this module reads these files.
    text = json.dumps(content)
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n"


def _content(path: Path, number: int) -> dict[str, Any] | None:
    try:
        with path.open(encoding="utf-8", newline="\n") as stream:
            for _ in range(number):
                stream.readline()
            checksum, _, text = stream.readline().rstrip("\n").partition(" ")
        if checksum != hashlib.sha256(text.encode()).hexdigest():
            return None
        content = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _path(output: Path, case: str, kind: str = "") -> Path:
    # Case names are relative paths of any length and alphabet; their hash is a file name everywhere.
    name = hashlib.sha256(case.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return output / "finished" / f"{name}{kind}.jsonl"
