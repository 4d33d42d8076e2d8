from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged

from monai_iou.datasets.cases import DatasetError
from monai_iou.planning.own_errors import chain
from monai_iou.workflow.data import BundleCases
from monai_iou.workflow.loading import LabelClassesd, LabelReader, VolumeReader

AFFINE = np.diag([-1.0, 2.0, 3.0, 1.0])


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    return path


def load(path: Path | list[Path], reader: type = VolumeReader, **kwargs: object) -> MetaTensor:
    return LoadImaged("x", reader=reader, **kwargs)({"x": path})["x"]  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 2)])
def test_images_come_as_monais_own_reader_gives_them(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    path = save(tmp_path / "a.nii.gz", array)
    ours, theirs = load(path, ensure_channel_first=True), load(path, "NibabelReader", ensure_channel_first=True)
    assert torch.equal(ours.as_tensor(), theirs.as_tensor())
    assert torch.equal(ours.affine, theirs.affine)
    assert ours.meta["filename_or_obj"] == theirs.meta["filename_or_obj"]


def test_files_are_the_channels_of_one_image(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(4, 5, 6, 2)).astype(np.float32)
    paths = [save(tmp_path / f"a_{c:04d}.nii.gz", array[..., c]) for c in range(2)]
    assert torch.equal(load(paths, ensure_channel_first=True).as_tensor(), torch.from_numpy(np.moveaxis(array, -1, 0)))


def test_large_label_values_become_classes_without_a_float_between(tmp_path: Path) -> None:
    values = [0, 70000, 312782546, 312782550]
    array = np.array(values, dtype=np.int32).reshape(1, 2, 2)
    label = load(save(tmp_path / "a.nii.gz", array), LabelReader, dtype=None)
    assert not label.is_floating_point()
    classes = LabelClassesd("x", values)({"x": label})["x"]
    assert classes.flatten().tolist() == [0, 1, 2, 3]
    assert classes.dtype == torch.uint8
    with pytest.raises(DatasetError) as caught:
        LabelClassesd("x", values[:3])({"x": label})
    assert str(caught.value) == (
        f"Expected {tmp_path / 'a.nii.gz'} to hold only label values that the network was planned for (0, 70000, "
        "312782546), but got 312782550: correct the label, or train with this value."
    )


def test_classes_keep_the_order_of_the_values_and_have_room_for_a_thousand() -> None:
    values = [0, *range(5000, 5999)]
    label = torch.tensor(values)[None, None]
    classes = LabelClassesd("x", values)({"x": label})["x"]
    assert classes.dtype == torch.int16
    assert classes.flatten().tolist() == list(range(1000))


def damaged(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # in the checksum
    path.write_bytes(content)
    return path


def test_a_refused_file_is_not_read_by_another_reader(tmp_path: Path) -> None:
    path = damaged(save(tmp_path / "a.nii.gz", np.ones((4, 5, 6), np.int16)))
    with pytest.raises(Exception, match=r"a\.nii\.gz") as caught:
        load(path)
    assert any(isinstance(cause, DatasetError) for cause in chain(caught.value))


@pytest.mark.parametrize(
    ("value", "text"), [(np.nan, "has NaN or infinity"), (1e300, r"intensities that float32 can hold, but got 1e\+300")]
)
def test_numbers_that_a_network_cannot_take(tmp_path: Path, value: float, text: str) -> None:
    array = np.zeros((4, 5, 6))
    array[1, 2, 3] = value
    with pytest.raises(DatasetError, match=text):
        load(save(tmp_path / "a.nii", array))


def test_inference_lists_every_format_and_passes_over_hidden_files(tmp_path: Path) -> None:
    for name in ("b.nii", "c.NII.GZ", "a.mha", "d.nrrd", "._b.nii", ".x/e.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    cases = BundleCases(str(tmp_path))
    assert [item["case"] for item in cases.inference] == ["a", "b", "c", "d"]
    assert cases.result_path(tmp_path / "c.NII.GZ", "out", "", ".mha") == Path("out/c.mha")


def test_inference_refuses_a_damaged_image_before_the_first_mask(tmp_path: Path) -> None:
    from monai_iou.planning.plan import make_plan

    save(tmp_path / "a.nii.gz", np.ones((4, 5, 6), np.int16))
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(b"no volume"))
    with pytest.raises(DatasetError, match=r"b\.nii\.gz` to be a readable volume"):
        BundleCases(str(tmp_path)).check_inference(make_plan(None, [], [32, 32, 32]))


@pytest.mark.parametrize("spacing", [(1000.0, 1000.0, 1000.0), (1.0, 1000.0, 1.0)])
def test_inference_names_the_image_whose_voxels_are_unlike_the_models(
    tmp_path: Path, spacing: tuple[float, ...]
) -> None:
    from monai_iou.planning.plan import make_plan

    save(tmp_path / "b.nii.gz", np.ones((4, 5, 6), np.int16))
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6), np.int16), np.diag([*spacing, 1])), tmp_path / "a.nii.gz")
    with pytest.raises(
        DatasetError, match=r"a\.nii\.gz to have voxels like those that the model was trained on, of abo"
    ):
        BundleCases(str(tmp_path)).check_inference(make_plan(None, [], [32, 32, 32]))
