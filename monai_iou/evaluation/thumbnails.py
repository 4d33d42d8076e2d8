"""Pictures of a case for the report's viewer: a crop around a structure, kept with the case's record.

A crop's voxels are in the patient's axes (right, anterior, superior). It is stored once, as a mosaic of its axial
slices; the page cuts the three planes out of it. The image below the contours is read when a picture is shown.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.evaluation.masks import MaskPair
from monai_iou.volumes.grid import Grid, reorient, resample
from monai_iou.volumes.reading import read_channels

MARGIN_MM = 12.0
# Bounds a crop to 2 million voxels, about 1 MB of PNG.
MAX_SIZE = 128
# Distance of the codes in a PNG: browsers that hide their fingerprint change the lowest bits of what a page reads.
CODE_STEP = 85


def take_picture(pair: MaskPair, grid: Grid) -> dict[str, Any] | None:
    """Cut out both masks; None where both are empty.

    Args:
        pair: a structure's masks.
        grid: of the whole volume.

    Returns:
        Plain values: `shape` and `affine` of the crop in the patient's axes with `MARGIN_MM` around it, `inner` (where
        the masks lie in it), `codes` (their voxels, bit 0 the reference and bit 1 the prediction), `cut` (whether they
        reach beyond it), and `file` (for each axis, the file's axis, its number of voxels, and the voxel and step that
        the crop starts at and goes by there).
    """
    codes = pair.reference.astype(np.uint8) + 2 * pair.prediction.astype(np.uint8)
    if not codes.any():
        return None
    placed = np.array(grid.affine)
    placed[:3, 3] += grid.affine[:3, :3] @ np.asarray(pair.offset, dtype=float)
    x, y, z = codes.shape
    codes, here = reorient(codes, Grid((x, y, z), placed), _axes_only(grid))
    inner, cut = _box(codes)
    move = np.linalg.inv(grid.affine) @ here.affine  # crop index -> the file's index
    axes = [int(axis) for axis in np.abs(move[:3, :3]).argmax(axis=0)]
    steps = [int(np.sign(move[axis, i])) for i, axis in enumerate(axes)]
    first = [int(np.rint(move[axis, 3])) + steps[i] * inner[i].start for i, axis in enumerate(axes)]
    sizes = [grid.shape[axis] for axis in axes]
    low, high = _margins(inner, here.spacing, first, steps, sizes)
    affine = np.array(here.affine)
    affine[:3, 3] += affine[:3, :3] @ np.array([part.start - before for part, before in zip(inner, low, strict=True)])
    kept = np.ascontiguousarray(codes[inner])
    return {
        "shape": [size + before + after for size, before, after in zip(kept.shape, low, high, strict=True)],
        "inner": [[before, before + size] for size, before in zip(kept.shape, low, strict=True)],
        "affine": affine.tolist(),
        "codes": base64.b64encode(zlib.compress(kept.tobytes(), 1)).decode("ascii"),
        "cut": cut,
        "file": [
            [axis, size, start - step * before, step]
            for axis, size, start, step, before in zip(axes, sizes, first, steps, low, strict=True)
        ],
    }


def _margins(
    inner: tuple[slice, ...], spacing: tuple[float, ...], first: list[int], steps: list[int], sizes: list[int]
) -> tuple[list[int], list[int]]:
    """Voxels of anatomy before and after the masks, along each axis, as far as the image goes."""
    low, high = [], []
    for part, mm, start, step, size in zip(inner, spacing, first, steps, sizes, strict=True):
        length = part.stop - part.start
        wanted = min(math.ceil(MARGIN_MM / mm), max(0, (MAX_SIZE - length) // 2))
        last = start + step * (length - 1)
        room = (start, size - 1 - last) if step > 0 else (size - 1 - start, last)
        low.append(min(wanted, room[0]))
        high.append(min(wanted, room[1]))
    return low, high


def codes_of(picture: Mapping[str, Any]) -> NDArray[np.uint8]:
    """The voxels of a picture with its margin, shape `picture["shape"]`."""
    inner = [slice(start, stop) for start, stop in picture["inner"]]
    codes = np.zeros(picture["shape"], dtype=np.uint8)
    flat = np.frombuffer(zlib.decompress(base64.b64decode(picture["codes"])), dtype=np.uint8)
    codes[tuple(inner)] = flat.reshape([part.stop - part.start for part in inner])
    return codes


def show_picture(picture: Mapping[str, Any], image: Path | None) -> dict[str, Any]:
    """What the page needs to draw a picture.

    Args:
        picture: of `take_picture`.
        image: the image to show below the contours, on any grid, or None; of several channels the first is shown.

    Returns:
        `shape`, `spacing`, `columns` of the mosaics, `masks` (codes times `CODE_STEP`) and `image` as PNG data URIs,
        `window` (the grey values that black and white stand for), `file` and `affine` as above.

    Raises:
        VolumeError: the image cannot be read.
    """
    codes = codes_of(picture)
    x, y, z = codes.shape
    grid = Grid((x, y, z), np.asarray(picture["affine"]))
    columns = math.ceil(math.sqrt(z))
    shown = {
        "shape": [x, y, z],
        "spacing": list(grid.spacing),
        "columns": columns,
        "masks": _data_uri(_mosaic(codes * np.uint8(CODE_STEP), columns)),
        "image": None,
        "window": None,
        "file": picture["file"],
        "affine": picture["affine"],
    }
    if image is not None:
        volume = read_channels([image])
        grey, window = _grey(resample(volume.array[0].astype(np.float32), volume.grid, grid, order=1))
        shown |= {"image": _data_uri(_mosaic(grey, columns)), "window": window}
    return shown


def _axes_only(grid: Grid) -> Grid:
    """`grid` with its axes put in the order and direction nearest to right, anterior, superior."""
    affine = np.eye(4)
    for axis, letter in enumerate(grid.orientation):
        row = "RLAPSI".index(letter) // 2
        affine[:3, row] = grid.affine[:3, axis] * (1 if letter in "RAS" else -1)
    return Grid((1, 1, 1), affine)


def _box(codes: NDArray[np.uint8]) -> tuple[tuple[slice, ...], bool]:
    """The masks' box; where it is larger than `MAX_SIZE`, the part around the disagreement."""
    wrong = (codes == 1) | (codes == 2)
    slices: list[slice] = []
    cut = False
    for axis, size in enumerate(codes.shape):
        others = tuple(other for other in range(3) if other != axis)
        filled = np.flatnonzero(codes.any(axis=others))
        low, high = int(filled[0]), int(filled[-1]) + 1
        if high - low > MAX_SIZE:
            cut = True
            weights = np.cumsum((wrong if wrong.any() else codes > 0).sum(axis=others))
            middle = int(np.searchsorted(weights, weights[-1] / 2))
            low = max(0, min(max(low, middle - MAX_SIZE // 2), high - MAX_SIZE))
            high = min(size, low + MAX_SIZE)
        slices.append(slice(low, high))
    return tuple(slices), cut


def _grey(image: NDArray[Any]) -> tuple[NDArray[np.uint8], list[float]]:
    """Grey values of 8 bits over the range of the finite voxels' 0.1st to 99.9th percentile, and that range.

    The page narrows it: its window control needs more than what is shown at first.
    """
    finite = image[np.isfinite(image)]
    low, high = (float(value) for value in np.percentile(finite, [0.1, 99.9])) if finite.size else (0.0, 1.0)
    high = max(high, low + 1e-6 * max(1.0, abs(low)))
    scaled = (np.nan_to_num(image, nan=low, posinf=high, neginf=low) - low) / (high - low)
    grey: NDArray[np.uint8] = np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    return grey, [low, high]


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
