from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iou.volumes.labels import whole_labels
from monai_iou.volumes.reading import VolumeError, read_labels

PATH = Path("labels.nii")
IDS = [0, 70000, 312782546, 312782550, 2**40]


@pytest.mark.parametrize("dtype", ["f8", "i8", "u8"])
def test_large_values_are_kept_apart(dtype: str) -> None:
    got = whole_labels(np.array(IDS, dtype=dtype).reshape(1, 1, -1), PATH)
    assert got.ravel().tolist() == IDS


@pytest.mark.parametrize(("dtype", "value"), [("f2", 4096), ("f4", 312782546), ("f8", 2.0**60)])
def test_values_that_floats_do_not_keep_are_refused(dtype: str, value: float) -> None:
    with pytest.raises(VolumeError, match=r"to hold distinct labels, but got .*, which float\d\d cannot"):
        whole_labels(np.array([[[0, value]]], dtype=dtype), PATH)


def test_values_beyond_64_bit_integers_are_refused() -> None:
    with pytest.raises(VolumeError, match=f"within 64-bit integers, but got values up to {2**63}: renumber them"):
        whole_labels(np.array([[[0, 2**63]]], dtype=np.uint64), PATH)


@pytest.mark.parametrize(("value", "label"), [(0.99999994, 1), (7014.9995, 7015), (-1.00001, -1), (3.00009, 3)])
def test_rounding_of_whole_numbers_is_undone(value: float, label: int) -> None:
    assert whole_labels(np.array([[[value]]], np.float32), PATH).item() == label


@pytest.mark.parametrize("value", [0.999, 0.5, 7014.9, 1e6 + 0.25])
def test_fractions_are_refused_with_their_digits(value: float) -> None:
    with pytest.raises(VolumeError, match=f"whole-number labels, but got 1 fractions such as {value:.9g}: threshold"):
        whole_labels(np.array([[[0.0, value]]]), PATH)


def test_scaled_integers_of_a_large_label_are_read(tmp_path: Path) -> None:
    labels = np.zeros((4, 4, 4))
    labels[1:3] = 7015
    image = nibabel.Nifti1Image(labels, np.eye(4))
    image.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_labels(tmp_path / "a.nii.gz").array, labels)


@pytest.mark.parametrize("largest", [10, 14, 24, 117, 255])
def test_labels_that_nibabel_rounds_to_steps_are_read(largest: int, tmp_path: Path) -> None:
    """It scales floats to the header's type over their whole range."""
    labels = np.arange(343.0).reshape(7, 7, 7) % (largest + 1)
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4), header), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_labels(tmp_path / "a.nii.gz").array, labels)


@pytest.mark.parametrize(
    ("dtype", "slope", "stored"), [("i2", 0.01, 48), ("i2", 0.2, 1), ("f4", 0.09, 11), ("u1", 1 / 255, 128)]
)
def test_fractions_of_scaled_numbers_are_refused(dtype: str, slope: float, stored: int, tmp_path: Path) -> None:
    """Also where a step is as wide as the rounding; numbers with a fraction of their own are not rounded to steps."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    image = nibabel.Nifti1Image(np.full((2, 3, 4), stored, dtype), np.eye(4), header)
    image.header.set_slope_inter(slope, 0)
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(VolumeError, match="whole-number labels, but got 24 fractions such as 0"):
        read_labels(tmp_path / "a.nii")


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_nan_and_infinity_are_no_labels(dtype: str) -> None:
    with pytest.raises(VolumeError, match="to hold labels, but got 2 NaN or infinite voxels: write 0 for background"):
        whole_labels(np.array([[[np.nan, -np.inf, 1]]], dtype=dtype), PATH)
