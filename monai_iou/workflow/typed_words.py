"""The command line of `python -m monai.bundle` as it was typed: Fire reads words as Python, and paths are words."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["is_bundle_command", "is_cut", "misread", "output_key", "switch_on", "typed_text"]


def is_bundle_command() -> bool:
    """Return whether this program is `python -m monai.bundle`."""
    specification = getattr(sys.modules.get("__main__"), "__spec__", None)
    return specification is not None and specification.name.startswith("monai.bundle")


def switch_on(name: str) -> str:
    """Return how the command that runs sets a switch, for a message: `monai-iou train` has flags.

    Example:
        >>> switch_on("resume")
        '--resume'
    """
    return f"--{name} true" if is_bundle_command() else f"--{name}"


def output_key(name: str) -> str:
    """Return how the command that runs names a folder that it writes to, for a message.

    Example:
        >>> output_key("ckpt_dir")
        '--output'
    """
    return f"--{name}" if is_bundle_command() else "--output"


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
    return text not in (typed, typed.replace("#", "::"), typed.strip("'\"")) and not _is_expression(typed)


def is_cut(value: object, typed: str) -> bool:
    """Return whether an option's value ends at the first `#` of the text that was typed.

    Example:
        >>> is_cut("fold", "fold#0"), is_cut("fold::0", "fold#0"), is_cut(5, "%params.json#epochs")
        (True, False, False)
    """
    text = str(value)
    return "#" in typed and "#" not in text and "::" not in text and not _is_expression(typed)


def _is_expression(typed: str) -> bool:
    """Whether MONAI resolves the text: an expression, a reference, or a macro that reads a file."""
    return typed.lstrip("'\"").startswith(("$", "@", "%"))
