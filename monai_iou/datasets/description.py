"""What `dataset.json` says of channels and labels, in the Decathlon's way and in nnU-Net's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.scheme import LabelScheme
from monai_iou.tables import counted, text_remedy

__all__ = [
    "channels_key",
    "description_places",
    "read_description",
    "read_label_scheme",
    "read_labelled",
    "read_modalities",
]

LARGEST_FILE = 64 * 2**20
MOST_CLASSES = 1000
MOST_SHOWN = 200  # characters of a value in a message
IGNORE = "ignore"


def description_places(folder: Path) -> list[Path]:
    """Return where the dataset.json of a folder of labels may lie: in the folder or above it.

    A folder that is a link counts as it is written first, and then as the folder that it leads to.
    """
    written, followed = Path(os.path.normpath(folder.absolute())), folder.resolve()
    places = (written, written.parent, followed, followed.parent)
    return [place / "dataset.json" for place in dict.fromkeys(places)]


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
        bad_bytes = f"{error.object[error.start : error.end]!r}, half of a character"
        raise _refusal(path, "to hold text", bad_bytes, "write the name anew") from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DatasetError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        remedy = text_remedy(error, "correct the file")
        message = f"Expected {path} to be JSON, but it cannot be read ({reason}): {remedy}."
        raise DatasetError(message) from error
    if not isinstance(content, kind):
        wanted = "a JSON object" if kind is dict else "a JSON list"
        message = f"Expected {path} to hold {wanted}, but got {type(content).__name__}: see docs/bundle.md."
        raise DatasetError(message)
    return content


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            message = f"the key {key!r} comes twice"
            raise ValueError(message)
        unique[key] = value
    return unique


def channels_key(content: Mapping[str, Any]) -> str:
    """Return the key that names the channels: `modality`, or nnU-Net's `channel_names`."""
    return "modality" if "modality" in content or "channel_names" not in content else "channel_names"


def read_modalities(content: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Read the channels' names."""
    key = channels_key(content)
    modalities = content.get(key)
    channels = sorted(modalities, key=lambda name: (len(name), name)) if isinstance(modalities, dict) else []
    if not channels or channels != [str(channel) for channel in range(len(channels))]:
        expected = f'`{key}` in {path} to name the channels by number, as {{"0": "CT"}}'
        message = f"Expected {expected}, but got {_short(modalities)}: correct it."
        raise DatasetError(message)
    return tuple(str(modalities[name]) for name in channels)  # type: ignore[index]


def read_label_scheme(content: Mapping[str, Any], path: Path) -> LabelScheme:
    """Read `labels`, as value -> name (Decathlon) or name -> value or values (nnU-Net v2).

    Raises:
        DatasetError: they name no background and one more value, two of them are one number, or a value is negative
            or beyond 64 bits.
    """
    labels = content.get("labels")
    if isinstance(labels, dict) and any(_is_value(value) for value in labels.values()):
        pairs = [(str(name), _values(path, name, value)) for name, value in labels.items()]
    elif isinstance(labels, dict) and all(re.fullmatch(r"\s*[+-]?\d+\s*", str(key)) for key in labels):
        pairs = [(str(name), (int(value),)) for value, name in labels.items()]
    else:
        pairs = []
    singles = [(values[0], name) for name, values in pairs if len(values) == 1]
    values = [value for value, _ in singles]
    if len(pairs) < 2 or 0 not in values or min(values) < 0:
        shown = "a negative value, which no class can have" if values and min(values) < 0 else _short(labels)
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
    ignore = _ignored(content, path, pairs) if ignore is None else ignore
    kept = [(name, values) for name, values in pairs if values != (ignore,)]
    soft = _is_soft(content, path, ignore)
    named = {values[0]: name for name, values in kept if len(values) == 1}
    if "regions" in content:
        regions = _named_regions(content["regions"], path, named)
    elif all(len(values) == 1 for _, values in kept):
        if len(kept) < 2:
            raise _refusal(path, "to name a class besides the background and `ignore`", "none", "add it to `labels`")
        return LabelScheme(dict(sorted(named.items())), ignore=ignore, soft=soft)
    else:
        regions = {name: values for name, values in kept if values != (0,)}
    every = sorted({0, *named, *(value for values in regions.values() for value in values)})
    if ignore in every:
        raise _refusal(path, "to have no region with the value of `ignore`", str(ignore), "take it out of the region")
    order = _region_order(content, path, regions)
    return LabelScheme({value: named.get(value, str(value)) for value in every}, regions, order, ignore, soft)


def _ignored(content: Mapping[str, Any], path: Path, pairs: Sequence[tuple[str, tuple[int, ...]]]) -> int | None:
    """The value of the key `ignore`, of datasets that do not name it among the labels."""
    value = content.get(IGNORE)
    if value is None:
        return None
    if not _is_whole(value) or not 0 < value < 2**63:
        raise _refusal(path, "to have a label value above 0 as `ignore`", _short(value), "correct it")
    used = next((name for name, values in pairs if value in values and len(values) > 1), None)
    if used is not None:
        raise _refusal(
            path, "to have an `ignore` value of its own", f"{value}, a value of {used}", "correct one of them"
        )
    return int(value)


def _is_soft(content: Mapping[str, Any], path: Path, ignore: int | None) -> bool:
    soft = content.get("soft_labels", False)
    if not isinstance(soft, bool):
        raise _refusal(path, "to have true or false as `soft_labels`", _short(soft), "correct it")
    if soft and ignore is not None:
        reason = f"the label value {ignore} for it"
        raise _refusal(path, "to have no `ignore` with `soft_labels`, whose files hold no values", reason, "remove one")
    return soft


def _named_regions(entries: object, path: Path, named: Mapping[int, str]) -> dict[str, tuple[int, ...]]:
    """The key `regions`: name -> values, beside `labels` that name the values one by one."""
    if not isinstance(entries, dict) or not entries or not all(map(_is_value, entries.values())):
        expected = 'to map names to lists of label values in `regions`, as {"whole": [1, 2]}'
        raise _refusal(path, expected, _short(entries), "correct it")
    regions = {str(name): _values(path, name, values) for name, values in entries.items()}
    unknown = next((value for values in regions.values() for value in values if value not in named or not value), None)
    if unknown is not None:
        raise _refusal(path, "to make `regions` of foreground values that `labels` names", str(unknown), "correct one")
    return regions


def _region_order(content: Mapping[str, Any], path: Path, regions: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    order = content.get("regions_class_order")
    if not isinstance(order, list) or len(order) != len(regions) or not all(map(_is_whole, order)):
        expected = f"`regions_class_order` in {path} to name {counted(len(regions), 'value')}, one for each region"
        message = f"Expected {expected}, but got {_short(order)}: add it, in the order of the regions."
        raise DatasetError(message)
    for (name, values), value in zip(regions.items(), order, strict=True):
        if value not in values:
            message = (
                f"Expected `regions_class_order` in {path} to write each region as one of its values, but got {value} "
                f"for {name}, which has {', '.join(map(str, values))}: correct the order."
            )
            raise DatasetError(message)
    return tuple(order)


def read_labelled(entries: object, scheme: LabelScheme, where: str) -> tuple[int, ...] | None:
    """Read a case's `labelled`: the classes that were annotated in it, by name or value.

    Args:
        entries: the value of the key `labelled` in dataset.json, None if it says nothing.
        scheme: of the labels.
        where: for the error.

    Returns:
        Their numbers from 1, None if all of them are.

    Raises:
        DatasetError: it is no list, or names a class that there is not.

    Example:
        >>> scheme = LabelScheme({0: "background", 1: "liver", 5: "tumour"})
        >>> read_labelled(["liver"], scheme, "c"), read_labelled([5, "liver"], scheme, "c")
        ((1,), None)
    """
    if entries is None:
        return None
    names = {name: number for number, (name, _) in enumerate(scheme.classes, start=1)}
    known: dict[Any, int] = {**names, "background": 0, 0: 0, "0": 0, scheme.labels[0]: 0}
    for number, (_, values) in enumerate(() if scheme.regions else scheme.classes, start=1):
        known |= {values[0]: number, str(values[0]): number}
    given = entries if isinstance(entries, list) else [entries]
    for name in given:
        if not isinstance(name, (str, int)) or isinstance(name, bool) or name not in known:
            listed = ", ".join(names)
            message = (
                f"Expected `labelled` of {where} to list classes of `labels` ({_short(listed)}), but got "
                f"{_short(name)}: write their names."
            )
            raise DatasetError(message)
    numbers = tuple(sorted({known[name] for name in given} - {0}))
    return None if len(numbers) == len(names) else numbers


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


def _refusal(path: Path, expected: str, value: str, remedy: str) -> DatasetError:
    return DatasetError(f"Expected {path} {expected}, but got {value}: {remedy}.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
