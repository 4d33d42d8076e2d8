"""The curves of a training as one picture: loss and its terms, IoU and Dice, learning rate, seconds of an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.workflow.pictures import PIXELS_PER_INCH, pixels_of

__all__ = ["draw_curves"]

# Title of a plot, and what the names of its columns begin with.
PLOTS = (
    ("loss and its terms", ("train_loss",)),
    ("validation IoU", ("val_mean_iou",)),
    ("validation Dice", ("val_mean_dice",)),
    ("learning rate", ("learning_rate",)),
    ("seconds per epoch", ("seconds",)),
)
MAX_LINES = 10


def draw_curves(rows: Sequence[Mapping[str, Any]]) -> NDArray[np.uint8]:
    """Draw the columns of `epochs.csv` over the epochs.

    Args:
        rows: a mapping per epoch with `epoch` and any of the columns; a validation's columns are in some rows alone.

    Returns:
        The picture, shape (height, width, 3).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), dpi=PIXELS_PER_INCH, layout="constrained")
    places = figure.subplots(2, 3).ravel()
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))
    for place, (title, starts) in zip(places, PLOTS, strict=False):
        columns = [name for name in names if name.startswith(starts)][:MAX_LINES]
        for name in columns:
            points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
            # A single point has no line: markers show a training of one validation.
            place.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=_short(name, starts))
        if len(columns) > 1:
            place.legend(fontsize=8)
        place.set_title(title if columns else f"{title}: none yet", fontsize=10)
        place.set_xlabel("epoch", fontsize=9)
        place.grid(alpha=0.3)
        place.xaxis.get_major_locator().set_params(integer=True)
    for place in places[len(PLOTS) :]:
        place.set_axis_off()
    return pixels_of(figure)


def _short(name: str, starts: Sequence[str]) -> str:
    rest = next(name.removeprefix(start) for start in starts if name.startswith(start)).strip("_ ")
    return rest or {"train_loss": "loss"}.get(name, "mean")
