from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirstd, LoadImaged, SaveImaged

from monai_iou.files import OutputError
from monai_iou.volumes.reading import read_header
from monai_iou.workflow import masks
from monai_iou.workflow.data import BundleCases
from monai_iou.workflow.loading import VolumeReader
from monai_iou.workflow.masks import ClassValuesd, SaveImageMaskd, mask_dtype
from monai_iou.workflow.probability_files import SaveProbabilitiesd

TURNED = np.eye(4)
TURNED[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
TURNED[:3, 3] = (10, -20, 30)


def written(image: Path, folder: Path, values: np.ndarray | None = None, dtype: type = np.uint8) -> Path:
    """Load an image as inference does and write a mask for it."""
    item = EnsureChannelFirstd("x")(LoadImaged("x", reader=VolumeReader)({"x": image}))
    x = item["x"]
    mask = torch.ones(1, *x.shape[1:]) if values is None else torch.from_numpy(values)[None]
    cases = BundleCases(str(image.parent), images=[str(image)])
    SaveImageMaskd("x", cases, str(folder), output_dtype=dtype)({"x": MetaTensor(mask, meta=x.meta)})
    (path,) = folder.glob("*.nii.gz")
    return path


@pytest.mark.parametrize("codes", [(1, 2), (1, 1), (0, 2), (1, 0), (2, 4)])
@pytest.mark.parametrize("unit", ["mm", "micron", "unknown"])
def test_itk_and_nibabel_put_the_mask_on_the_image(tmp_path: Path, codes: tuple[int, int], unit: str) -> None:
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32), None)
    image.set_qform(TURNED if codes[0] else None, codes[0])
    image.set_sform(np.diag([1.0, 2.0, 3.0, 1.0]) if codes[1] else None, codes[1])
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii.gz")
    mask = written(tmp_path / "a.nii.gz", tmp_path / "out")
    first, second = (nib.load(path) for path in (tmp_path / "a.nii.gz", mask))
    np.testing.assert_allclose(first.affine, second.affine, atol=1e-6)
    np.testing.assert_allclose(first.get_qform(), second.get_qform(), atol=1e-6)
    for name in ("qform_code", "sform_code", "xyzt_units", "pixdim"):
        np.testing.assert_array_equal(first.header[name][...], second.header[name][...])
    assert second.get_data_dtype() == np.uint8
    corners = [
        SimpleITK.ReadImage(str(path)).TransformIndexToPhysicalPoint((4, 5, 6))
        for path in (tmp_path / "a.nii.gz", mask)
    ]
    np.testing.assert_allclose(*corners, atol=1e-4)


@pytest.mark.parametrize("codes", [(1, 2), (0, 0), (1, 0), (0, 2)])
@pytest.mark.parametrize("ending", [".nii.gz", ".hdr", ".img"])
def test_masks_and_probabilities_of_files_and_pairs_lie_on_the_image(
    tmp_path: Path, codes: tuple[int, int], ending: str
) -> None:
    """Also where a header states two places, or none, or a scale that is not its spacing."""
    kind = nib.Nifti1Image if ending == ".nii.gz" else nib.Nifti1Pair
    made = kind(np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32), None)
    made.header.set_zooms((1, 1, 1))
    made.set_qform(TURNED if codes[0] else None, codes[0])
    made.set_sform(np.diag([1.0, 2.0, 3.0, 1.0]) if codes[1] else None, codes[1])
    made.header.set_xyzt_units("mm", "sec")
    image = tmp_path / f"a{ending}"
    nib.save(made, image)
    mask = written(image, tmp_path / "masks")
    x = EnsureChannelFirstd("x")(LoadImaged("x", reader=VolumeReader)({"x": image}))["x"]
    half = MetaTensor(torch.full((2, 5, 6, 7), 0.5), meta=x.meta)
    cases = BundleCases(str(tmp_path), images=[str(image)])
    SaveProbabilitiesd("x", cases, str(tmp_path / "maps"), regions=False)({"x": half})
    (maps,) = (tmp_path / "maps").iterdir()
    for path in (mask, maps):
        first, second = (nib.load(each).header for each in (image, path))
        for name in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z"):
            np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_array_equal(first["pixdim"][:4], second["pixdim"][:4])
        there, here = SimpleITK.ReadImage(str(image)), SimpleITK.ReadImage(str(path))
        index = (4, 5, 6)
        point = here.TransformIndexToPhysicalPoint((*index, 0) if path == maps else index)
        np.testing.assert_allclose(point[:3], there.TransformIndexToPhysicalPoint(index), atol=1e-4)
    probabilities = nib.load(maps)
    assert probabilities.shape == (5, 6, 7, 2)
    assert probabilities.get_data_dtype() == np.float32
    assert probabilities.header.get_xyzt_units() == ("mm", "unknown"), "classes are no times"
    assert (probabilities.get_fdata() == 0.5).all()


@pytest.mark.parametrize("codes", [(0, 7), (9, 0), (6, 6), (200, 1), (1, 200)])
def test_codes_that_nobody_knows_leave_the_mask_on_the_image(tmp_path: Path, codes: tuple[int, int]) -> None:
    """The reader takes every code above 0; nibabel writes 0 in its place, and the mask would lie elsewhere."""
    image = nib.Nifti1Image(np.ones((5, 6, 7), np.float32), None)
    image.set_qform(TURNED, 1)
    image.set_sform(np.diag([1.0, 2.0, 3.0, 1.0]), 1)
    nib.save(image, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[252:256] = np.array(codes, "<i2").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    mask = read_header(written(tmp_path / "a.nii", tmp_path / "out"))
    there = read_header(tmp_path / "a.nii")
    assert mask is not None
    assert there is not None
    np.testing.assert_allclose(mask.affine, there.affine, atol=1e-5)


def test_voxels_right_behind_a_header_do_not_end_the_run(tmp_path: Path) -> None:
    """Without the four bytes for extensions, which nibabel does not write."""
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7), np.float32), TURNED), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[108:112] = np.array([348], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content[:348] + content[352:])
    mask = nib.load(written(tmp_path / "a.nii", tmp_path / "out"))
    np.testing.assert_array_equal(np.asarray(mask.dataobj), 1)


@pytest.mark.parametrize("shape", [(5, 6, 1), (5, 6), (5, 6, 7, 1), (5, 6, 7, 1, 1), (1, 6, 7)])
def test_trailing_axes_are_those_of_the_image(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nib.save(nib.Nifti1Image(np.ones(shape, np.int16), TURNED), tmp_path / "a.nii.gz")
    assert nib.load(written(tmp_path / "a.nii.gz", tmp_path / "out")).shape == shape


def test_channels_of_the_image_are_none_of_the_mask(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7, 2), np.int16), TURNED), tmp_path / "a.nii.gz")
    mask = nib.load(written(tmp_path / "a.nii.gz", tmp_path / "out"))
    assert mask.shape == (5, 6, 7)
    np.testing.assert_allclose(mask.affine, TURNED, atol=1e-6)


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_masks_of_other_formats_lie_on_the_image_too(tmp_path: Path, name: str) -> None:
    image = SimpleITK.GetImageFromArray(np.ones((7, 6, 5), np.int16))
    image.SetSpacing((0.5, 1.5, 3.0))
    image.SetOrigin((10, -20, 30))
    image.SetDirection((np.cos(0.3), -np.sin(0.3), 0, np.sin(0.3), np.cos(0.3), 0, 0, 0, 1))
    SimpleITK.WriteImage(image, str(tmp_path / name))
    mask = SimpleITK.ReadImage(str(written(tmp_path / name, tmp_path / "out")))
    for index in ((0, 0, 0), (4, 5, 6)):
        point = mask.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(point, image.TransformIndexToPhysicalPoint(index), atol=1e-4)


def test_values_of_any_size_come_back(tmp_path: Path) -> None:
    values = [0, 70000, 312782546, 312782550]
    classes = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.float32)
    nib.save(nib.Nifti1Image(classes, np.eye(4)), tmp_path / "a.nii.gz")
    labels = ClassValuesd("x", values)({"x": torch.from_numpy(classes)})["x"].numpy()
    mask = nib.load(written(tmp_path / "a.nii.gz", tmp_path / "out", labels, mask_dtype(values)))
    np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(values)[classes.astype(int)])
    assert mask.get_data_dtype() == np.int32


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], torch.uint8),
        ([0, 256], torch.int16),
        ([0, -1], torch.int16),
        ([0, 40000], torch.int32),
        ([0, 1 << 33], torch.int64),
    ],
)
def test_values_take_the_smallest_type_that_other_programs_write(values: list[int], dtype: torch.dtype) -> None:
    plain = ClassValuesd("x", values)({"x": torch.tensor([[0.0, 1.0]])})["x"]
    regions = ClassValuesd("x", values, values[1:])({"x": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})["x"]
    for found in (plain, regions):
        assert found.dtype == dtype
        assert found.tolist() == [values]


def test_a_mask_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7), np.int16), np.eye(4)), tmp_path / "a.nii.gz")

    def full(self: object, name: Path) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib.Nifti1Image, "to_filename", full)
    writer = masks.MaskWriter(np.uint8)
    writer.set_data_array(torch.ones(1, 5, 6, 7))
    writer.set_metadata({"affine": np.eye(4), "filename_or_obj": str(tmp_path / "a.nii.gz")})
    (tmp_path / "out").mkdir()
    with pytest.raises(
        OutputError, match=r"to write the mask `.*out/m.nii.gz`, but got the error 'No space left on dev"
    ):
        writer.write(tmp_path / "out" / "m.nii.gz")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("postfix", "file"), [("", "p1/image.mha"), ("mask", "p1/image_mask.mha")])
def test_a_mask_goes_where_the_name_of_its_case_says(tmp_path: Path, postfix: str, file: str) -> None:
    """Also for a single case, whose image's own name would tell it apart from the others."""
    image = tmp_path / "p1" / "image.nii.gz"
    image.parent.mkdir()
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7), np.int16), np.eye(4)), image)
    cases = BundleCases(str(tmp_path), images=[{"case": "p1/image", "image": str(image)}])
    saver = SaveImageMaskd("x", cases, str(tmp_path / "out"), postfix, ".mha")
    saver({"x": MetaTensor(torch.ones(1, 5, 6, 7), meta={"affine": torch.eye(4), "filename_or_obj": str(image)})})
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [tmp_path / "out" / file]


@pytest.mark.parametrize(("case", "file"), [("p1/image", "p1/image.mha"), ("b.1", "b.1.mha")])
def test_configs_from_before_this_transform_still_name_their_masks(tmp_path: Path, case: str, file: str) -> None:
    """As copies of the bundle hold them: MONAI's own transform with the root and the names of `BundleCases`."""
    image = tmp_path / "p1" / "image.nii.gz"
    image.parent.mkdir()
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7), np.int16), np.eye(4)), image)
    cases = BundleCases(str(tmp_path), images=[{"case": case, "image": str(image)}])
    saver = SaveImaged(
        "x",
        output_dir=str(tmp_path / "out"),
        data_root_dir=cases.mask_root,
        output_postfix="",
        output_ext=".mha",
        output_name_formatter=cases.mask_name,
        writer="monai_iou.workflow.masks.MaskWriter",
        separate_folder=False,
        resample=False,
        print_log=False,
    )
    saver({"x": MetaTensor(torch.ones(1, 5, 6, 7), meta={"affine": torch.eye(4), "filename_or_obj": str(image)})})
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [tmp_path / "out" / file]


def test_programs_that_save_results_themselves_leave_this_transform_out() -> None:
    """MONAI Label asks for the class, MONAI Deploy for the name."""
    assert issubclass(SaveImageMaskd, SaveImaged)
    assert "SaveImage" in SaveImageMaskd.__name__
