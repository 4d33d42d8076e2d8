"""Patients: every way to write a part of a file's name, and refusals of tables and sides that would part a patient."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.folder import read_folder
from monai_iou.datasets.patients import group_of, patient_of
from monai_iou.datasets.splits import count_patients
from monai_iou.evaluation.groups import patients_of
from monai_iou.evaluation.pairing import Pair
from monai_iou.evaluation.request import Request
from monai_iou.workflow.data import BundleCases

PATIENTS = [f"P{p}" for p in range(4)]
CASES = [f"{patient}_{visit}" for patient in PATIENTS for visit in "ab"]


def dataset(root: Path, folder: str = "imagesTr", drop: tuple[str, ...] = (), **content: Any) -> Path:
    """Eight cases of four patients; the files are empty, as none is opened. `folder` may name the {patient}."""
    pairs = []
    for case in CASES:
        entry = {"image": f"{folder.format(patient=case[:2])}/{case}.nii.gz", "label": f"labelsTr/{case}.nii.gz"}
        for path in map(root.joinpath, entry.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        pairs += [] if case in drop else [entry]
    described = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "lesion"}, "training": pairs}
    (root / "dataset.json").write_text(json.dumps({**described, **content}), encoding="utf-8")
    return root


def nnunet(root: Path, **content: Any) -> Path:
    for case in CASES:
        for name in (f"imagesTr/{case}_0000", f"imagesTr/{case}_0001", f"labelsTr/{case}"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / f"{name}.nii.gz").touch()
    described = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "lesion": 1}}
    (root / "dataset.json").write_text(json.dumps({**described, **content}), encoding="utf-8")
    return root


def table(*parts: str) -> dict[str, list[str]]:
    return {patient: [part.format(patient) for part in parts] for patient in PATIENTS}


def evaluated(root: Path, **options: Any) -> dict[str, str]:
    pairs = [Pair(case, None, root / f"labelsTr/{case}.nii.gz") for case in CASES]
    return patients_of(pairs, Request(root, root / "labelsTr", root / "out", **options))


def refusal(root: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        read_folder(root)
    return str(caught.value)


WAYS = [
    ("{}",),
    ("{}_a.nii.gz", "{}_b.nii.gz"),
    ("imagesTr/{}_",),
    ("./imagesTr/{}_a.nii.gz", "imagesTr/{}_b.nii.gz"),
    ("labelsTr/{}_",),
]


@pytest.mark.parametrize("layout", [dataset, nnunet])
@pytest.mark.parametrize("parts", WAYS, ids=[way[0] for way in WAYS])
def test_parts_of_names_and_of_paths_keep_a_patient_together(
    layout: Any, parts: tuple[str, ...], tmp_path: Path
) -> None:
    folder = read_folder(layout(tmp_path, patient_groups=table(*parts)))
    assert count_patients(folder.labelled, folder.patient_groups) == 4
    for seed in range(5):
        training, validation = ({case.name[:2] for case in side} for side in folder.split(0.25, seed))
        assert not training & validation
    # An evaluation knows the patients by the same rule, from the dataset.json of the references or as a table.
    expected = {case: case[:2] for case in CASES}
    assert evaluated(tmp_path) == evaluated(tmp_path, groups=tmp_path / "dataset.json") == expected


def test_parts_with_extensions_are_read_in_a_table_of_an_evaluation(tmp_path: Path) -> None:
    (tmp_path / "groups.json").write_text(json.dumps(table("{}_a.nii.gz", "{}_b.nii.gz")))
    assert evaluated(tmp_path, groups=tmp_path / "groups.json") == {case: case[:2] for case in CASES}


@pytest.mark.parametrize("part", ["{}", "{}/", "images/{}/"])
def test_a_folder_of_a_patient_is_a_part(part: str, tmp_path: Path) -> None:
    folder = read_folder(dataset(tmp_path, "images/{patient}", patient_groups=table(part)))
    assert count_patients(folder.labelled, folder.patient_groups) == 4


def test_letters_of_folders_that_all_cases_share_claim_none(tmp_path: Path) -> None:
    groups = {"a": ["_a"], "rest": ["_b"], "none": ["P"]}
    folder = read_folder(dataset(tmp_path, patient_groups=groups))
    assert {patient_of(case, folder.patient_groups) for case in folder.labelled} == {"group a", "group rest"}
    for letter in ("m", "gz", "s", "Tr"):
        groups = {"wrong": [letter]}
        assert f"but got {letter!r} of wrong, which is in none" in refusal(dataset(tmp_path, patient_groups=groups))


@pytest.mark.parametrize("layout", [dataset, nnunet])
@pytest.mark.parametrize("part", ["p2_", "P2-", "imagesTr/p2", "P2_a.nii.", "P2_c.nii.gz", "/P2_a.nii.gz/"])
def test_a_part_that_claims_no_case_is_refused(layout: Any, part: str, tmp_path: Path) -> None:
    groups = {**table("{}_"), "P2": [part]}
    assert refusal(layout(tmp_path, patient_groups=groups)) == (
        f"Expected every part in `patient_groups` of {tmp_path}/dataset.json to be in the name or path of a case, but "
        f"got {part!r} of P2, which is in none, while P2_a has no patient: correct the part, in which capital letters "
        "count, or remove it if the dataset has no such case."
    )


def test_a_right_table_may_name_cases_that_are_elsewhere_or_left_out(tmp_path: Path) -> None:
    entry = {"image": "imagesTr/P3_a.nii.gz", "label": "labelsTr/P3_a.nii.gz"}
    few = {"P3": ["P3_a"], "P0": ["P0_"]}  # most cases have no patient
    for lists in ({"test": [entry["image"]]}, {"test_labelled": [entry]}, {"validation": [entry]}, {}):
        folder = read_folder(dataset(tmp_path / str(len(str(lists))), drop=("P3_a",), **lists, patient_groups=few))
        assert count_patients(folder.training, folder.patient_groups) == 6
    # The file of a case that was left out may be gone: no other case can belong to its patient.
    read_folder(dataset(tmp_path / "gone", patient_groups={**table("{}_"), "P9": ["P9_"]}))
    nnunet(tmp_path / "moved", patient_groups={"P3": ["P3_b", "P3_c"]})
    (tmp_path / "moved/left_out").mkdir()
    (tmp_path / "moved/left_out/P3_c_0000.nii.gz").touch()
    read_folder(tmp_path / "moved")


def test_a_whole_name_of_a_file_or_folder_claims_no_longer_one(tmp_path: Path) -> None:
    """Whose names end with it: they would be taken from their own patient."""
    files = ["imagesTr/scan7.nii.gz", "imagesTr/scan8.nii.gz", "imagesTr/rescan7.nii.gz", "imagesTr/rescan9.nii.gz"]
    files += ["anna/s1.nii.gz", "joanna/s2.nii.gz", "joanna/s3.nii.gz"]
    groups = {
        "A": ["scan7.nii.gz", "scan8.nii.gz"],
        "B": ["rescan7.nii.gz", "rescan9.nii.gz"],
        "C": ["anna/"],
        "D": ["joanna/"],
    }
    found = [group_of(Path(file).name.removesuffix(".nii.gz"), groups, [file]) for file in files]
    assert found == ["A", "A", "B", "B", "C", "D", "D"]
    assert group_of("joanna/s2", groups) == "D", "of a case that is called by its folder"
    ends = {"a": ["_a.nii.gz"], "b": ["_b.nii.gz"]}  # which can only be meant as the end of a name
    assert evaluated(dataset(tmp_path, patient_groups=ends)) == {case: case[-1] for case in CASES}


@pytest.mark.parametrize(
    ("groups", "patient"),
    [
        ({"first": ["_a"], "second": ["P1"]}, "first"),
        ({"first": ["P1"], "second": ["P1_a.nii.gz"]}, "first"),
        ({"first": ["P1_a.nii.gz"], "second": ["imagesTr/"]}, "first"),
        ({"first": ["a.nii.gz"], "second": ["P1_"]}, "first"),
        ({"first": ["1_a.nii.gz"], "second": ["P1_"]}, "second"),
    ],
)
def test_the_first_patient_with_a_part_counts(groups: dict[str, list[str]], patient: str) -> None:
    assert group_of("P1_a", groups, ["imagesTr/P1_a.nii.gz"]) == patient


SPLITS = [
    {"train": [case for case in CASES if case[-1] != visit], "val": [f"P{p}_{visit}" for p in range(4)]}
    for visit in "ab"
]


@pytest.mark.parametrize("layout", [dataset, nnunet])
def test_folds_of_splits_final_that_part_a_patient_are_refused(layout: Any, tmp_path: Path) -> None:
    layout(tmp_path, patient_groups={"one": ["P1_"]})
    (tmp_path / "splits_final.json").write_text(json.dumps(SPLITS))
    message = (
        f"Expected fold 0 of {tmp_path}/splits_final.json to keep the cases of a patient on one side, but one has P1_b "
        "in training and P1_a in validation: put both on one side there or, if you do want to split this "
        "patient, take one out of `patient_groups` in dataset.json."
    )
    for fold in (0, 1):  # before the first fold is trained, and before volumes are opened, which are empty here
        with pytest.raises(DatasetError, match=f"^{re.escape(message)}$"):
            _ = BundleCases(str(tmp_path), folds=2, fold=fold).training
    folder = read_folder(tmp_path)
    assert len(folder.split(0.25)[1]) >= 2  # not its folds
    layout(tmp_path)
    assert [case.name for case in read_folder(tmp_path).split(0.1, folds=2, fold=1)[1]] == SPLITS[1]["val"]


def test_a_validation_list_that_parts_a_patient_is_refused(tmp_path: Path) -> None:
    entry = {"image": "imagesTr/P3_a.nii.gz", "label": "labelsTr/P3_a.nii.gz"}
    dataset(tmp_path, drop=("P3_a",), validation=[entry], patient_groups=table("{}_"))
    message = f"Expected `training` and `validation` of {tmp_path}/dataset.json to keep the cases of a patient on one"
    with pytest.raises(DatasetError, match=re.escape(message)) as caught:
        _ = BundleCases(str(tmp_path)).validation
    assert "but P3 has P3_b in training and P3_a in validation: put both on one side there" in str(caught.value)
    assert len(read_folder(tmp_path).split(0)[0]) == 8  # trains on all of them
