"""Which cases are of one patient: by a file, or by dataset.json, where the rule is that of a training."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_iou.datasets.cases import Case
from monai_iou.datasets.patients import patient_of
from monai_iou.evaluation.groups import patient_notes, patients_of
from monai_iou.evaluation.pairing import Pair
from monai_iou.evaluation.request import Request, RequestError
from monai_iou.files import read_csv, write_csv


def pairs_of(*cases: str, references: Path = Path("labelsTr")) -> list[Pair]:
    return [Pair(case, None, references / f"{case}.nii.gz") for case in cases]


def described(root: Path, **content: Any) -> Request:
    (root / "labelsTr").mkdir(exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return Request(root, root / "labelsTr", root / "out")


def listed(root: Path, text: str, *cases: str, name: str = "patients.csv") -> dict[str, str]:
    (root / name).write_text(text, encoding="utf-8")
    return patients_of(pairs_of(*cases), Request(root, root, root / "out", groups=root / name))


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"P1": ["P1"], "P14": ["P14"]}, ["P1", "P14", "case P2_a"]),
        ({"P1": ["P1"]}, ["P1", "case P14_a", "case P2_a"]),
        ({"1": ["1"], "2": ["2_a", "2"]}, ["1", "case P14_a", "2"]),
        ({"first": ["P"], "second": ["P14"]}, ["first", "first", "first"]),
        ({}, ["case P1_a", "case P14_a", "case P2_a"]),
    ],
)
def test_numbers_are_whole_and_the_first_group_wins(
    groups: dict[str, list[str]], expected: list[str], tmp_path: Path
) -> None:
    cases = ["P1_a", "P14_a", "P2_a"]
    found = patients_of(pairs_of(*cases), described(tmp_path, patient_groups=groups))
    assert [found[case] for case in cases] == expected
    if groups:
        as_file = listed(tmp_path, json.dumps(groups), *cases, name="groups.json")
        assert as_file == found


@given(
    groups=st.dictionaries(
        st.sampled_from(["A", "B", "C"]), st.lists(st.text("P19_", min_size=1, max_size=3), min_size=1, max_size=2)
    ),
    cases=st.lists(st.text("P19_a", min_size=1, max_size=6), min_size=1, max_size=6, unique=True),
)
@settings(max_examples=100, deadline=None)
def test_patients_are_those_of_a_training(
    groups: dict[str, list[str]], cases: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "groups"
    folder.mkdir(exist_ok=True)
    found = patients_of(pairs_of(*cases), described(folder, patient_groups=groups))
    trained = {case: patient_of(Case(case, Path(case)), groups) for case in cases}
    assert {case: f"group {p}" if p in groups else p for case, p in found.items()} == trained


def test_a_name_from_a_mac_is_the_same_name(tmp_path: Path) -> None:
    apart, one = (unicodedata.normalize(form, "Müller_1") for form in ("NFD", "NFC"))
    assert apart != one
    for case, part in ((one, apart), (apart, one)):
        assert patients_of(pairs_of(case), described(tmp_path, patient_groups={"M": [part]})) == {case: "M"}
        assert listed(tmp_path, f"case,patient\n{part},M\n", case) == {case: "M"}


def test_references_named_otherwise_than_their_images_have_the_patients_of_the_training(tmp_path: Path) -> None:
    training = [{"image": f"imagesTr/P{i}_t1.nii.gz", "label": f"labelsTr/scan{i}.nii.gz"} for i in (1, 14)]
    request = described(tmp_path, training=training, patient_groups={"one": ["P1"], "other": ["P14"]})
    there = pairs_of("scan1", "scan14", references=tmp_path / "labelsTr")
    copies = pairs_of("scan1", "scan14", references=tmp_path / "elsewhere")
    for pairs in (there, copies):
        assert patients_of(pairs, request) == {"scan1": "one", "scan14": "other"}
    (tmp_path / "link").symlink_to(tmp_path / "labelsTr")
    through = Request(tmp_path, tmp_path / "link", tmp_path / "out")
    assert patients_of(pairs_of("scan1", references=tmp_path / "link"), through) == {"scan1": "one"}


def test_a_short_row_is_an_empty_cell(tmp_path: Path) -> None:
    for rows in ("a\nb,P\n", "b,P\na\n"):
        assert listed(tmp_path, f"case,patient\n{rows}", "a", "b") == {"a": "case a", "b": "P"}


def test_cases_may_be_named_as_their_files(tmp_path: Path) -> None:
    found = listed(tmp_path, "case,patient\nsite/a.nii.gz,P\n b.mha ,P\nnot evaluated,Q\n", "site/a", "b")
    assert found == {"site/a": "P", "b": "P"}


def test_cases_may_be_named_with_the_escapes_of_our_tables(tmp_path: Path) -> None:
    """Which stand for bytes that are no text, unless a case is called so."""
    cases = "M\udcfc_1", "M\udcfc_2", r"M\udcfe"
    write_csv(tmp_path / "cases.csv", ("case",), [{"case": case} for case in cases])
    shown = [row["case"] for row in read_csv(tmp_path / "cases.csv")]
    assert shown == [r"M\udcfc_1", r"M\udcfc_2", r"M\udcfe"]
    rows = f"{shown[0]},P\n{shown[1]}.nii.gz,P\n{shown[2]},Q\n"
    assert listed(tmp_path, f"case,patient\n{rows}", *cases) == dict(zip(cases, "PPQ", strict=True))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("g.csv", "case,patient\na,P\na,Q\n", "gives `a` to P and Q: remove one row."),
        ("g.csv", "case,patient\na,P\na.nii.gz,Q\n", "gives `a` to P and Q: remove one row."),
        ("g.csv", "case,patient\nx,P\ny,P\n", "to name cases that are evaluated, such as a, but got x, y: name the"),
        ("g.json", '{"x": "P"}', "to name cases that are evaluated, such as a, but got x: name the cases as"),
        ("g.json", '{"P": ["x"]}', "to name cases that are evaluated, such as a, but got x: name the cases as"),
        ("g.json", "{}", "such as a, but got none: name the cases as cases.csv does, each with its patient."),
        ("g.csv", "case,patient\na,\nb,\n", "but got none: name the cases as cases.csv does, each with its patient."),
        ("g.csv", "case\na\n", "JSON that maps patients to lists of cases, but got column case: correct it."),
        (
            "g.csv",
            "id,who\na,P\n",
            "JSON that maps patients to lists of cases, but got columns id and who: correct it.",
        ),
        ("g.csv", "case,patient\n", "JSON that maps patients to lists of cases, but got no row: correct it."),
    ],
)
def test_a_file_that_gives_no_patients_is_refused(name: str, text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=re.escape(expected)):
        listed(tmp_path, text, "a", "b", name=name)


@pytest.mark.parametrize(("name", "text"), [("g.csv", "case,patient\na,M\xfcller\n"), ("g.json", '{"a": "M\xfcller"}')])
def test_a_file_of_patients_in_another_encoding_is_answered_with_it(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError, match=r"but got 'utf-8' codec can't decode byte 0xfc .*: save it in UTF-8\.$"):
        patients_of(pairs_of("a"), Request(tmp_path, tmp_path, tmp_path / "out", groups=tmp_path / name))


def test_cases_without_a_patient_beside_others_are_noted(tmp_path: Path) -> None:
    """A misspelt name would make its case a patient of its own, and the intervals too narrow."""
    file = tmp_path / "patients.csv"
    request = Request(tmp_path, tmp_path, tmp_path / "out", groups=file)
    patients = listed(tmp_path, "case,patient\na,P\nB,P\nC,Q\nd,Q\n", "a", "b", "c", "d")
    assert patient_notes(patients, request) == [
        f"Cases without a patient in `{file}`: 2 of 4, such as b. Each counts as a patient of its own: if it is not, "
        "name it there as cases.csv does, or the intervals are too narrow."
    ]
    assert patient_notes(listed(tmp_path, "case,patient\na,P\nb,P\nelse,Q\n", "a", "b"), request) == []
    groups = described(tmp_path, patient_groups={"P": ["a"]})
    assert patient_notes(patients_of(pairs_of("a", "b"), groups), groups) == [], "a training names only some as well"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_in_the_encodings_of_a_training(encoding: str, tmp_path: Path) -> None:
    for name in ("dataset.json", "g.json"):
        (tmp_path / name).write_text(json.dumps({"patient_groups": {"P": ["a\u00fc"]}}), encoding=encoding)
    (tmp_path / "labelsTr").mkdir()
    for groups in (None, tmp_path / "g.json"):
        request = Request(tmp_path, tmp_path / "labelsTr", tmp_path / "out", groups=groups)
        assert patients_of(pairs_of("a\u00fc", "b"), request) == {"a\u00fc": "P", "b": "case b"}


@pytest.mark.parametrize("content", [{"training": 5}, {"training": [None, {"image": 3}]}, {"validation": {"a": 1}}])
def test_lists_that_are_no_lists_say_nothing(content: dict[str, Any], tmp_path: Path) -> None:
    request = described(tmp_path, patient_groups={"P": ["a"]}, **content)
    assert patients_of(pairs_of("a"), request) == {"a": "P"}
