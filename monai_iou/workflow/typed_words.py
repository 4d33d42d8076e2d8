"""The command line of `python -m monai.bundle` as it was typed: Fire reads words as Python, and paths are words."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["is_bundle_command", "misread", "typed_text"]


def is_bundle_command() -> bool:
    """Return whether this program is `python -m monai.bundle`."""
    specification = getattr(sys.modules.get("__main__"), "__spec__", None)
    return specification is not None and specification.name.startswith("monai.bundle")


def typed_text(name: str, words: Sequence[str]) -> str | None:
    """Return the value of an option as it was typed, the last one if it is there twice; None if it is not there.

    Example:
        >>> typed_text("output_dir", ["run", "--output_dir", "a", "--output-dir=2024_01"])
        '2024_01'
    """
    text = None
    for place, word in enumerate(words):
        key, equals, value = word.partition("=")
        if key.startswith("-") and key.lstrip("-").replace("-", "_") == name:
            text = value if equals else words[place + 1] if place + 1 < len(words) else None
    return text


def misread(value: object, typed: str) -> bool:
    """Return whether an option's value is not the text that was typed: cut at a `#`, or a number in another form.

    Quotes, MONAI's expressions and references, and its `::` for `#` are not misread.

    Example:
        >>> misread("a", "a#1"), misread(202401, "2024_01"), misread(7, "7"), misread("a b", "'a b'")
        (True, True, False, False)
    """
    text = str(value)
    return text not in (typed, typed.replace("#", "::"), typed.strip("'\"")) and not typed.startswith(("$", "@", "%"))
