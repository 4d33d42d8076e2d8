"""The arguments that every region loss takes after its own, written once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from monai_iou.losses.base import RegionLoss

_Init = TypeVar("_Init", bound=Callable[..., None])
_KINDS = inspect.Parameter


def with_region_arguments(init: _Init) -> _Init:
    """Give a constructor `(self, own, *args, own_by_keyword, **options)` the signature of a region loss.

    That is: its own arguments, those of `IoULoss` in MONAI's order, by keyword those of `IoULoss` and its own. Without
    `*args`, the arguments of `IoULoss` are by keyword too. A call that does not fit raises TypeError naming the class.
    """
    own = list(inspect.signature(init).parameters.values())
    shared = list(inspect.signature(RegionLoss.__init__).parameters.values())[1:]
    if not any(parameter.kind is _KINDS.VAR_POSITIONAL for parameter in own):
        shared = [parameter.replace(kind=_KINDS.KEYWORD_ONLY) for parameter in shared]
    merged = [
        *[parameter for parameter in own if parameter.kind is _KINDS.POSITIONAL_OR_KEYWORD],
        *shared,
        *[parameter for parameter in own if parameter.kind is _KINDS.KEYWORD_ONLY],
    ]
    signature = inspect.Signature(merged, return_annotation=None)

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **options: Any) -> None:
        try:
            signature.bind(self, *args, **options)
        except TypeError as error:
            names = ", ".join(list(signature.parameters)[1:])
            reason = str(error).removeprefix("got ")
            message = f"Expected arguments of {type(self).__name__} ({names}), but got {reason}."
            raise TypeError(message) from None
        init(self, *args, **options)

    construct.__signature__ = signature  # type: ignore[attr-defined]
    return cast("_Init", construct)
