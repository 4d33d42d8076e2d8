"""PNG pictures: every kind of pixel is read exactly, damage is refused, and masks come back as they were written."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from PIL import Image

from monai_iou.volumes import png
from monai_iou.volumes.names import case_name, volumes_below
from monai_iou.volumes.png import png_channels, read_png, write_png
from monai_iou.volumes.reading import VolumeError, read_channels, read_labels, read_volume

RNG = np.random.default_rng(0)
SIDES = (7, 5)  # rows, columns


def pixels(dtype: Any = np.uint8, channels: int = 0, below: int | None = None) -> np.ndarray:
    shape = (*SIDES, channels) if channels else SIDES
    return RNG.integers(0, below or np.iinfo(dtype).max + 1, shape, dtype=dtype)


def part(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def write_by_hand(path: Path, rows: np.ndarray, depth: int, kind: int) -> Path:
    """A PNG by its standard, with pixels packed into `depth` bits."""
    bits = [np.unpackbits(rows[:, [column]], axis=1)[:, 8 - depth :] for column in range(rows.shape[1])]
    packed = np.packbits(np.concatenate(bits, axis=1), axis=1)
    lines = b"".join(b"\0" + line.tobytes() for line in packed)
    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, kind, 0, 0, 0)
    colours = part(b"PLTE", bytes(range(3 * 2**depth))) if kind == 3 else b""
    body = part(b"IHDR", head) + colours + part(b"IDAT", zlib.compress(lines)) + part(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [0, 3])
def test_few_bits_keep_their_numbers(depth: int, kind: int, tmp_path: Path) -> None:
    rows = pixels(below=2**depth)
    path = write_by_hand(tmp_path / "a.png", rows, depth, kind) if (depth, kind) != (8, 3) else tmp_path / "a.png"
    if (depth, kind) == (8, 3):
        picture = Image.fromarray(rows, "P")
        picture.putpalette(bytes(range(256)) * 3)
        picture.save(path)
    np.testing.assert_array_equal(read_labels(path).array[:, :, 0], rows.T)
    assert png_channels(path) == len(read_channels([path]).array) == (3 if kind == 3 else 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [0, 3])
def test_greys_and_colours_are_those_of_itk(dtype: Any, channels: int, tmp_path: Path) -> None:
    rows, path = pixels(dtype, channels), tmp_path / "a.PNG"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(rows, isVector=bool(channels)), str(tmp_path / "a.png"))
    (tmp_path / "a.png").rename(path)
    volume = read_channels([path])
    assert volume.array.dtype == dtype
    assert volume.grid.spacing == (1.0, 1.0, 1.0)
    expected = rows.transpose(2, 1, 0) if channels else rows.T[None]
    np.testing.assert_array_equal(volume.array[..., 0], expected)
    assert case_name(path) == "a"
    if channels:
        with pytest.raises(VolumeError, match=r"a\.PNG. to hold one label map, but got shape 5x7x1x3"):
            read_labels(path)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_left_out_and_told(mode: str, tmp_path: Path) -> None:
    rows = pixels(channels=len(mode))
    Image.fromarray(rows, mode).save(tmp_path / "a.png")
    volume = read_channels([tmp_path / "a.png"])
    assert len(volume.array) == len(mode) - 1
    np.testing.assert_array_equal(volume.array[0, :, :, 0], rows[..., 0].T)
    assert volume.notes == (f"{tmp_path / 'a.png'}: its transparency is left out.",)
    rows[..., -1] = 255
    Image.fromarray(rows, mode).save(tmp_path / "a.png")
    assert read_channels([tmp_path / "a.png"]).notes == ()


def write_greys_of_16_bits(path: Path, rows: np.ndarray) -> np.ndarray:
    """A PNG of greys and transparency, (rows, columns, 2), by its standard; every line has another filter."""
    lines, above = b"", np.zeros((rows.shape[1] + 1, 4), np.uint8)
    for number, row in enumerate(rows.astype(">u2").view(np.uint8)):
        line = np.concatenate([np.zeros((1, 4), np.uint8), row])
        left, up, corner = line[:-1].astype(int), above[1:].astype(int), above[:-1].astype(int)
        guess = left + up - corner
        nearest = np.argmin(np.abs(guess - [left, up, corner]), axis=0)
        paeth = np.choose(nearest, [left, up, corner])
        filters = [np.zeros_like(left), left, up, (left + up) // 2, paeth]
        lines += bytes([number % 5]) + ((row - filters[number % 5]) % 256).astype(np.uint8).tobytes()
        above = line
    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, 4, 0, 0, 0)
    background = part(b"bKGD", b"\0\1")  # of greys, one number
    body = part(b"IHDR", head) + background + part(b"IDAT", zlib.compress(lines)) + part(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return rows[..., 0].T


def test_greys_of_16_bits_with_transparency_are_read(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.png", pixels(np.uint16, 2)
    greys = write_greys_of_16_bits(path, rows)
    volume = read_channels([path])
    assert volume.array.dtype == np.uint16
    np.testing.assert_array_equal(volume.array[0, :, :, 0], greys)
    np.testing.assert_array_equal(read_labels(path).array[:, :, 0], greys)
    assert volume.notes == (f"{path}: its transparency is left out.",)
    rows[..., 1] = 65535
    write_greys_of_16_bits(path, rows)
    assert read_channels([path]).notes == ()
    assert png_channels(path) == 1


def test_every_byte_of_a_picture_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels()).save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(VolumeError) as caught:
            read_volume(path)
        assert re.fullmatch(r"Expected .+, but got .+: .+\.", str(caught.value))
    for length in (0, 20, len(whole) - 13):
        path.write_bytes(whole[:length])
        with pytest.raises(VolumeError):
            read_volume(path)


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (65535, np.uint16)])
@pytest.mark.parametrize("axis", range(3))
def test_a_mask_comes_back(largest: int, dtype: Any, axis: int, tmp_path: Path) -> None:
    mask = np.expand_dims(RNG.integers(0, largest, SIDES), axis)
    mask.flat[0] = largest
    write_png(mask, tmp_path / "m.png")
    found, _, _ = read_png(tmp_path / "m.png", as_labels=True)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[:, :, 0], mask.squeeze(axis))


def test_what_a_png_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one slice for a PNG, but got shape \(2, 3, 4\): take another format\.$"):
        write_png(np.zeros((2, 3, 4), int), tmp_path / "m.png")
    for value in (-1, 65536):
        with pytest.raises(ValueError, match=r"from 0 to 65535 for a PNG, but got"):
            write_png(np.full((2, 3, 1), value), tmp_path / "m.png")


def test_pictures_beside_volumes_are_no_volumes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "b_preview.png"):
        Image.fromarray(pixels()).save(tmp_path / name)
    assert [path.name for path in volumes_below(tmp_path)] == ["a.png", "b.png"]
    (tmp_path / "a_probabilities.nii.gz").touch()
    assert [path.name for path in volumes_below(tmp_path)] == ["a.png", "b.png"]
    every = [path.name for path in volumes_below(tmp_path, without=())]
    assert every == ["a.png", "a_probabilities.nii.gz", "b.png"]
    deeper = tmp_path / "deeper"
    deeper.mkdir()
    for name in ("c.nii.gz", "c.png"):
        (deeper / name).touch()
    names = [path.name for path in volumes_below(tmp_path)]
    assert names == ["a.png", "b.png", "c.nii.gz"], "each folder by itself"


@pytest.mark.parametrize("channels", [0, 3, 4])
def test_pictures_that_are_too_large_for_pillow_are_read_all_the_same(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels(channels=channels)).save(path)
    array, _, notes = read_png(path)
    monkeypatch.setattr(png, "LARGEST_OF_PILLOW", 4)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("Pillow was asked"))
    again, _, same_notes = read_png(path)
    np.testing.assert_array_equal(again, array)
    assert again.dtype == array.dtype
    assert same_notes == notes
