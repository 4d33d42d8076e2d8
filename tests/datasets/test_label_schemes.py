"""What dataset.json says of labels: regions, ignored voxels, shares, several raters, cases that lack classes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from monai_iou.datasets.case_volumes import read_case, read_shares
from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.description import read_label_scheme
from monai_iou.datasets.folder import SegmentationFolder, read_folder
from monai_iou.datasets.label_counts import count_label_files
from monai_iou.planning.fingerprint import compute_fingerprint, measure_case
from monai_iou.volumes.reading import VolumeError

SHAPE = (6, 7, 8)
PATH = Path("dataset.json")
VALUES = {"0": "background", "1": "oedema", "2": "core", "3": "enhancing"}
REGIONS = {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}


def save(path: Path, array: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path.name


def dataset(root: Path, maps: list[Any], entries: list[dict[str, Any]] | None = None, **content: Any) -> Path:
    """A folder with a case for each label; a list gives a case several raters."""
    pairs: list[dict[str, Any]] = []
    for k, given in enumerate(maps):
        image = save(root / f"c{k}.nii.gz", np.random.default_rng(k).normal(size=SHAPE).astype(np.float32))
        raters = given if isinstance(given, list) else [given]
        files = [save(root / f"label{k}_{rater}.nii.gz", label) for rater, label in enumerate(raters)]
        extra = {} if entries is None else entries[k]
        pairs.append({"image": image, "label": files if isinstance(given, list) else files[0], **extra})
    text = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "lesion"}, "training": pairs, **content}
    (root / "dataset.json").write_text(json.dumps(text))
    return root


def label(*values: int, dtype: Any = np.uint8) -> np.ndarray:
    array = np.zeros(SHAPE, dtype)
    for k, value in enumerate(values):
        array[k] = value
    return array


def refusal(root: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        _ = read_folder(root).training_facts
    assert re.fullmatch(r"Expected .+, but .+: .+\.", str(caught.value)), str(caught.value)
    return str(caught.value)


def read(root: Path) -> SegmentationFolder:
    folder = read_folder(root)
    assert folder.training_facts
    return folder


def test_decathlons_regions_are_nnunets(tmp_path: Path) -> None:
    nnunet = {"background": 0, **REGIONS}
    mine = read_label_scheme({"labels": VALUES, "regions": REGIONS, "regions_class_order": [1, 2, 3]}, PATH)
    theirs = read_label_scheme({"labels": nnunet, "regions_class_order": [1, 2, 3]}, PATH)
    assert mine.classes == theirs.classes == (("whole", (1, 2, 3)), ("core", (2, 3)), ("enhancing", (3,)))
    assert mine.order == theirs.order == (1, 2, 3)
    assert list(mine.labels) == list(theirs.labels) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "content",
    [
        {"labels": {**VALUES, "9": "ignore"}},
        {"labels": {**VALUES, "9": "IGNORE"}},
        {"labels": VALUES, "ignore": 9},
        {"labels": {**VALUES, "9": "not annotated"}, "ignore": 9},
        {"labels": {"background": 0, "oedema": 1, "core": 2, "enhancing": 3, "ignore": 9}},
    ],
)
def test_the_ignored_value_is_no_class(content: dict[str, Any]) -> None:
    scheme = read_label_scheme(content, PATH)
    assert scheme.ignore == 9
    assert scheme.labels == {0: "background", 1: "oedema", 2: "core", 3: "enhancing"}
    assert scheme.file_values == (0, 1, 2, 3, 9)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"labels": VALUES, "regions": REGIONS}, "regions_class_order"),
        ({"labels": VALUES, "regions": REGIONS, "regions_class_order": [1, 1, 3]}, "1 for core, which has 2, 3"),
        ({"labels": VALUES, "regions": {"whole": [1, 8]}, "regions_class_order": [1]}, "8"),
        ({"labels": VALUES, "regions": {"whole": [0, 1]}, "regions_class_order": [1]}, "foreground values"),
        ({"labels": VALUES, "regions": ["whole"]}, "map names to lists"),
        ({"labels": {"background": 0, "ignore": 1}}, "besides the background and `ignore`"),
        ({"labels": VALUES, "ignore": -1}, "above 0 as `ignore`"),
        ({"labels": VALUES, "ignore": "9"}, "above 0 as `ignore`"),
        ({"labels": {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order": [1, 2], "ignore": 1}, "a value of"),
        ({"labels": VALUES, "soft_labels": "yes"}, "true or false as `soft_labels`"),
        ({"labels": {**VALUES, "9": "ignore"}, "soft_labels": True}, "no `ignore` with `soft_labels`"),
    ],
)
def test_contradictions_are_refused(content: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetError, match=re.escape(words)) as caught:
        read_label_scheme(content, PATH)
    assert re.fullmatch(r"Expected .+, but .+: .+\.", str(caught.value)), str(caught.value)


def test_the_fingerprint_counts_regions_and_no_ignored_voxel(tmp_path: Path) -> None:
    content = {"labels": VALUES, "regions": REGIONS, "regions_class_order": [1, 2, 3], "ignore": 9}
    root = dataset(tmp_path, [label(1, 2, 3, 9), label(9, 9, 1)], **content)
    folder, plane = read(root), 7 * 8
    found = compute_fingerprint(folder)
    assert [each.name for each in found.classes] == ["whole", "core", "enhancing"]
    assert [each.value for each in found.classes] == [1, 2, 3]
    assert found.voxels == (2 * plane + 3 * plane, 4 * plane, 2 * plane, plane)
    assert found.foreground_fraction.largest[0] == pytest.approx(3 / 6)
    assert found.classes[0].components == 2
    assert folder.training_facts[1].foreground.shape == (1, plane), "ignored voxels are no foreground"


def test_a_folder_of_ignored_voxels_alone_has_no_foreground(tmp_path: Path) -> None:
    assert "have foreground" in refusal(dataset(tmp_path, [label(9), label(9)], ignore=9))


def test_ignored_voxels_are_not_counted_for_class_weights(tmp_path: Path) -> None:
    save(tmp_path / "labelsTr/a.nii.gz", label(1, 9))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1, "ignore": 9}}))
    counts = count_label_files(tmp_path / "labelsTr")
    assert counts.values == (0, 1)
    assert counts.voxels.tolist() == [[4 * 56, 56]]


def test_several_raters_agree_by_halves(tmp_path: Path) -> None:
    root = dataset(tmp_path, [[label(1, 1), label(1), label(0, 0, 1)], label(1)])
    folder = read(root)
    assert folder.has_raters
    assert [len(case.labels) for case in folder.training] == [3, 1]
    assert isinstance(folder.training[0].as_item()["label"], list)
    assert isinstance(folder.training[1].as_item()["label"], str)
    volumes = read_case(folder.training[0], folder.scheme, folder.modalities)
    assert volumes.mask(1)[:, 0, 0].tolist() == [True, False, False, False, False, False]
    assert measure_case(folder.training[0], folder.scheme, folder.modalities).voxels == (5 * 56, 56)


def test_raters_on_another_grid_or_without_a_file_are_refused(tmp_path: Path) -> None:
    root = dataset(tmp_path, [[label(1), label(1)[:5]], label(1)])
    assert "label0_1.nii.gz to lie on the grid" in refusal(root)
    content = json.loads((root / "dataset.json").read_text())
    content["training"][0]["label"] = []
    (root / "dataset.json").write_text(json.dumps(content))
    assert "an empty list" in refusal(root)


def test_soft_labels_are_shares_of_the_classes(tmp_path: Path) -> None:
    soft = np.zeros(SHAPE, np.float32)
    soft[0], soft[1] = 0.75, 0.25
    folder = read(dataset(tmp_path, [soft, soft], soft_labels=True))
    assert measure_case(folder.training[0], folder.scheme, folder.modalities).voxels == (5 * 56, 56)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (np.full(SHAPE, 1.5, np.float32), "shares from 0 to 1"),
        (np.full((*SHAPE, 2), 0.4, np.float32), "to hold 1 channel, one for each class"),
    ],
)
def test_wrong_shares_are_refused(tmp_path: Path, shares: np.ndarray, words: str) -> None:
    assert words in refusal(dataset(tmp_path, [shares, shares], soft_labels=True))


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-0.25, 1.0), (0.0, 1.25)])
def test_shares_that_a_file_stores_as_scaled_integers_are_read(ends: tuple[float, float], tmp_path: Path) -> None:
    shares = np.linspace(*ends, int(np.prod(SHAPE)), dtype=np.float32).reshape(SHAPE)
    image = nib.Nifti1Image(shares, np.eye(4))
    image.set_data_dtype(np.uint8)
    nib.save(image, tmp_path / "a.nii.gz")
    stored = np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj)
    if ends == (0.0, 1.0):
        assert stored.max() > 1, "the scale in the header is rounded"
        read_back = read_shares(tmp_path / "a.nii.gz").array[0]
        assert read_back.dtype == np.float32
        assert (read_back.min(), read_back.max()) == (0, 1)
        np.testing.assert_allclose(read_back, stored, atol=1e-6)
    else:
        wrong = next(end for end in ends if end not in (0, 1))
        remedy = "replace negative values by 0" if wrong < 0 else "divide by the largest value"
        end = rf"but got {wrong:g}: {remedy}, or set `soft_labels` to false if these are no shares\."
        with pytest.raises(VolumeError, match=rf"shares from 0 to 1, as .*, {end}$"):
            read_shares(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_shares_that_are_no_numbers_have_a_remedy_of_their_own(wrong: float, tmp_path: Path) -> None:
    shares = np.full(SHAPE, 0.5, np.float32)
    shares.flat[0] = wrong
    nib.save(nib.Nifti1Image(shares, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(
        VolumeError, match=rf"but got {wrong}: replace NaN and infinite values, or set `soft_labels` to"
    ):
        read_shares(tmp_path / "a.nii.gz")


def test_shares_of_more_than_a_voxel_are_refused(tmp_path: Path) -> None:
    shares = np.full((*SHAPE, 2), 0.6, np.float32)
    names = {"0": "background", "1": "a", "2": "b"}
    said = refusal(dataset(tmp_path, [shares], labels=names, soft_labels=True))
    assert "add up to at most 1 in every voxel, but got 1.2: correct the shares, or list classes that overlap " in said


def test_fractions_without_the_key_name_it(tmp_path: Path) -> None:
    assert "set `soft_labels` to true" in refusal(dataset(tmp_path, [np.full(SHAPE, 0.5, np.float32)]))


LIVER = {"0": "background", "1": "liver", "5": "tumour", "7": "spleen"}


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["liver", "spleen"], (1, 3)),
        ([1, 7], (1, 3)),
        (["7", "background", 0], (3,)),
        ([], ()),
        (["tumour", "spleen", "liver"], None),
        ("liver", (1,)),
    ],
)
def test_a_case_names_its_classes(tmp_path: Path, named: Any, expected: tuple[int, ...] | None) -> None:
    root = dataset(tmp_path, [label(1), label(1)], [{"labelled": named}, {}], labels=LIVER)
    folder = read(root)
    assert [case.labelled for case in folder.training] == [expected, None]
    assert folder.is_partly_labelled == (expected is not None)
    whole = dataset(tmp_path, [label(1), label(1)], labels=LIVER, labelled={"c0": named})
    assert [case.labelled for case in read(whole).training] == [expected, None]


@pytest.mark.parametrize(
    ("entry", "whole", "words"),
    [
        ({"labelled": ["kidney"]}, {}, "'kidney'"),
        ({"labelled": [2]}, {}, "but got 2"),
        ({}, {"labelled": {"c9": ["liver"]}}, "name cases with labels, but got c9"),
        ({}, {"labelled": ["liver"]}, "map names of cases"),
    ],
)
def test_unknown_classes_and_cases_are_refused(
    tmp_path: Path, entry: dict[str, Any], whole: dict[str, Any], words: str
) -> None:
    assert words in refusal(dataset(tmp_path, [label(1)], [entry], labels=LIVER, **whole))


def test_a_thousand_classes_are_measured_in_one_look(tmp_path: Path) -> None:
    values = np.arange(999, dtype=np.int32) * 70_000
    array = np.resize(values, SHAPE).astype(np.int32)
    names = {str(value): f"n{value}" for value in values}
    folder = read(dataset(tmp_path, [array], labels=names))
    measures = measure_case(folder.training[0], folder.scheme, folder.modalities)
    counts = np.unique(array, return_counts=True)[1]
    assert measures.voxels[: len(counts)] == tuple(counts.tolist())
    assert sum(measures.voxels) == array.size
    names["70000000"] = "one more"
    names["70070000"] = "and another"
    assert "at most 1000 labels" in refusal(dataset(tmp_path, [array], labels=names))
