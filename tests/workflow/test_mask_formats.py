"""Masks in ITK's formats lie where NIfTI puts them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from monai_iou.datasets.cases import DatasetError
from monai_iou.volumes.reading import read_labels
from monai_iou.workflow.mask_formats import ITK_ENDINGS, check_fits_png, write_with_itk


@pytest.mark.parametrize("ending", ITK_ENDINGS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.int64])
def test_written_and_read_again(tmp_path: Path, ending: str, dtype: type[np.generic]) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 200, (5, 4, 3)).astype(dtype)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))  # an oblique scan, left-handed in half of all cases
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * [0.5, 0.7, 3.0], [10.0, -20.0, 5.0]
    write_with_itk(array, affine, tmp_path / f"mask{ending}")
    found = read_labels(tmp_path / f"mask{ending}")
    assert np.array_equal(found.array, array)
    np.testing.assert_allclose(found.grid.affine, affine, atol=1e-6)


def test_masks_that_no_png_can_hold_are_refused_before_any_work() -> None:
    check_fits_png(Path("a.png"), (5, 4, 1), [0, 65535])
    message = r"^Expected a mask of one slice with values up to 65535 for a PNG, but got {} for a.nii: take .+\.$"
    with pytest.raises(DatasetError, match=message.format("shape 5x4x3")):
        check_fits_png(Path("a.nii"), (5, 4, 3), [0, 1])
    with pytest.raises(DatasetError, match=message.format("the value 65536")):
        check_fits_png(Path("a.nii"), (5, 4, 1), [0, 65536])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"."):
        write_with_itk(np.zeros((2, 2, 2), np.uint8), np.eye(4), tmp_path / "no" / "a.mha")
