"""Decathlon-layout folders: what is read, every refusal in one sentence, and splits that keep patients together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import DATA

from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.datasets.folder import read_folder
from monai_iou.datasets.naming import names_root
from monai_iou.datasets.splits import count_patients, fold_cases, split_cases
from monai_iou.planning.fingerprint import compute_fingerprint
from monai_iou.workflow.data import BundleCases

REAL = DATA


def write(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good training cases and one labelled test case."""
    rng = np.random.default_rng(0)
    entries: dict[str, list[dict[str, str]]] = {"Tr": [], "Ts": []}
    for index in range(4):
        part = "Tr" if index < 3 else "Ts"
        entry = {kind: f"./{kind}s{part}/c{index}.nii.gz" for kind in ("image", "label")}
        write(tmp_path / entry["image"], rng.normal(size=(6, 7, 8)).astype(np.float32))
        write(tmp_path / entry["label"], rng.integers(0, 2, (6, 7, 8)).astype(np.uint8))
        entries[part].append(entry)
    content = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "lesion"},
        "training": entries["Tr"],
        "test": [entry["image"] for entry in entries["Ts"]],
        "test_labelled": entries["Ts"],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path) -> str:
    """The message of reading and checking a folder; one sentence that ends with what to do."""
    with pytest.raises(DatasetError) as caught:
        _ = read_folder(folder).training_facts
    message = str(caught.value)
    assert "\n" not in message
    assert re.fullmatch(r"Expected .+, but .+: .+\.", message), message
    return message


def test_reads_names_and_facts(folder: Path) -> None:
    read = read_folder(folder)
    assert [case.name for case in read.training] == ["c0", "c1", "c2"]
    assert [case.name for case in read.evaluation] == ["c3"]
    assert read.modalities == ("CT",)
    assert read.labels == {0: "background", 1: "lesion"}
    facts = read.training_facts[0]
    assert facts.shape == (6, 7, 8)
    assert facts.spacing == pytest.approx((1, 2, 3))
    image = nib.load(read.training[0].image).get_fdata()
    label = nib.load(read.training[0].label).get_fdata()  # type: ignore[arg-type]
    np.testing.assert_allclose(facts.foreground[0], image[label > 0], rtol=1e-6)


def test_spacing_and_shape_are_in_ras_order(folder: Path) -> None:
    affine = np.array([[0, 0, -3.0, 5], [1.0, 0, 0, 6], [0, 2.0, 0, 7], [0, 0, 0, 1]])  # voxel axes: A, S, L
    for kind in ("images", "labels"):
        write(folder / f"{kind}Tr" / "c0.nii.gz", np.ones((4, 5, 6), np.uint8), affine)
    facts = read_folder(folder).training_facts[0]
    assert facts.shape == (6, 4, 5)
    assert facts.spacing == pytest.approx((3, 1, 2))


def test_channels_last(folder: Path) -> None:
    for index in range(3):
        write(folder / f"imagesTr/c{index}.nii.gz", np.ones((6, 7, 8, 2), np.float32))
    edit(folder, modality={"1": "T2", "0": "T1"})
    read = read_folder(folder)
    assert read.modalities == ("T1", "T2")
    assert read.training_facts[0].foreground.shape[0] == 2


def test_missing_dataset_json(tmp_path: Path) -> None:
    assert str(tmp_path / "dataset.json") in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"labels": 3}'])
def test_dataset_json_that_is_not_one(folder: Path, text: str) -> None:
    (folder / "dataset.json").write_text(text)
    assert "dataset.json" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modality", {"CT": "0"}),
        ("modality", {"1": "CT"}),
        ("patient_groups", ["c0", "c1"]),
        ("patient_groups", {"P1": "c0"}),
        ("test", "./imagesTs/c3.nii.gz"),
        ("test", [None]),
        ("training", [{"image": None, "label": "./labelsTr/c0.nii.gz"}]),
        ("training", [{"image": "./imagesTr/c0.nii.gz", "label": 3}]),
    ],
)
def test_a_key_of_another_type(folder: Path, key: str, value: object) -> None:
    edit(folder, **{key: value})
    message = refusal(folder)
    assert str(folder / "dataset.json") in message
    assert f"`{key}`" in message or "the label of" in message


def test_labels_that_are_all_empty(folder: Path) -> None:
    for index in range(3):
        write(folder / f"labelsTr/c{index}.nii.gz", np.zeros((6, 7, 8), np.uint8))
    assert "all 3 are empty: add cases with voxels of lesion." in refusal(folder)


def test_a_case_whose_voxels_are_all_ignored(folder: Path) -> None:
    """No patch of it shows anything; a training would end at the first one, after minutes perhaps."""
    edit(folder, ignore=255)
    write(folder / "labelsTr/c1.nii.gz", np.full((6, 7, 8), 255, np.uint8))
    message = (
        f"Expected {folder / 'labelsTr/c1.nii.gz'} to have voxels that are not ignored, but all have the value 255:"
    )
    assert message in refusal(folder)
    with pytest.raises(DatasetError, match="to have voxels that are not ignored"):
        compute_fingerprint(read_folder(folder))


@pytest.mark.parametrize("split", [{"val_fraction": 0.4}, {"folds": 3, "fold": 0}])
def test_a_split_that_leaves_no_foreground_to_train_on(folder: Path, split: dict[str, Any]) -> None:
    """The model would learn nothing, and a CT would be normalised without the window of its foreground."""
    held_out = BundleCases(str(folder), **split).validation
    others = [f"c{i}" for i in range(3) if f"c{i}" not in [item["case"] for item in held_out]]
    for name in others:
        write(folder / f"labelsTr/{name}.nii.gz", np.zeros((6, 7, 8), np.uint8))
    which, found = ("the only case", "it is") if len(others) == 1 else (f"one of the {len(others)} cases", "all are")
    message = (
        f"Expected {which} to train on to have foreground, but {found} empty ({', '.join(others)}): choose another "
        "`split_seed` or other `folds`, or correct the split that splits_final.json or `validation` gives."
    )
    with pytest.raises(DatasetError, match=re.escape(message)):
        BundleCases(str(folder), **split).plan([8, 8, 8])


def test_singular_affine(folder: Path) -> None:
    image = nib.Nifti1Image(np.ones((6, 7, 8), np.float32), None)
    image.header["qform_code"], image.header["sform_code"] = 0, 1
    image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]
    nib.save(image, folder / "imagesTr/c1.nii.gz")
    message = refusal(folder)
    assert f"{folder}/imagesTr/c1.nii.gz` to have a valid affine" in message
    assert "voxels of 1.41421x0x1 mm" in message


def test_empty_training_list(folder: Path) -> None:
    edit(folder, training=[])
    assert "`training`" in refusal(folder)


def test_image_without_label(folder: Path) -> None:
    (folder / "labelsTr/c1.nii.gz").unlink()
    assert "c1.nii.gz" in refusal(folder)
    edit(folder, training=[{"image": "./imagesTr/c0.nii.gz"}])
    assert "imagesTr/c0.nii.gz" in refusal(folder)


@pytest.mark.parametrize("key", ["training", "test", "test_labelled"])
def test_images_of_one_name_in_two_folders_are_called_by_their_folders(folder: Path, key: str) -> None:
    images = [f"imagesTr/{patient}/image.nii.gz" for patient in ("p1", "p2")]
    for image in images:
        write(folder / image, np.ones((6, 7, 8), np.float32))
    pairs = [{"image": image, "label": "labelsTr/c0.nii.gz"} for image in images]
    edit(folder, **{key: images if key == "test" else pairs}, patient_groups={"one": ["p1/"], "two": ["p2/"]})
    read = read_folder(folder)
    cases = {"training": read.training, "test": read.test, "test_labelled": read.evaluation}[key]
    assert [case.name for case in cases] == ["p1/image", "p2/image"]
    assert names_root([case.image for case in cases]) == folder.resolve() / "imagesTr"


@pytest.mark.parametrize("key", ["training", "test", "test_labelled"])
@pytest.mark.parametrize("other", ["imagesTr/c0.nii"])
def test_two_images_of_one_name(folder: Path, key: str, other: str) -> None:
    write(folder / other, np.ones((6, 7, 8), np.float32))
    images = ["imagesTr/c0.nii.gz", other]
    pairs = [{"image": image, "label": "labelsTr/c0.nii.gz"} for image in images]
    edit(folder, **{key: images if key == "test" else pairs})
    message = refusal(folder)
    assert f"{folder}/imagesTr/c0.nii.gz and {folder}/{other} are both called c0" in message


def test_a_pair_listed_twice(folder: Path) -> None:
    edit(folder, training=[{"image": "imagesTr/c0.nii.gz", "label": "labelsTr/c0.nii.gz"}] * 2)
    assert f"{folder}/imagesTr/c0.nii.gz comes twice" in refusal(folder)


@pytest.mark.parametrize("path", ["../outside.nii.gz", "/etc/hostname.nii.gz", "imagesTr/../../outside.nii.gz"])
def test_paths_that_leave_the_folder(folder: Path, path: str) -> None:
    write(folder.parent / "outside.nii.gz", np.ones((6, 7, 8), np.float32))
    edit(folder, training=[{"image": path, "label": "./labelsTr/c0.nii.gz"}])
    assert path in refusal(folder)
    edit(folder, training=[{"image": "./imagesTr/c0.nii.gz", "label": path}])
    assert path in refusal(folder)


def test_other_grids(folder: Path) -> None:
    write(folder / "labelsTr/c2.nii.gz", np.ones((6, 7, 7), np.uint8))
    message = refusal(folder)
    assert "labelsTr/c2.nii.gz" in message
    assert "6x7x7 and 6x7x8" in message
    moved = np.diag([1.0, 2.0, 3.0, 1.0])
    moved[0, 3] = 0.5
    write(folder / "labelsTr/c2.nii.gz", np.ones((6, 7, 8), np.uint8), moved)
    assert "0.5 voxels" in refusal(folder)
    moved[0, 3] = 1e-4  # float32 headers differ by this much
    write(folder / "labelsTr/c2.nii.gz", np.ones((6, 7, 8), np.uint8), moved)
    assert len(read_folder(folder).training_facts) == 3


@pytest.mark.parametrize(("value", "dtype"), [(3, np.uint8), (0.5, np.float32), (-1, np.int16)])
def test_label_value_outside_the_labels(folder: Path, value: float, dtype: type) -> None:
    label = np.zeros((6, 7, 8), dtype)
    label[0, 0, 0] = value
    write(folder / "labelsTr/c1.nii.gz", label)
    message = refusal(folder)
    assert "labelsTr/c1.nii.gz" in message
    assert f"{value:g}" in message


def test_gaps_in_label_values_are_allowed(folder: Path) -> None:
    for index in range(3):
        write(folder / f"labelsTr/c{index}.nii.gz", np.where(np.ones((6, 7, 8)) > 0, 7, 0).astype(np.float32))
    edit(folder, labels={"7": "tumour", "0": "background"})
    assert list(read_folder(folder).labels) == [0, 7]
    assert len(read_folder(folder).training_facts) == 3


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_truncated_file(folder: Path, kind: str) -> None:
    path = folder / f"{kind}Tr/c1.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{kind}Tr/c1.nii.gz" in refusal(folder)
    path.write_bytes(b"not gzip")
    assert f"{kind}Tr/c1.nii.gz" in refusal(folder)


def test_4d_where_3d_is_expected(folder: Path) -> None:
    write(folder / "imagesTr/c0.nii.gz", np.ones((6, 7, 8, 2), np.float32))
    message = refusal(folder)
    assert "6x7x8x2" in message
    assert "3D" in message


def test_image_with_nan(folder: Path) -> None:
    voxels = np.ones((6, 7, 8), np.float32)
    voxels[1, 2, 3] = np.nan
    write(folder / "imagesTr/c0.nii.gz", voxels)
    assert "NaN" in refusal(folder)


def test_first_bad_file_is_named_whatever_the_order_of_threads(folder: Path) -> None:
    for index in (1, 2):
        (folder / f"imagesTr/c{index}.nii.gz").write_bytes(b"")
    assert all("c1.nii.gz" in refusal(folder) for _ in range(5))


@given(
    patients=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 5),
)
def test_split_is_a_partition_by_patient(patients: list[int], fraction: float, seed: int) -> None:
    cases = [Case(f"s{p}_{v}", Path(f"s{p}_{v}.nii")) for p, visits in enumerate(patients) for v in range(visits)]
    groups = {f"patient {p}": [f"s{p}"] for p in range(len(patients))}
    training, validation = split_cases(cases, fraction, seed, groups)
    assert (training, validation) == split_cases(cases[:], fraction, seed, groups)
    if len(patients) == 1 and fraction > 0:
        assert training == validation == cases
        return
    assert sorted(case.name for case in training + validation) == sorted(case.name for case in cases)
    sides = [{case.name.split("_")[0] for case in side} for side in (training, validation)]
    assert not sides[0] & sides[1]
    assert training
    assert bool(validation) == (fraction > 0)


@given(
    patients=st.lists(st.integers(1, 4), min_size=2, max_size=12),
    data=st.data(),
    seed=st.integers(0, 5),
)
def test_every_case_is_validated_in_exactly_one_fold(patients: list[int], data: st.DataObject, seed: int) -> None:
    cases = [Case(f"s{p}_{v}", Path(f"s{p}_{v}.nii")) for p, visits in enumerate(patients) for v in range(visits)]
    groups = {f"patient {p}": [f"s{p}"] for p in range(len(patients))}
    assert count_patients(cases, groups) == len(patients)
    folds = data.draw(st.integers(2, len(patients)))
    splits = [fold_cases(cases, folds, fold, seed, groups) for fold in range(folds)]
    assert splits == [fold_cases(cases[:], folds, fold, seed, groups) for fold in range(folds)]
    assert sorted(case.name for _, held in splits for case in held) == sorted(case.name for case in cases)
    for training, validation in splits:
        assert [case for case in cases if case not in validation] == training
        assert training
        assert validation
        sides = [{case.name.split("_")[0] for case in side} for side in (training, validation)]
        assert not sides[0] & sides[1]
    sizes = [len(validation) for _, validation in splits]
    assert max(sizes) - min(sizes) <= max(patients)


PATIENTS = "the number of patients to divide into folds"


@pytest.mark.parametrize(
    ("folds", "fold", "text"),
    [
        (4, 0, f"Expected `folds` to be at most 3, {PATIENTS}, but got 4: take 3 or fewer."),
        (1, 0, "Expected `folds` to be an integer of at least 2, but got 1: give 2 or more, usually 5."),
        ("five", 0, "Expected `folds` to be an integer of at least 2, but got 'five': give 2 or more, usually 5."),
        (3, 3, "Expected `fold` to be an integer from 0 to 2, as `folds` is 3, but got 3: count folds from 0."),
        (3, -1, "Expected `fold` to be an integer from 0 to 2, as `folds` is 3, but got -1: count folds from 0."),
    ],
)
def test_folds_that_cannot_be(folder: Path, folds: object, fold: object, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        fold_cases(read_folder(folder).training, folds, fold)  # type: ignore[arg-type]


def test_folds_may_be_numpys_numbers(folder: Path) -> None:
    cases = read_folder(folder).training
    for fold in np.arange(3):
        assert fold_cases(cases, np.int64(3), fold) == fold_cases(cases, 3, int(fold))  # type: ignore[arg-type]


def test_the_bundle_validates_on_the_fold(folder: Path) -> None:
    held_out = []
    for fold in range(3):
        cases = BundleCases(str(folder), folds=3, fold=fold)
        assert len(cases.training) == 2
        held_out += [item["case"] for item in cases.validation]
    assert sorted(held_out) == ["c0", "c1", "c2"]
    assert len(BundleCases(str(folder), folds="null").validation) == 1  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="to be at most 3, the number of patients"):
        _ = BundleCases(str(folder), folds=4).validation
    with pytest.raises(ValueError, match="Expected `folds` to be given with `fold` 1, but it is not: add it, or leave"):
        _ = BundleCases(str(folder), fold=1).validation


def test_the_cases_of_validation_are_counted_as_what_they_are(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = json.loads((folder / "dataset.json").read_text())["training"]
    edit(folder, training=training[:1], validation=training[1:])
    with pytest.raises(
        ValueError, match=f"^Expected `folds` to be at most 3, {PATIENTS}, but got 4: take 3 or fewer.$"
    ):
        read_folder(folder).split(0.1, 0, 4)
    with caplog.at_level("INFO"):
        assert len(BundleCases(str(folder)).validation) == 2
    assert f"Checking 3 cases for training and validation of {folder}" in caplog.messages


def test_fraction_outside_its_range() -> None:
    with pytest.raises(ValueError, match=r"Expected `val_fraction` to be in \[0, 1\), but got 1"):
        split_cases([], 1)


@pytest.mark.real_data
def test_three_visits_of_one_patient_stay_together() -> None:
    root = REAL / "Task901_MSLesionFLAIR"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    read = read_folder(root)
    for seed in range(20):
        _, validation = split_cases(read.training, 0.2, seed, read.patient_groups)
        assert len([case for case in validation if "P14" in case.name]) in (0, 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "a\n",
            "Expected the image in `test` to be a NIfTI, MetaImage, NRRD or PNG file, but got {}: convert it to NIfTI.",
        ),
        (
            "a\n.nii.gz",
            "Expected the image in `test` at {}, but there is no such file: add it or remove the entry from ",
        ),
    ],
)
def test_a_name_with_a_line_break_leaves_the_message_one_sentence(tmp_path: Path, name: str, expected: str) -> None:
    for part in ("imagesTr", "labelsTr"):
        write(tmp_path / part / "c.nii.gz", np.ones((4, 4, 4), np.uint8))
    content = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "x"},
        "training": [{"image": "imagesTr/c.nii.gz", "label": "labelsTr/c.nii.gz"}],
        "test": [name],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError) as caught:
        read_folder(tmp_path)
    assert str(caught.value).startswith(expected.format(repr(str(tmp_path / name))))
