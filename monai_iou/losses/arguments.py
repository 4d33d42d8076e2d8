"""Arguments of the losses: explain a call that does not fit, suggest the right name, and check factors."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor

from monai_iou import checks

_Init = TypeVar("_Init", bound=Callable[..., None])

# Argument names of MONAI's and other libraries' losses, with the names used here. The first that the loss has is meant.
_RENAMED = {
    "lambda_dice": ("lambda_iou", "lambda_global"),
    "lambda_gdl": ("lambda_iou",),
    "lambda_jaccard": ("lambda_iou",),
    "lambda_focal": ("lambda_ce",),
    "lambda_ce": ("lambda_focal",),
    "ce_weight": ("weight",),
    "focal_weight": ("weight",),
    "class_weights": ("weight",),
    "use_softmax": ("softmax",),
    "weight_mode": ("weights",),
    "w_type": ("weight",),
}
_OF_LOGITS = [
    (("softmax", "sigmoid"), "write `softmax=True` or `sigmoid=True` for logits"),
    (("sigmoid",), "write `sigmoid=True` for logits"),
]
# What to write for an argument of another library, with the names used here: said only of a loss that has them.
_WRITTEN: dict[str, list[tuple[tuple[str, ...], str]]] = {
    "jaccard": [(("alpha", "beta"), "write `alpha=1` and `beta=1` for the IoU (Jaccard)")],
    "smooth": [(("smooth_nr", "smooth_dr"), "write `smooth_nr` and `smooth_dr`")],
    "per_image": [(("batch",), "write `batch=False`")],
    "mode": [
        (
            ("softmax", "sigmoid"),
            "write `softmax=True` for mutually exclusive classes, or `sigmoid=True` for overlapping ones",
        )
    ],
    "from_logits": _OF_LOGITS,
    "activation": _OF_LOGITS,
}
_EXPLAINED = {
    "alpha": "use FocalTverskyLoss, which weights false positives by `alpha`",
    "beta": "use FocalTverskyLoss, which weights false negatives by `beta`",
    "gamma": "use FocalIoULoss or LogIoULoss for an exponent of the IoU, or IoUFocalLoss for a focal term",
    "pos_weight": "use WeightedCrossEntropyLoss or IoUCELoss, which weight the foreground of sigmoid outputs by it",
    "num_classes": "leave it out, because the classes are known from the input and the target",
    "lambda_focal": "use IoUFocalLoss for a focal term",
    "lambda_ce": "use IoUCELoss for a cross-entropy term",
    "lambda_iou": "use IoUCELoss for a sum of terms, or CompoundLoss(losses, weights)",
    "lambda_dice": "use IoUCELoss(lambda_iou=...) for a sum of terms, or CompoundLoss(losses, weights)",
}


def explains_arguments(init: _Init) -> _Init:
    """Make a constructor raise a one-sentence TypeError, naming its class, when a call does not fit its arguments."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **options: Any) -> None:
        bound_arguments(signature, self, args, options)
        init(self, *args, **options)

    return cast("_Init", construct)


def bound_arguments(
    signature: inspect.Signature, loss: object, args: tuple[Any, ...], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by name, without `self`.

    Raises:
        TypeError: if they do not fit the signature. For an unknown name, the message suggests the name that was
            probably meant.
    """
    try:
        bound = signature.bind(loss, *args, **options)
    except TypeError as error:
        names = list(signature.parameters)[1:]
        unknown = [name for name in options if name not in names]
        reason, remedy = str(error).removeprefix("got "), "correct the call"
        if unknown:
            reason = f"an unexpected keyword argument '{unknown[0]}'"
            remedy = _remedy(unknown[0], names)
        message = f"Expected arguments of {type(loss).__name__} ({', '.join(names)}), but got {reason}: {remedy}."
        raise TypeError(message) from None
    return dict(list(bound.arguments.items())[1:])


def _remedy(name: str, names: list[str]) -> str:
    """Return what to do instead of passing the unknown argument `name`."""
    if name == "alpha" and "pos_weight" in names:  # a focal loss, which has another alpha than a Tversky loss
        factor = next((f"`{each}`" for each in ("lambda_focal", "lambda_ce") if each in names), "the loss")
        return (
            "for the `alpha` of a focal loss, write `pos_weight=alpha / (1 - alpha)` with `sigmoid=True` and multiply "
            f"{factor} by 1 - alpha, or use FocalTverskyLoss for that of a Tversky loss"
        )
    renamed = [other for other in _RENAMED.get(name, ()) if other in names]
    is_known = name in _EXPLAINED or name in _WRITTEN
    close = renamed or ([] if is_known else difflib.get_close_matches(name, names, n=1))
    if close:
        return f"write `{close[0]}`"
    if {"loss", "losses"} & set(names):
        return "choose among these arguments, and give options of the losses inside to these"
    if name == "jaccard" and "beta" not in names and {"smooth_nr", "bins"} & set(names):  # neither Tversky nor entropy
        return "leave it out, because this loss always computes the IoU (Jaccard)"
    if name in _WRITTEN:
        fitting = [text for needed, text in _WRITTEN[name] if set(needed) <= set(names)]
        return fitting[0] if fitting else "leave it out, because this loss has no such option"
    return _EXPLAINED.get(name, "choose among these arguments")


def check_factors(weights: Sequence[float] | Tensor | None, of: str) -> list[float] | None:
    """Return the factors of a loss, one for each term or scale; raise unless they are a list of numbers of at least 0.

    Args:
        weights: the factors.
        of: what has a factor, "loss" or "scale".
    """
    if weights is None:
        return None
    check_constant("weights", weights)
    remedy = f"give one factor for each {of}, such as weights=[1.0, 0.5]"
    listed = weights.tolist() if isinstance(weights, Tensor) and weights.ndim else weights
    factors = checks.check_list("weights", listed, remedy)
    if not factors:
        message = f"Expected `weights` to hold at least one factor, but got {weights}: {remedy}."
        raise ValueError(message)
    for factor in factors:
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
            message = f"Expected every one of `weights` to be a number, but got {type(factor).__name__}: {remedy}."
            raise TypeError(message)
    return [checks.check_positive("weights", factor, allow_zero=True) for factor in factors]


def check_constant(name: str, value: object) -> None:
    """Raise ValueError for a tensor, or a list with one, that requires a gradient: a loss trains no weights."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
        message = f"Expected `{name}` to be constant, but got a tensor that requires a gradient: pass {name}.detach()."
        raise ValueError(message)
