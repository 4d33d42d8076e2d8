"""Pictures of masks over images: their slice, their side, their colours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from monai_iou.evaluation import thumbnails
from monai_iou.volumes.png import write_png
from monai_iou.volumes.reading import VolumeError
from monai_iou.workflow import pictures as drawing
from monai_iou.workflow import previews
from monai_iou.workflow.curves import draw_curves
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
            # Most of it in the middle slices, whose numbers are the same from both ends.
            array = np.zeros((13, 15, 17), np.uint8)
            array[2:7, 3:8, 4:9] = 1
            array[6, 7, :] = array[6, :, 8] = array[:, 7, 8] = 1
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


def preview_figure(tmp_path: Path, array: np.ndarray, affine: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Any:
    figures: list[Any] = []

    def keep(figure: Any) -> np.ndarray:
        figure.draw_without_rendering()
        figures.append(figure)
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(drawing, "pixels_of", keep)
    for name in ("image", "mask"):
        nib.Nifti1Image(array, affine).to_filename(tmp_path / f"{name}.nii.gz")
    write_preview([tmp_path / "image.nii.gz"], tmp_path / "mask.nii.gz", tmp_path / "preview.png")
    return figures[0]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "IPL", "ALI"])
def test_a_preview_gives_the_files_own_slices_and_the_orientation_of_the_report(
    codes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, voxel = (20, 30, 40), (3, 4, 5)
    array = np.zeros(shape, np.uint8)
    array[voxel] = 1
    affine = np.zeros((4, 4))
    for axis, letter in enumerate(codes):
        affine["RLAPSI".index(letter) // 2, axis] = 1 if letter in "RAS" else -1
    affine[3, 3] = 1
    figure = preview_figure(tmp_path, array, affine, monkeypatch)
    sides = {"axial": ("SI", "RLAP"), "coronal": ("AP", "RLSI"), "sagittal": ("RL", "APSI")}
    for place, (name, (across, letters)) in zip(figure.axes, sides.items(), strict=True):
        axis = next(i for i, letter in enumerate(codes) if letter in across)
        assert place.get_title() == f"{name}, slice {voxel[axis] + 1} of {shape[axis]}"
        # Each letter stands at its edge, and the voxel on the side where it is in the patient.
        assert [text.get_text() for text in place.texts] == list(letters)
        x, y = place.transAxes.inverted().transform(place.transData.transform(bright_pixel(place)))
        for letter, towards in zip(letters, (1 - x, x, y, 1 - y), strict=True):
            pair = next(pair for pair in ("RL", "AP", "SI") if letter in pair)
            axis = next(i for i, code in enumerate(codes) if code in pair)
            along = (voxel[axis] + 0.5) / shape[axis]
            assert towards == pytest.approx(along if codes[axis] == letter else 1 - along, abs=0.05)
        left, right, upper, lower = (text.get_position() for text in place.texts)
        assert left[0] < 0.5 < right[0]
        assert lower[1] < 0.5 < upper[1]


def bright_pixel(place: Any) -> tuple[float, float]:
    """The one bright pixel of a plane, in the coordinates of its data."""
    ((row, column),) = np.argwhere(np.asarray(place.images[0].get_array()) == 1)
    return float(column), float(row)


def test_the_sides_are_those_of_the_report() -> None:
    script = (Path(thumbnails.__file__).parent / "templates" / "viewer.js").read_text(encoding="utf-8")
    found = dict(re.findall(r"(\w+): \{ axes: .*, sides: (\[.*?\])", script))
    assert {name: "".join(json.loads(letters)) for name, letters in found.items()} == drawing.SIDES


@pytest.mark.parametrize(
    ("name", "shown"),
    [("M\udcf6ller", r"M\udcf6ller"), ("a\nb", r"a\nb"), ("\u60a3", r"\u60a3"), ("M\xfcller", "M\xfcller")],
)
def test_a_name_is_drawn_as_text_whatever_its_characters(name: str, shown: str) -> None:
    """Undecodable bytes, control characters and signs that the font lacks stand as escape sequences."""
    volume = np.zeros((8, 9, 10), int)
    named, escaped, other = (draw_case(volume, volume, title=title) for title in (name, shown, "other"))
    assert np.array_equal(named, escaped)
    assert not np.array_equal(named, other)


@pytest.mark.parametrize("name", ["a$1_$1", "a$1_$2", "a$^$b", "x$y$"])
def test_dollar_signs_in_names_are_no_formulas(name: str) -> None:
    from matplotlib import rc_context

    volume, column = np.zeros((8, 9, 10), int), f"val_mean_iou {name}"

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        curves = draw_curves([{"epoch": 1, "val_mean_iou": 0.5, column: 0.4}])
        return draw_case(volume, volume, title=name), curves

    with rc_context({"text.parse_math": False}):
        expected = drawn()
    assert all(np.array_equal(*both) for both in zip(drawn(), expected, strict=True))


@pytest.mark.parametrize("shape", [(12, 14, 1), (12, 1, 14), (1, 12, 14), (12, 1, 1), (1, 12, 1), (1, 1, 12)])
@pytest.mark.parametrize("signs", [(1.0, 1.0, 1.0), (-1.0, -1.0, 1.0), (1.0, -1.0, -1.0)])
def test_a_png_mask_is_drawn_where_the_same_mask_as_nifti_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], signs: tuple[float, ...]
) -> None:
    labels = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    nib.Nifti1Image(labels, np.diag([*signs, 1.0])).to_filename(tmp_path / "mask.nii.gz")
    write_png(labels, tmp_path / "mask.png")
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(previews, "draw_case", lambda _, labels, **__: drawn.append(labels) or np.zeros((4, 4, 3)))
    monkeypatch.setattr(previews, "save_png", lambda *_: None)
    for mask in ("mask.nii.gz", "mask.png"):
        write_preview([tmp_path / "mask.nii.gz"], tmp_path / mask, tmp_path / "preview.png")
    np.testing.assert_array_equal(*drawn)


def test_a_png_mask_of_another_image_is_not_drawn(tmp_path: Path) -> None:
    nib.Nifti1Image(np.zeros((4, 6, 1), np.uint8), np.eye(4)).to_filename(tmp_path / "image.nii.gz")
    write_png(np.zeros((6, 4, 1), np.uint8), tmp_path / "mask.png")
    with pytest.raises(VolumeError) as raised:
        write_preview([tmp_path / "image.nii.gz"], tmp_path / "mask.png", tmp_path / "preview.png")
    assert str(raised.value) == (
        f"Expected `{tmp_path / 'mask.png'}` to be a picture of 4x6x1 voxels, but got 6x4 pixels: write the file again."
    )
