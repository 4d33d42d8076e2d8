"""Pictures of a mask over its image: the slice of each plane with most of it, contours by label, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.files import replaced_file

__all__ = ["PIXELS_PER_INCH", "draw_case", "pixels_of", "save_png"]

PLANES = (("axial", 2, (0, 1)), ("coronal", 1, (0, 2)), ("sagittal", 0, (1, 2)))  # axes in RAS order
# Letters at the left, right, upper and lower edge of a plane, as in the report, and their places there.
SIDES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
EDGES = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"),
         (0.5, 0.02, "center", "bottom"))  # fmt: skip
WINDOW = (0.5, 99.5)  # percentiles that black and white stand for
MAX_LABELS = 10
PIXELS_PER_INCH = 100


def draw_case(
    image: NDArray[Any],
    prediction: NDArray[Any],
    reference: NDArray[Any] | None = None,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
    backwards: Sequence[bool] = (False, False, False),
) -> NDArray[np.uint8]:
    """Draw three planes of an image with the contours of its labels: dashed the prediction, solid the reference.

    Each plane shows the slice that holds most of the reference, or of the prediction where there is none; the middle
    one without either. As in the report, the patient's right is on the left, and in the sagittal plane the front.

    Args:
        image: shape (X, Y, Z), its axes pointing to the patient's right, front and head.
        prediction: label values, of the same shape; 0 is the background.
        reference: likewise, if there is one.
        spacing: of the voxels, in mm.
        title: above the planes.
        backwards: for each axis, whether the slices of the file are counted from the axis's other end.

    Returns:
        The picture, shape (height, width, 3).
    """
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    shown = reference if reference is not None and reference.any() else prediction
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, WINDOW) if finite.size else (0.0, 1.0)
    figure = Figure(figsize=(10, 4), dpi=PIXELS_PER_INCH, facecolor="black", layout="constrained")
    axes = figure.subplots(1, len(PLANES))
    values = [int(value) for value in np.unique(np.concatenate([np.unique(prediction), np.unique(shown)])) if value]
    for place, (name, axis, others) in zip(axes, PLANES, strict=True):
        index = _fullest(shown, axis)
        place.imshow(
            np.take(image, index, axis).T, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower",
            aspect=spacing[others[1]] / spacing[others[0]], interpolation="nearest",
        )  # fmt: skip
        for number, value in enumerate(values[:MAX_LABELS]):
            _contour(place, np.take(prediction, index, axis) == value, number, dashed=True)
            if reference is not None:
                _contour(place, np.take(reference, index, axis) == value, number, dashed=False)
        place.invert_xaxis()
        for letter, (x, y, across, up) in zip(SIDES[name], EDGES, strict=True):
            place.text(
                x, y, letter, ha=across, va=up, transform=place.transAxes, color="white", fontsize=9, fontweight="bold",
                path_effects=[withStroke(linewidth=2, foreground="black")],
            )  # fmt: skip
        size = image.shape[axis]
        number = size - index if backwards[axis] else index + 1
        place.set_title(f"{name}, slice {number} of {size}", color="white", fontsize=9)
        place.set_axis_off()
    key = "dashed: prediction" + ("" if reference is None else ", solid: reference")
    figure.suptitle(f"{title}   ({key})" if title else key, color="white", fontsize=10)
    return pixels_of(figure)


def _fullest(labels: NDArray[Any], axis: int) -> int:
    counts = np.count_nonzero(labels, axis=tuple(other for other in range(3) if other != axis))
    return int(counts.argmax()) if counts.any() else labels.shape[axis] // 2


def _contour(place: Any, inside: NDArray[np.bool_], number: int, *, dashed: bool) -> None:
    if not inside.any():
        return
    padded = np.pad(inside, 1).T.astype(np.float32)  # a region at the border has a contour there too
    where = [np.arange(-1, inside.shape[axis] + 1) for axis in (0, 1)]
    style = "dashed" if dashed else "solid"
    place.contour(*where, padded, levels=[0.5], colors=[f"C{number}"], linestyles=[style], linewidths=1.2)


def pixels_of(figure: Any) -> NDArray[np.uint8]:
    """Draw a matplotlib figure; shape (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        _as_it_is(text)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
    return pixels


def _as_it_is(text: Any) -> None:
    """Let a text show the names in it as they are: without formulas, and what its font lacks as escape sequences."""
    from matplotlib.font_manager import findfont, get_font

    text.set_parse_math(False)  # a name may have dollar signs
    shown = text.get_text()
    if not (shown.isascii() and shown.isprintable()):
        font = get_font(findfont(text.get_fontproperties()))
        known = (c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode("ascii") for c in shown)
        text.set_text("".join(known))


def save_png(pixels: NDArray[np.uint8], path: Path) -> None:
    """Write a picture, whole or not at all.

    Args:
        pixels: shape (height, width, 3).
        path: of the PNG file; its folder is made if there is none.
    """
    from matplotlib.image import imsave

    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path, ".png") as temporary:
        imsave(temporary, pixels)
