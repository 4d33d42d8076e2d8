"""PNG pictures as volumes of one slice: greys, colours as channels, and the numbers of palettes as labels."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.header import check_regular, refusal
from monai_iou.volumes.memory import room_for
from monai_iou.volumes.plain_names import plain_name

__all__ = ["MOST_STORED", "PNG_AFFINE", "of_slice", "png_channels", "read_png", "write_png"]

# Pixels of 1 mm; columns run to the patient's left and rows to the back, as ITK takes them.
PNG_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, COLOURS, PALETTE = 0, 2, 3  # of the header's colour type; 4 more with transparency
MOST_STORED = 65535
LARGEST_OF_PILLOW = 170_000_000  # pixels: of more than 178 956 970 it raises an error, as against an attack


def png_channels(path: Path) -> int:
    """Return the number of channels of a picture as an image: 3 of colours and palettes, else 1.

    Raises:
        VolumeError: the file is no whole PNG.
    """
    return 1 if _checked(path)[3] in (GREY, GREY + 4) else 3


def read_png(path: Path, *, as_labels: bool = False) -> tuple[NDArray[Any], NDArray[np.float64], tuple[str, ...]]:
    """Read a picture; every checksum of the file is verified.

    Args:
        path: the file.
        as_labels: take the numbers of a palette instead of its colours.

    Returns:
        Values (X, Y, 1), or (X, Y, 1, 3) of colours, the affine, and notes for the reader. X are the columns, Y the
        rows.

    Raises:
        VolumeError: the file is damaged, or does not fit into the free memory.
    """
    width, height, depth, kind = _checked(path)
    channels = 1 if kind in (GREY, GREY + 4) or as_labels else 3
    with room_for(path, 4 * width * height * channels * max(1, depth // 8), (width, height)):
        is_large = width * height > LARGEST_OF_PILLOW and depth == 8 and kind in (GREY, COLOURS, COLOURS + 4)
        if depth == 16 and kind == GREY + 4:
            pixels = _greys_of_16_bits(path)
        elif is_large or (depth == 16 and kind != GREY):
            pixels = _by_itk(path)
        else:
            pixels = _by_pillow(path, depth, as_labels=as_labels)
    notes: tuple[str, ...] = ()
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        colours, opaque = pixels[..., :-1], bool((pixels[..., -1] == np.iinfo(pixels.dtype).max).all())
        pixels = colours[..., 0] if colours.shape[2] == 1 else colours
        notes = () if opaque else (f"{path}: its transparency is left out.",)
    return np.ascontiguousarray(np.swapaxes(pixels, 0, 1)[:, :, None]), PNG_AFFINE.copy(), notes


def write_png(array: NDArray[Any], path: Path) -> None:
    """Write a map of labels of one slice as a picture of greys, its first longer axis from left to right.

    Args:
        array: shape (X, Y, Z) with one side of 1, of integers from 0 to 65535.
        path: the file.

    Raises:
        ValueError: it has more slices or other values.
    """
    from PIL import Image

    flat = [axis for axis, side in enumerate(array.shape) if side == 1]
    if not flat:
        message = f"Expected a mask of one slice for a PNG, but got shape {array.shape}: take another format."
        raise ValueError(message)
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= MOST_STORED:
        found = f"{int(array.min())} to {int(array.max())}"
        message = f"Expected label values from 0 to {MOST_STORED} for a PNG, but got {found}: take another format."
        raise ValueError(message)
    small = int(array.max(initial=0)) < 256
    rows = np.ascontiguousarray(array.squeeze(flat[-1]).T, dtype=np.uint8 if small else np.uint16)
    Image.fromarray(rows).save(path, format="PNG")


def of_slice(array: NDArray[Any], shape: Sequence[int], path: Path) -> NDArray[Any]:
    """Return the map of labels that `write_png` made a picture of.

    Args:
        array: the picture as `read_png` gives it, (columns, rows, 1).
        shape: of the map, (X, Y, Z).
        path: the file, for the error.

    Raises:
        VolumeError: the picture has other sides.
    """
    sides = list(shape)
    if 1 in sides:
        del sides[2 - sides[::-1].index(1)]  # the axis that is left out there
    if list(array.shape[:2]) != sides:
        found, wanted = ("x".join(map(str, each)) for each in (array.shape[:2], shape))
        raise refusal(path, f"be a picture of {wanted} voxels", f"{found} pixels", "write the file again")
    return array.reshape(shape)


def _checked(path: Path) -> tuple[int, int, int, int]:
    """Width, height, bits and colour type, after every part of the file was compared with its checksum."""
    check_regular(path)
    content = path.read_bytes()
    parts = list(_parts(content)) if content.startswith(SIGNATURE) else []
    if not parts or parts[0][0] != b"IHDR" or len(parts[0][1]) != 13 or parts[-1][0] != b"IEND":
        raise refusal(path, "be a whole PNG", "a file that is cut off, damaged or of another kind", "copy it again")
    width, height, depth, kind = struct.unpack(">IIBB", parts[0][1][:10])
    return width, height, depth, kind


def _parts(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each part until one that does not fit its length or checksum."""
    place = len(SIGNATURE)
    while place + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        body = content[place + 8 : place + 8 + length]
        checksum = content[place + 8 + length : place + 12 + length]
        if len(checksum) < 4 or zlib.crc32(kind + body) != int.from_bytes(checksum, "big"):
            return
        yield kind, body
        if kind == b"IEND":
            return
        place += 12 + length


def _by_pillow(path: Path, depth: int, *, as_labels: bool) -> NDArray[Any]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its size was compared with the memory
        with Image.open(path) as image:
            if image.mode == "P" and not as_labels:
                image = image.convert("RGB")
            values = np.array(image)
            greys = image.mode == "L"
    if greys and depth < 8:  # Pillow spreads them over 0 to 255
        values = values // (255 // (2**depth - 1))
    return values.astype(np.uint8) if values.dtype == bool else values


def _greys_of_16_bits(path: Path) -> NDArray[Any]:
    """Greys and transparency of 16 bits, (rows, columns, 2): Pillow would drop 8 of them, and ITK refuses them.

    A pixel has four bytes, as one of colours and transparency of 8 bits has, so that the file is read as these.
    """
    from PIL import Image

    stored = list(_parts(path.read_bytes()))
    head = stored[0][1][:8] + bytes((8, COLOURS + 4)) + stored[0][1][10:]
    kept = [(b"IHDR", head), *(each for each in stored if each[0] in (b"IDAT", b"IEND"))]
    written = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in kept
    )
    with Image.open(io.BytesIO(SIGNATURE + written)) as image:
        return np.ascontiguousarray(image).view(">u2").astype(np.uint16)


def _by_itk(path: Path) -> NDArray[Any]:
    """Colours and transparency of 16 bits, of which Pillow would drop 8, and pictures that it takes for an attack."""
    import SimpleITK

    with plain_name(path) as name:
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(name)))
