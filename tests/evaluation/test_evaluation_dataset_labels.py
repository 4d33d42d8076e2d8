"""What the dataset.json of the references says of labels reaches an evaluation that names none."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from monai_iou.console import print_comparison, print_evaluation
from monai_iou.evaluation.columns import columns_of
from monai_iou.evaluation.compare import compare_folders
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.request import Request, RequestError
from monai_iou.files import read_csv
from monai_iou.metrics import CHALLENGES

SHAPE = (6, 7, 8)
REGIONS = {"background": 0, "whole": [1, 2], "core": [2]}


def folders(root: Path, **content: Any) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference, prediction = rng.choice([0, 1, 2, 9], size=SHAPE), rng.choice([0, 1, 2], size=SHAPE)
    for name, array in (("labelsTr", reference), ("predictions", prediction)):
        (root / name).mkdir()
        nib.save(nib.Nifti1Image(array.astype(np.uint8), np.eye(4)), root / name / "a.nii.gz")
    (root / "dataset.json").write_text(json.dumps(content))
    return reference, prediction


def scores(root: Path, **options: Any) -> dict[str, float]:
    request = Request(root / "predictions", root / "labelsTr", root / "out", **options)
    return {row["label"]: row["iou"] for row in evaluate_folders(request).rows}


def expected(reference: np.ndarray, prediction: np.ndarray, values: list[int], ignore: int | None = 9) -> float:
    counts = reference != ignore
    a, b = np.isin(prediction, values) & counts, np.isin(reference, values) & counts
    return float((a & b).sum() / (a | b).sum())


def test_regions_are_scored_without_the_ignored_voxels(tmp_path: Path) -> None:
    maps = folders(tmp_path, labels={**REGIONS, "ignore": 9}, regions_class_order=[1, 2])
    found = scores(tmp_path)
    assert found == {
        "whole": pytest.approx(expected(*maps, [1, 2])),
        "core": pytest.approx(expected(*maps, [2])),
    }


def test_options_come_first(tmp_path: Path) -> None:
    maps = folders(tmp_path, labels={**REGIONS, "ignore": 9}, regions_class_order=[1, 2])
    assert scores(tmp_path, labels=(2,)) == {"2": pytest.approx(expected(*maps, [2]))}
    named = scores(tmp_path, labels=(1, 9))
    assert named == {"1": pytest.approx(expected(*maps, [1], None)), "9": 0}


@pytest.mark.parametrize(
    ("labels", "name", "message"),
    [
        (REGIONS, "hole", "to name structures that are scored (whole, core), but got hole: correct its name."),
        (
            {"background": 0, "liver": 1, "tumour": 2},
            "liver",
            "to name labels, which are whole numbers, but got liver: correct its name, or name what is scored with "
            "`--labels` or `--regions`.",
        ),
    ],
)
def test_a_tolerance_that_nothing_would_use_is_refused_before_any_work(
    tmp_path: Path, labels: dict[str, Any], name: str, message: str
) -> None:
    folders(tmp_path, labels=labels, regions_class_order=[1, 2])
    with pytest.raises(RequestError) as error:
        scores(tmp_path, tolerances={name: 3.0})
    assert str(error.value) == f"Expected `--tolerance` {message}"
    assert not (tmp_path / "out").exists()


def test_a_tolerance_of_a_label_that_no_reference_holds_is_refused(tmp_path: Path) -> None:
    """Before any case is scored, which would be for nothing: the tolerances are part of what a score depends on."""
    folders(tmp_path)
    with pytest.raises(RequestError) as error:
        scores(tmp_path, tolerances={"11": 3.0})
    assert str(error.value) == (
        "Expected `--tolerance` to name structures that are scored (1, 2, 9), but got 11: correct its name, or name "
        "what is scored with `--labels` or `--regions`."
    )
    assert not (tmp_path / "out").exists()
    found = scores(tmp_path, tolerances={"1": 3.0})
    results = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    with pytest.raises(RequestError):
        scores(tmp_path, tolerances={"11": 3.0})
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == results
    assert scores(tmp_path, labels=(1, 2, 9, 11), tolerances={"11": 3.0}).keys() == found.keys() | {"11"}


@pytest.mark.parametrize(("label", "read"), [("1", ["a"]), ("3", ["a", "b"])])
def test_references_are_read_until_the_labels_with_a_tolerance_are_found(
    tmp_path: Path, label: str, read: list[str]
) -> None:
    """One that cannot be read ends nothing: it is a failure where it is scored."""
    folders(tmp_path)
    nib.save(nib.Nifti1Image(np.full(SHAPE, 3, np.uint8), np.eye(4)), tmp_path / "labelsTr" / "b.nii.gz")
    for name in ("b", "c"):
        (tmp_path / "predictions" / f"{name}.nii.gz").write_bytes((tmp_path / "predictions/a.nii.gz").read_bytes())
    (tmp_path / "labelsTr" / "c.nii.gz").write_bytes(b"no volume")
    request = Request(tmp_path / "predictions", tmp_path / "labelsTr", tmp_path / "out", tolerances={label: 3.0})
    steps: list[Any] = []
    done = evaluate_folders(request, steps.append)
    assert [(step.case, step.total) for step in steps if step.stage == "references"] == [(name, 3) for name in read]
    assert [failure["case"] for failure in done.failures] == ["c"]
    with pytest.raises(RequestError, match=r"to name structures that are scored \(1, 2, 3, 9\), but got 4: correct"):
        evaluate_folders(replace(request, tolerances={label: 3.0, "4": 1.0}))


def test_a_tolerance_of_a_region_of_the_description_is_used(tmp_path: Path) -> None:
    folders(tmp_path, labels=REGIONS, regions_class_order=[1, 2])
    requests = [
        Request(tmp_path / "predictions", tmp_path / "labelsTr", tmp_path / "out", **options)
        for options in ({"tolerances": {"core": 0.0}}, {"tolerance": 0.0}, {})
    ]
    named, every, usual = ({row["label"]: row["nsd"] for row in evaluate_folders(each).rows} for each in requests)
    assert named == {"whole": usual["whole"], "core": every["core"]}
    assert every["core"] < usual["core"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, ""),
        (
            {"labels": {"background": 0, "a": [1, 2]}},
            "Expected `regions_class_order` in PATH to name 1 value, one for each region, but got None: add it, "
            "in the order of the regions.",
        ),
        ({"labels": "lesion"}, "Expected `labels` in PATH to name the background 0 and at least one more value, as "),
        (
            {"labels": {"0": "background", "1": "one"}, "labelled": {"a": ["eno"]}},
            "Expected `labelled` of a to list classes of `labels` ('one'), but got 'eno': write their names.",
        ),
    ],
)
def test_a_description_that_says_nothing_usable_changes_nothing_and_is_noted(
    tmp_path: Path, content: dict[str, Any], problem: str
) -> None:
    maps = folders(tmp_path, **content)
    assert scores(tmp_path)["1"] == pytest.approx(expected(*maps, [1], None))
    notes = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["notes"]
    path = str(tmp_path / "dataset.json")
    said = f"What `{path}` says of labels was left out. {problem.replace('PATH', path)}"
    assert [note[: len(said)] for note in notes] == ([said] if problem else [])


@pytest.mark.parametrize("content", [b'{"labels": {"background": 0, "whole": [1, 2]},}', b"[]", b"\xff", None])
def test_a_description_that_cannot_be_read_is_noted(
    tmp_path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = folders(tmp_path)
    (tmp_path / "dataset.json").unlink(missing_ok=True)
    if content is None:  # a link whose file is not there
        (tmp_path / "dataset.json").symlink_to(tmp_path / "nowhere.json")
    else:
        (tmp_path / "dataset.json").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    done = evaluate_folders(Request(Path("predictions"), Path("labelsTr"), Path("out")))
    assert done.rows[0]["iou"] == pytest.approx(expected(*maps, [1], None))
    (note,) = done.notes
    assert note.startswith("`dataset.json` cannot be read (")
    assert note.endswith("): what it may say of regions, an ignored value, patients and names of labels was left out.")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_description_is_read_in_the_encodings_of_a_training(tmp_path: Path, encoding: str) -> None:
    maps = folders(tmp_path)
    content = {"labels": {**REGIONS, "ignore": 9}, "regions_class_order": [1, 2]}
    (tmp_path / "dataset.json").write_text(json.dumps(content), encoding=encoding)
    assert scores(tmp_path)["whole"] == pytest.approx(expected(*maps, [1, 2]))


@pytest.mark.parametrize(
    "labelled",
    [
        {"labelled": {"a": [1]}},
        {"training": [{"image": "i.nii.gz", "label": "labelsTr/a.nii.gz", "labelled": ["one"]}]},
    ],
)
def test_a_class_that_a_case_lacks_is_not_scored_there(tmp_path: Path, labelled: dict[str, Any]) -> None:
    maps = folders(tmp_path, labels={"0": "background", "1": "one", "2": "two", "9": "ignore"}, **labelled)
    found = scores(tmp_path)
    assert found["1"] == pytest.approx(expected(*maps, [1]))
    assert np.isnan(found["2"])
    again = scores(tmp_path)
    assert again["1"] == found["1"], "taken from the finished cases"
    assert np.isnan(again["2"])


def test_one_pair_of_files_is_described_as_its_folder(tmp_path: Path) -> None:
    labels = {"0": "background", "1": "one", "2": "two", "9": "ignore"}
    maps = folders(tmp_path, labels=labels, labelled={"a": ["one"]})
    request = Request(tmp_path / "predictions/a.nii.gz", tmp_path / "labelsTr/a.nii.gz", tmp_path / "out")
    found = {row["label"]: row["iou"] for row in evaluate_folders(request).rows}
    assert found["1"] == pytest.approx(expected(*maps, [1]))
    assert np.isnan(found["2"])


@pytest.mark.parametrize("like", ["isles22", "brats-mets", "autopet"])
def test_a_class_that_a_case_lacks_is_in_no_column_of_a_challenge(like: str, tmp_path: Path) -> None:
    folders(tmp_path, labels={"0": "background", "1": "one", "2": "two", "9": "ignore"}, labelled={"a": ["one"]})
    request = Request(tmp_path / "predictions", tmp_path / "labelsTr", tmp_path / "out", like=like)
    done = evaluate_folders(request)
    rows = {row["label"]: row for row in done.rows}
    columns = CHALLENGES[like].columns
    assert all(np.isnan(rows["2"][name]) for name in columns)
    assert not any(np.isnan(rows["1"][name]) for name in columns)
    assert all(done.summary["labels"]["2"][name]["mean"] is None for name in columns)


def partly_annotated(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Three cases of two classes: `b` and `c` were not annotated for class 2, and of `c` there is no prediction."""
    labels = {"background": 0, "one": 1, "two": 2}
    reference, prediction = folders(root, labels=labels, labelled={"b": [1], "c": [1]})
    for case in "bc":
        array = np.where(reference == 2, 0, reference).astype(np.uint8)
        nib.save(nib.Nifti1Image(array, np.eye(4)), root / "labelsTr" / f"{case}.nii.gz")
    (root / "predictions" / "b.nii.gz").write_bytes((root / "predictions" / "a.nii.gz").read_bytes())
    return reference, prediction


@pytest.mark.parametrize("options", [{}, {"like": "isles22"}, {"missing": "penalty"}, {"present": "either"}])
def test_a_class_that_a_case_lacks_is_in_no_mean(tmp_path: Path, options: dict[str, Any]) -> None:
    """Volumes and counts of what nobody annotated are unknown, and not 0."""
    partly_annotated(tmp_path)
    request = Request(tmp_path / "predictions", tmp_path / "labelsTr", tmp_path / "out", labels=(1, 2), **options)
    done = evaluate_folders(request)
    columns = columns_of(request.rules.challenge)
    rows = {(row["case"], row["label"]): row for row in done.rows}
    assert all(math.isnan(rows["b", "2"][name]) for name in columns)
    for name in columns:
        assert done.summary["labels"]["2"][name]["mean"] == pytest.approx(rows["a", "2"][name], nan_ok=True), name
    for row in read_csv(tmp_path / "out" / "cases.csv"):
        if row["label"] == "2" and row["case"] != "a":
            assert {row[name] for name in columns} == {""}
    assert "nan ml" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    alone = evaluate_folders(Request(tmp_path / "predictions", tmp_path / "labelsTr", tmp_path / "2", labels=(2,)))
    for name in ("dataset", "dataset_defined"):
        assert alone.summary[name]["iou_d"] == pytest.approx(rows["a", "2"]["iou"])


def test_a_region_that_the_annotated_classes_do_not_determine_is_in_no_mean(tmp_path: Path) -> None:
    partly_annotated(tmp_path)
    regions = {"both": (1, 2), "first": (1,), "second": (2,)}
    request = Request(tmp_path / "predictions", tmp_path / "labelsTr", tmp_path / "out", regions=regions)
    done = evaluate_folders(request)
    rows = {(row["case"], row["label"]): row["iou"] for row in done.rows}
    assert [math.isnan(rows["b", name]) for name in regions] == [True, False, True]
    assert done.summary["labels"]["second"]["iou"]["mean"] == pytest.approx(rows["a", "second"])
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    content = {"labels": labels, "regions_class_order": [1, 2], "labelled": {"b": ["whole"], "c": ["whole"]}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for name, options in (("regions", {}), ("labels", {"labels": (1, 2)})):
        done = evaluate_folders(Request(tmp_path / "predictions", tmp_path / "labelsTr", tmp_path / name, **options))
        unknown = {row["label"] for row in done.rows if row["case"] == "b" and math.isnan(row["iou"])}
        assert unknown == ({"core"} if name == "regions" else {"1", "2"})


def test_a_class_that_a_case_lacks_is_unknown_in_the_exports(tmp_path: Path) -> None:
    reference, prediction = partly_annotated(tmp_path)
    request = Request(tmp_path / "predictions", tmp_path / "labelsTr", tmp_path / "out", labels=(1, 2))
    evaluate_folders(replace(request, export=("nnunet", "panoptica")))
    found = json.loads((tmp_path / "out" / "nnunet_summary.json").read_text(encoding="utf-8"))
    known, unknown = (case["metrics"]["2"] for case in found["metric_per_case"])
    assert all(math.isnan(value) for value in unknown.values())
    assert found["mean"]["2"] == known
    assert (known["n_ref"], known["n_pred"]) == ((reference == 2).sum(), (prediction == 2).sum())
    with (tmp_path / "out" / "panoptica.tsv").open(encoding="utf-8", newline="") as stream:
        first, second = csv.DictReader(stream, delimiter="\t")
    assert {cell for name, cell in second.items() if name.startswith("2-")} == {""}
    assert first["2-global_bin_volume_pred"] == str((prediction == 2).sum())


def one_and_false(root: Path, **content: Any) -> Request:
    """References of class 1 alone in two cases, and perfect predictions with a box of class 2 beside it."""
    reference = np.zeros(SHAPE, np.uint8)
    reference[1:3, 1:3, 1:3] = 1
    prediction = reference.copy()
    prediction[4:6, 4:6, 4:6] = 2
    for kind, array in (("labelsTr", reference), ("predictions", prediction)):
        (root / kind).mkdir()
        for case in "ab":
            nib.save(nib.Nifti1Image(array, np.eye(4)), root / kind / f"{case}.nii.gz")
    (root / "dataset.json").write_text(json.dumps(content))
    return Request(root / "predictions", root / "labelsTr", root / "out")


LIVER = {"background": 0, "liver": 1, "tumour": 2}


@pytest.mark.parametrize(
    ("labelled", "ious", "note"),
    [
        ({}, [0.0, 0.0], "2 (tumour): no reference holds it, so that only false positives count."),
        ({"a": ["liver"]}, [math.nan, 0.0], "2 (tumour): no reference holds it, so that only false positives count."),
        ({"a": [1], "b": ["liver"]}, [math.nan] * 2, "2 (tumour): it was annotated in no case and has no scores."),
    ],
)
def test_a_class_that_the_description_names_is_no_unknown_label_where_it_is_predicted_alone(
    labelled: dict[str, Any], ious: list[float], note: str, tmp_path: Path
) -> None:
    """No reference holds it: it was not annotated, or there is none."""
    done = evaluate_folders(one_and_false(tmp_path, labels=LIVER, labelled=labelled))
    assert done.failures == []
    assert done.notes == [note]
    rows = {(row["case"], row["label"]): row for row in done.rows}
    assert [rows[case, "1"]["iou"] for case in "ab"] == [1.0, 1.0]
    np.testing.assert_equal([rows[case, "2"]["iou"] for case in "ab"], ious)
    np.testing.assert_equal([rows[case, "2"]["lesion_fp"] for case in "ab"], [iou + 1 for iou in ious])


@pytest.mark.parametrize(
    ("labels", "chosen", "failed"),
    [(LIVER, (1,), []), (LIVER, (), []), ({"background": 0, "liver": 1}, (), ["a", "b"]), ("none", (), ["a", "b"])],
)
def test_only_labels_that_nobody_names_make_a_case_fail(
    labels: Any, chosen: tuple[int, ...], failed: list[str], tmp_path: Path
) -> None:
    done = evaluate_folders(replace(one_and_false(tmp_path, labels=labels), labels=chosen))
    assert [failure["case"] for failure in done.failures] == failed
    assert {row["label"] for row in done.rows} == ({"1"} if chosen else {"1", "2"} if not failed else set())


def test_what_a_description_says_of_labels_is_not_said_of_lesion_numbers(tmp_path: Path) -> None:
    """But of the patients it is."""
    request = one_and_false(tmp_path, labels=LIVER, labelled={"b": ["tumour"]}, patient_groups={"P": ["a", "b"]})
    done = evaluate_folders(replace(request, instances=True))
    assert [(row["label"], row["lesion_tp"], row["lesion_fp"]) for row in done.rows] == [("1", 1, 1)] * 2
    assert done.summary["titles"] == {"1": "1"}
    assert done.summary["patients"] == {"a": "P", "b": "P"}
    assert done.notes == []
    (tmp_path / "dataset.json").write_text("{")
    (note,) = evaluate_folders(replace(request, instances=True)).notes
    assert note.startswith(f"`{tmp_path / 'dataset.json'}` cannot be read ("), "the patients are lost"


@pytest.mark.parametrize("regions", [{"labels": REGIONS}, {"labels": LIVER, "regions": {"whole": [1, 2], "core": [2]}}])
def test_a_value_of_a_region_of_the_description_is_not_ignored(regions: dict[str, Any], tmp_path: Path) -> None:
    maps = folders(tmp_path, **regions, regions_class_order=[1, 2])
    with pytest.raises(RequestError) as error:
        scores(tmp_path, ignore=2)
    assert str(error.value) == (
        f"Expected `--ignore` to differ from the labels of the regions in `{tmp_path / 'dataset.json'}`, but got 2, a "
        "label of whole: drop `--ignore`, or name what is scored with `--labels` or `--regions`."
    )
    assert not (tmp_path / "out").exists()
    assert scores(tmp_path, ignore=2, labels=(1,)) == {"1": pytest.approx(expected(*maps, [1], 2))}


@pytest.mark.parametrize("named", ["as its file", "as the table says", "below the folder"])
def test_the_description_of_nnunet_knows_its_cases_by_their_files(named: str, tmp_path: Path) -> None:
    """It lists none, and a table of pairs may call them otherwise."""
    labelled, groups = {"b": ["liver"]}, {"P": ["a", "b"]}
    channels = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    request = one_and_false(tmp_path, labels=LIVER, labelled=labelled, patient_groups=groups, **channels)
    shutil.copytree(tmp_path / "labelsTr", tmp_path / "labelsTs")  # of other cases that have the same names
    table = {
        "as its file": "prediction,reference\na.nii.gz,a.nii.gz\nb.nii.gz,b.nii.gz\n",
        "as the table says": "prediction,reference,case\na.nii.gz,a.nii.gz,one\nb.nii.gz,b.nii.gz,two\n",
        "below the folder": "prediction,reference\na.nii.gz,labelsTr/a.nii.gz\nb.nii.gz,labelsTr/b.nii.gz\n",
    }
    (tmp_path / "pairs.csv").write_text(table[named])
    references = tmp_path if named == "below the folder" else tmp_path / "labelsTr"
    output = tmp_path.parent / f"{tmp_path.name}-out"
    done = evaluate_folders(replace(request, references=references, output=output, pairs=tmp_path / "pairs.csv"))
    assert [math.isnan(row["iou"]) for row in done.rows if row["label"] == "2"] == [False, True]
    assert set((done.patients or {}).values()) == {"P"}


def test_what_no_case_was_annotated_for_is_noted_as_such(tmp_path: Path) -> None:
    folders(tmp_path, labels={"background": 0, "one": 1, "two": 2}, labelled={"a": [1]})
    request = Request(tmp_path / "predictions", tmp_path / "labelsTr", tmp_path / "out", labels=(1, 2, 3))
    assert evaluate_folders(request).notes == [
        "2 (two): it was annotated in no case and has no scores.",
        "3: no reference holds it, so that only false positives count.",
    ]


def test_a_class_that_a_case_lacks_is_not_counted_in_its_probabilities(tmp_path: Path) -> None:
    content = {"labels": {"0": "background", "1": "one", "2": "two", "9": "ignore"}}
    folders(tmp_path, **content)
    maps = np.random.default_rng(0).dirichlet([1, 1, 1], SHAPE).astype(np.float32)
    (tmp_path / "maps").mkdir()
    for case in "ab":
        nib.save(nib.Nifti1Image(maps, np.eye(4)), tmp_path / "maps" / f"{case}.nii.gz")
        for kind in ("labelsTr", "predictions"):
            (tmp_path / kind / f"{case}.nii.gz").write_bytes((tmp_path / kind / "a.nii.gz").read_bytes())
    for labelled, counts in (({}, {"1": 2, "2": 2}), ({"b": [1]}, {"1": 2, "2": 1}), ({"a": [1], "b": [1]}, {"1": 2})):
        (tmp_path / "dataset.json").write_text(json.dumps({**content, "labelled": labelled}))
        request = Request(
            tmp_path / "predictions", tmp_path / "labelsTr", tmp_path / "out", probabilities=tmp_path / "maps"
        )
        found = evaluate_folders(request).summary["probabilities"]
        assert {label: scores["cases"] for label, scores in found.items()} == counts


def test_report_and_comparison_call_labels_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders(tmp_path, labels={"background": 0, "liver": 1, "tumour": 2, "cyst": 7})
    for kind in ("labelsTr", "predictions"):
        (tmp_path / kind / "b.nii.gz").write_bytes((tmp_path / kind / "a.nii.gz").read_bytes())
    for out in ("out", "other", "third"):
        request = Request(tmp_path / "predictions", tmp_path / "labelsTr", tmp_path / out, labels=(1, 2, 7))
        done = evaluate_folders(request)
    print_evaluation(done, tmp_path / "out")
    said = [line.removeprefix("Note: ").partition(": ")[0] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert said == ["7 (cyst)", "Label 1 (liver)", "Label 2 (tumour)", "Label 7 (cyst)"]
    rows = compare_folders([tmp_path / name for name in ("out", "other", "third")], tmp_path / "comparison")
    print_comparison(rows, tmp_path / "comparison")
    assert capsys.readouterr().out.startswith("other against out, label 1 (liver), IoU: +0.0000 (")
    ranking = (tmp_path / "comparison" / "comparison.html").read_text(encoding="utf-8").partition("Ranking by mean")[2]
    assert ranking.partition("</table>")[0].count("<tr><td>2 (tumour)</td>") == 3
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["titles"] == {"1": "1 (liver)", "2": "2 (tumour)", "7": "7 (cyst)"}
    for page in (tmp_path / "out" / "report.html", tmp_path / "comparison" / "comparison.html"):
        text = page.read_text(encoding="utf-8")
        assert "1 (liver)" in text
        assert "2 (tumour)" in text
