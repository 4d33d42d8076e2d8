"""NIfTI-1 and NIfTI-2 headers of single files and of pairs, compressed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.grid import NOTE_MM, distance_mm, spatial_grid
from monai_iou.volumes.header import Header, Part, VolumeError, check_affine, check_shape, one_number, refusal
from monai_iou.volumes.payload import AGAIN, GZIP_MAGIC, decompressed

# Header sizes in bytes, with the magic strings of a single file and of a pair.
SIZES = {348: (b"n+1\0", b"ni1\0"), 540: (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n")}
UNITS_MM = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # unknown, metre, millimetre, micron
UNIT_NAMES = {1: "metres", 3: "microns"}
DAMAGED = "correct its header or write the file again"


def read_nifti_header(path: Path) -> Header:
    """Read the header of a NIfTI file, or of a pair given by the name of either file.

    The affine is the sform if its code is set, otherwise the qform if its code is set, and otherwise follows from the
    spacing alone, as in nibabel and FSL.

    Raises:
        VolumeError: if the file has no NIfTI header, or the header is damaged or contradictory.
    """
    first = _header_file(path)
    block, compressed = _first_bytes(first)
    header, pair = _parse(path, block)
    shape = tuple(int(length) for length in header["dim"][1 : 1 + _axes(path, header)])
    check_shape(path, shape)
    dtype = _dtype(path, header)
    data = _partner(first, ".img") if pair else first
    if pair:
        compressed = _first_bytes(data, 2)[1]
    offset = _offset(path, header, 0 if pair else len(header.binaryblock))
    encoding = "gzip" if compressed else "raw"
    part = Part(data, 0 if compressed else offset, encoding, skip=offset if compressed else 0)
    affine, notes = _place(path, header)
    scaling = _scaling(path, header)
    files = (first, data) if pair else (first,)
    return Header(path, shape, dtype, affine, (part,), scaling, files, tuple(notes))


def load_raw_header(path: Path) -> Any:
    """Return the header of a NIfTI file or pair as a nibabel object, for writing another file on the same grid."""
    return _parse(path, _first_bytes(_header_file(path))[0])[0]


def _header_file(path: Path) -> Path:
    return _partner(path, ".hdr") if path.name.lower().endswith((".img", ".img.gz")) else path


def _first_bytes(path: Path, count: int = 540) -> tuple[bytes, bool]:
    """Return the first bytes of a file after decompression, and whether the file is compressed."""
    with path.open("rb") as stream:
        start = stream.read(count)
        if not start.startswith(GZIP_MAGIC):
            return start, False
        stream.seek(0)
        block = b""
        for piece in decompressed(path, stream, "gzip"):
            block += piece[: count - len(block)]
            if len(block) >= count:
                break
        return block, True


def _partner(path: Path, extension: str) -> Path:
    """Return the other file of a pair; its extension may be in lower or upper case, and it may be compressed."""
    stem = path.name[: path.name.lower().rfind(".hdr" if extension == ".img" else ".img")]
    for ending in (extension, extension.upper(), extension + ".gz", extension.upper() + ".GZ"):
        if (other := path.with_name(stem + ending)).is_file():
            return other
    raise refusal(path, f"have its `{stem}{extension}` beside it", "no such file", "copy both files of the pair")


def _parse(path: Path, block: bytes) -> tuple[Any, bool]:
    import nibabel

    # The stored header size also reveals the byte order, which nibabel would guess from the number of axes.
    order = "<" if int.from_bytes(block[:4], "little") in SIZES else ">"
    size = int.from_bytes(block[:4], "little" if order == "<" else "big")
    if size not in SIZES or len(block) < size:
        raise refusal(path, "be a readable volume", "no NIfTI header", AGAIN)
    magic = block[344:348] if size == 348 else block[4:12]
    if magic not in SIZES[size]:
        mark = f"the magic string {magic!r} (an Analyze file does not distinguish left and right)"
        raise refusal(path, "be NIfTI", mark, "convert it with the program that wrote it")
    kind = nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header
    return kind(block[:size], order, check=False), magic == SIZES[size][1]


def _axes(path: Path, header: Any) -> int:
    axes = int(header["dim"][0])
    if not 1 <= axes <= 7:
        raise refusal(path, "have 1 to 7 axes", str(axes), DAMAGED)
    return axes


def _dtype(path: Path, header: Any) -> np.dtype[Any]:
    import nibabel

    code = int(header["datatype"])
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except (nibabel.spatialimages.HeaderDataError, KeyError):
        raise refusal(path, "have a NIfTI data type", f"the code {code}", DAMAGED) from None
    if dtype.fields is not None:
        raise one_number(path, "RGB colours")
    if dtype.kind == "c":
        raise one_number(path, f"complex numbers ({dtype.name})")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise refusal(path, "hold integers or floats of up to 64 bits", f"the data type {code}", "convert it")
    if int(header["bitpix"]) not in (0, 8 * dtype.itemsize):
        bits = f"{int(header['bitpix'])} bits for {dtype.name}"
        raise refusal(path, "have a `bitpix` that fits its data type", bits, DAMAGED)
    return dtype


def _offset(path: Path, header: Any, least: int) -> int:
    offset = float(header["vox_offset"])
    # It is 0 in pairs, and in the single files of some programs.
    offset = float(least + 4) if offset == 0 and least else offset
    if not np.isfinite(offset) or offset != int(offset) or not least <= offset < 2**62:
        raise refusal(path, "store its voxels after its header", f"the offset {offset:g}", DAMAGED)
    return int(offset)


def _scaling(path: Path, header: Any) -> tuple[float, float] | None:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return None  # the standard defines a slope of 0 as no scaling
    if not np.isfinite(intercept):
        raise refusal(path, "have a finite scaling", f"the intercept {intercept}", DAMAGED)
    return None if (slope, intercept) == (1.0, 0.0) else (slope, intercept)


def _place(path: Path, header: Any) -> tuple[NDArray[np.float64], list[str]]:
    """Return the affine in millimetres, and notes about its peculiarities."""
    sform, qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    notes: list[str] = []
    if not sform:
        _check_pixdim(path, header)
    affine = np.asarray(header.get_sform() if sform else _qform(path, header) if qform else _base(header), float)
    unit = int(header["xyzt_units"]) & 7
    if unit not in UNITS_MM:
        notes.append(f"`{path.name}`: the header's unit of length ({unit}) is unknown; it was read as millimetres.")
    elif unit in UNIT_NAMES:
        notes.append(f"`{path.name}`: the header's lengths are in {UNIT_NAMES[unit]} and were converted to mm.")
    scale = UNITS_MM.get(unit, 1.0)
    affine = _in_mm(header, affine, scale)
    check_affine(path, affine)
    if sform and qform:
        notes += _conflict(path, header, affine, scale)
    return affine, notes


def _check_pixdim(path: Path, header: Any) -> None:
    spacing = np.asarray(header["pixdim"][1 : 1 + min(3, int(header["dim"][0]))], float)
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        text = "x".join(f"{value:g}" for value in spacing)
        raise refusal(path, "have a positive spacing", f"{text} in `pixdim`", "correct the spacing in its header")


def _qform(path: Path, header: Any) -> NDArray[np.float64]:
    import nibabel

    factor = float(header["pixdim"][0])
    if factor not in (-1.0, 0.0, 1.0):
        # The standard defines 1 and -1 only, and treats 0 as 1.
        raise refusal(path, "have -1 or 1 in `pixdim[0]`", f"{factor:g}", DAMAGED)
    try:
        fixed = _with_lengths(header)
        fixed["pixdim"][0] = factor or 1.0
        return np.asarray(fixed.get_qform(), float)
    except (ValueError, nibabel.spatialimages.HeaderDataError) as error:
        raise refusal(path, "have a valid qform", f"the error '{error}'", DAMAGED) from error


def _base(header: Any) -> NDArray[np.float64]:
    return np.asarray(_with_lengths(header).get_base_affine(), float)


def _with_lengths(header: Any) -> Any:
    """Return a copy with 1 as the spacing along the axes that the file does not have, where many programs write 0."""
    fixed = header.copy()
    for axis in range(int(header["dim"][0]) + 1, 4):
        value = float(header["pixdim"][axis])
        fixed["pixdim"][axis] = value if np.isfinite(value) and value > 0 else 1.0
    return fixed


def _in_mm(header: Any, affine: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """Return an affine in mm; an axis that the file does not have keeps the 1 that stands for it, as 1 mm."""
    filled = (np.arange(3) >= int(header["dim"][0])) & np.isclose(np.linalg.norm(affine[:3, :3], axis=0), 1)
    factors = np.array([*np.where(filled, 1.0, scale), scale])
    return np.vstack([affine[:3] * factors, affine[3:]])


def _conflict(path: Path, header: Any, affine: NDArray[np.float64], scale: float) -> list[str]:
    try:
        other = _in_mm(header, _qform(path, header), scale)
        check_affine(path, other)
    except VolumeError:
        return [f"`{path.name}`: the qform is invalid; the sform (code {int(header['sform_code'])}) was used."]
    shape = header["dim"][1 : 1 + int(header["dim"][0])]
    first, second = spatial_grid(shape, affine), spatial_grid(shape, other)
    distance = distance_mm(first, second)
    if distance <= max(NOTE_MM, 0.01 * min(first.spacing)):
        return []
    codes = f"sform (code {int(header['sform_code'])}) and qform (code {int(header['qform_code'])})"
    return [
        f"`{path.name}`: {codes} differ by up to {distance:.4g} mm; the sform was used, as nibabel and FSL do, while "
        "ITK-based viewers may take the qform."
    ]
