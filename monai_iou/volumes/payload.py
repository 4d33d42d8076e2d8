"""Reading the stored numbers of a volume: decompressed in pieces, with all checksums and lengths verified."""

from __future__ import annotations

import bz2
import importlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.header import Header, Part, VolumeError, check_regular, refusal

BLOCK = 1 << 18
PIECE = 1 << 20
# The highest compression of Deflate is 258 bytes to 2 bits. A file that claims more is damaged or malicious.
MAX_RATIO = 1032
# Some programs pad the last block of a file with zeros.
PADDING = 512
GZIP_MAGIC = b"\x1f\x8b"
AGAIN = "copy or write the file again"


def _fastest_zlib() -> Any:
    """Return zlib-ng, which decompresses in two thirds of the time, or the standard zlib if it is not installed."""
    try:
        return importlib.import_module("zlib_ng.zlib_ng")
    except ImportError:
        return zlib


_ZLIB = _fastest_zlib()


def stored_numbers(header: Header) -> NDArray[Any]:
    """Read the stored numbers of a volume.

    Returns:
        An array of shape `header.shape` in native byte order, with the axes in the order of the file.

    Raises:
        VolumeError: if data are missing, damaged, or more than the header states.
    """
    check_claims(header)
    share = header.stored_bytes // len(header.parts)
    numbers = np.empty(header.stored_bytes // header.dtype.itemsize, dtype=header.dtype)
    buffer = memoryview(numbers.view(np.uint8))  # type: ignore[arg-type]
    for index, part in enumerate(header.parts):
        target = buffer[index * share : (index + 1) * share]
        if part.encoding in ("ascii", "hex"):
            _fill_from_text(header, part, target)
        else:
            _fill(header.path, part, target)
    if not numbers.dtype.isnative:
        numbers.byteswap(inplace=True)
        numbers = numbers.view(numbers.dtype.newbyteorder("="))
    return numbers.reshape(header.shape, order="F")


def check_claims(header: Header) -> None:
    """Raise VolumeError if a header claims more data than its files can hold, before memory is allocated.

    So it does if several files cannot each hold the same number of whole slices: their voxels would be shifted.
    """
    if not _is_even(header.shape, len(header.parts)):
        shape = "x".join(map(str, header.shape))
        remedy = "correct the list of its files, or the size in its header"
        raise refusal(header.path, "name files of equally many slices", f"{len(header.parts)} for {shape}", remedy)
    share = header.stored_bytes // len(header.parts)
    for part in header.parts:
        check_regular(part.file)
        size = part.file.stat().st_size
        most = _most_bytes(part, size, header.dtype.itemsize)
        if share > most:
            shape = "x".join(map(str, header.shape))
            source = "" if part.file == header.path else f" in `{part.file.name}`"
            claim = f"{size} bytes{source} for {share} of shape {shape}, {header.dtype.name}"
            raise refusal(header.path, "hold all its voxels", claim, AGAIN)


def _is_even(shape: tuple[int, ...], parts: int) -> bool:
    """Return whether equal parts of a volume are whole slices, volumes, or groups of either."""
    for length in reversed(shape[min(2, len(shape) - 1) :]):
        if length % parts == 0:
            return True
        if parts % length:
            return False
        parts //= length
    return parts == 1


def _most_bytes(part: Part, size: int, itemsize: int) -> int:
    if part.encoding == "raw":
        return size - (0 if part.from_end else part.offset)
    if part.encoding in ("ascii", "hex"):
        return size * itemsize
    # bzip2 compresses runs of 45 MB to about ten bytes, but its memory grows only with the data that are read.
    return size * (MAX_RATIO if part.encoding != "bzip2" else 10**6)


def _fill(path: Path, part: Part, target: memoryview) -> None:
    """Read the bytes of a part into `target`, and continue to the end of the stream, where the checksums are."""
    filled, skip = 0, part.skip
    with part.file.open("rb") as stream:
        stream.seek(-len(target) if part.from_end else part.offset, 2 if part.from_end else 0)
        if part.encoding == "raw":
            filled = _read_into(stream, target)
            rest: Iterator[bytes] = iter((stream.read(PADDING + 1),))
        else:
            rest = decompressed(path, stream, part.encoding)
        after = 0
        for piece in rest:
            if skip:
                cut = min(skip, len(piece))
                piece, skip = piece[cut:], skip - cut
            room = min(len(piece), len(target) - filled)
            target[filled : filled + room] = piece[:room]
            filled += room
            after += len(piece) - room
            if part.exact and (after > PADDING or any(piece[room:])):
                raise refusal(path, f"end after its {len(target)} bytes of voxels", "more data", AGAIN)
    if filled < len(target):
        raise refusal(path, f"hold {len(target)} bytes of voxels", f"{filled} (it is truncated)", AGAIN)


def _read_into(stream: BinaryIO, target: memoryview) -> int:
    filled = 0
    while filled < len(target):
        count = stream.readinto(target[filled : filled + (1 << 24)])  # type: ignore[attr-defined]
        if not count:
            break
        filled += count
    return filled


def decompressed(path: Path, stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    """Yield the decompressed pieces of a stream up to its end.

    Args:
        path: the volume, for error messages.
        stream: an open file, positioned at the compressed data.
        encoding: "gzip", "zlib" or "bzip2".

    Raises:
        VolumeError: if the stream is damaged or truncated, its checksum or length is wrong, or other data follow it.
    """
    read_member = _bzip2_member if encoding == "bzip2" else _deflate_member
    block = stream.read(BLOCK)
    first = True
    while first or block:
        if not first and not block.strip(b"\0"):
            block = stream.read(BLOCK)  # padding to the end of a tape or disk block
            continue
        if not first and (encoding == "zlib" or not block.startswith(GZIP_MAGIC[:1] if encoding == "gzip" else b"BZ")):
            raise refusal(path, "end with its compressed data", "other bytes after them", AGAIN)
        first = False
        try:
            block = yield from read_member(path, stream, block, encoding)
        except (zlib.error, _ZLIB.error, OSError, ValueError, EOFError) as error:
            if isinstance(error, VolumeError):
                raise
            reason = re.sub(r"^Error -?\d+ while decompressing data: ", "", str(error))
            problem = f"the error '{reason}' in its compressed data"
            raise refusal(path, "be a readable volume", problem, AGAIN) from error
        block = block or stream.read(BLOCK)


def _deflate_member(path: Path, stream: BinaryIO, block: bytes, encoding: str) -> Any:
    inflate = _ZLIB.decompressobj(31 if encoding == "gzip" else 15)
    while not inflate.eof:
        if not block:
            raise refusal(path, "be a readable volume", "the end of the file before that of its compressed data", AGAIN)
        while block and not inflate.eof:
            yield inflate.decompress(block, PIECE)
            block = inflate.unconsumed_tail
        if not inflate.eof:
            # The last bytes of output may be available without further input.
            block = stream.read(BLOCK)
            if not block and (piece := inflate.decompress(b"", PIECE)):
                yield piece
    return inflate.unused_data


def _bzip2_member(path: Path, stream: BinaryIO, block: bytes, encoding: str) -> Any:
    inflate = bz2.BZ2Decompressor()
    while not inflate.eof:
        if inflate.needs_input and not block:
            raise refusal(path, "be a readable volume", "the end of the file before that of its compressed data", AGAIN)
        yield inflate.decompress(block, PIECE)
        block = stream.read(BLOCK) if inflate.needs_input and not inflate.eof else b""
    return inflate.unused_data


def _fill_from_text(header: Header, part: Part, target: memoryview) -> None:
    with part.file.open("rb") as stream:
        stream.seek(part.offset)
        text = stream.read()
    if part.encoding == "hex":
        digits = b"".join(text.split())
        try:
            data = bytes.fromhex(digits.decode("ascii"))
        except ValueError as error:
            raise refusal(header.path, "hold hexadecimal voxels", f"the error '{error}'", AGAIN) from error
        if len(data) != len(target):
            raise refusal(header.path, f"hold {len(target)} bytes of voxels", str(len(data)), AGAIN)
        target[:] = data
        return
    words = text.replace(b",", b" ").split()
    view = np.frombuffer(target, dtype=header.dtype)
    if len(words) != len(view):
        raise refusal(header.path, f"hold {len(view)} numbers", str(len(words)), AGAIN)
    try:
        view[:] = [(float if header.dtype.kind == "f" else int)(word) for word in words]
    except (ValueError, OverflowError) as error:
        raise refusal(
            header.path, f"hold numbers of type {header.dtype.name}", f"the error '{error}'", AGAIN
        ) from error
