"""What `dataset.json` says of channels and labels, in the Decathlon's way and in nnU-Net's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_iou.datasets.cases import DatasetError

__all__ = ["LabelScheme", "read_description", "read_label_scheme", "read_modalities"]

LARGEST_FILE = 64 * 2**20
MOST_CLASSES = 1000
MOST_SHOWN = 200  # characters of a value in a message
IGNORE = "ignore"


@dataclass(frozen=True)
class LabelScheme:
    """What the values in label files mean.

    Attributes:
        labels: value -> name, 0 first; without the ignored value. Of regions, the values that they are made of.
        regions: name -> values, in the order of dataset.json, where classes overlap; empty without regions.
        order: of the regions, the value that each is written as, later ones over earlier ones (nnU-Net's
            `regions_class_order`).
        ignore: value of voxels that count neither way, None without one.
    """

    labels: dict[int, str]
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    order: tuple[int, ...] = ()
    ignore: int | None = None


def read_description(path: Path, kind: type = dict) -> Any:
    """Read dataset.json, or another JSON file that holds a `kind`.

    Raises:
        DatasetError: it is missing, no JSON in UTF-8 (with or without byte-order mark), too large, too deeply nested,
            or has a key twice.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise _refusal(path, "to be a JSON file of some kilobytes", f"{path.stat().st_size} bytes", "correct it")
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique)
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{error.object[error.start : error.end]!r}, half of a character"
        raise _refusal(path, "to hold text", found, "write the name anew") from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DatasetError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        message = f"Expected {path} to be JSON, but it cannot be read ({reason}): correct the file."
        raise DatasetError(message) from error
    if not isinstance(content, kind):
        wanted = "a JSON object" if kind is dict else "a JSON list"
        message = f"Expected {path} to hold {wanted}, but got {type(content).__name__}: see docs/bundle.md."
        raise DatasetError(message)
    return content


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            message = f"the key {key!r} comes twice"
            raise ValueError(message)
        found[key] = value
    return found


def read_modalities(content: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Read the channels' names from `modality`, or nnU-Net's `channel_names`."""
    key = "modality" if "modality" in content or "channel_names" not in content else "channel_names"
    found = content.get(key)
    channels = sorted(found, key=lambda name: (len(name), name)) if isinstance(found, dict) else []
    if not channels or channels != [str(channel) for channel in range(len(channels))]:
        expected = f'`{key}` in {path} to name the channels by number, as {{"0": "CT"}}'
        message = f"Expected {expected}, but got {_short(found)}: correct it."
        raise DatasetError(message)
    return tuple(str(found[name]) for name in channels)  # type: ignore[index]


def read_label_scheme(content: Mapping[str, Any], path: Path) -> LabelScheme:
    """Read `labels`, as value -> name (Decathlon) or name -> value or values (nnU-Net v2).

    Raises:
        DatasetError: they name no background and one more value, two of them are one number, or a value is negative
            or beyond 64 bits.
    """
    found = content.get("labels")
    if isinstance(found, dict) and any(_is_value(value) for value in found.values()):
        pairs = [(str(name), _values(path, name, value)) for name, value in found.items()]
    elif isinstance(found, dict) and all(re.fullmatch(r"\s*[+-]?\d+\s*", str(key)) for key in found):
        pairs = [(str(name), (int(value),)) for value, name in found.items()]
    else:
        pairs = []
    singles = [(values[0], name) for name, values in pairs if len(values) == 1]
    values = [value for value, _ in singles]
    if len(pairs) < 2 or 0 not in values or min(values) < 0:
        shown = "a negative value, which no class can have" if values and min(values) < 0 else _short(found)
        message = (
            f"Expected `labels` in {path} to name the background 0 and at least one more value, as "
            f'{{"0": "background", "1": "lesion"}}, but got {shown}: correct it.'
        )
        raise DatasetError(message)
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise _refusal(path, "to name each label value once in `labels`", f"{twice[0]} twice", "remove one of them")
    _check_range(path, pairs)
    return _scheme(content, path, pairs)


def _scheme(content: Mapping[str, Any], path: Path, pairs: Sequence[tuple[str, tuple[int, ...]]]) -> LabelScheme:
    ignore = next((values[0] for name, values in pairs if name.lower() == IGNORE and len(values) == 1), None)
    kept = [(name, values) for name, values in pairs if values != (ignore,)]
    if all(len(values) == 1 for _, values in kept):
        return LabelScheme(dict(sorted((values[0], name) for name, values in kept)), ignore=ignore)
    regions = {name: values for name, values in kept if values != (0,)}
    singles = {values[0]: name for name, values in kept if len(values) == 1}
    every = sorted({0, *(value for values in regions.values() for value in values)})
    order = content.get("regions_class_order")
    if not isinstance(order, list) or len(order) != len(regions) or not all(map(_is_whole, order)):
        expected = f"`regions_class_order` in {path} to name a value for each of the {len(regions)} regions"
        message = f"Expected {expected}, but got {_short(order)}: add it, in the order of `labels`."
        raise DatasetError(message)
    return LabelScheme({value: singles.get(value, str(value)) for value in every}, regions, tuple(order), ignore)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_value(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, list) and bool(value) and all(map(_is_whole, value)))


def _values(path: Path, name: object, value: object) -> tuple[int, ...]:
    if not _is_value(value):
        raise _refusal(
            path, f"to give the label {_short(name)} a value or a list of values", _short(value), "correct it"
        )
    return tuple(dict.fromkeys(value)) if isinstance(value, list) else (value,)  # type: ignore[return-value]


def _check_range(path: Path, pairs: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    every = [value for _, values in pairs for value in values]
    if max(every) >= 2**63:
        raise _refusal(path, "to have label values within 64-bit integers", str(max(every))[:40], "renumber them")
    if min(every) < 0:
        raise _refusal(path, "to have label values from 0 up", str(min(every)), "renumber them")
    if len(pairs) > MOST_CLASSES:
        raise _refusal(path, f"to name at most {MOST_CLASSES} labels", str(len(pairs)), "merge some of them")


def _refusal(path: Path, expected: str, found: str, remedy: str) -> DatasetError:
    return DatasetError(f"Expected {path} {expected}, but got {found}: {remedy}.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
