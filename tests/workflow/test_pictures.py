"""Pictures of masks over images: their slice, their side, their colours."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_iou.workflow.pictures import draw_case, save_png
from monai_iou.workflow.previews import write_preview


def coloured(picture: np.ndarray) -> np.ndarray:
    """Pixels that are not grey."""
    return (picture.max(2).astype(int) - picture.min(2)) > 40


def test_the_patients_right_is_on_the_left() -> None:
    image, mask = np.zeros((40, 40, 40)), np.zeros((40, 40, 40), int)
    mask[30:35, 18:22, 18:22] = 1  # to the patient's right
    axial = coloured(draw_case(image, mask))[:, :330]
    columns = np.flatnonzero(axial.any(0))
    assert columns.size
    assert columns.mean() < 165


def test_no_mask_no_colour_and_nan_is_drawn() -> None:
    image = np.full((8, 9, 10), np.nan)
    assert not coloured(draw_case(image, np.zeros((8, 9, 10), int))).any()


def test_the_reference_decides_the_slice() -> None:
    image = np.zeros((20, 20, 20))
    reference, prediction = np.zeros((2, 20, 20, 20), int)
    reference[5:8, 5:8, 3], prediction[5:8, 5:8, 15] = 1, 1
    with_reference = coloured(draw_case(image, prediction, reference))[:, :330].sum()
    prediction[5:8, 5:8, 3] = 1
    both = coloured(draw_case(image, prediction, reference))[:, :330].sum()
    assert 0 < with_reference <= both


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR"])
def test_a_preview_does_not_depend_on_the_order_of_the_files_axes(tmp_path: Path, codes: str) -> None:
    pictures = []
    for target in ("RAS", codes):
        for name in ("image", "mask"):
            array = np.zeros((12, 14, 16), np.uint8)
            array[2:5, 3:6, 4:9] = 1
            made = nib.Nifti1Image(array, np.diag([2.0, 1.0, 3.0, 1.0]))
            transform = nib.orientations.ornt_transform(
                nib.io_orientation(made.affine), nib.orientations.axcodes2ornt(target)
            )
            made.as_reoriented(transform).to_filename(tmp_path / f"{name}.nii.gz")
        write_preview([tmp_path / "image.nii.gz"], tmp_path / "mask.nii.gz", tmp_path / f"{target}.png")
        from matplotlib.image import imread

        pictures.append(imread(tmp_path / f"{target}.png"))
    assert np.array_equal(*pictures)


def test_a_picture_makes_its_folder(tmp_path: Path) -> None:
    save_png(np.zeros((3, 4, 3), np.uint8), tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
