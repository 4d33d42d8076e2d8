from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_iou.volumes.grid import (
    Grid,
    GridError,
    align,
    distance_mm,
    distance_voxels,
    offset_note,
    reorient,
    resample,
    same_grid,
)

SHAPE = (4, 5, 6)
SPACING = np.array([0.5, 1.0, 3.0])
permutations = st.permutations(range(3))
flips = st.tuples(st.booleans(), st.booleans(), st.booleans())
angles = st.floats(-np.pi, np.pi)


def rotated(angle: float) -> Grid:
    """An oblique grid: SPACING, turned about two axes, shifted."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3] = turn * SPACING
    affine[:3, 3] = (-30.0, 12.5, 7.25)
    return Grid(SHAPE, affine)


def rearranged(array: np.ndarray, grid: Grid, axes: list[int], flip: tuple[bool, ...]) -> tuple[np.ndarray, Grid]:
    """The same voxels in another axis order, with the affine that says so, by nibabel's orientation functions."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff

    orientation = np.array([[axes[i], -1 if flip[i] else 1] for i in range(3)], dtype=float)
    array = apply_orientation(array, orientation)
    return array, Grid(array.shape, grid.affine @ inv_ornt_aff(orientation, grid.shape))


@given(angle=angles, axes=permutations, flip=flips)
@settings(deadline=None)
def test_same_grid_in_another_axis_order_is_read_right(angle, axes, flip):
    grid = rotated(angle)
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    other, turned = rearranged(array, grid, axes, flip)
    np.testing.assert_array_equal(align(other, turned, grid), array)


@given(angle=angles, axes=permutations, flip=flips, shift=st.sampled_from([0.0, 0.01, 0.02, 0.03, 0.1, 1.0]))
@settings(deadline=None)
def test_grids_differ_from_a_fortieth_of_a_voxel(angle, axes, flip, shift):
    grid = rotated(angle)
    other, turned = rearranged(np.zeros(SHAPE), grid, axes, flip)
    moved = turned.affine.copy()
    moved[:3, 3] += shift * grid.affine[:3, 1]  # along an axis of voxels
    moved_grid = Grid(turned.shape, moved)
    assert same_grid(moved_grid, turned) == (shift < 0.025)
    if shift < 0.025:
        align(other, moved_grid, grid)
    else:
        with pytest.raises(GridError):
            align(other, moved_grid, grid)


@given(angle=angles, shift=st.floats(-2, 2))
@settings(deadline=None)
def test_distance_in_voxels_is_that_of_the_farthest_voxel_along_an_axis(angle, shift):
    second = rotated(angle)
    moved = second.affine.copy()
    moved[:3, 3] += shift * second.affine[:3, 2]
    moved[:3, 0] *= 1.1
    voxels = np.array([[*index, 1] for index in itertools.product(*map(range, SHAPE))]).T
    expected = np.abs(np.linalg.inv(second.affine) @ moved @ voxels - voxels).max()
    assert distance_voxels(Grid(SHAPE, moved), second) == pytest.approx(expected, abs=1e-9)


def test_a_distance_is_told_from_a_thousandth_of_a_millimetre_on():
    here = Grid((2, 2, 2), np.eye(4))
    for shift, told in ((5e-4, False), (2e-3, True), (0.02, True)):
        affine = np.eye(4)
        affine[2, 3] = shift
        assert (offset_note(Grid((2, 2, 2), affine), here) is not None) == told


@given(angle=angles)
@settings(deadline=None)
def test_distance_is_that_of_the_farthest_voxel(angle):
    first, second = rotated(0.3), rotated(0.3 + 0.1 * np.sin(angle))
    voxels = np.array([[*index, 1] for index in itertools.product(*map(range, SHAPE))])
    expected = np.linalg.norm((voxels @ first.affine.T - voxels @ second.affine.T)[:, :3], axis=1).max()
    assert distance_mm(first, second) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "SAL", "AIR", "ILP"])
def test_orientation_agrees_with_nibabel(codes):
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff

    affine = inv_ornt_aff(axcodes2ornt(codes), SHAPE)
    assert Grid(SHAPE, np.linalg.inv(affine)).orientation == "".join(aff2axcodes(np.linalg.inv(affine)))
    assert Grid(SHAPE, rotated(0.3).affine).orientation == "".join(aff2axcodes(rotated(0.3).affine))


def aff2axcodes(affine: np.ndarray) -> tuple[str, ...]:
    import nibabel

    return nibabel.aff2axcodes(affine)


def test_refusal_names_both_grids_and_the_remedy():
    here = Grid((2, 3, 4), np.diag([1.0, 1.0, 2.0, 1.0]))
    there = Grid((2, 3, 5), np.diag([-1.0, -1.0, 2.0, 1.0]))
    with pytest.raises(GridError) as error:
        align(np.zeros((2, 3, 5)), there, here)
    assert str(error.value) == (
        "Expected the prediction on the reference's grid (shape 2x3x4, spacing 1x1x2 mm, orientation RAS, origin "
        "(0, 0, 0) mm), but got shape 2x3x5, spacing 1x1x2 mm, orientation LPS, origin (0, 0, 0) mm: write the "
        "prediction on the reference's grid, or pass `--resample reference`."
    )


def test_oblique_axes_are_left_alone_and_refused():
    array = np.zeros(SHAPE)
    assert reorient(array, rotated(0.4), rotated(0.0))[0] is array
    with pytest.raises(GridError, match="mm apart"):
        align(array, rotated(0.4), rotated(0.0))


def test_resampling_to_half_the_spacing_repeats_voxels_up_to_the_outer_half():
    labels = np.arange(1, 4, dtype=np.uint8).reshape(3, 1, 1)
    coarse = Grid((3, 1, 1), np.diag([2.0, 1.0, 1.0, 1.0]))
    fine = np.diag([1.0, 1.0, 1.0, 1.0])
    fine[0, 3] = -0.5
    result = resample(labels, coarse, Grid((6, 1, 1), fine))
    assert result.ravel().tolist() == [1, 1, 2, 2, 3, 3]
    assert result.dtype == np.uint8


def test_resampling_agrees_with_simpleitk():
    import SimpleITK

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, SHAPE).astype(np.uint8)
    source, target = rotated(0.2), rotated(0.5)
    image = SimpleITK.GetImageFromArray(labels.transpose())
    for item, grid in ((image, source), (canvas := SimpleITK.Image(*SHAPE, SimpleITK.sitkUInt8), target)):
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine
        item.SetSpacing(grid.spacing)
        item.SetOrigin(lps[:3, 3])
        item.SetDirection((lps[:3, :3] / np.array(grid.spacing)).ravel())
    expected = SimpleITK.GetArrayFromImage(
        SimpleITK.Resample(image, canvas, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor, 0)
    ).transpose()
    np.testing.assert_array_equal(resample(labels, source, target), expected)
