"""This package's own errors, which MONAI buries under others when they are raised inside one of its configs."""

from __future__ import annotations

from collections.abc import Iterator

from monai_iou.files import OutputError

__all__ = ["chain", "own_error"]


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and so on to the root."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def own_error(error: BaseException) -> BaseException | None:
    """Return the error in a chain that says in a sentence of this package what is wrong, None if there is none.

    Example:
        >>> try:
        ...     raise ValueError("Expected 1, but got 2: take 1.")
        ... except ValueError as sentence:
        ...     buried = RuntimeError("Failed to evaluate ConfigExpression")
        ...     buried.__cause__ = sentence
        >>> own_error(buried)
        ValueError('Expected 1, but got 2: take 1.')
    """
    return next((each for each in chain(error) if _is_ours(each)), None)


def _is_ours(error: BaseException) -> bool:
    return isinstance(error, (ValueError, OutputError)) and str(error).startswith("Expected ")
