"""Crops around the worst cases' structures as PNG data URIs, for the report's slice viewer.

A crop is stored once, as a mosaic of its axial slices; the page cuts the three planes out of it.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.grid import Grid, reorient, resample
from monai_iou.volumes.reading import read_volume

MARGIN_MM = 12.0
# Bounds a crop to 2 million voxels, about 1 MB of PNG.
MAX_SIZE = 128
RAS = Grid((1, 1, 1), np.eye(4))


@dataclass(frozen=True)
class SliceImage:
    """One case's crop in RAS axis order.

    Args:
        shape: voxels along right, anterior and superior.
        spacing: mm along them.
        columns: tiles in a row of the mosaics.
        masks: PNG data URI; bit 0 of a pixel is the reference, bit 1 the prediction.
        image: PNG data URI of the image, or None.
        cut: whether the structures reach beyond the crop.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    columns: int
    masks: str
    image: str | None
    cut: bool


def make_slice_image(
    prediction: NDArray[Any], reference: NDArray[Any], grid: Grid, image: Path | None
) -> SliceImage | None:
    """Cut out both masks with a margin; None where both are empty.

    Args:
        prediction: mask on `grid`.
        reference: mask on `grid`.
        grid: where the voxels lie.
        image: the image to show, on any grid; it is resampled linearly if it lies on another one.

    Raises:
        VolumeError: the image cannot be read.
    """
    codes = reference.astype(np.uint8) + 2 * prediction.astype(np.uint8)
    if not codes.any():
        return None
    background = None
    if image is not None:
        volume = read_volume(image)
        background = resample(volume.array.astype(np.float32), volume.grid, grid, order=1)
        background = reorient(background, grid, _axes_only(grid))[0]
    codes, reoriented = reorient(codes, grid, _axes_only(grid))
    box, cut = _box(codes, reoriented)
    codes = codes[box]
    columns = math.ceil(math.sqrt(codes.shape[2]))
    pixels = None if background is None else _windowed(background[box])
    return SliceImage(
        codes.shape,
        reoriented.spacing,
        columns,
        _data_uri(_mosaic(codes, columns)),
        None if pixels is None else _data_uri(_mosaic(pixels, columns)),
        cut,
    )


def _axes_only(grid: Grid) -> Grid:
    """`grid` with its axes put in the order and direction nearest to right, anterior, superior."""
    affine = np.eye(4)
    for axis, letter in enumerate(grid.orientation):
        row = "RLAPSI".index(letter) // 2
        affine[:3, row] = grid.affine[:3, axis] * (1 if letter in "RAS" else -1)
    return Grid(RAS.shape, affine)


def _box(codes: NDArray[np.uint8], grid: Grid) -> tuple[tuple[slice, ...], bool]:
    """The structures' box with a margin; where it is larger than `MAX_SIZE`, the part around the disagreement."""
    wrong = (codes == 1) | (codes == 2)
    slices: list[slice] = []
    cut = False
    for axis, (size, spacing) in enumerate(zip(codes.shape, grid.spacing, strict=True)):
        others = tuple(other for other in range(3) if other != axis)
        filled = np.flatnonzero(codes.any(axis=others))
        margin = math.ceil(MARGIN_MM / spacing)
        low, high = max(0, int(filled[0]) - margin), min(size, int(filled[-1]) + margin + 1)
        if high - low > MAX_SIZE:
            cut = True
            weights = np.cumsum((wrong if wrong.any() else codes > 0).sum(axis=others))
            middle = int(np.searchsorted(weights, weights[-1] / 2))
            low = min(max(low, middle - MAX_SIZE // 2), high - MAX_SIZE)
            high = low + MAX_SIZE
        slices.append(slice(low, high))
    return tuple(slices), cut


def _windowed(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey values of 8 bits between the 1st and 99th percentile of the finite voxels."""
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, [1, 99]) if finite.size else (0.0, 1.0)
    scaled = (np.nan_to_num(image, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-9)
    # 64 levels: what an eye can tell apart in a small picture, in half the bytes of 256.
    grey: NDArray[np.uint8] = (np.clip(scaled, 0, 1) * 63).astype(np.uint8) * 4
    return grey


def _mosaic(volume: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Axial slices side by side; a tile's rows run along anterior, its columns along right."""
    x, y, z = volume.shape
    rows = math.ceil(z / columns)
    sheet = np.zeros((rows * y, columns * x), dtype=np.uint8)
    for k in range(z):
        row, column = divmod(k, columns)
        sheet[row * y : (row + 1) * y, column * x : (column + 1) * x] = volume[:, :, k].T
    return sheet


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    """8-bit grey PNG (ISO/IEC 15948): signature, header, deflated rows each after a filter byte of 0, end."""
    height, width = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1).tobytes()
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    ]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()
