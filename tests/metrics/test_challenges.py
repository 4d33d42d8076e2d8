"""Challenges' scores against loops over the published definitions, and against what the organisers' scripts print."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
from places import DATA
from scipy import ndimage

from monai_iou.metrics.challenges import CHALLENGES, Challenge, autopet, brats_mets, challenge_scores, isles22, ms

SPACING = (0.9137, 1.1731, 2.5157)
NAN = pytest.approx(math.nan, nan_ok=True)


def blobs(seed: int, count: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Reference boxes, and a prediction that moves, drops, grows and invents some."""
    generator = np.random.default_rng(seed)
    shape = (24, 22, 14)
    reference, prediction = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for _ in range(count):
        low = generator.integers(0, np.array(shape) - 4)
        size = generator.integers(1, 5, len(shape))
        kind = generator.integers(0, 5)
        if kind != 0:
            reference[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))] = True
        if kind != 1:
            moved = np.maximum(low + generator.integers(-1, 2, len(shape)), 0)
            prediction[tuple(slice(a, a + n) for a, n in zip(moved, size + (kind == 2), strict=True))] = True
    return prediction, reference


def components(mask: np.ndarray, connectivity: int) -> list[np.ndarray]:
    structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[connectivity])
    numbers, count = ndimage.label(mask, structure)
    return [numbers == k + 1 for k in range(count)]


def dice(p: np.ndarray, r: np.ndarray) -> float:
    return 2 * (p & r).sum() / (p.sum() + r.sum())


@pytest.mark.parametrize("seed", range(12))
def test_brats_against_the_definition(seed):
    prediction, reference = blobs(seed, count=12)
    ball = ndimage.generate_binary_structure(3, 2)
    predicted = components(prediction, 26)
    used: set[int] = set()
    scored, hits, misses = [], 0, 0
    for zone in components(ndimage.binary_dilation(reference, ball), 26):
        lesion = reference & zone
        reach = ndimage.binary_dilation(lesion, ball)
        own = [j for j, p in enumerate(predicted) if (p & reach).any()]
        used |= set(own)
        if lesion.sum() * math.prod(SPACING) <= 2:
            continue
        scored.append(dice(np.any([predicted[j] for j in own], axis=0), lesion) if own else 0.0)
        hits, misses = hits + bool(own), misses + (not own)
    extra = len(predicted) - len(used)
    got = brats_mets(prediction, reference, spacing=SPACING)
    assert (got["Num_TP"], got["Num_FP"], got["Num_FN"]) == (hits, extra, misses)
    expected = sum(scored) / (len(scored) + extra) if scored or extra else 1.0
    assert got["LesionWise_Score_Dice"] == pytest.approx(expected)
    assert got["Legacy_Dice"] == pytest.approx(dice(prediction, reference))
    assert got["Sensitivity"] == pytest.approx((prediction & reference).sum() / reference.sum())
    assert got["Specificity"] == pytest.approx((~prediction & ~reference).sum() / (~reference).sum())
    assert got["GT_Complete_Volume"] == pytest.approx(reference.sum() * math.prod(SPACING))


# Printed by github.com/rachitsaluja/BraTS-2023-Metrics (ET, dilation 1, 2 mm3) for the masks of `blobs`:
# lesion-wise Dice, lesion-wise HD95, and HD95 of the whole masks.
BRATS_PRINTED = {
    (1, 7): (0.19761904761904764, 2.7653618217062834, 2.775772072762856),
    (2, 7): (0.15687613843351547, 65.14743596976296, 10.050699830055237),
    (3, 7): (0.11163032191069573, 3.096904978049235, 3.6547999382019043),
    (20, 12): (0.025641025641025644, 250.5443127098205, 7.940936254224669),
}


@pytest.mark.parametrize("case", BRATS_PRINTED)
def test_brats_equals_what_the_organisers_script_prints(case):
    got = brats_mets(*blobs(*case), spacing=SPACING)
    names = ("LesionWise_Score_Dice", "LesionWise_Score_HD95", "Legacy_HD95")
    assert [got[name] for name in names] == pytest.approx(BRATS_PRINTED[case], rel=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_isles_and_autopet_against_the_definition(seed):
    prediction, reference = blobs(seed, count=12)
    found = [bool((c & prediction).any()) for c in components(reference, 26)]
    extra = [not (c & reference).any() for c in components(prediction, 26)]
    got = isles22(prediction, reference, spacing=SPACING)
    tp, fp, fn = sum(found), sum(extra), len(found) - sum(found)
    voxel_ml = math.prod(SPACING) / 1000
    assert got == pytest.approx(
        {
            "dice": dice(prediction, reference),
            "absolute_volume_difference": abs(int(prediction.sum()) - int(reference.sum())) * voxel_ml,
            "absolute_lesion_difference": abs(len(found) - len(extra)),
            "lesion_f1_score": tp / (tp + (fp + fn) / 2),
        }
    )
    wrong = sum(int(c.sum()) for c in components(prediction, 18) if not (c & reference).any())
    missed = sum(int(c.sum()) for c in components(reference, 18) if not (c & prediction).any())
    assert autopet(prediction, reference, spacing=SPACING) == pytest.approx(
        {
            "dice_sc": dice(prediction, reference),
            "false_pos_vol": wrong * voxel_ml,
            "false_neg_vol": missed * voxel_ml,
        }
    )


def msseg_detected(lesions: list[np.ndarray], others: list[np.ndarray]) -> int:
    """Commowick et al. 2018, lesion by lesion."""
    everything = np.any(lesions, axis=0) if lesions else None
    count = 0
    for lesion in lesions:
        parts = [(int((lesion & o).sum()), k) for k, o in enumerate(others)]
        parts.sort(key=lambda part: (-part[0], -others[part[1]].sum()))
        covered = sum(n for n, _ in parts)
        if covered / lesion.sum() <= 0.10:
            continue
        explained, fine = 0, True
        for n, k in parts:
            if explained / covered >= 0.65:
                break
            fine &= (others[k] & ~everything).sum() / others[k].sum() <= 0.70
            explained += n
        count += fine
    return count


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("spacing", [SPACING, (1.0, 1.0, 1.0)])
def test_ms_against_the_definition(seed, spacing):
    prediction, reference = blobs(seed, count=12)
    p_lesions, r_lesions = (
        [c for c in components(m, 6) if c.sum() * math.prod(spacing) > 3] for m in (prediction, reference)
    )
    sensitivity = msseg_detected(r_lesions, p_lesions) / len(r_lesions)
    precision = msseg_detected(p_lesions, r_lesions) / len(p_lesions)
    harmonic = 2 * sensitivity * precision / (sensitivity + precision) if sensitivity + precision else 0.0
    touched = [bool((c & prediction).any()) for c in components(reference, 18)]
    wrong = [not (c & reference).any() for c in components(prediction, 18)]
    assert ms(prediction, reference, spacing=spacing) == pytest.approx(
        {
            "Dice": dice(prediction, reference),
            "SensL": sensitivity,
            "PPVL": precision,
            "F1_score": harmonic,
            "LTPR": np.mean(touched),
            "LFPR": np.mean(wrong),
        },
        nan_ok=True,
    )


@pytest.mark.real_data
def test_a_real_mask_shifted_with_six_lesions_dropped_and_four_invented():
    """The organisers' scripts give these numbers for this pair."""
    nibabel = pytest.importorskip("nibabel")
    path = DATA / "Task901_MSLesionFLAIR/labelsTr/openms_07.nii.gz"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the repository")
    mask = np.asarray(nibabel.load(path).dataobj) > 0
    reference = np.pad(mask[ndimage.find_objects(mask.astype(int))[0]], 4)
    numbers, count = ndimage.label(reference, np.ones((3, 3, 3)))
    assert count == 37
    prediction = np.roll(reference & ~np.isin(numbers, [2, 8, 14, 20, 26, 32]), 1, axis=0)
    for corner in ((10, 10, 10), (30, 20, 8), (12, 40, 20), (40, 50, 30)):
        prediction[tuple(slice(a, a + 2) for a in corner)] = True
    brats = brats_mets(prediction, reference)
    assert (brats["Num_TP"], brats["Num_FP"], brats["Num_FN"]) == (24, 4, 3)
    assert brats["LesionWise_Score_Dice"] == pytest.approx(0.360434752650756, rel=1e-6)
    assert brats["LesionWise_Score_HD95"] == pytest.approx(85.51451207648601, rel=1e-6)
    assert brats["Legacy_HD95"] == pytest.approx(23.93741840717165, rel=1e-6)
    assert isles22(prediction, reference)["lesion_f1_score"] == pytest.approx(7 / 9)
    volumes = autopet(prediction, reference)
    assert (volumes["false_pos_vol"], volumes["false_neg_vol"]) == pytest.approx((0.040, 0.244))


def test_lesions_none_of_which_is_found_have_the_lowest_f1_of_msseg():
    prediction, reference = np.zeros((16, 16, 16), dtype=bool), np.zeros((16, 16, 16), dtype=bool)
    reference[2:5, 2:5, 2:5] = reference[9:12, 9:12, 9:12] = prediction[13:16, 2:5, 2:5] = True
    expected = {"Dice": 0, "SensL": 0, "PPVL": 0, "F1_score": 0, "LTPR": 0, "LFPR": 1}
    assert challenge_scores("ms", prediction, reference) == expected


@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_the_orientation_of_an_image_does_not_decide_between_equal_overlaps(axes):
    """Of two components with 4 voxels in the lesion, that with 12 outside is the larger, and is judged first."""
    reference, prediction = np.zeros((7, 7, 24), dtype=bool), np.zeros((7, 7, 24), dtype=bool)
    reference[3, 3:5, 2:22] = True
    prediction[3, 3, 2:7] = prediction[3, 3, 9:13] = prediction[:4, 3, 15:19] = True
    scores = ms(np.flip(prediction, axes), np.flip(reference, axes))
    assert (scores["SensL"], scores["PPVL"]) == (0, 1)


def test_empty_masks_and_penalties():
    lesion, nothing = np.zeros((9, 9, 9), dtype=bool), np.zeros((9, 9, 9), dtype=bool)
    lesion[3:6, 3:6, 3:6] = True
    names = ("LesionWise_Score_Dice", "LesionWise_Score_HD95", "Legacy_Dice", "Legacy_HD95", "Sensitivity")
    table = {"none": (nothing, nothing), "extra": (lesion, nothing), "missed": (nothing, lesion)}
    brats = {name: [brats_mets(*pair)[n] for n in names] for name, pair in table.items()}
    assert brats == {"none": [1, 0, 1, 0, 1], "extra": [0, 374, 0, 374, 0], "missed": [0, 374, 0, 374, 0]}
    assert isles22(nothing, nothing)["lesion_f1_score"] == isles22(nothing, nothing)["dice"] == 1
    assert isles22(lesion, nothing)["lesion_f1_score"] == isles22(nothing, lesion)["lesion_f1_score"] == 0
    assert autopet(nothing, nothing)["dice_sc"] == NAN
    assert autopet(lesion, nothing)["false_pos_vol"] == autopet(nothing, lesion)["false_neg_vol"] == 0.027
    assert [ms(nothing, lesion)[name] for name in ("SensL", "PPVL", "F1_score")] == [0, 0, 0]
    assert [ms(lesion, nothing)[name] for name in ("SensL", "PPVL", "F1_score")] == [NAN, 0, 0]
    assert [ms(nothing, nothing)[name] for name in ("SensL", "PPVL", "F1_score")] == [NAN, NAN, NAN]
    tiny = np.zeros((9, 9, 9), dtype=bool)
    tiny[4, 4, 4] = True
    assert brats_mets(nothing, tiny)["LesionWise_Score_Dice"] == 1
    assert brats_mets(tiny, tiny)["Num_TP"] == 0
    two = tiny.copy()
    two[4, 4, 5] = True  # 2 mm3, which is not above 2 mm3, also where the volume of an oblique voxel is rounded up
    assert [brats_mets(two, two, spacing=(1, 1, size))["Num_TP"] for size in (1, 1 + 1e-7, 1.01)] == [0, 0, 1]
    assert ms(tiny, tiny)["SensL"] == NAN
    row = np.zeros((12, 3, 3), dtype=bool)
    row[:10, 1, 1] = True  # 3 mm3, which is not above 3 mm3: 3 / (1.5 * 0.4 * 0.5) is below 10 by a rounding error
    assert ms(row, row, spacing=(1.5, 0.4, 0.5))["SensL"] == NAN
    row[10, 1, 1] = True
    assert ms(row, row, spacing=(1.5, 0.4, 0.5))["SensL"] == 1


def test_ignored_voxels_are_no_true_negatives():
    prediction, reference = blobs(4)
    ignored = np.zeros_like(reference)
    ignored[:, :, :4] = True
    prediction, reference = prediction & ~ignored, reference & ~ignored
    counted = int((~ignored).sum())
    got = challenge_scores("brats-mets", prediction, reference, voxels=counted)
    negative = (~prediction & ~reference & ~ignored).sum()
    assert got["Specificity"] == pytest.approx(negative / (negative + (prediction & ~reference).sum()))
    everything = challenge_scores("brats-mets", prediction, reference)
    assert {name for name in got if got[name] != everything[name]} == {"Specificity"}
    assert challenge_scores("isles22", prediction, reference, voxels=counted) == isles22(prediction, reference)
    either = int((prediction | reference).sum())
    brats_mets(prediction, reference, voxels=either)
    brats_mets(prediction, reference, voxels=np.int64(reference.size))


@pytest.mark.parametrize("name", CHALLENGES)
def test_a_number_of_voxels_that_the_image_cannot_have_is_refused_by_every_challenge(name):
    prediction, reference = blobs(4)
    either = int((prediction | reference).sum())
    for wrong in (either - 1, reference.size + 1, -1):
        message = (
            f"Expected `voxels` to be between {either}, the voxels of either mask, and {reference.size}, those of the "
            f"image, but got {wrong}: count all voxels that are not ignored."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            challenge_scores(name, prediction, reference, voxels=wrong)
    for wrong, kind in ((True, "bool"), (float(reference.size), "float"), ("all", "str")):
        message = f"Expected `voxels` to be an integer, but got {kind}: count all voxels that are not ignored."
        with pytest.raises(TypeError, match=re.escape(message)):
            challenge_scores(name, prediction, reference, voxels=wrong)


def test_positional_arguments_of_a_challenge_keep_their_meaning():
    fields = [field.name for field in dataclasses.fields(Challenge)]
    assert fields[:7] == ["title", "source", "rule", "score", "columns", "missing", "of_lesions"]


@pytest.mark.parametrize("name", CHALLENGES)
def test_every_challenge_names_its_columns_source_and_penalties(name):
    challenge = CHALLENGES[name]
    got = challenge_scores(name, *blobs(0), spacing=SPACING)
    assert tuple(got) == challenge.columns
    assert got == pytest.approx(challenge.score(*blobs(0), spacing=SPACING), nan_ok=True)
    assert all(type(value) is float for value in got.values())
    assert challenge.source.startswith("https://")
    assert {*challenge.missing, *challenge.of_prediction, *challenge.of_lesions} <= set(challenge.columns)
    assert not set(challenge.missing) & set(challenge.of_prediction)


def test_refusals():
    mask = np.zeros((4, 4, 4), dtype=bool)
    with pytest.raises(ValueError, match=re.escape("Expected `challenge` to be one of 'brats-mets', 'isles22', 'auto")):
        challenge_scores("brats", mask, mask)
    for challenge in CHALLENGES:
        with pytest.raises(ValueError, match="to have the same shape of 3 dimensions"):
            challenge_scores(challenge, mask[0], mask[0])
        with pytest.raises(ValueError, match="to be a mask of 0 and 1, but got nan"):
            challenge_scores(challenge, np.full((4, 4, 4), math.nan), mask)
        with pytest.raises(ValueError, match="Expected `spacing` to be 3 positive numbers in mm"):
            challenge_scores(challenge, mask, mask, spacing=0)
