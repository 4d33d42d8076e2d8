"""MetaImage, NRRD and NIfTI headers: SimpleITK is the oracle for voxels and geometry."""

from __future__ import annotations

import bz2
import gzip
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from monai_iou.volumes.reading import (
    VolumeError,
    channel_count,
    file_hash,
    read_channels,
    read_header,
    read_labels,
    read_volume,
)

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
ANGLE = 0.3
DIRECTION = (np.cos(ANGLE), -np.sin(ANGLE), 0, np.sin(ANGLE), np.cos(ANGLE), 0, 0, 0, 1)
DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


def itk_image(array: np.ndarray) -> SimpleITK.Image:
    """An oblique image of `array` (X, Y, Z)."""
    image = SimpleITK.GetImageFromArray(array.transpose())
    image.SetSpacing((0.5, 1.25, 3.0))
    image.SetOrigin((-20.5, 30.0, 40.0))
    image.SetDirection(DIRECTION)
    return image


def itk_affine(image: SimpleITK.Image) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return LPS_TO_RAS @ affine


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr", "a.nii", "a.nii.gz", "A.MHA", "A.NII.GZ", "a.hdr"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_format_and_type_reads_as_itk_reads_it(tmp_path: Path, name: str, dtype: str, compressed: bool) -> None:
    if compressed and dtype not in ("u1", "f4"):
        return
    array = np.random.default_rng(0).integers(0, 100, (4, 5, 6)).astype(dtype)
    path = tmp_path / name
    SimpleITK.WriteImage(itk_image(array), str(path.with_name(name.lower())), compressed)
    path.with_name(name.lower()).rename(path)
    got, expected = read_volume(path), SimpleITK.ReadImage(str(path) if name.islower() else str(_lower(path)))
    np.testing.assert_array_equal(got.array, SimpleITK.GetArrayFromImage(expected).transpose())
    assert got.array.dtype == np.dtype(dtype)
    np.testing.assert_allclose(got.grid.affine, itk_affine(expected), atol=1e-4)


def _lower(path: Path) -> Path:
    """ITK knows extensions in lower case only."""
    copy = path.with_name(path.name.lower())
    copy.write_bytes(path.read_bytes())
    return copy


def nrrd(path: Path, array: np.ndarray, encoding: str, data: bytes, extra: str = "", header: str | None = None) -> Path:
    lines = header or (
        "space: right-anterior-superior\nspace directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (1,2,3)\n"
    )
    sizes = " ".join(map(str, array.shape))
    text = f"NRRD0004\ntype: short\ndimension: {array.ndim}\nsizes: {sizes}\nendian: little\nencoding: {encoding}\n"
    path.write_bytes((text + lines + extra + "\n").encode() + data)
    return path


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii", "hex"])
def test_every_encoding_of_nrrd(tmp_path: Path, encoding: str) -> None:
    array = np.random.default_rng(1).integers(-50, 3000, (4, 5, 6)).astype("<i2")
    raw = array.tobytes(order="F")
    text = " ".join(map(str, array.ravel(order="F"))).encode()
    data = {
        "raw": raw,
        "gzip": gzip.compress(raw),
        "bzip2": bz2.compress(raw),
        "ascii": text,
        "hex": raw.hex().encode(),
    }
    got = read_volume(nrrd(tmp_path / "a.nrrd", array, encoding, data[encoding]))
    np.testing.assert_array_equal(got.array, array)
    np.testing.assert_allclose(got.grid.affine, [[2, 0, 0, 1], [0, 3, 0, 2], [0, 0, 4, 3], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    "header",
    [
        "space: left-posterior-superior\nspace directions: (0,2,0) (3,0,0) (0,0,-4)\nspace origin: (1,2,3)\n",
        "space: left-anterior-superior\nspace directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (1,2,3)\n",
        "space dimension: 3\nspace directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (1,2,3)\n",
        "space: scanner-xyz\nspace directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (1,2,3)\n",
        "spacings: 2 3 4\naxis mins: 5 6 7\ncenterings: node node node\n",
        "spacings: 2 3 4\naxis mins: 5 6 7\ncenters: cell cell cell\n",
        "spacings: 2 3 4\naxis mins: 5 6 7\ncenterings: Cell node ???\n",
        "spacings: 2 3 4\naxis mins: 5 6 7\ncenters: none none node\n",
        "spacings: 2 3 4\naxis mins: 5 6 7\naxis maxs: 9 15 23\n",
        "spacings: 2 3 4\naxismins: 5 6 7\n",
        "spacings: 2 3 4\naxis mins: nan 6 7\n",
        "spacings: 2 3 4\n",
    ],
)
def test_every_space_of_nrrd_lies_where_itk_puts_it(tmp_path: Path, header: str) -> None:
    array = np.arange(24, dtype="<i2").reshape(2, 3, 4)
    path = nrrd(tmp_path / "a.nrrd", array, "raw", array.tobytes(order="F"), header=header)
    expected = SimpleITK.ReadImage(str(path))
    np.testing.assert_allclose(read_volume(path).grid.affine, itk_affine(expected), atol=1e-9)


@pytest.mark.parametrize("origin", ["(0,0,0)", "(nan, nan, nan)"])
def test_an_origin_of_nrrd_that_says_nothing_needs_no_directions(tmp_path: Path, origin: str) -> None:
    header = f"space: left-posterior-superior\nspacings: 2 3 4\nspace origin: {origin}\n"
    path = nrrd(tmp_path / "a.nrrd", np.zeros((2, 3, 4), "<i2"), "raw", bytes(48), header=header)
    np.testing.assert_array_equal(read_volume(path).grid.affine, np.diag([-2, -3, 4, 1]))


@pytest.mark.parametrize("origin", ["(1,2,3)", "(0,0,3)", "(nan,0,3)", "(inf,0,0)"])
def test_an_origin_of_nrrd_without_directions_is_refused_and_not_dropped(tmp_path: Path, origin: str) -> None:
    header = f"space: left-posterior-superior\nspacings: 2 3 4\nspace origin: {origin}\n"
    path = nrrd(tmp_path / "a.nrrd", np.zeros((2, 3, 4), "<i2"), "raw", bytes(48), header=header)
    message = (
        f"Expected `{path}` to have `space directions` with its `space origin`, but got none: add the axes' directions."
    )
    with pytest.raises(VolumeError, match=f"^{re.escape(message)}$"):
        read_volume(path)
    with pytest.raises(RuntimeError, match="NRRD"):
        SimpleITK.ReadImage(str(path))


@pytest.mark.parametrize(
    ("unit", "millimetres"), [("mm", 1), ("?", 1), ("um", 1e-3), ("cm", 10), ("m", 1e3), ("nm", 1e-6)]
)
def test_every_unit_of_length_of_metaimage_is_converted(tmp_path: Path, unit: str, millimetres: float) -> None:
    got = read_volume(_with_unit(tmp_path, unit))
    np.testing.assert_allclose(got.grid.spacing, np.multiply((2, 3, 4), millimetres))


@pytest.mark.parametrize("unit", ["mm", "um", "cm"])
def test_an_axis_that_the_file_does_not_have_is_1_mm_in_every_unit_and_format(tmp_path: Path, unit: str) -> None:
    scale, pixels = {"mm": 1.0, "um": 1e-3, "cm": 10.0}[unit], bytes(20)
    metaimage = (
        "ObjectType = Image\nNDims = 2\nBinaryData = True\nBinaryDataByteOrderMSB = False\nElementSpacing = 5 6\n"
        f"Offset = 7 8\nDimSize = 4 5\nDistanceUnits = {unit}\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    )
    nrrd_ = (
        "NRRD0004\ntype: uchar\ndimension: 2\nspace dimension: 2\nsizes: 4 5\nspace directions: (5,0) (0,6)\n"
        f'space origin: (-7,-8)\nspace units: "{unit}" "{unit}"\nencoding: raw\nendian: little\n\n'
    )
    (tmp_path / "a.mha").write_bytes(metaimage.encode() + pixels)
    (tmp_path / "a.nrrd").write_bytes(nrrd_.encode() + pixels)
    for name in ("a.mha", "a.nrrd"):
        grid = read_volume(tmp_path / name).grid
        assert grid.shape == (4, 5, 1)
        assert grid.spacing == pytest.approx((5 * scale, 6 * scale, 1.0))
        assert np.abs(grid.affine[:3, 3]) == pytest.approx([7 * scale, 8 * scale, 0.0])


@pytest.mark.parametrize(
    "header",
    [
        "space dimension: 2\nspace directions: (5,0) (0,6) none\nspace origin: (-7,-8)\nkinds: domain domain vector\n",
        "spacings: 5 6 nan\naxis mins: -7 -8 nan\ncenters: node node ???\nkinds: domain domain list\n",
    ],
)
def test_channels_of_a_slice_of_nrrd_are_no_slices(tmp_path: Path, header: str) -> None:
    array = np.arange(60, dtype="<i2").reshape(4, 5, 3)
    path = nrrd(tmp_path / "a.nrrd", array, "raw", array.tobytes(order="F"), header=header)
    volume = read_channels([path])
    np.testing.assert_array_equal(volume.array, array.transpose(2, 0, 1)[..., None])
    np.testing.assert_allclose(volume.grid.affine, [[-5, 0, 0, 7], [0, -6, 0, 8], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert channel_count(path) == 3
    for read, expected in ((read_volume, "hold one 3D volume"), (read_labels, "hold one label map")):
        with pytest.raises(VolumeError, match=f"^Expected `{path}` to {expected}, but got shape 4x5x1x3: write "):
            read(path)


@pytest.mark.parametrize("third", [0.0, 1.0, 250.0])
@pytest.mark.parametrize("form", ["sform", "qform", "spacing"])
def test_an_axis_that_a_nifti_file_does_not_have_is_1_mm_unless_it_states_another(
    tmp_path: Path, form: str, third: float
) -> None:
    affine = np.diag([500.0, 600, third or 1, 1])
    image = nibabel.Nifti1Image(np.zeros((4, 5), np.uint8), affine)
    image.set_sform(affine, int(form == "sform"))
    image.set_qform(affine, int(form == "qform"))
    image.header.set_xyzt_units("micron")
    image.header["pixdim"][3] = third
    nibabel.save(image, tmp_path / "a.nii")
    states = third > 1 and form != "spacing"  # which nibabel reads for the axes of the file alone
    assert read_volume(tmp_path / "a.nii").grid.spacing == pytest.approx((0.5, 0.6, third / 1e3 if states else 1.0))


def test_an_unknown_unit_of_metaimage_is_refused(tmp_path: Path) -> None:
    path = _with_unit(tmp_path, "inch")
    message = f"Expected `{path}` to have a unit of length in `DistanceUnits`, but got 'inch': write mm, um, cm or m."
    with pytest.raises(VolumeError, match=f"^{re.escape(message)}$"):
        read_volume(path)


def _with_unit(folder: Path, unit: str) -> Path:
    header = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nElementSpacing = 2 3 4\n"
        f"DimSize = 2 3 4\nDistanceUnits = {unit}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    path = folder / "a.mha"
    path.write_bytes(header.encode() + bytes(48))
    return path


@pytest.mark.parametrize("edges", ["5 6 7\ncenters: cell cell", "5 6 7\ncenters: cell cell edge", "inf 6 7"])
def test_edges_of_nrrd_that_mean_nothing_are_refused(tmp_path: Path, edges: str) -> None:
    header = f"spacings: 2 3 4\naxis mins: {edges}\n"
    path = nrrd(tmp_path / "a.nrrd", np.zeros((2, 3, 4), "<i2"), "raw", bytes(48), header=header)
    with pytest.raises(VolumeError, match=r"in `(centers|axis mins)`, but got '(cell cell|edge|inf 6 7)': correct its"):
        read_volume(path)


def test_data_in_other_folders_lists_and_patterns_are_read_and_hashed(tmp_path: Path) -> None:
    array = np.arange(60, dtype="<i2").reshape(3, 4, 5)
    (tmp_path / "data").mkdir()
    slices = [array[:, :, k].tobytes(order="F") for k in range(5)]
    for k, part in enumerate(slices):
        (tmp_path / f"data/s{k + 1:02d}.raw").write_bytes(part)
    (tmp_path / "data/all.raw").write_bytes(b"junk" + b"".join(slices))
    mhd = "ObjectType = Image\nNDims = 3\nDimSize = 3 4 5\nElementSpacing = 1 1 1\nElementType = MET_SHORT\n"
    listed = "\n".join(f"data/s{k + 1:02d}.raw" for k in range(5))
    base = "NRRD0004\ntype: short\ndimension: 3\nsizes: 3 4 5\nspacings: 1 1 1\nencoding: raw\nendian: little\n"
    headers = {
        "list.mhd": mhd + f"ElementDataFile = LIST\n{listed}\n",
        "pattern.mhd": mhd + "ElementDataFile = data/s%02d.raw 1 5 1\n",
        "end.mhd": mhd + "HeaderSize = -1\nElementDataFile = data/all.raw\n",
        "skip.mhd": mhd + "HeaderSize = 4\nElementDataFile = data/all.raw\n",
        "one.nhdr": base + "byte skip: 4\ndata file: data/all.raw\n",
        "end.nhdr": base + "byte skip: -1\ndata file: data/all.raw\n",
        "list.nhdr": base + f"data file: LIST\n{listed}\n",
        "pattern.nhdr": base + "data file: data/s%02d.raw 1 5 1\n",
    }
    before = {}
    for name, text in headers.items():
        (tmp_path / name).write_text(text)
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, array, err_msg=name)
        before[name] = file_hash(tmp_path / name)
    for file in (tmp_path / "data/s03.raw", tmp_path / "data/all.raw"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    for name in headers:
        assert file_hash(tmp_path / name) != before[name], name


def test_a_pair_is_read_by_either_name_and_hashed_whole(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    nibabel.save(nibabel.Nifti1Pair(array, np.diag([1.0, 2, 3, 1])), tmp_path / "a.hdr")
    for name in ("a.hdr", "a.img"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, array)
    before = file_hash(tmp_path / "a.hdr")
    content = bytearray((tmp_path / "a.img").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a.img").write_bytes(content)
    assert file_hash(tmp_path / "a.hdr") != before
    (tmp_path / "a.img").unlink()
    with pytest.raises(VolumeError, match=r"to have its `a\.img` beside it, but got no such file"):
        read_volume(tmp_path / "a.hdr")


@pytest.mark.parametrize(("unit", "scale"), [("micron", 1e3), ("meter", 1e-3), ("mm", 1.0), ("unknown", 1.0)])
def test_units_of_nifti_are_applied(tmp_path: Path, unit: str, scale: float) -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.diag([scale, 2 * scale, 3 * scale, 1]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii")
    got = read_volume(tmp_path / "a.nii")
    assert got.grid.spacing == pytest.approx((1, 2, 3))
    assert bool(got.notes) == (scale != 1)


@pytest.mark.parametrize(("unit", "scale"), [("microns", 1e3), ("cm", 0.1), ("mm", 1.0)])
def test_units_of_nrrd_are_applied_and_others_refused(tmp_path: Path, unit: str, scale: float) -> None:
    array = np.zeros((2, 2, 2), "<i2")
    directions = f"({scale},0,0) (0,{scale},0) (0,0,{scale})"
    header = f"space: RAS\nspace directions: {directions}\nspace units:" + f' "{unit}"' * 3 + "\n"
    got = read_volume(nrrd(tmp_path / "a.nrrd", array, "raw", array.tobytes(), header=header))
    assert got.grid.spacing == pytest.approx((1, 1, 1))
    other = header.replace(unit, "furlong")
    with pytest.raises(VolumeError, match="to have a unit of length in `space units`, but got 'furlong': write mm"):
        read_volume(nrrd(tmp_path / "b.nrrd", array, "raw", array.tobytes(), header=other))


@pytest.mark.parametrize(("units", "scale"), [("um", 1e-3), ("CM", 10.0), ("mm", 1.0), ("", 1.0)])
def test_units_of_the_axes_of_nrrd_are_applied_and_others_refused(tmp_path: Path, units: str, scale: float) -> None:
    path = tmp_path / "a.nrrd"
    header = (
        "NRRD0004\ntype: uint8\ndimension: 4\nsizes: 1 2 2 2\nspacings: nan 20 30 40\naxis mins: nan 0 0 100\n"
        f'kinds: vector domain domain domain\nunits: "counts"{f" {chr(34)}{units}{chr(34)}" * 3}\nencoding: raw\n\n'
    )
    path.write_bytes(header.encode() + bytes(8))
    got = read_volume(path)
    np.testing.assert_allclose(got.grid.spacing, np.array([20, 30, 40]) * scale)
    np.testing.assert_allclose(got.grid.affine[2, 3], 120 * scale)  # `axis mins` is the edge of a voxel
    assert bool(got.notes) == (scale != 1)
    for wrong, expected in (("furlong", "have a unit of length in `units`, but got 'furlong': write mm"),):
        path.write_bytes(header.replace(f'"{units}"', f'"{wrong}"').encode() + bytes(8))
        with pytest.raises(VolumeError, match=expected):
            read_volume(path)
    path.write_bytes(header.replace('"counts" ', "").encode() + bytes(8))
    with pytest.raises(VolumeError, match="have 4 units in `units`, but got"):
        read_volume(path)


def test_a_conflict_of_the_two_forms_is_told_with_the_one_that_was_used(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((9, 9, 9), np.uint8), None)
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    image.set_qform(turned, 1)
    image.set_sform(np.eye(4), 2)
    nibabel.save(image, tmp_path / "a.nii")
    got = read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(got.grid.affine, np.eye(4))
    assert "sform (code 2) and qform (code 1) differ by up to 3.381 mm; the sform was used" in got.notes[0]
    image.set_qform(np.eye(4), 1)
    nibabel.save(image, tmp_path / "b.nii")
    assert read_volume(tmp_path / "b.nii").notes == ()


def nifti_bytes(**changes: float | tuple[float, ...]) -> bytes:
    """A NIfTI of 2x2x2 voxels with fields of its header replaced."""
    image = nibabel.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.eye(4))
    code = changes.pop("qform", 0)
    if code:
        image.set_sform(None, 0)
        image.set_qform(np.eye(4), 1)
    raw = bytearray(image.to_bytes())
    header = np.frombuffer(raw, nibabel.nifti1.header_dtype, count=1)
    for name, value in changes.items():
        header[name] = value
    return bytes(raw)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"vox_offset": 1e30}, "to store its voxels after its header, but got the offset 1e+30"),
        ({"vox_offset": np.nan}, "to store its voxels after its header, but got the offset nan"),
        ({"vox_offset": 9e9}, "to hold all its voxels"),
        ({"dim": (3, 0, 2, 2, 1, 1, 1, 1)}, "to have at least one voxel along each axis, but got shape 0x2x2"),
        ({"dim": (3, -5, 2, 2, 1, 1, 1, 1)}, "to have at least one voxel along each axis, but got shape -5x2x2"),
        ({"dim": (9, 2, 2, 2, 1, 1, 1, 1)}, "to have 1 to 7 axes, but got 9"),
        ({"dim": (3, 32767, 32767, 32767, 1, 1, 1, 1)}, "to hold all its voxels, but got 360 bytes for 3517"),
        ({"datatype": 128, "bitpix": 24}, "to hold one number per voxel, but got RGB colours: convert it"),
        ({"datatype": 32, "bitpix": 64}, "to hold one number per voxel, but got complex numbers (complex64): conv"),
        ({"datatype": 77}, "to have a NIfTI data type, but got the code 77"),
        ({"bitpix": 32}, "to have a `bitpix` that fits its data type, but got 32 bits for uint8"),
        ({"scl_slope": 2, "scl_inter": np.nan}, "to have a finite scaling, but got the intercept nan"),
        ({"srow_x": (0, 0, 0, 0)}, "to have a valid affine, but got voxels of 0x1x1 mm"),
        ({"srow_x": (np.nan, 0, 0, 0)}, "to have a valid affine, but got voxels of nanx1x1 mm"),
        ({"srow_y": (1, 0, 0, 0)}, "to have a valid affine, but got"),
        ({"qform": 1, "pixdim": (1, 0, 1, 1, 1, 1, 1, 1)}, "to have a positive spacing, but got 0x1x1 in `pixdim`"),
        ({"qform": 1, "pixdim": (1, -2, 1, 1, 1, 1, 1, 1)}, "to have a positive spacing, but got -2x1x1 in"),
        ({"qform": 1, "pixdim": (1, np.nan, 1, 1, 1, 1, 1, 1)}, "to have a positive spacing, but got nanx1x1 in"),
        ({"qform": 1, "pixdim": (1, 1e30, 1, 1, 1, 1, 1, 1)}, "to have a valid affine, but got voxels of 1e+30x1x1"),
        ({"qform": 1, "quatern_b": 3.0}, "to have a valid qform"),
        ({"magic": b"xyz"}, "to be NIfTI, but got the magic string"),
    ],
)
def test_headers_of_nifti_that_cannot_be_right(tmp_path: Path, changes: dict, text: str) -> None:
    for name, pack in (("a.nii", bytes), ("a.nii.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(nifti_bytes(**dict(changes))))
        for read in (read_volume, read_labels, lambda path: read_channels([path])):
            with pytest.raises(VolumeError) as error:
                read(tmp_path / name)
            assert str(error.value).startswith(f"Expected `{tmp_path / name}` to ")
            assert text.split(" bytes for")[0] in str(error.value).replace("a.nii.gz", "a.nii") or name == "a.nii.gz"


@pytest.mark.parametrize("spacing", ["0 1 1", "-1 1 1", "nan 1 1", "inf 1 1", "1e30 1 1", "1 1", "one 1 1"])
def test_spacing_that_cannot_be_in_text_headers(tmp_path: Path, spacing: str) -> None:
    mha = f"ObjectType = Image\nNDims = 3\nDimSize = 1 1 1\nElementSpacing = {spacing}\nElementType = MET_UCHAR\n"
    (tmp_path / "a.mha").write_bytes(f"{mha}ElementDataFile = LOCAL\n".encode() + b"\1")
    nrrd(tmp_path / "a.nrrd", np.ones((1, 1, 1)), "raw", b"\1\0", header=f"spacings: {spacing}\n")
    vector = ",".join([*spacing.split()[:1], "0", "0"])
    nrrd(
        tmp_path / "b.nrrd",
        np.ones((1, 1, 1)),
        "raw",
        b"\1\0",
        header=f"space directions: ({vector}) (0,1,0) (0,0,1)\n",
    )
    for name in ("a.mha", "a.nrrd", *(["b.nrrd"] if spacing not in ("1 1", "-1 1 1") else [])):
        with pytest.raises(VolumeError, match=r"^Expected `.*\.$"):
            read_volume(tmp_path / name)


def test_channels_are_the_fourth_axis_or_files(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(3, 4, 5, 2)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "both.nii.gz")
    for channel in range(2):
        nibabel.save(nibabel.Nifti1Image(array[..., channel], np.eye(4)), tmp_path / f"c{channel}.nii.gz")
    both = read_channels([tmp_path / "both.nii.gz"])
    np.testing.assert_array_equal(both.array, np.moveaxis(array, -1, 0))
    np.testing.assert_array_equal(read_channels([tmp_path / f"c{c}.nii.gz" for c in range(2)]).array, both.array)
    assert both.grid.shape == (3, 4, 5)
    nibabel.save(nibabel.Nifti1Image(array[..., 0], np.diag([2.0, 1, 1, 1])), tmp_path / "c1.nii.gz")
    with pytest.raises(VolumeError, match=r"to be on the same grid .* as its other channels"):
        read_channels([tmp_path / "c0.nii.gz", tmp_path / "c1.nii.gz"])


def series() -> SimpleITK.Image:
    """Three volumes on one grid, joined along a fourth axis."""
    rng = np.random.default_rng(2)
    volumes = [itk_image(rng.integers(0, 100, (4, 5, 6)).astype(np.int16)) for _ in range(3)]
    return SimpleITK.JoinSeries(volumes, 11.0, 0.5)


@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.nii.gz"])
def test_a_series_of_itk_is_an_image_of_channels(tmp_path: Path, name: str) -> None:
    image = series()
    SimpleITK.WriteImage(image, str(tmp_path / name))
    got = read_channels([tmp_path / name])
    np.testing.assert_array_equal(got.array, SimpleITK.GetArrayFromImage(image).transpose(0, 3, 2, 1))
    np.testing.assert_allclose(got.grid.affine, itk_affine(image[..., 0]), atol=1e-4)
    assert channel_count(tmp_path / name) == 3
    with pytest.raises(VolumeError, match="to hold one 3D volume, but got shape 4x5x6x3: write each volume to its own"):
        read_volume(tmp_path / name)


def test_a_fourth_axis_of_nrrd_lies_along_a_dimension_of_its_own(tmp_path: Path) -> None:
    array = np.arange(48, dtype="<i2").reshape(2, 3, 4, 2)
    header = (
        "space: {}\nspace directions: (0,2,0,0) (3,0,0,0) (0,0,4,0) {}\nspace origin: (1,2,3,9)\n"
        'space units: "cm" "cm" "cm" "s"\n'
    )
    for space, signs in (("left-posterior-superior-time", [1, 1, 1]), ("RAST", [-1, -1, 1])):
        text = header.format(space, "(0,0,0,0.5)")
        got = read_channels([nrrd(tmp_path / "a.nrrd", array, "raw", array.tobytes(order="F"), header=text)])
        np.testing.assert_array_equal(got.array, np.moveaxis(array, -1, 0))
        lps = np.diag([*signs, 1]) @ [[0, 30, 0, 10], [20, 0, 0, 20], [0, 0, 40, 30], [0, 0, 0, 1]]
        np.testing.assert_allclose(got.grid.affine, LPS_TO_RAS @ lps)
    for vector in ("(0,0,1,0.5)", "(0,0,0,0)"):
        path = nrrd(tmp_path / "a.nrrd", array, "raw", array.tobytes(), header=header.format("RAST", vector))
        with pytest.raises(VolumeError) as error:
            read_channels([path])
        shown = vector.replace(",", ", ")
        assert str(error.value) == (
            f"Expected `{path}` to have one axis along the fourth dimension, and three without a part of it, but got "
            f"(0, 2, 0, 0); (3, 0, 0, 0); (0, 0, 4, 0); {shown}: write each volume to its own file."
        )


@pytest.mark.parametrize("code", ["qform", "sform", "both", "none"])
@pytest.mark.parametrize("length", [0, -1, np.nan])
def test_the_length_of_an_axis_that_a_nifti_lacks_does_not_matter(tmp_path: Path, code: str, length: float) -> None:
    image = nibabel.Nifti1Image(np.ones((4, 5), np.uint8), np.eye(4))
    affine = np.array([[0, 0.5, 0, 3], [2, 0, 0, 4], [0, 0, -1, 5], [0, 0, 0, 1.0]])
    image.set_qform(affine, 1 if code in ("qform", "both") else 0)
    image.set_sform(affine, 1 if code in ("sform", "both") else 0)
    raw = bytearray(image.to_bytes())
    np.frombuffer(raw, nibabel.nifti1.header_dtype, count=1)["pixdim"][0, 3] = length
    (tmp_path / "a.nii").write_bytes(raw)
    got = read_volume(tmp_path / "a.nii")
    assert got.grid.spacing == (2.0, 0.5, 1.0)
    assert got.notes == ()
    if code != "none":
        np.testing.assert_allclose(got.grid.affine, affine, atol=1e-6)


def test_the_header_alone_tells_shape_and_place(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([1.0, 2, 3, 1])), path)
    header = read_header(path)
    assert header is not None
    assert (header.shape, header.dtype, header.stored_bytes) == ((3, 4, 5), np.dtype("<i2"), 120)
    np.testing.assert_array_equal(header.affine, np.diag([1.0, 2, 3, 1]))
