"""Records of finished cases, so that an evaluation started again does only what is not done yet.

They lie in the folder `finished` of the output, one JSON file a case, with what they depend on: the hashes of both
files and a fingerprint of the options.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from monai_iou import files as out
from monai_iou.evaluation.scoring import Settings
from monai_iou.volumes.reading import file_hash

# Raised when the content of a record changes: older ones are then evaluated again.
VERSION = 2


def settings_hash(settings: Settings) -> str:
    """What a record depends on besides its files: the options, and the versions of this package and of its record."""
    text = json.dumps([VERSION, metadata.version("monai-iou"), asdict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write(output: Path, record: Mapping[str, Any]) -> None:
    """Keep the record of a case.

    Raises:
        OutputError: it cannot be written.
    """
    path = _path(output, record["case"])
    out.prepare(path.parent)
    # Python's own NaN and Infinity, unlike summary.json: only `read` reads this file.
    out.write_text(path, json.dumps(record))


def read(output: Path, case: str) -> dict[str, Any] | None:
    """The record of a case, or None if there is none that can be read."""
    try:
        record = json.loads(_path(output, case).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("case") == case else None


def matches_inputs(record: Mapping[str, Any], **inputs: Path) -> bool:
    """Whether the files (`prediction`, `reference`) are those the record was made from."""
    try:
        return all(record["inputs"][name] == file_hash(path) for name, path in inputs.items())
    except OSError:
        return False  # a file that cannot be read is the case's failure, told by its task


def _path(output: Path, case: str) -> Path:
    # Case names are relative paths of any length and alphabet; their hash is a file name everywhere.
    return output / "finished" / f"{hashlib.sha256(case.encode()).hexdigest()[:24]}.json"
