"""Paths as MONAI's configs must hold them: of `#` its parser makes `::`, and text that starts with `$` it evaluates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["literal", "with_literal_paths"]

PATHS = ("bundle_root", "dataset_dir", "ckpt_dir", "output_dir", "images", "models", "start_from")
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
    return "$" + re.sub("[#@%]", lambda sign: f"\\x{ord(sign[0]):x}", repr(value))


def with_literal_paths(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bundle's keys with the paths among them as they are; in other keys, `$` and `@` are the user's own."""
    return {name: literal(value) if name in PATHS else value for name, value in keys.items()}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)
