"""How `monai-iou train` scores what it held out: by the files as dataset.json names them, whatever links lead to."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import NAMES, decathlon, describe, make_case, save

from monai_iou.datasets.folder import read_folder
from monai_iou.evaluation.pairing import read_pairs
from monai_iou.evaluation.request import RESULTS
from monai_iou.evaluation.results import Evaluation
from monai_iou.workflow.held_out import score_request
from monai_iou.workflow.run_state import RunState
from monai_iou.workflow.run_summary import write_summary
from monai_iou.workflow.training_runs import STAGES, Training, TrainingRun

LABELS = [1, 2, 3]


def score(dataset: Path, run: Path, names: list[str] | None = None) -> Evaluation:
    """The scores of a training that held out these cases, all by default, and has found nothing in any."""
    cases = [case for case in read_folder(dataset).training if names is None or case.name in names]
    for case in cases:
        save(run / "validation" / "masks" / f"{case.name}.nii.gz", np.zeros_like(make_case(0)[1]))
    training = Training(run, (), {}, {})
    held_out = [case.as_item() for case in cases]
    RunState(run, {}, list(STAGES), {"held_out": held_out, "labels": LABELS}).write()
    scores = TrainingRun(run, dataset, (training,)).run(lambda _: None, lambda _: None)
    assert scores is not None
    return scores


def into_store(file: Path, store: Path) -> None:
    """Replace a file by a link to its content, as Hugging Face and DVC do: the target has no extension."""
    target = store / hashlib.sha256(file.read_bytes()).hexdigest()
    store.mkdir(parents=True, exist_ok=True)
    shutil.move(file, target)
    file.symlink_to(target)


def test_labels_that_link_to_a_content_store_are_scored_as_files(tmp_path: Path) -> None:
    content = decathlon(tmp_path / "plain", patient_groups={"P": ["c0", "c1"]})
    content["training"][2]["labelled"] = ["oedema"]
    described = describe(tmp_path / "plain", content)
    shutil.copytree(described, tmp_path / "linked")
    for file in (tmp_path / "linked").rglob("*.*"):
        into_store(file, tmp_path / "blobs")
    plain, linked = (score(tmp_path / name, tmp_path / f"run of {name}") for name in ("plain", "linked"))
    assert plain.failures == linked.failures == []
    assert str(plain.rows) == str(linked.rows)  # as text, where NaN is what it is
    assert plain.patients == linked.patients == {"c0": "P", "c1": "P", "c2": "case c2"}
    assert plain.summary["titles"] == linked.summary["titles"] == {str(v): f"{v} ({NAMES[str(v)]})" for v in LABELS}
    lacking = [row["label"] for row in linked.rows if row["case"] == "c2" and np.isnan(row["iou"])]
    assert lacking == ["2", "3"]


def test_the_page_of_a_training_has_the_names_and_headings_of_the_report(tmp_path: Path) -> None:
    scores = score(describe(tmp_path / "data", decathlon(tmp_path / "data")), tmp_path / "run")
    page = write_summary(tmp_path / "run", {}, scores).read_text(encoding="utf-8")
    report = (scores.request.output / "report.html").read_text(encoding="utf-8")
    heads, names = r'<th scope="col"[^>]*>([^<]*)</th>', r'<th scope="row" class="left">([^<]*)</th>'
    titles = list(scores.summary["titles"].values())
    assert re.findall(names, page) == re.findall(names, report)[: len(LABELS)] == titles
    assert len(re.findall(heads, page)) == 7
    assert set(re.findall(heads, page)) <= set(re.findall(heads, report))
    shown = r", label ([^<]*) <span"
    assert set(re.findall(shown, page)) == set(re.findall(shown, report)) <= set(titles)


def test_links_into_two_folders_of_which_one_holds_the_run(tmp_path: Path) -> None:
    dataset = describe(tmp_path / "data", decathlon(tmp_path / "data"))
    for i, store in enumerate(("one", "two", "two")):
        into_store(dataset / f"labelsTr/c{i}.nii.gz", tmp_path / "disk" / store)
    scores = score(dataset, tmp_path / "disk" / "run")
    assert (len(scores.records), scores.failures) == (3, [])


def test_a_report_names_files_in_the_form_in_which_the_user_gave_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent to others, and folders may be called after users or patients."""
    stored = describe(tmp_path / "disk", decathlon(tmp_path / "disk", patient_groups={"P": ["c0", "c1"]}))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "data").symlink_to(stored)
    (stored / "labelsTr" / "c2.nii.gz").write_bytes(b"damaged")
    monkeypatch.chdir(tmp_path / "study")
    scores = score(Path("data"), Path("run"))
    assert scores.patients == {"c0": "P", "c1": "P", "c2": "case c2"}
    (failure,) = scores.failures
    assert "`data/labelsTr/c2.nii.gz`" in failure["reason"]
    assert failure["reference"] == "data/labelsTr/c2.nii.gz"
    assert scores.request.images == Path("data/imagesTr")
    summary = json.loads(Path("run/validation/summary.json").read_text(encoding="utf-8"))
    assert summary["options"]["references"] == "data/labelsTr"
    assert summary["options"]["predictions"] == "run/validation/masks"
    pages = {path: path.read_text(encoding="utf-8") for path in Path("run/validation").iterdir() if path.is_file()}
    assert {path.name for path in pages} == {*RESULTS, "pairs.csv"}
    assert [path for path, text in pages.items() if str(tmp_path) in text] == []
    again = score(Path("data"), Path("run"))
    assert (again.summary["cases"]["reused"], again.summary["notes"]) == (2, scores.summary["notes"])


def test_files_of_a_dataset_that_was_moved_between_two_folds_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = describe(tmp_path / "data", decathlon(tmp_path / "data"))
    before = shutil.copytree(described, tmp_path / "before")
    held_out = [read_folder(root).training[i].as_item() for i, root in enumerate((described, before))]
    states = [RunState(Path("run"), {}, facts={"held_out": [item], "labels": LABELS}) for item in held_out]
    monkeypatch.chdir(tmp_path)
    Path("run/validation").mkdir(parents=True)
    request = score_request(Path("data"), Path("run"), Path("run/validation/masks"), Path("run/validation"), states)
    assert request.pairs is not None
    pairs = read_pairs(request.pairs, request.predictions, request.references)
    assert [pair.reference for pair in pairs] == [Path(item["label"]) for item in held_out]

    shutil.rmtree(before)
    states[1].request["dataset"] = str(before)
    request = score_request(Path("data"), Path("run"), Path("run/validation/masks"), Path("run/validation"), states)
    assert request.pairs is not None
    pairs = read_pairs(request.pairs, request.predictions, request.references)
    assert all(pair.reference is not None and pair.reference.is_file() for pair in pairs)
    assert (request.references, request.images) == (Path("data/labelsTr"), Path("data/imagesTr"))


def test_one_held_out_case_in_a_folder_of_its_own(tmp_path: Path) -> None:
    channels, label = make_case(0)
    entries: list[dict[str, Any]] = []
    for patient in ("p0", "p1"):
        entry = {"image": f"imagesTr/{patient}/scan.nii.gz", "label": f"labelsTr/{patient}/scan.nii.gz"}
        save(tmp_path / "data" / entry["image"], channels[0])
        save(tmp_path / "data" / entry["label"], label)
        entries.append({**entry, "labelled": [1] if patient == "p0" else [1, 2, 3]})
    describe(tmp_path / "data", {"modality": {"0": "T1"}, "labels": NAMES, "training": entries})
    scores = score(tmp_path / "data", tmp_path / "run", ["p0/scan"])
    assert [np.isnan(row["iou"]) for row in scores.rows] == [False, True, True]
    both = score(tmp_path / "data", tmp_path / "another run")
    assert [np.isnan(row["iou"]) for row in both.rows] == [False, True, True, False, False, False]


@pytest.mark.parametrize("whole", [False, True], ids=["of the entry", "of the dataset"])
def test_annotated_classes_and_patients_of_images_that_are_not_named_as_their_labels(
    whole: bool, tmp_path: Path
) -> None:
    content = decathlon(tmp_path)
    for i, entry in enumerate(content["training"]):
        for kind, ending in (("image", f"/c{i}_t1.nii.gz"), ("label", f"/c{i}_seg.nii.gz")):
            shutil.move(tmp_path / entry[kind], new := (tmp_path / entry[kind]).with_name(ending[1:]))
            entry[kind] = str(new.relative_to(tmp_path))
    content["patient_groups"] = {"P": ["c0_t1", "c1_t1"]}
    content |= {"labelled": {"c0_t1": ["core"]}} if whole else {}
    content["training"][0] |= {} if whole else {"labelled": ["core"]}
    scores = score(describe(tmp_path, content), tmp_path.with_name("run"))
    assert scores.patients == {"c0_t1": "P", "c1_t1": "P", "c2_t1": "case c2_t1"}
    found = {(row["case"], row["label"]) for row in scores.rows if not np.isnan(row["iou"])}
    assert found == {("c0_t1", "2")} | {(f"c{i}_t1", str(value)) for i in (1, 2) for value in LABELS}


def test_patients_and_classes_of_cases_with_several_raters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = decathlon(tmp_path / "data", patient_groups={"P": ["c0", "c1"]})
    content["training"][0] |= {"label": [content["training"][0]["label"]] * 2, "labelled": ["core"]}
    dataset = describe(tmp_path / "data", content)
    written = tmp_path / "run/validation/references"

    def with_label_maps(items: list[dict[str, Any]], *_: object) -> list[dict[str, Any]]:
        for item in items:
            save(written / f"{item['case']}.nii.gz", make_case(int(item["case"][1:]))[1])
        return [{**item, "label": str(written / f"{item['case']}.nii.gz")} for item in items]

    monkeypatch.setattr("monai_iou.workflow.held_out.with_label_maps", with_label_maps)
    scores = score(dataset, tmp_path / "run")
    assert scores.patients == {"c0": "P", "c1": "P", "c2": "case c2"}
    assert [row["label"] for row in scores.rows if row["case"] == "c0" and not np.isnan(row["iou"])] == ["2"]
    assert json.loads((tmp_path / "run/validation/summary.json").read_text())["options"]["patients"] == 2
