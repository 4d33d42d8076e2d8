from __future__ import annotations

import math

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance, compute_iou, compute_surface_dice

from monai_iou.evaluation.case_files import Settings, evaluate_files
from monai_iou.evaluation.columns import CASE_COLUMNS, LESION_COLUMNS, SCORE_COLUMNS
from monai_iou.evaluation.probabilities import OPERATING_POINTS, count_files
from monai_iou.evaluation.rules import Rules, Structure
from monai_iou.evaluation.scoring import evaluate_case
from monai_iou.volumes.grid import Grid
from monai_iou.volumes.png import PNG_AFFINE, write_png
from monai_iou.volumes.reading import VolumeError

SPACING = (0.5, 1.0, 2.5)
GRID = Grid((16, 14, 12), np.diag([*SPACING, 1.0]))
ONE = (Structure("1", (1,)),)


def blobs(seed: int, labels: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    volume = np.zeros(GRID.shape, np.uint8)
    for _ in range(int(rng.integers(1, 6))):
        low = [int(rng.integers(0, size - 4)) for size in GRID.shape]
        volume[tuple(slice(a, a + int(rng.integers(1, 6))) for a in low)] = rng.integers(1, labels + 1)
    return volume


def score(prediction, reference, structures=ONE, **options):
    return evaluate_case(prediction, reference, GRID, structures, **options)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_a_perfect_prediction_has_perfect_scores(seed):
    rows, lesions = score(blobs(seed, 1), blobs(seed, 1))
    perfect = ("iou", "dice", "precision", "recall", "boundary_iou", "nsd", "lesion_f1", "pq", "sq", "rq", "cc_iou")
    assert all(rows[0][name] == 1 for name in perfect)
    assert rows[0]["hd95_mm"] == rows[0]["assd_mm"] == rows[0]["lesion_fp"] == rows[0]["lesion_fn"] == 0
    assert {lesion["status"] for lesion in lesions} == {"tp"}
    assert sum(lesion["volume_ml"] for lesion in lesions) == pytest.approx(rows[0]["reference_ml"])


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's own call of its own function
@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_scores_equal_monai(seed):
    prediction, reference = blobs(seed), blobs(seed + 1)
    rows, _ = score(prediction, reference, (Structure("1", (1,)), Structure("2", (2,))), tolerance=0.9)
    for row in rows:
        masks = [
            torch.from_numpy(volume == int(row["label"]))[None, None].float() for volume in (prediction, reference)
        ]
        if not all(mask.any() for mask in masks):
            continue
        assert row["iou"] == pytest.approx(float(compute_iou(*masks)), abs=1e-6)
        assert row["dice"] == pytest.approx(2 * row["iou"] / (1 + row["iou"]))
        hd95 = float(compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=SPACING))
        assert row["hd95_mm"] == pytest.approx(hd95, rel=1e-5)
        nsd = compute_surface_dice(
            *masks, [0.9], include_background=True, spacing=SPACING, use_subvoxels=True, distance_metric="euclidean"
        )
        assert row["nsd"] == pytest.approx(float(nsd), abs=1e-5)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_ignored_voxels_have_no_effect(seed):
    prediction, reference = blobs(seed), blobs(seed + 1)
    ignored = np.random.default_rng(seed).random(GRID.shape) < 0.3
    reference[ignored] = 9
    first = score(prediction, reference, ignore=9)
    prediction[ignored] = np.random.default_rng(seed + 2).integers(0, 3, int(ignored.sum()))
    assert repr(score(prediction, reference, ignore=9)) == repr(first)


def test_the_specificity_of_a_challenge_is_that_of_the_rows_voxels():
    prediction, reference = blobs(3), blobs(4)
    reference[:, :, :3] = 9
    for ignore in (None, 9):
        rules = Rules(like="brats-mets")
        row = evaluate_case(prediction, reference, GRID, [Structure("1", (1,))], ignore, rules=rules)[0][0]
        assert row["voxels_fp"] > 0
        assert row["Specificity"] == row["voxels_tn"] / (row["voxels_tn"] + row["voxels_fp"])


def test_regions_are_unions_of_labels():
    prediction, reference = blobs(1), blobs(2)
    whole = score(prediction, reference, (Structure("whole", (1, 2)),))
    merged = score((prediction > 0).astype(np.uint8), (reference > 0).astype(np.uint8))
    assert repr([{**row, "label": "1"} for row in whole[0]]) == repr(merged[0])


def test_empty_masks():
    empty, full = np.zeros(GRID.shape, np.uint8), blobs(3, 1)
    both = score(empty, empty)[0][0]
    counts = {
        "reference_ml",
        "prediction_ml",
        "fragments",
        "merges",
        *(f"{kind}_{n}" for kind in ("lesion", "voxels") for n in ("tp", "fp", "fn")),
    }
    assert (both.pop("voxels_tn"), both.pop("diagonal_mm") > 0) == (empty.size, True)
    assert all(both[name] == 0 if name in counts else math.isnan(both[name]) for name in SCORE_COLUMNS if name in both)
    false = score(full, empty)[0][0]
    assert false["iou"] == false["dice"] == false["nsd"] == false["pq"] == false["lesion_f1"] == 0
    assert false["lesion_fp"] > 0
    missed, lesions = score(empty, full)
    assert missed[0]["recall"] == 0
    assert math.isnan(missed[0]["hd95_mm"])
    assert {lesion["status"] for lesion in lesions} == {"fn"}


def test_lesion_rows_give_place_and_match():
    reference, prediction = np.zeros(GRID.shape, np.uint8), np.zeros(GRID.shape, np.uint8)
    reference[2:4, 3:5, 4:6] = 1
    prediction[2:4, 3:5, 4:5] = 1
    prediction[10:12, 10, 10] = 1
    affine = np.diag([-0.5, 1.0, 2.5, 1.0])
    affine[:3, 3] = (40.0, -10.0, 5.0)
    rows, lesions = evaluate_case(prediction, reference, Grid(GRID.shape, affine), ONE)
    found, false = lesions
    assert (found["status"], found["kind"], found["matched_iou"]) == ("tp", "reference", 0.5)
    assert found["volume_ml"] == pytest.approx(8 * 0.5 * 1.0 * 2.5 / 1000)
    place = tuple(found[f"centroid_{axis}_mm"] for axis in "xyz")
    assert place == pytest.approx((40 - 0.5 * 2.5, -10 + 3.5, 5 + 2.5 * 4.5))
    assert (false["status"], false["kind"]) == ("fp", "prediction")
    assert (rows[0]["lesion_tp"], rows[0]["lesion_fp"], rows[0]["lesion_fn"]) == (1, 1, 0)
    assert set(found) == set(LESION_COLUMNS) - {"case"}


def test_one_slice_is_scored_as_an_image_with_its_thickness():
    reference = np.zeros((9, 1, 9), np.uint8)
    reference[2:6, 0, 2:6] = 1
    grid = Grid(reference.shape, np.diag([1.0, 5.0, 2.0, 1.0]))
    rows, lesions = evaluate_case(np.roll(reference, 1, axis=2), reference, grid, ONE)
    assert rows[0]["hd95_mm"] == 2.0
    assert rows[0]["reference_ml"] == pytest.approx(16 * 10 / 1000)
    assert lesions[0]["volume_ml"] == pytest.approx(16 * 10 / 1000)
    assert lesions[0]["centroid_z_mm"] == 7.0


TILTED = np.diag([1.0, 1.0, 3.0, 1.0])
TILTED[1:3, 2] = 3.0 * np.sin(np.radians(20)), 3.0 * np.cos(np.radians(20))


@pytest.mark.parametrize(
    ("shape", "affine", "volume"),
    [
        ((9, 9, 1), np.diag([1.0, 1.0, 5.0, 1.0]), 20.0),
        ((9, 9, 1), np.diag([1.0, 1.0, 0.25, 1.0]), 1.0),
        ((1, 9, 9), np.diag([5.0, 0.5, 2.0, 1.0]), 20.0),
        ((9, 9, 9), TILTED, 24 * np.cos(np.radians(20))),
    ],
)
def test_the_smallest_volume_is_in_mm3_of_the_voxels(tmp_path, shape, affine, volume):
    """Slices are scored in 2D and sheared grids as if they were not, in masks and in probability maps alike."""
    reference = np.zeros(shape, np.uint8)
    reference[tuple(slice(2, 4) if size > 1 else slice(None) for size in shape)] = 1
    save(tmp_path / "r.nii", reference, affine)
    for least, kept in ((0.0, 1), (0.99 * volume, 1), (volume, 1), (1.01 * volume, 0)):
        rules = Rules(min_volume_mm3=least)
        rows, lesions = evaluate_case(reference, reference, Grid(shape, affine), ONE, rules=rules)
        assert rows[0]["lesion_tp"] == len(lesions) == kept, least
        assert [lesion["volume_ml"] for lesion in lesions] == pytest.approx([volume / 1000] * kept)
        counted = count_files({"1": tmp_path / "r.nii"}, tmp_path / "r.nii", ONE, None, rules)
        assert counted["counts"]["1"]["lesions"] == [[kept, 0, 0]] * len(OPERATING_POINTS), least


def test_a_tilted_gantry_changes_volumes_and_is_noted(tmp_path):
    reference = np.zeros((12, 12, 12), np.uint8)
    reference[2:6, 2:6, 2:6] = 1
    affine = np.diag([0.5, 0.5, 3.0, 1.0])
    affine[1:3, 2] = 3.0 * np.sin(np.radians(20)), 3.0 * np.cos(np.radians(20))
    save(tmp_path / "r.nii", reference, affine)
    record = evaluate_files("c", tmp_path / "r.nii", tmp_path / "r.nii", Settings(ONE))
    expected = 64 * abs(np.linalg.det(affine)) / 1000  # 6 % less than the product of the spacings
    row, lesion = record["rows"][0], record["lesions"][0]
    assert (row["reference_ml"], row["prediction_ml"], lesion["volume_ml"]) == pytest.approx((expected,) * 3)
    assert len(record["notes"]) == 1
    assert record["notes"][0].startswith("c: the reference's axes are 20 degrees off right angles (gantry tilt): ")
    assert "boundary IoU and CC-IoU assume right angles" in record["notes"][0]
    like = evaluate_files("c", tmp_path / "r.nii", tmp_path / "r.nii", Settings(ONE, rules=Rules(like="autopet")))
    assert "CC-IoU and the columns of `--like autopet` assume right angles" in like["notes"][0]


def test_headers_that_round_an_oblique_affine_get_no_note(tmp_path):
    a, b = np.radians((7.0, 25.0))
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = np.round(turn @ tilt @ np.diag([0.9, 0.9, 2.0]), 4)
    save(tmp_path / "r.nii", blobs(1, 1), affine)
    assert evaluate_files("c", tmp_path / "r.nii", tmp_path / "r.nii", Settings(ONE))["notes"] == []


def save(path, array, affine=GRID.affine):
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def test_files_in_other_axis_orders_score_the_same(tmp_path):
    prediction, reference = blobs(4), blobs(5)
    settings_ = Settings((Structure("1", (1,)), Structure("2", (2,))))
    straight = save(tmp_path / "p.nii", prediction)
    image = nibabel.load(straight).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nibabel.save(image, tmp_path / "turned.nii")
    save(tmp_path / "r.nii", reference)
    first, second = (
        evaluate_files("c", tmp_path / name, tmp_path / "r.nii", settings_) for name in ("p.nii", "turned.nii")
    )
    assert repr(first["rows"]) == repr(second["rows"])
    assert set(CASE_COLUMNS) <= set(first["rows"][0])
    assert first["reference_values"] == np.unique(reference).tolist()


def test_other_grids_are_refused_or_resampled_with_a_note(tmp_path):
    reference = np.zeros((8, 8, 8), np.uint8)
    reference[2:6, 2:6, 2:6] = 1
    fine = np.eye(4) / 2
    fine[:3, 3], fine[3, 3] = -0.25, 1
    save(tmp_path / "r.nii", reference, np.eye(4))
    save(tmp_path / "p.nii", np.kron(reference, np.ones((2, 2, 2), np.uint8)), fine)
    refused = evaluate_files("c", tmp_path / "p.nii", tmp_path / "r.nii", Settings(ONE))
    assert "pass `--resample reference`" in refused["problem"]
    assert (refused["rows"][0]["iou"], refused["rows"][0]["prediction_ml"]) == (0, 0)
    record = evaluate_files("c", tmp_path / "p.nii", tmp_path / "r.nii", Settings(ONE, resample=True))
    assert record["rows"][0]["iou"] == 1
    assert record["notes"][0].startswith("c: the prediction was resampled by nearest neighbour from shape 16x16x16,")


@pytest.mark.parametrize("resampling", [False, True])
@pytest.mark.parametrize("shape", [(9, 7, 1), (1, 9, 7), (9, 1, 1)])
def test_the_pixels_of_a_png_are_the_voxels_of_its_reference(tmp_path, shape, resampling):
    """`monai-iou predict --format .png` writes such masks; a PNG states no place that could be compared."""
    reference, prediction = np.random.default_rng(0).integers(0, 2, (2, *shape), dtype=np.uint8)
    affine = np.diag([-0.5, 0.5, 3, 1])
    affine[:3, 3] = 30, 40, 5
    save(tmp_path / "r.nii", reference, affine)
    save(tmp_path / "p.nii", prediction, affine)
    write_png(prediction, tmp_path / "p.png")
    settings_ = Settings(ONE, resample=resampling)
    record, expected = (
        evaluate_files("c", tmp_path / name, tmp_path / "r.nii", settings_) for name in ("p.png", "p.nii")
    )
    assert record["problem"] is None
    assert repr(record["rows"]) == repr(expected["rows"])
    assert record["notes"] == [
        "c: the prediction is a PNG, which states no place: its pixels count as the reference's voxels."
    ]
    write_png(np.ones((8, 7, 1), np.uint8), tmp_path / "q.png")
    sides = "x".join(map(str, shape))
    assert evaluate_files("c", tmp_path / "q.png", tmp_path / "r.nii", settings_)["problem"] == (
        f"Expected `{tmp_path / 'q.png'}` to be a picture of {sides} voxels, but got 8x7 pixels: write the file again."
    )


@pytest.mark.parametrize("resampling", [False, True])
def test_a_reference_that_is_a_png_has_no_place_to_resample_to(tmp_path, resampling):
    mask = np.ones((9, 7, 1), np.uint8)
    write_png(mask, tmp_path / "r.png")
    write_png(mask, tmp_path / "p.png")
    save(tmp_path / "p.nii", mask, np.diag([0.5, 0.5, 3, 1]))
    save(tmp_path / "same.nii", mask, PNG_AFFINE)
    settings_ = Settings(ONE, resample=resampling)
    for name in ("p.png", "same.nii"):
        record = evaluate_files("c", tmp_path / name, tmp_path / "r.png", settings_)
        assert (record["problem"], record["notes"], record["rows"][0]["iou"]) == (None, [], 1)
    problem = evaluate_files("c", tmp_path / "p.nii", tmp_path / "r.png", settings_)["problem"]
    assert problem == (
        f"Expected the prediction as a PNG, because the reference `{tmp_path / 'r.png'}` is one and states no place, "
        "but got shape 9x7x1, spacing 0.5x0.5x3 mm, orientation RAS, origin (0, 0, 0) mm: write the prediction as a "
        "PNG too."
    )


def test_probabilities_that_are_png_lie_on_the_reference_too(tmp_path):
    mask = np.random.default_rng(0).integers(0, 2, (9, 7, 1), dtype=np.uint8)
    save(tmp_path / "r.nii", mask, np.diag([0.5, 0.5, 3, 1]))
    write_png(mask, tmp_path / "p.png")
    save(tmp_path / "p.nii", mask, np.diag([0.5, 0.5, 3, 1]))
    counted = [
        evaluate_files("c", None, tmp_path / "r.nii", Settings(ONE), maps={"1": tmp_path / name})["maps"]
        for name in ("p.png", "p.nii")
    ]
    np.testing.assert_equal(counted[0]["counts"], counted[1]["counts"])


def test_an_image_is_not_a_label_map(tmp_path):
    image = save(tmp_path / "image.nii", np.arange(1331, dtype=np.int16).reshape(11, 11, 11), np.eye(4))
    labels = save(tmp_path / "labels.nii", np.ones((11, 11, 11), np.uint8), np.eye(4))
    with pytest.raises(VolumeError, match="to be a label map, but got 1331 different values: pass labels, not images"):
        evaluate_files("c", labels, image, Settings())
    assert "to be a label map" in evaluate_files("c", image, labels, Settings())["problem"]


@pytest.mark.parametrize("structures", [None, ONE, (Structure("both", (1, 2)), Structure("2", (2,)))])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_scores_of_boxes_are_scores_of_the_whole_volume(tmp_path, structures, dtype):
    prediction, reference = blobs(11).astype(dtype), blobs(12).astype(dtype)
    for name, array in (("p.nii.gz", prediction), ("r.nii.gz", reference)):
        nibabel.save(nibabel.Nifti1Image(array, GRID.affine, dtype=dtype), tmp_path / name)
    record = evaluate_files("c", tmp_path / "p.nii.gz", tmp_path / "r.nii.gz", Settings(structures))
    chosen = structures or (*ONE, Structure("2", (2,)))
    # A value that is nowhere, ignored, keeps the volume whole.
    rows, lesions = evaluate_case(prediction, reference, GRID, chosen, ignore=99)
    assert repr([{"case": "c", **row} for row in rows]) == repr(record["rows"])
    assert repr([{"case": "c", **row} for row in lesions]) == repr(record["lesions"])


def test_voxel_counts_and_volume_error_are_those_of_the_masks():
    prediction, reference = blobs(8, 1), blobs(9, 1)
    row = score(prediction, reference)[0][0]
    p, r = prediction == 1, reference == 1
    expected = ((p & r).sum(), (p & ~r).sum(), (~p & r).sum(), (~p & ~r).sum())
    assert tuple(row[f"voxels_{name}"] for name in ("tp", "fp", "fn", "tn")) == expected
    assert row["relative_volume_error"] == pytest.approx((p.sum() - r.sum()) / r.sum())
    assert row["diagonal_mm"] == pytest.approx(np.linalg.norm(np.multiply(GRID.shape, SPACING)))
    ignored = reference.copy()
    ignored[0] = 9
    row = evaluate_case(prediction, ignored, GRID, ONE, ignore=9)[0][0]
    assert row["voxels_tn"] == (~p & ~r)[1:].sum()
