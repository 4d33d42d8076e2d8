"""Paths as MONAI's configs must hold them: of `#` its parser makes `::`, and text that starts with `$` it evaluates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["PATHS", "as_code", "literal", "reference", "with_literal_paths"]

PATHS = ("bundle_root", "dataset_dir", "ckpt_dir", "output_dir", "cache_dir", "start_from")  # the keys of one path
LISTS = ("images", "models")
# At the start of a text these signs mark an expression, a reference or a macro; the others count anywhere.
SIGNS = re.compile(r"\A[$@%]|#|[@%]::")


def literal(value: Any) -> Any:
    r"""Return a value that MONAI's parser takes as it is: the value itself, or where that has signs, an expression.

    Args:
        value: text, or lists and dictionaries of text.

    Example:
        >>> literal("data/a.nii.gz")
        'data/a.nii.gz'
        >>> print(literal(["data/a#1.nii.gz", "$b.nii.gz"]))
        $['data/a\x231.nii.gz', '$b.nii.gz']
    """
    if not any(SIGNS.search(text) for text in _texts(value)):
        return value
    return f"${as_code(value)}"


def reference(path: str, key: str) -> str:
    r"""Return the text by which a config reads a key of a JSON file: a macro, or where it would not do, an expression.

    Example:
        >>> reference("weights.json", "weights")
        '%weights.json::weights'
        >>> print(reference("run#1.json", "weights"))
        $__import__('json').loads(__import__('pathlib').Path('run\x231.json').read_text('utf-8'))['weights']
    """
    if literal(path) == path:
        return f"%{path}::{key}"
    return f"$__import__('json').loads(__import__('pathlib').Path({as_code(path)}).read_text('utf-8'))[{key!r}]"


def as_code(value: Any) -> str:
    """Return a value as Python, for an expression of a config in which no sign is a reference to another key."""
    return re.sub("[#@%]", lambda sign: f"\\x{ord(sign[0]):x}", repr(value))


def with_literal_paths(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bundle's keys with the paths among them as they are; in other keys, `$` and `@` are the user's own."""
    return {name: literal(value) if name in (*PATHS, *LISTS) else value for name, value in keys.items()}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)
