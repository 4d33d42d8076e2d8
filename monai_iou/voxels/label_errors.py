"""The errors for targets whose values are not labels: they name the first wrong value that counts, and the remedy."""

from __future__ import annotations

import math

from torch import Tensor


def label_error(
    labels: Tensor, classes: int | None, ignore_index: int | None, kept: Tensor | None = None
) -> ValueError:
    """Return the error for the first value of a label map that is not a class.

    Args:
        labels: label map, (B, 1, *S) or (B, N).
        classes: number C of classes; None where no input has a channel for each, so that any number is one.
        ignore_index: label of ignored voxels.
        kept: which voxels count, bool of as many voxels; None if all do.
    """
    values = labels.detach().flatten()
    values = values if values.is_floating_point() else values.long()
    below = values.isfinite() if classes is None else values < classes
    bad = ~((values >= 0) & below & (values == values.round() if values.is_floating_point() else True))
    if ignore_index is not None:
        bad = bad & (values != ignore_index)
    value = _first(values, bad, kept)
    remedy = "map the labels to consecutive classes, or set `ignore_index` to the value to leave out"
    expected = "class numbers from 0" if classes is None else f"the labels 0 to {classes - 1}"
    if value is None:
        return _overwritten(expected)
    if not math.isfinite(value):
        remedy = "replace it by the number of a class"
    elif isinstance(value, float) and value != round(value):
        remedy = f"give a soft target one channel per class, shape (B, {classes or 'C'}, *S)"
    elif isinstance(value, float):
        value = int(value)
    channels = "" if classes is None else f" of an input with {classes} channels"
    message = f"Expected `target` to hold {expected}{channels}, but got {value}: {remedy}."
    return ValueError(message)


def map_error(maps: Tensor, kept: Tensor | None = None) -> ValueError:
    """Return the error for per-class maps with a value outside 0 to 1.

    Args:
        maps: (B, C, *S).
        kept: which voxels count, (B, N) bool; None if all do.
    """
    values = maps.detach().flatten(2)
    values = values if values.is_floating_point() else values.long()  # torch does not order unsigned types of 16 bits
    kept = None if kept is None else kept.unsqueeze(1).expand(values.shape)
    value = _first(values, ~((values >= 0) & (values <= 1)), kept)
    if value is None:
        return _overwritten("per-class values between 0 and 1")
    one = maps.shape[1] == 1
    expected = "values between 0 and 1 for an input with one channel" if one else "per-class values between 0 and 1"
    if not math.isfinite(value):
        remedy = "replace it by the share of the class"
        if math.isnan(value):
            remedy += "; only a class that was not annotated is NaN in its whole map"
    elif value != round(value):
        remedy = "clip the values to 0" if value < 0 else "divide the values by the largest one"
    elif one:
        label = int(value)
        remedy = f"pass `target > 0`, `target == {label}` for this label alone, or ignore_index={label} to leave it out"
    else:
        remedy = "pass maps of 0 and 1, such as `target > 0`, or class numbers as one channel, shape (B, 1, *S)"
    message = f"Expected `target` to hold {expected}, but got {value}: {remedy}."
    return ValueError(message)


def _first(values: Tensor, bad: Tensor, kept: Tensor | None) -> float | None:
    """Return the first bad value that counts; None if there is none any more."""
    found = values[bad if kept is None else bad & kept.reshape(bad.shape)]
    return found[0].item() if found.numel() else None


def _overwritten(expected: str) -> ValueError:
    message = (
        f"Expected `target` of an earlier call to hold {expected}, but got another value, which has been overwritten "
        "since: check the labels before they are passed, or give every call a tensor of its own."
    )
    return ValueError(message)
