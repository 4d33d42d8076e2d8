"""`evaluate --probabilities`: thresholds, calibration and FROC from probability maps, against direct computation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from monai_iou.cli import main
from monai_iou.evaluation import case_files, map_records
from monai_iou.evaluation import probabilities as reading
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.map_files import GRID, find_maps
from monai_iou.evaluation.pairing import PairingError
from monai_iou.evaluation.probabilities import OPERATING_POINTS, count_files
from monai_iou.evaluation.probability_channels import channels_of
from monai_iou.evaluation.request import Request
from monai_iou.evaluation.rules import Rules, Structure
from monai_iou.evaluation.thresholds import dense, sparse
from monai_iou.volumes.probability_kind import ProbabilityKind, description, kind_of

SHAPE, SPACING = (14, 12, 10), (1.0, 2.0, 1.5)
AFFINE = np.diag([*SPACING, 1.0])
CASES = 4


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)


def made_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A label map of two classes, and probabilities (3, *S) that are often but not always right."""
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    for value in (1, 2):
        for _ in range(2):
            low = [int(rng.integers(0, size - 4)) for size in SHAPE]
            label[tuple(slice(a, a + 3) for a in low)] = value
    logits = ndimage.gaussian_filter(rng.normal(size=(3, *SHAPE)), (0, 1, 1, 1)) * 6
    for value in range(3):
        logits[value][label == value] += 1.5
    odds = np.exp(logits)
    return label, (odds / odds.sum(0)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("maps")
    for i in range(CASES):
        label, probabilities = made_case(i)
        save(root / "references" / f"c{i}.nii.gz", label)
        save(root / "predictions" / f"c{i}.nii.gz", probabilities.argmax(0).astype(np.uint8))
        (root / "npz").mkdir(exist_ok=True)
        np.savez_compressed(root / "npz" / f"c{i}.npz", probabilities=probabilities.transpose(0, 3, 2, 1))
        shutil.copy(root / "predictions" / f"c{i}.nii.gz", root / "npz")
        save(root / "channels" / f"c{i}.nii.gz", np.moveaxis(probabilities, 0, -1))
        for value in (1, 2):
            save(root / "files" / f"c{i}_{value}.nii.gz", probabilities[value])
    return root


def archive(folder: Path) -> dict[str, Path]:
    """The first archive and its mask."""
    return {"": folder / "npz" / "c0.npz", GRID: folder / "npz" / "c0.nii.gz"}


def evaluated(folder: Path, output: Path, maps: str, **options: Any) -> dict[str, Any]:
    request = Request(folder / "predictions", folder / "references", output, probabilities=folder / maps, **options)
    evaluate_folders(request)
    found: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return found


def test_scores_equal_direct_computation(folder: Path, tmp_path: Path) -> None:
    found = evaluated(folder, tmp_path / "out", "npz", match="any")["probabilities"]
    made = [made_case(i) for i in range(CASES)]
    for value in (1, 2):
        scores = found[str(value)]
        assert scores["cases"] == CASES
        for k in (20, 60, 100, 150):
            ious = []
            for label, probabilities in made:
                p, t = probabilities[value] >= k / 200 - 1 / 8000, label == value
                ious.append((p & t).sum() / (p | t).sum())
            assert scores["iou"][k] == pytest.approx(np.mean(ious), abs=1e-6)
        assert scores["iou_at_half"] == scores["iou"][100]
        assert scores["best_iou"] == max(value for value in scores["iou"] if value is not None)
        p = np.concatenate([probabilities[value].ravel() for _, probabilities in made])
        t = np.concatenate([(label == value).ravel() for label, _ in made])
        place = np.minimum((p * 20).astype(int), 19)
        gaps = [(place == i).mean() * abs(p[place == i].mean() - t[place == i].mean()) for i in np.unique(place)]
        assert scores["ece"] == pytest.approx(sum(gaps), abs=1e-3)
        assert scores["average_precision"] == pytest.approx(average_precision(p, t), abs=1e-6)


def average_precision(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """By sorting the probabilities, rounded as the histograms' are; equal ones are one step."""
    nodes = np.rint(probabilities * 4000)
    steps = [(nodes >= node) for node in np.unique(nodes)[::-1]]
    recalls = [0.0, *(float(truth[predicted].sum() / truth.sum()) for predicted in steps)]
    precisions = [float(truth[predicted].mean()) for predicted in steps]
    return sum((b - a) * p for a, b, p in zip(recalls[:-1], recalls[1:], precisions, strict=True))


def test_the_average_precision_of_a_sure_model_tells_its_voxels_apart(folder: Path, tmp_path: Path) -> None:
    """They lie between two of the thresholds of the curves: 199 / 200 and 1."""
    label, _ = made_case(0)
    truth = label == 1
    false = np.zeros(SHAPE, bool)
    false[0, :6, :4] = True
    false &= ~truth
    sure = np.where(truth, 0.9988, np.where(false, 0.9963, 0.001)).astype(np.float32)
    for kind, array in (("references", truth), ("predictions", truth | false)):
        save(tmp_path / kind / "a.nii.gz", array.astype(np.uint8))
    save(tmp_path / "maps" / "a.nii.gz", np.stack([1 - sure, sure], -1))
    found = evaluated(tmp_path, tmp_path / "out", "maps")["probabilities"]["1"]
    assert found["average_precision"] == pytest.approx(average_precision(sure, truth)) == 1
    assert found["best_iou"] == pytest.approx(truth.sum() / (truth | false).sum())


def test_operating_points_are_what_components_give(folder: Path, tmp_path: Path) -> None:
    rule = {"match": "any", "pairing": "many-to-one"}
    froc = evaluated(folder, tmp_path / "out", "npz", **rule)["probabilities"]["1"]["froc"]
    everywhere = np.ones((3, 3, 3))
    for k, threshold in enumerate(OPERATING_POINTS):
        found = lesions = false = 0
        for label, probabilities in map(made_case, range(CASES)):
            components, count = ndimage.label(label == 1, everywhere)
            predicted, number = ndimage.label(probabilities[1] >= threshold, everywhere)
            lesions += count
            found += len(set(np.unique(components[predicted > 0])) - {0})
            false += sum(not components[predicted == i].any() for i in range(1, number + 1))
        assert froc["sensitivity"][k] == pytest.approx(found / lesions)
        assert froc["false_positives"][k] == pytest.approx(false / CASES)
    known = [share for share in froc["sensitivity_at"].values() if share is not None]
    assert known == sorted(known)


@pytest.mark.usefixtures("forked_workers")
def test_every_layout_and_number_of_workers_gives_the_same(folder: Path, tmp_path: Path) -> None:
    first = evaluated(folder, tmp_path / "npz", "npz")
    for i, layout in enumerate(("channels", "files")):
        assert evaluated(folder, tmp_path / layout, layout, workers=1 + i)["probabilities"] == first["probabilities"]
    page = (tmp_path / "npz" / "report.html").read_text(encoding="utf-8")
    assert "Best mean IoU" in page
    assert "Reliability diagram" in page


def test_regions_are_sums_of_channels(folder: Path, tmp_path: Path) -> None:
    label, probabilities = made_case(0)
    whole = Structure("whole", (1, 2))
    counted = count_files(archive(folder), folder / "references" / "c0.nii.gz", [whole], None, Rules())
    histogram = counted["counts"]["whole"]["histogram"]
    assert histogram.sum() == label.size
    assert histogram[1].sum() == (label > 0).sum()
    nodes = np.arange(4001) / 4000
    assert (histogram * nodes).sum() == pytest.approx((1 - probabilities[0]).sum(), rel=1e-4)


REGIONS = {"whole": (1, 2, 3), "core": (2, 3), "active": (3,)}


def nested(background: bool) -> tuple[np.ndarray, np.ndarray]:
    """Labels 0 to 3 one within the other, and outputs of sigmoids for the regions, with or without a background."""
    depth = np.minimum.reduce([np.minimum(i, size - 1 - i) for i, size in zip(np.indices(SHAPE), SHAPE, strict=True)])
    label = np.clip(depth - 1, 0, 3).astype(np.uint8)
    noise = np.random.default_rng(3).normal(size=(4, *SHAPE))
    outputs = [
        1 / (1 + np.exp(3 - 6 * np.isin(label, values) - n))
        for values, n in zip(REGIONS.values(), noise[1:], strict=True)
    ]
    first = [1 / (1 + np.exp(3 - 6 * (label == 0) - noise[0]))] if background else []
    return label, np.stack([*first, *outputs]).astype(np.float32)


def structures(regions: dict[str, tuple[int, ...]]) -> list[Structure]:
    return [Structure(name, values) for name, values in regions.items()]


@pytest.mark.parametrize("background", [True, False])
def test_outputs_of_regions_are_taken_in_their_order(background: bool, tmp_path: Path) -> None:
    """As `predict` writes them with a background, and nnU-Net without one: they are no shares that could be added."""
    label, channels = nested(background)
    save(tmp_path / "label.nii.gz", label)
    save(tmp_path / "maps.nii.gz", np.moveaxis(channels, 0, -1))
    files = {"": tmp_path / "maps.nii.gz"}
    counted = count_files(files, tmp_path / "label.nii.gz", structures(REGIONS), None, Rules())["counts"]
    for i, (name, values) in enumerate(REGIONS.items(), start=int(background)):
        inside = np.isin(label, values)
        expected = np.bincount(np.rint(channels[i][inside] * 4000).astype(int), minlength=4001)
        assert np.abs(counted[name]["histogram"][1] - expected).sum() <= 2, "but for ties of the rounding"


@pytest.mark.parametrize(
    ("background", "regions", "message"),
    [
        (
            True,
            {"core": (2, 3)},
            "Expected the channels of `M` to add up to 1 as those of labels do, or to be one for ",
        ),
        (True, {"core": (2,)}, "each of core, but got 4 that do not add up to 1: name all of them in `--labels` or "),
        (False, {"core": (2,)}, "each of core, but got 3 that do not add up to 1: name all"),
        (
            False,
            {"whole": (1, 2, 3), "active": (3,)},
            "the first of the 3 channels of `M` to be the background, because",
        ),
        (False, {"whole": (1, 2, 3)}, "for each of whole, with or without a background before them, but got 3: name"),
        (
            True,
            {"1": (1,), "2": (2,), "3": (3,)},
            "to exclude each other, because each of 1, 2, 3 is one label, but got",
        ),
        (
            False,
            {"1": (1,), "2": (2,), "3": (3,)},
            "outputs of regions that overlap: name these in `--regions`, in the order",
        ),
        (True, {"rest": (-1,), "1": (1,)}, "one channel for each of rest, 1, with or without a background before them"),
    ],
)
def test_channels_that_cannot_be_told_to_be_the_structures_are_refused(
    background: bool, regions: dict[str, tuple[int, ...]], message: str
) -> None:
    _, channels = nested(background)
    with pytest.raises(ValueError, match=re.escape(message)):
        channels_of(Path("M"), channels, structures(regions))


def test_shares_in_eight_bits_are_labels_and_their_sum_is_at_most_1() -> None:
    _, probabilities = made_case(0)
    rounded = np.ceil(probabilities * 255).astype(np.float32) / 255
    found = channels_of(Path("M"), rounded, structures({"all": (0, 1, 2), "1": (1,), "both": (1, 2)}))
    names = {structure.name: values for structure, values in found.items()}
    np.testing.assert_array_equal(names["all"], 1)
    np.testing.assert_array_equal(names["1"], rounded[1])
    np.testing.assert_allclose(names["both"], np.minimum(rounded[1:].sum(0), 1))


def test_separate_outputs_of_labels_are_taken_by_their_value() -> None:
    """Sigmoids of labels that do not overlap, named in any order."""
    _, probabilities = made_case(0)
    outputs = probabilities * np.float32(0.9)
    found = channels_of(Path("M"), outputs, structures({"2": (2,), "1": (1,)}))
    assert all((values == outputs[structure.values[0]]).all() for structure, values in found.items())


def softmax_of_four(margin: int = 0, zoom: float = 1) -> np.ndarray:
    """Blurred shares of four labels, one in the other: zero in a margin, or interpolated by splines and clipped."""
    label, _ = nested(background=True)
    sure = np.stack([label == value for value in range(4)]).astype(np.float32)
    soft = ndimage.gaussian_filter(sure, (0, 0.5, 0.5, 0.5))
    if zoom != 1:
        soft = np.stack([ndimage.zoom(channel, zoom, order=3) for channel in sure]).clip(0, 1)
    soft[:, :margin] = 0
    return soft


@pytest.mark.parametrize("margin", [0, 1, 2])
def test_shares_with_a_margin_of_zeros_are_shares(margin: int) -> None:
    """As many regions as foreground channels: taken for outputs of regions, they would be scored wrongly."""
    soft = softmax_of_four(margin)
    found = channels_of(Path("M"), soft, structures(REGIONS))
    for structure, values in found.items():
        np.testing.assert_allclose(values, soft[list(structure.values)].sum(0).clip(0, 1), atol=1e-6)


def test_shares_that_were_clipped_and_single_odd_voxels_are_shares() -> None:
    soft = softmax_of_four(zoom=2.5)
    assert soft.sum(0).max() > 1.02
    soft[:, 17, 16, 12] = 0.9
    found = channels_of(Path("M"), soft, structures({"core": (2, 3)}))
    ((_, values),) = found.items()
    np.testing.assert_allclose(values, soft[2:].sum(0).clip(0, 1), atol=1e-6)


def test_regions_of_a_case_without_the_inner_ones_are_outputs_where_the_file_says_so() -> None:
    """Where it does not, nothing tells them from shares that were interpolated."""
    _, channels = nested(background=True)
    channels = channels.clip(0.002, 0.998)
    channels[2:] *= 0.02
    channels[0] = 1 - channels[1]
    with pytest.raises(ValueError, match="for each of whole, core, active, but got sums that tell neither: write one"):
        channels_of(Path("M"), channels, structures(REGIONS))
    found = channels_of(Path("M"), channels, structures(REGIONS), kind=ProbabilityKind(True))
    for i, values in enumerate(found.values(), start=1):
        np.testing.assert_array_equal(values, channels[i])
    order = {"active": (3,), "core": (2, 3), "whole": (1, 2, 3)}
    found = channels_of(Path("M"), channels[[0, 3, 2, 1]], structures(order), kind=ProbabilityKind(True))
    for i, values in zip((3, 2, 1), found.values(), strict=True):
        np.testing.assert_array_equal(values, channels[i])
    with pytest.raises(ValueError, match="to exclude each other, because each of 1, 2, 3 is one label"):
        channels_of(Path("M"), channels, structures({"1": (1,), "2": (2,), "3": (3,)}), kind=ProbabilityKind(True))
    with pytest.raises(ValueError, match="one for each of whole, core, active, more, but got 4 that do not add up"):
        channels_of(Path("M"), channels, structures({**REGIONS, "more": (2,)}), kind=ProbabilityKind(True))
    assert len(channels_of(Path("M"), channels[1:], structures(REGIONS), kind=ProbabilityKind(True))) == 3, (
        "without its background"
    )
    channels[0] = 0.9  # a background that was hardly trained
    assert len(channels_of(Path("M"), channels, structures(REGIONS), kind=ProbabilityKind(True))) == 3


@pytest.mark.parametrize("large", [0, 15])
def test_a_small_uncertain_lesion_tells_regions_from_shares(large: int) -> None:
    """However large another one is, of which nothing is in two regions: summed, it would be certain."""
    outputs = np.full((4, 30, 30, 30), 0.01, np.float32)
    outputs[1, 2 : 2 + large, 2 : 2 + large, 2 : 2 + large] = 0.98
    for channel, value in ((1, 0.45), (2, 0.4), (3, 0.35)):
        outputs[channel, 22:25, 22:25, 22:25] = value
    outputs[0] = 1 - outputs[1]
    for i, values in enumerate(channels_of(Path("M"), outputs, structures(REGIONS)).values(), start=1):
        np.testing.assert_array_equal(values, outputs[i])


def test_hardly_anything_predicted_is_not_summed() -> None:
    outputs = np.full((4, 9, 9, 9), 0.09, np.float32)
    outputs[0] = 0.91
    for i, values in enumerate(channels_of(Path("M"), outputs, structures(REGIONS)).values(), start=1):
        np.testing.assert_array_equal(values, outputs[i])


@pytest.mark.parametrize("background", [True, False])
def test_a_small_region_in_a_large_one_is_no_label(background: bool) -> None:
    """One twenty-seventh of it: labels would exclude each other."""
    outputs = np.full((3, 30, 30, 30), 0.01, np.float32)
    outputs[1, 5:20, 5:20, 5:20], outputs[2, 8:13, 8:13, 8:13] = 0.98, 0.97
    outputs[0] = 1 - outputs[1]
    with pytest.raises(ValueError, match="to exclude each other, because each of 1, 2 is one label, but got outputs"):
        channels_of(Path("M"), outputs if background else outputs[1:], structures({"1": (1,), "2": (2,)}))


def test_a_file_of_predict_says_what_its_channels_are(tmp_path: Path) -> None:
    for regions in (True, False):
        image = nibabel.Nifti1Image(np.zeros((2, 2, 2, 3), np.float32), np.eye(4))
        image.header["descrip"] = description(regions=regions)
        nibabel.save(image, tmp_path / "a.nii.gz")
        assert kind_of(tmp_path / "a.nii.gz") == ProbabilityKind(regions)
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2, 3), np.float32), np.eye(4)), tmp_path / "b.nii")
    np.savez(tmp_path / "c.npz", np.zeros(3))
    (tmp_path / "d.nii").write_bytes(b"broken")
    assert [kind_of(tmp_path / name) for name in ("b.nii", "c.npz", "d.nii", "absent.nii")] == [ProbabilityKind()] * 4


@pytest.mark.parametrize(
    ("values", "told", "known"),
    [
        ((0, 2, 3), "monai_iou: classes share one probability, of 0 2-3", (0, 2, 3)),
        ((0, 3, 1), "monai_iou: classes share one probability, of 0 3 1", (0, 3, 1)),
        (tuple(range(0, 60, 2)), "monai_iou: classes share one probability, of other values", ()),
    ],
)
def test_a_file_of_predict_names_label_values_that_are_no_channel_numbers(
    tmp_path: Path, values: tuple[int, ...], told: str, known: tuple[int, ...]
) -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2, len(values)), np.float32), np.eye(4))
    image.header["descrip"] = description(regions=False, values=values)
    assert image.header["descrip"].item().decode() == told
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert kind_of(tmp_path / "a.nii.gz") == ProbabilityKind(False, known)


@pytest.mark.parametrize(
    ("told", "count"), [("0-9999", 10_000), ("0 2-10001", 0), ("0-9999999999", 0), (f"0-{'9' * 30}", 0)]
)
def test_a_damaged_number_of_a_header_does_not_fill_the_memory(tmp_path: Path, told: str, count: int) -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2, 3), np.float32), np.eye(4))
    image.header["descrip"] = f"monai_iou: classes share one probability, of {told}"
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert kind_of(tmp_path / "a.nii.gz") == ProbabilityKind(False, tuple(range(count)))


@pytest.mark.parametrize("held", [(2, 4), tuple(range(2, 60, 2))])
@pytest.mark.parametrize("named", [False, True])
def test_channels_whose_values_had_no_room_are_not_scored_by_their_numbers(
    tmp_path: Path, held: tuple[int, ...], named: bool
) -> None:
    """They go by the order of the labels, if these are as many, and else they are left out with a note."""
    values = tuple(range(0, 60, 2))
    label = np.zeros((10, 10, 10), np.uint8)
    label.flat[: 20 * len(held)] = np.repeat(held, 20)
    for kind in ("references", "predictions"):
        save(tmp_path / kind / "a.nii.gz", label)
    image = nibabel.Nifti1Image(np.stack([label == value for value in values], -1).astype(np.float32), AFFINE)
    image.header["descrip"] = description(regions=False, values=values)
    path = tmp_path / "predictions" / "a_probabilities.nii.gz"
    nibabel.save(image, path)
    folders = tmp_path / "predictions", tmp_path / "references", tmp_path / "out"
    done = evaluate_folders(Request(*folders, probabilities=folders[0], labels=held if named else ()))
    left_out = (
        f"a: its probabilities are left out. Expected `{path}` to have one channel for each of 2, 4, with or without a "
        "background before them, but got 30: name all of them in `--labels` or `--regions`, in the order of the "
        "channels."
    )
    assert done.notes == ([left_out] if len(held) == 2 else [])
    if len(held) > 2:
        scores = {int(name): score["iou_at_half"] for name, score in done.summary["probabilities"].items()}
        assert scores == dict.fromkeys(held, 1)
    message = (
        f"Expected `{path}` to name the label values of its channels, but its header has no room for them: name all of "
        "them in `--labels`, in the order of the channels."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        count_files({"": path}, folders[1] / "a.nii.gz", None, None, Rules())


@pytest.mark.parametrize("scored", [(2,), (3,), (2, 3), (3, 2)])
def test_label_values_with_gaps_have_the_channels_that_the_file_names(scored: tuple[int, ...]) -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 500).T
    chosen = structures({str(value): (value,) for value in scored})
    found = channels_of(Path("M"), shares, chosen, kind=ProbabilityKind(False, (0, 2, 3)))
    for structure, channel in found.items():
        np.testing.assert_array_equal(channel, shares[structure.values[0] - 1])


@pytest.mark.parametrize("chosen", [{"1": (1,), "2": (2,)}, {"whole": (1, 2, 3), "3": (3,)}])
def test_a_label_that_is_not_among_the_values_of_the_file_gets_no_channel(chosen: dict[str, tuple[int, ...]]) -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 500).T
    message = (
        "Expected `M` to have a channel for every scored label, but got those of 0, 2, 3, and none of 1: name labels "
        "that the model has in `--labels` or `--regions`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        channels_of(Path("M"), shares, structures(chosen), kind=ProbabilityKind(False, (0, 2, 3)))


def test_one_of_the_labels_is_not_guessed_where_the_file_had_no_room_for_their_values() -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(4), 500).T
    with pytest.raises(
        ValueError, match="Expected `M` to have one channel for each of 2, with or without a background"
    ):
        channels_of(Path("M"), shares, structures({"2": (2,)}), kind=ProbabilityKind(False, ()))


def test_one_label_may_have_two_outputs_that_are_no_shares() -> None:
    """A sigmoid for the background, which is not what the other leaves."""
    soft = softmax_of_four()
    outputs = np.stack([soft[0], 1 - soft[0]])
    outputs[:, 7, 6, 5] = 0.7, 0.9
    ((_, values),) = channels_of(Path("M"), outputs, structures({"1": (1,)})).items()
    np.testing.assert_array_equal(values, outputs[1])


def test_two_labels_may_overlap_a_little() -> None:
    outputs = np.zeros((2, 10, 10), np.float32)
    outputs[0, :5], outputs[1, 5:] = 0.9, 0.9
    outputs[:, 5, :2] = 0.8
    regions = structures({"1": (1,), "2": (2,)})
    assert len(channels_of(Path("M"), outputs, regions)) == 2
    outputs[:, 5:8] = 0.8
    with pytest.raises(ValueError, match="to exclude each other, because each of 1, 2 is one label, but got"):
        channels_of(Path("M"), outputs, regions)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_a_background_is_what_the_others_leave(share: float) -> None:
    """Outputs of three regions for two of them: without a background, which is the first cannot be told."""
    outputs = np.zeros((3, 10, 10), np.float32)
    outputs[0] = 1 - share
    outputs[1, :2], outputs[2, :1] = 0.9, 0.8
    outputs[0, :2] = 0.05
    regions = structures({"a": (1, 2), "b": (2, 5)})
    if share < 0.25:
        assert len(channels_of(Path("M"), outputs, regions)) == 2
    else:
        with pytest.raises(ValueError, match="Expected the first of the 3 channels of `M` to be the background"):
            channels_of(Path("M"), outputs, regions)


def test_the_background_of_many_uncertain_shares_need_not_be_large() -> None:
    """Values beyond the channels go by their order; shares say by themselves that the first is a background."""
    shares = np.full((9, 5, 5), 1 / 9, np.float32)
    found = channels_of(Path("M"), shares, structures({str(value): (value,) for value in range(10, 18)}))
    assert len(found) == 8


def test_nan_does_not_change_what_the_channels_are(folder: Path) -> None:
    soft = softmax_of_four()
    soft[1, 7, 6, 5] = np.nan
    ((_, values),) = channels_of(Path("M"), soft, structures({"core": (2, 3)})).items()
    np.testing.assert_allclose(values, soft[2:].sum(0), atol=1e-6)


@pytest.mark.parametrize("layout", ["volume", "one channel", "archive"])
@pytest.mark.parametrize("options", [{}, {"labels": (1,)}, {"regions": {"1": (1, 2)}}])
def test_one_channel_is_the_only_structure(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Whatever its values are: it is no background, and shares its probability with nothing."""
    for i, sure in enumerate((False, True)):
        label, (_, probability, _) = made_case(i)
        probability = np.where(probability >= 0.5, np.float32(0.95), np.float32(0.02)) if sure else probability
        for kind, mask in (("references", label == 1), ("predictions", probability >= 0.5)):
            save(tmp_path / kind / f"c{i}.nii.gz", mask.astype(np.uint8))
        save(tmp_path / "alone" / f"c{i}_1.nii.gz", probability)
        if layout == "archive":
            save(tmp_path / "maps" / f"c{i}.nii.gz", (probability >= 0.5).astype(np.uint8))
            np.savez(tmp_path / "maps" / f"c{i}.npz", probabilities=probability.T[None])
        else:
            save(tmp_path / "maps" / f"c{i}.nii.gz", probability if layout == "volume" else probability[..., None])
    alone, found = (evaluated(tmp_path, tmp_path / "out", maps, **options) for maps in ("alone", "maps"))
    assert found["notes"] == []
    assert found["probabilities"]["1"]["cases"] == 2
    assert found["probabilities"] == alone["probabilities"]


@pytest.mark.parametrize("infinite", [np.inf, -np.inf])
@pytest.mark.parametrize("values", [[(1,)], [(1, 2)], [(1,), (2,)]])
@pytest.mark.parametrize("layout", ["shares", "outputs", "a file for each structure"])
def test_infinity_is_no_probability(
    layout: str, values: list[tuple[int, ...]], infinite: float, folder: Path, tmp_path: Path
) -> None:
    """Nor part of one: the sum of a region is cut at 1. It is refused in a channel that nobody asks for as well."""
    maps = np.moveaxis(made_case(0)[1] if layout == "shares" else nested(background=True)[1], 0, -1).copy()
    maps[-1, -1, :, 1] = infinite
    save(tmp_path / "maps.nii.gz", maps[..., 1] if layout == "a file for each structure" else maps)
    named = [Structure(f"s{i}", each) for i, each in enumerate(values)]
    files = {each.name if layout == "a file for each structure" else "": tmp_path / "maps.nii.gz" for each in named}
    with pytest.raises(ValueError, match="to hold probabilities") as error:
        count_files(files, folder / "references" / "c0.nii.gz", named, None, Rules())
    assert str(error.value) == (
        f"Expected `{tmp_path / 'maps.nii.gz'}` to hold probabilities between 0 and 1, but got {infinite}: write the "
        "outputs of a softmax or a sigmoid instead of logits."
    )


def test_an_error_of_a_library_is_told_in_a_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        message = "zero-size array"
        raise KeyError(message)

    monkeypatch.setattr(reading, "channels_of", fails)
    notes = evaluated(folder, tmp_path / "out", "channels")["notes"]
    assert notes == [
        f"c{i}: its probabilities are left out. Expected probabilities that can be scored, but got the error KeyError: "
        "'zero-size array': check files and free memory."
        for i in range(CASES)
    ]


@pytest.mark.parametrize("layout", ["one file", "a file for each label"])
def test_logits_are_refused_by_what_a_user_can_change(layout: str, folder: Path, tmp_path: Path) -> None:
    reference = folder / "references" / "c0.nii.gz"
    label = np.asarray(nibabel.load(reference).dataobj)
    logits = np.stack([label == value for value in range(3)], -1).astype(np.float32) * 6 - 3
    save(tmp_path / "maps.nii.gz", logits if layout == "one file" else logits[..., 1])
    files = {"" if layout == "one file" else "1": tmp_path / "maps.nii.gz"}
    message = (
        "to hold probabilities between 0 and 1, but got -3: write the outputs of a softmax or a sigmoid instead of"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        count_files(files, reference, structures({"1": (1,)}), None, Rules())


def test_ignored_voxels_may_hold_anything(folder: Path, tmp_path: Path) -> None:
    files, reference = archive(folder), folder / "references" / "c0.nii.gz"
    label, probabilities = made_case(0)
    spoilt = np.where(label == 2, np.float32(-7), probabilities)
    spoilt[:, np.argwhere(label == 2)[0][0]][:, label[np.argwhere(label == 2)[0][0]] == 2] = np.nan
    save(tmp_path / "maps.nii.gz", np.moveaxis(spoilt, 0, -1))
    counts = [
        count_files(each, reference, structures({"1": (1,)}), 2, Rules())["counts"]["1"]["histogram"]
        for each in (files, {"": tmp_path / "maps.nii.gz"})
    ]
    np.testing.assert_array_equal(*counts)


def test_ignored_voxels_count_nowhere(folder: Path) -> None:
    files, reference = archive(folder), folder / "references" / "c0.nii.gz"
    label, _ = made_case(0)
    counted = count_files(files, reference, [Structure("1", (1,))], 2, Rules())
    assert counted["counts"]["1"]["histogram"].sum() == (label != 2).sum()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"broken",
        lambda content: content[: len(content) // 2],
        lambda content: content[:2000] + bytes(100) + content[2100:],
    ],
    ids=["no archive", "half an archive", "wrong bytes"],
)
def test_maps_that_cannot_be_used_are_noted_and_none_at_all_is_an_error(
    damage: Callable[[bytes], bytes], folder: Path, tmp_path: Path
) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    request = Request(folder / "predictions", folder / "references", tmp_path / "out", probabilities=maps)
    with pytest.raises(PairingError, match=r"Expected volumes in `.*maps`, but got none"):
        evaluate_folders(request)
    (maps / "c0.npz").write_bytes((folder / "npz" / "c0.npz").read_bytes())
    (maps / "c1.npz").write_bytes(damage((folder / "npz" / "c1.npz").read_bytes()))
    np.savez(maps / "c2.npz", probabilities=np.zeros((3, 4, 4, 4), np.float32))
    for i in range(3):
        shutil.copy(folder / "npz" / f"c{i}.nii.gz", maps)
    done = evaluate_folders(request)
    assert done.failures == [], "the scores of the masks are there"
    summary = json.loads(json.dumps(done.summary))
    assert summary["probabilities"]["1"]["cases"] == 1
    notes = "\n".join(summary["notes"])
    assert "c1: its probabilities are left out. Expected `" in notes
    mask = maps / "c2.nii.gz"
    assert f"(classes, 10, 12, 14), as nnU-Net writes them for the mask `{mask}`, but got (3, 4, 4, 4): put" in notes
    assert "c3: there is no probability map of this name" in notes


def test_the_command_prints_the_best_threshold(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{kind}={folder / kind}" for kind in ("predictions", "references")]
    assert main(["evaluate", *options, f"--output={tmp_path / 'out'}", f"--probabilities={folder / 'npz'}"]) == 0
    assert "Label 1: best mean IoU" in capsys.readouterr().out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What was read and hashed, by folder and name."""
    seen: dict[str, list[str]] = {"read": [], "hash": []}
    readers = {"read": ("read_labels", "_archive", "read_volume", "read_channels"), "hash": ("file_hash",)}
    for kind, names in readers.items():
        for module in (case_files, reading):
            for name in names:
                if hasattr(module, name):
                    original = getattr(module, name)

                    def spy(path: Any, *rest: Any, kind: str = kind, original: Any = original) -> Any:
                        one = path[0] if isinstance(path, list) else path
                        seen[kind].append(f"{one.parent.name}/{one.name}")
                        return original(path, *rest)

                    monkeypatch.setattr(module, name, spy)
    return seen


def every_file(layout: str) -> list[str]:
    masks = [f"{kind}/c{i}.nii.gz" for kind in ("predictions", "references") for i in range(CASES)]
    names = [f"c{i}_{v}.nii.gz" for i in range(CASES) for v in (1, 2)] if layout == "files" else []
    names = names or [f"c{i}.{'npz' if layout == 'npz' else 'nii.gz'}" for i in range(CASES)]
    return sorted([*masks, *(f"{layout}/{name}" for name in names)])


@pytest.mark.parametrize("layout", ["npz", "channels", "files"])
@pytest.mark.parametrize("labels", [(), (1, 2)])
def test_every_file_is_read_once_and_nothing_to_do_is_hashing(
    folder: Path, tmp_path: Path, calls: dict[str, list[str]], layout: str, labels: tuple[int, ...]
) -> None:
    first = evaluated(folder, tmp_path / "out", layout, labels=labels)
    hashed = sorted([*every_file(layout), *(f"npz/c{i}.nii.gz" for i in range(CASES) if layout == "npz")])
    assert sorted(calls["read"]) == every_file(layout), "of the mask beside an archive only the header"
    assert sorted(calls["hash"]) == hashed
    calls["read"].clear()
    calls["hash"].clear()
    again = evaluated(folder, tmp_path / "out", layout, labels=labels)
    assert calls["read"] == []
    assert sorted(calls["hash"]) == hashed
    assert again["probabilities"] == first["probabilities"]


def test_maps_that_are_added_or_replaced_leave_the_scores_as_they_are(
    folder: Path, tmp_path: Path, calls: dict[str, list[str]]
) -> None:
    evaluate_folders(Request(folder / "predictions", folder / "references", tmp_path / "out"))
    calls["read"].clear()
    fresh = evaluated(folder, tmp_path / "fresh", "npz")["probabilities"]
    calls["read"].clear()
    assert evaluated(folder, tmp_path / "out", "npz")["probabilities"] == fresh
    assert sorted(calls["read"]) == [name for name in every_file("npz") if not name.startswith("predictions")]
    calls["read"].clear()
    evaluated(folder, tmp_path / "out", "npz", match="any")  # another rule: all is scored anew, and read once
    assert sorted(calls["read"]) == every_file("npz")
    maps = tmp_path / "npz"
    shutil.copytree(folder / "npz", maps)
    request = Request(folder / "predictions", folder / "references", tmp_path / "fresh", probabilities=maps)
    calls["read"].clear()
    evaluate_folders(request)  # the same bytes in another folder
    assert calls["read"] == []
    (maps / "c0.npz").write_bytes((maps / "c1.npz").read_bytes())
    changed = evaluate_folders(request).summary["probabilities"]
    assert sorted(calls["read"]) == ["npz/c0.npz", "references/c0.nii.gz"]
    assert changed != fresh


def test_a_map_of_a_label_that_nobody_scores_does_no_harm(folder: Path, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    shutil.copytree(folder / "files", maps)
    fresh = evaluated(folder, tmp_path / "a", "files")["probabilities"]
    image = nibabel.load(folder / "references" / "c0.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.full(image.shape, np.nan, np.float32), image.affine), maps / "c0_5.nii.gz")
    request = Request(folder / "predictions", folder / "references", tmp_path / "b", probabilities=maps)
    summary = evaluate_folders(request).summary
    assert summary["probabilities"] == fresh
    assert not any("c0" in note for note in summary["notes"])


def test_channels_in_the_order_of_labels_that_nobody_named(folder: Path, tmp_path: Path) -> None:
    """Labels 3 and 7 with three channels: which goes with which is known when all references were read."""
    renamed = np.array([0, 3, 7], np.uint8)
    for i in range(CASES):
        label, _ = made_case(i)
        if i == 1:
            label[label == 2] = 0  # a case without the second label
        for kind in ("references", "predictions"):
            save(tmp_path / kind / f"c{i}.nii.gz", renamed[label])
    request = Request(tmp_path / "predictions", tmp_path / "references", tmp_path / "a", probabilities=folder / "npz")
    unnamed = evaluate_folders(request)
    named = evaluate_folders(replace(request, output=tmp_path / "b", labels=(3, 7)))
    assert len(unnamed.maps) == len(named.maps) == CASES
    assert unnamed.summary["probabilities"] == named.summary["probabilities"]
    assert evaluate_folders(request).summary["probabilities"] == named.summary["probabilities"]


def test_counts_are_kept_whole(folder: Path) -> None:
    files, reference = archive(folder), folder / "references" / "c0.nii.gz"
    count = count_files(files, reference, [Structure("1", (1,))], None, Rules())["counts"]["1"]
    kept = {**count, "histogram": sparse(count["histogram"])}
    again = map_records._compact(json.loads(json.dumps(map_records._plain(kept))))
    for held in (kept, again):
        assert held["lesions"] == count["lesions"]
        assert sum(part.nbytes for row in held["histogram"] for part in row) <= 10 * np.count_nonzero(
            count["histogram"]
        )
        np.testing.assert_array_equal(dense(held["histogram"]), count["histogram"])


@pytest.mark.parametrize("mask", ["{}.nii.gz", "{}_mask.mha", "{}_mask.nii.gz"])
def test_the_maps_of_predict_are_found_beside_its_masks(mask: str, tmp_path: Path) -> None:
    cases = ["a", "a_b", "p1/c"]
    for case in cases:
        for name in (f"{case}.nii.gz", mask.format(case), f"{case}_probabilities.nii.gz"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    maps = {case: {"": tmp_path / f"{case}_probabilities.nii.gz"} for case in cases}
    assert find_maps(tmp_path, cases) == maps
    (tmp_path / "a_b_probabilities.nii.gz").unlink()
    del maps["a_b"]
    assert find_maps(tmp_path, cases) == maps, "the mask is not a map where another case has one"


def test_a_structure_may_be_called_mask(tmp_path: Path) -> None:
    for name in ("a_mask", "a_core"):
        (tmp_path / f"{name}.nii.gz").touch()
    parts = {"core": tmp_path / "a_core.nii.gz", "mask": tmp_path / "a_mask.nii.gz"}
    assert find_maps(tmp_path, ["a"]) == {"a": parts}


def test_nnunets_masks_are_no_maps_where_an_archive_is_missing(tmp_path: Path) -> None:
    for name in ("a.npz", "a.nii.gz", "b.nii.gz"):
        (tmp_path / name).touch()
    assert find_maps(tmp_path, ["a", "b"]) == {"a": {"": tmp_path / "a.npz", GRID: tmp_path / "a.nii.gz"}}


def test_maps_of_predict_are_no_predictions(folder: Path, tmp_path: Path) -> None:
    """Masks and maps in one folder: that of `monai-iou predict --save-probabilities -o DIR`."""
    both = Path(shutil.copytree(folder / "predictions", tmp_path / "both"))
    for path in (folder / "channels").iterdir():
        shutil.copy(path, both / path.name.replace(".nii", "_probabilities.nii"))
    apart = evaluated(folder, tmp_path / "apart", "channels")
    found = evaluate_folders(Request(both, folder / "references", tmp_path / "together", probabilities=both))
    assert found.failures == []
    together = json.loads((tmp_path / "together" / "summary.json").read_text(encoding="utf-8"))
    assert together["probabilities"] == apart["probabilities"]


def test_archives_behind_links_and_with_capital_letters_are_found(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.npz").touch()
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    maps = tmp_path / "maps"
    maps.mkdir()
    (maps / "site").symlink_to(tmp_path / "real")
    (maps / "b.NPZ").touch()
    (maps / "._b.npz").touch()
    found = find_maps(maps, ["site/a", "b"])
    assert found == {"site/a": {"": maps / "site" / "a.npz"}, "b": {"": maps / "b.NPZ"}}


LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def archived(root: Path, affine: np.ndarray, shift: int = 0, shape: tuple[int, ...] = (10, 9, 8)) -> Request:
    """A reference on the plain grid, and a mask and an archive of nnU-Net of the same place on that of `affine`."""
    label = np.zeros(shape, np.uint8)
    label[2:5, 3:6, 4:7] = 1
    label[4, 5, 6] = 0  # not the same from all sides
    image = nibabel.Nifti1Image(np.roll(label, shift, (0, 1, 2)), affine)
    for kind in ("predictions", "references"):
        (root / kind).mkdir(parents=True)
    nibabel.save(image, root / "predictions" / "c.nii.gz")
    sure = image.get_fdata().astype(np.float32) * np.float32(0.9)
    channels = np.stack([1 - sure, sure]).transpose(0, 3, 2, 1)
    np.savez_compressed(root / "predictions" / "c.npz", probabilities=channels)
    onto = nibabel.Nifti1Image(label, np.eye(4)) if shift else nibabel.as_closest_canonical(image)
    nibabel.save(onto, root / "references" / "c.nii.gz")
    folders = root / "predictions", root / "references", root / "out"
    return Request(*folders, probabilities=root / "predictions", resample=bool(shift))


@pytest.mark.parametrize("late", [False, True], ids=["with the masks", "added later"])
@pytest.mark.parametrize("shape", [(10, 9, 8), (8, 9, 8)], ids=["cuboid", "the same reversed"])
@pytest.mark.parametrize("permuted", [False, True])
def test_an_archive_lies_where_the_mask_beside_it_lies(
    shape: tuple[int, ...], permuted: bool, late: bool, tmp_path: Path
) -> None:
    """Not where the reference's voxels lie, which may be stored in another order."""
    request = archived(tmp_path, LPS[:, [2, 0, 1, 3]] if permuted else LPS, shape=shape)
    if late:
        evaluate_folders(replace(request, probabilities=None))
    done = evaluate_folders(request)
    assert done.rows[0]["iou"] == 1.0
    assert done.summary["probabilities"]["1"]["iou_at_half"] == 1.0
    assert done.notes == []


@pytest.mark.parametrize("late", [False, True], ids=["with the masks", "added later"])
def test_an_archive_on_another_grid_is_left_out_although_the_mask_is_resampled(late: bool, tmp_path: Path) -> None:
    moved = np.eye(4)
    moved[:3, 3] = 2
    request = archived(tmp_path, moved, shift=-2)
    if late:
        evaluate_folders(replace(request, probabilities=None))
    done = evaluate_folders(request)
    assert done.rows[0]["iou"] == 1.0
    assert done.summary["probabilities"] == {}
    (note,) = (note for note in done.notes if "probabilities" in note)
    assert note == (
        f"c: its probabilities are left out. Expected the probabilities of `{tmp_path / 'predictions' / 'c.npz'}` on "
        "the reference's grid (shape 10x9x8, spacing 1x1x1 mm, orientation RAS, origin (0, 0, 0) mm), but got shape "
        "10x9x8, spacing 1x1x1 mm, orientation RAS, origin (2, 2, 2) mm: write them on that grid, because "
        "`--resample` takes masks only."
    )


def test_an_archive_without_its_mask_is_read_with_the_axes_of_the_prediction_and_the_notes_say_so(
    tmp_path: Path,
) -> None:
    request = archived(tmp_path, LPS)
    maps = tmp_path / "maps"
    maps.mkdir()
    shutil.copy(tmp_path / "predictions" / "c.npz", maps)
    request = replace(request, probabilities=maps)
    done = evaluate_folders(request)
    assert done.summary["probabilities"]["1"]["iou_at_half"] == 1.0
    told = (
        "Archives of probabilities without their masks beside them: 1, such as c.npz. They were read as probabilities "
        "of the scored predictions, with the same axes."
    )
    assert done.notes == [told]
    shutil.copy(tmp_path / "predictions" / "c.nii.gz", maps)
    done = evaluate_folders(request)
    assert (done.summary["probabilities"]["1"]["iou_at_half"], done.notes) == (1.0, [])
    nibabel.save(nibabel.load(tmp_path / "references" / "c.nii.gz"), maps / "c.nii.gz")
    assert evaluate_folders(request).summary["probabilities"]["1"]["iou_at_half"] < 0.5, "another mask is another grid"


def test_an_archive_with_its_axes_in_the_order_of_the_file_is_refused(tmp_path: Path) -> None:
    """Where the shape is the same reversed, nobody could tell the two orders apart."""
    request = archived(tmp_path, LPS)
    path = tmp_path / "predictions" / "c.npz"
    with np.load(path) as held:
        np.savez(path, probabilities=held["probabilities"].transpose(0, 3, 2, 1))
    (note,) = evaluate_folders(request).notes
    assert "to hold probabilities of shape (classes, 8, 9, 10), as nnU-Net writes them for the mask" in note
    assert "but got (2, 10, 9, 8): put the two files of one prediction there." in note


def test_a_label_that_is_nowhere_and_hardly_predicted_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its mean IoU is 0 at low thresholds and undefined at 0.5, where nothing is predicted."""
    nothing = np.zeros(SHAPE, np.uint8)
    probability = np.zeros(SHAPE, np.float32)
    probability[2, 2, 2] = 0.3
    for kind in ("references", "predictions"):
        save(tmp_path / kind / "a.nii.gz", nothing)
    save(tmp_path / "maps" / "a_1.nii.gz", probability)
    options = [f"--{kind}={tmp_path / kind}" for kind in ("predictions", "references")]
    options += [f"--probabilities={tmp_path / 'maps'}", f"--output={tmp_path / 'out'}", "--labels=1"]
    assert main(["evaluate", *options]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "best mean IoU" in line)
    assert re.fullmatch(r"Label 1: best mean IoU 0\.000 at [\d.]+, undefined at 0\.5, ECE 0\.000\d", line)
