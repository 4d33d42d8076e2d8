from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from places import DATA

from monai_iou.volumes.grid import align
from monai_iou.volumes.reading import VolumeError, file_hash, is_volume, read_labels, read_volume

ODD = DATA / "odd_files"
needs_odd_files = pytest.mark.skipif(not ODD.is_dir(), reason="the real odd files are not beside the project")
AFFINE = np.array([[-0.5, 0, 0, 20], [0, 1, 0, -30], [0, 0, 3, 40], [0, 0, 0, 1.0]])


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4, (6, 7, 8)).astype(np.uint8)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def as_itk(array: np.ndarray) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(array.transpose())
    image.SetSpacing((0.5, 1.0, 3.0))
    image.SetOrigin((-20.0, 30.0, 40.0))  # AFFINE in ITK's LPS
    image.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
    return image


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd"])
def test_formats_of_itk_give_the_voxels_and_grid_of_nifti(tmp_path, labels, name):
    SimpleITK.WriteImage(as_itk(labels), tmp_path / name)
    expected, got = read_labels(save(tmp_path / "a.nii.gz", labels)), read_labels(tmp_path / name)
    np.testing.assert_array_equal(got.array, expected.array)
    np.testing.assert_allclose(got.grid.affine, expected.grid.affine, atol=1e-6)
    assert got.grid.orientation == "LAS"
    assert got.grid.voxel_ml == pytest.approx(0.0015)


def test_dicom_series_gives_the_grid_of_the_image_it_was_written_from(tmp_path, labels):
    write_dicom(tmp_path / "series", labels)
    got = read_volume(tmp_path / "series")
    np.testing.assert_array_equal(got.array, labels)
    np.testing.assert_allclose(got.grid.spacing, (0.5, 1.0, 3.0), atol=1e-6)
    assert is_volume(tmp_path / "series")


def test_dicom_series_with_a_missing_slice_is_refused(tmp_path, labels):
    write_dicom(tmp_path / "series", labels)
    (tmp_path / "series" / "004.dcm").unlink()
    with pytest.raises(VolumeError, match=r"evenly spaced slices, but got distances from 3 to 6 mm: add missing"):
        read_volume(tmp_path / "series")


def write_dicom(folder: Path, array: np.ndarray) -> None:
    folder.mkdir()
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(array.shape[2]):
        image = SimpleITK.GetImageFromArray(array[:, :, k : k + 1].transpose().astype(np.int16))
        image.SetSpacing((0.5, 1.0, 3.0))
        for key, value in {
            "0008|0060": "MR",
            "0020|000d": "1.2.3",
            "0020|000e": "1.2.3.4",
            "0008|0018": f"1.2.3.4.{k + 1}",
            "0020|0032": f"-20\\30\\{40 + 3 * k}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(k),
        }.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{k:03}.dcm"))
        writer.Execute(image)


def test_header_scaling_is_applied_and_whole_numbers_survive_it(tmp_path):
    image = nibabel.Nifti1Image(np.array([[[0, 10, 20, 30]]], dtype=np.int16), AFFINE)
    image.header.set_slope_inter(1, 0)
    nibabel.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:116] = np.float32(0.1).tobytes()  # scl_slope
    (tmp_path / "a.nii").write_bytes(raw)
    got = read_labels(tmp_path / "a.nii")
    assert got.array.ravel().tolist() == [0, 1, 2, 3]
    assert got.array.dtype == np.uint8


@pytest.mark.parametrize(("low", "high", "dtype"), [(0, 255, "u1"), (-1, 3, "i2"), (0, 70000, "i4"), (0, 2**40, "i8")])
def test_labels_take_the_smallest_dtype(tmp_path, low, high, dtype):
    got = read_labels(save(tmp_path / "a.nii.gz", np.array([[[low, high]]], dtype=np.float64)))
    assert got.array.dtype == np.dtype(dtype)
    assert got.array.ravel().tolist() == [low, high]


def test_big_endian_and_trailing_axes_are_read(tmp_path, labels):
    image = nibabel.Nifti1Image(labels[..., None].astype(">i2"), AFFINE, nibabel.Nifti1Header(endianness=">"))
    nibabel.save(image, tmp_path / "a.nii")
    got = read_labels(tmp_path / "a.nii")
    np.testing.assert_array_equal(got.array, labels)
    assert got.grid.shape == labels.shape


def test_image_of_two_dimensions_is_one_slice(tmp_path):
    image = SimpleITK.GetImageFromArray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    image.SetSpacing((0.5, 2.0))
    SimpleITK.WriteImage(image, tmp_path / "a.mha")
    got = read_volume(tmp_path / "a.mha")
    assert got.array.shape == (3, 2, 1)
    assert got.grid.spacing == (0.5, 2.0, 1.0)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0, np.nan, np.inf], "hold labels, but got 2 NaN or infinite voxels: write 0 for background."),
        ([0, 0.25, 1], "hold whole-number labels, but got 1 fractions such as 0.25: threshold the probabilities, or"),
    ],
)
def test_floats_that_are_not_labels_are_refused(tmp_path, values, text):
    path = save(tmp_path / "a.nii.gz", np.array([[values]], dtype=np.float32))
    with pytest.raises(VolumeError) as error:
        read_labels(path)
    assert f"Expected `{path}` to {text}" in str(error.value)


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path


def test_damaged_and_absent_files_give_one_sentence(tmp_path, labels, capfd):
    big = np.random.default_rng(0).integers(0, 200, (20, 20, 20)).astype(np.uint8)
    for name in ("a.mha", "a.nrrd"):
        SimpleITK.WriteImage(as_itk(big), tmp_path / name)
        truncated(tmp_path / name)
    truncated(save(tmp_path / "a.nii.gz", big))
    truncated(save(tmp_path / "a.nii", big))
    (tmp_path / "b.nii.gz").write_bytes(b"")
    (tmp_path / "c.nii.gz").write_bytes(b"not a volume")
    (tmp_path / "d.nii").write_bytes(gzip.compress(b"not a volume"))
    (tmp_path / "e.mha").write_text("not a volume")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "f.nii.gz", np.zeros((2, 2, 2, 3), np.uint8))
    for path in [*tmp_path.iterdir(), tmp_path / "absent.nii"]:
        with pytest.raises(VolumeError) as error:
            read_labels(path)
        assert_one_sentence(str(error.value), path)


def assert_one_sentence(text: str, path: Path) -> None:
    assert text.startswith(f"Expected `{path}` to ")
    assert text.endswith(".")
    assert "\n" not in text
    assert "(0x" not in text
    assert len(text.replace(str(path), "")) < 300


def test_colour_and_zero_spacing_are_refused(tmp_path):
    colour = np.zeros((2, 2, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colour, AFFINE), tmp_path / "rgb.nii")
    with pytest.raises(VolumeError, match="to hold one number per voxel"):
        read_volume(tmp_path / "rgb.nii")
    SimpleITK.WriteImage(SimpleITK.Image((2, 2, 2), SimpleITK.sitkVectorUInt8, 3), tmp_path / "rgb.mha")
    with pytest.raises(VolumeError, match="to hold one number per voxel, but got 3"):
        read_volume(tmp_path / "rgb.mha")
    raw = bytearray(save(tmp_path / "flat.nii", np.zeros((2, 2, 2), np.uint8)).read_bytes())
    raw[280:292] = bytes(12)  # srow_x up to its offset
    (tmp_path / "flat.nii").write_bytes(raw)
    with pytest.raises(VolumeError, match="to have a valid affine"):
        read_volume(tmp_path / "flat.nii")


@pytest.mark.parametrize(("name", "kind"), [("a.tif", "TIFF"), ("a.jpg", "JPEG"), ("a.bmp", "BMP"), ("a.dat", "TIFF")])
def test_pictures_without_a_spacing_in_mm_are_refused(tmp_path, name, kind):
    """ITK reads them with the resolution of a print, or with 1 mm."""
    SimpleITK.WriteImage(SimpleITK.Image((8, 8), SimpleITK.sitkUInt8), tmp_path / f"a.{kind.lower()[:4]}")
    (tmp_path / f"a.{kind.lower()[:4]}").rename(tmp_path / name)
    with pytest.raises(VolumeError) as error:
        read_volume(tmp_path / name)
    assert str(error.value) == (
        f"Expected `{tmp_path / name}` to be of a format that states the spacing in mm, but got {kind}: convert it to "
        ".nii.gz with its spacing or, if it is a single picture, to .png."
    )


@pytest.mark.parametrize("name", ["a.gipl", "a.vtk", "a.mnc"])
def test_other_formats_of_itk_keep_their_spacing(tmp_path, labels, name):
    SimpleITK.WriteImage(as_itk(labels), tmp_path / name)
    got = read_labels(tmp_path / name)
    np.testing.assert_array_equal(got.array, labels)
    np.testing.assert_allclose(got.grid.spacing, (0.5, 1.0, 3.0))


def test_hash_covers_detached_data_and_every_slice(tmp_path, labels):
    SimpleITK.WriteImage(as_itk(labels), tmp_path / "a.mhd")
    write_dicom(tmp_path / "series", labels)
    for path, part in (
        (tmp_path / "a.mhd", tmp_path / "a.raw"),
        (tmp_path / "series", tmp_path / "series" / "003.dcm"),
    ):
        before = file_hash(path)
        assert before == file_hash(path)
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
        assert file_hash(path) != before


@pytest.mark.real_data
@needs_odd_files
def test_every_odd_file_is_read_or_refused_in_one_sentence():
    read, refused = set(), {}
    for path in sorted(ODD.rglob("*")):
        if not path.is_file() and not is_volume(path):
            continue
        for reader in (read_volume, read_labels):
            try:
                reader(path)
                read.add(path.name)
            except VolumeError as error:
                assert_one_sentence(str(error), path)
                refused[path.name] = str(error)
    readable = {
        "anatomical.nii",
        "CT_mask.nii.gz",
        "CT_mask.mha",
        "brain1_label.nrrd",
        "breast1_label.nrrd",
    }
    readable |= {"t2__t2_seg-manual.nii.gz", "mt__mt1_gmseg_goldstandard.nii.gz", "dmri__dwi_mean.nii.gz", "image"}
    assert readable <= read
    several = {"functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz", "dmri__dmri.nii.gz", "fmri__fmri.nii.gz"}
    assert several | {"mask", "RS.dcm"} <= refused.keys() - read
    assert "or each volume to its own file" in refused["functional.nii"]
    assert "an RT structure set" in refused["mask"]


@pytest.mark.real_data
@needs_odd_files
def test_dicom_metaimage_and_nifti_of_one_patient_agree():
    twin, resaved = ODD / "dicom_ct_STS_019_CCBY3" / "nifti_twin", ODD / "resaved_mha_STS_019_CCBY3"
    mask, other = read_labels(twin / "CT_mask.nii.gz"), read_labels(resaved / "CT_mask.mha")
    np.testing.assert_array_equal(align(other.array, other.grid, mask.grid), mask.array)
    image = read_volume(twin / "CT_image.nii.gz")
    for path in (ODD / "dicom_ct_STS_019_CCBY3" / "image", resaved / "CT_image.mha"):
        other = read_volume(path)
        np.testing.assert_array_equal(align(other.array, other.grid, image.grid), image.array)


@pytest.mark.real_data
@needs_odd_files
def test_masks_lie_on_their_images_in_any_orientation():
    folder = ODD / "spinalcord_sct_MIT"
    for image, mask in (("t2__t2", "t2__t2_seg-manual"), ("mt__mt1", "mt__mt0_seg"), ("t1__t1w", "t1__t1w_seg-manual")):
        label, picture = read_labels(folder / f"{mask}.nii.gz"), read_volume(folder / f"{image}.nii.gz")
        assert align(label.array, label.grid, picture.grid).shape == picture.array.shape
