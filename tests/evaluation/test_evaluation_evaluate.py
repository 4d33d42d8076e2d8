from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from monai.metrics import compute_iou
from places import DATA

from monai_iou.evaluation import case_files
from monai_iou.evaluation import evaluate as module
from monai_iou.evaluation.columns import CASE_COLUMNS, LESION_COLUMNS
from monai_iou.evaluation.compare import compare_folders
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.results import Request, RequestError
from monai_iou.files import OutputError, read_csv, write_text

SHAPE = (20, 18, 16)


def save(path: Path, array: np.ndarray, spacing=(1.0, 1.0, 2.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])), path)


def volume(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    array = np.zeros(SHAPE, np.uint8)
    for label in (1, 2):
        low = rng.integers(1, 8, 3)
        array[tuple(slice(a, a + int(rng.integers(4, 7))) for a in low)] = label
    return array


@pytest.fixture
def request_(tmp_path) -> Request:
    for i in range(4):
        save(tmp_path / "references" / f"case{i}.nii.gz", volume(i))
        save(tmp_path / "predictions" / f"case{i}.nii.gz", np.roll(volume(i), 1, axis=i % 3))
    return Request(tmp_path / "predictions", tmp_path / "references", tmp_path / "out")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_tables_hold_every_case_and_label_and_read_back_exactly(request_):
    done = evaluate_folders(request_)
    rows = table(request_.output / "cases.csv")
    assert (request_.output / "cases.csv").read_text(encoding="utf-8").splitlines()[0] == (
        "case,label,iou,dice,precision,recall,reference_ml,prediction_ml,boundary_iou,hd95_mm,nsd,assd_mm,"
        "lesion_tp,lesion_fp,lesion_fn,lesion_f1,pq,sq,rq,cc_iou,fragments,merges,voxels_tp,voxels_fp,"
        "voxels_fn,voxels_tn,relative_volume_error,diagonal_mm"
    )
    assert [(row["case"], row["label"]) for row in rows] == [(f"case{i}", label) for i in range(4) for label in "12"]
    for text, row in zip(rows, done.rows, strict=True):
        assert all(float(text[name]) == row[name] for name in CASE_COLUMNS[2:])
    lesions = table(request_.output / "lesions.csv")
    assert tuple(lesions[0]) == LESION_COLUMNS
    for row in done.rows:
        mine = [lesion for lesion in lesions if (lesion["case"], lesion["label"]) == (row["case"], row["label"])]
        for status in ("tp", "fp", "fn"):
            assert sum(lesion["status"] == status for lesion in mine) == row[f"lesion_{status}"]
    assert table(request_.output / "failures.csv") == []


@pytest.mark.parametrize("by_table", [False, True])
def test_masks_beside_their_images_are_scored_as_those_in_a_folder_of_their_own(request_, tmp_path, by_table):
    """As `monai-iou predict` writes them without `--output`; a table of pairs names them itself, without a note."""
    beside = tmp_path / "beside"
    for i in range(4):
        save(beside / f"case{i}.nii.gz", np.full(SHAPE, -389, np.int16))
        save(beside / f"case{i}_mask.nii.gz", np.roll(volume(i), 1, axis=i % 3))
        save(beside / f"case{i}_probabilities.nii.gz", np.zeros((*SHAPE, 3), np.float32), (1.0, 1.0, 2.0))
    lines = "".join(f"case{i}_mask.nii.gz,case{i}.nii.gz\n" for i in range(4))
    (tmp_path / "pairs.csv").write_text(f"prediction,reference\n{lines}", encoding="utf-8")
    table = tmp_path / "pairs.csv" if by_table else None
    expected, done = (
        evaluate_folders(replace(request_, **options))
        for options in ({}, {"predictions": beside, "output": tmp_path / "other", "pairs": table, "images": beside})
    )
    assert (done.rows, done.failures) == (expected.rows, [])
    note = (
        "Masks beside their images, as `monai-iou predict` writes them, were scored as the predictions of these "
        f"images: 4 of 4, such as `{beside / 'case0_mask.nii.gz'}`."
    )
    assert done.notes == ([] if by_table else [note])
    file = Request(beside / "case0_mask.nii.gz", request_.references / "case0.nii.gz", tmp_path / "one")
    assert evaluate_folders(file).notes == [], "two files are a pair whatever their names"


def test_summary_describes_the_rows(request_):
    done = evaluate_folders(Request(**{**vars(request_), "command": ("monai-iou", "evaluate")}))
    summary = json.loads((request_.output / "summary.json").read_text(encoding="utf-8"))
    ious = [row["iou"] for row in done.rows if row["label"] == "1"]
    assert summary["labels"]["1"]["iou"]["mean"] == pytest.approx(np.mean(ious))
    assert summary["labels"]["1"]["iou"]["median"] == pytest.approx(np.median(ious))
    assert summary["labels"]["1"]["iou"]["mean_interval"] is None  # of four cases it would be their range
    assert summary["labels"]["1"]["iou"]["sd"] == pytest.approx(np.std(ious, ddof=1))
    assert summary["labels"]["1"]["iou"]["quartiles"] == pytest.approx(np.percentile(ious, [25, 75]).tolist())
    images = [np.mean([row["iou"] for row in done.rows if row["case"] == f"case{i}"]) for i in range(4)]
    assert summary["dataset"]["iou_i"] == pytest.approx(np.mean(images))
    assert summary["dataset"]["iou_i_worst_10"] == pytest.approx(min(images))
    assert summary["worst_cases"][0]["iou"] == min(row["iou"] for row in done.rows)
    assert summary["cases"] == {"paired": 4, "evaluated": 4, "failed": 0, "reused": 0}
    assert summary["command"] == ["monai-iou", "evaluate"]
    assert summary["versions"]["monai"]
    assert len(summary["inputs"]["case3"]["reference"]) == 64


def test_broken_cases_do_not_stop_the_others(request_):
    predictions, references = request_.predictions, request_.references
    (predictions / "case0.nii.gz").unlink()
    save(predictions / "extra.nii.gz", volume(9))
    (predictions / "case1.nii.gz").write_bytes((predictions / "case1.nii.gz").read_bytes()[:100])
    unnamed = volume(2)
    unnamed[0, 0, 0] = 7
    save(predictions / "case2.nii.gz", unnamed)
    save(references / "nan.nii.gz", np.full(SHAPE, np.nan, np.float32))
    save(predictions / "nan.nii.gz", volume(2))
    save(references / "empty.nii.gz", np.zeros(SHAPE, np.uint8))
    save(predictions / "empty.nii.gz", np.zeros(SHAPE, np.uint8))
    save(references / "other.nii.gz", volume(3))
    save(predictions / "other.nii.gz", volume(3), spacing=(1.0, 1.0, 2.5))
    done = evaluate_folders(request_)
    assert {row["case"] for row in done.rows} == {"case3", "empty"}
    failures = {row["case"]: row["reason"] for row in table(request_.output / "failures.csv")}
    assert failures.keys() == {"case0", "case1", "case2", "extra", "nan", "other"}
    assert failures["case0"].startswith("Expected a prediction for the reference")
    assert "to be a readable volume" in failures["case1"]
    assert (
        "to hold only labels 1 and 2, but got 7 in 1 voxel: name all in `--labels` or `--regions`" in failures["case2"]
    )
    assert failures["extra"].startswith("Expected a reference for the prediction")
    assert "NaN or infinite voxels" in failures["nan"]
    assert "spacing 1x1x2.5 mm" in failures["other"]
    assert json.loads((request_.output / "summary.json").read_text(encoding="utf-8"))["cases"]["failed"] == 6
    assert all(row["iou"] != row["iou"] for row in done.rows if row["case"] == "empty")


@pytest.mark.parametrize("broken", ["predictions", "references"])
@pytest.mark.parametrize("labels", [(), (1,)])
def test_the_tables_are_written_where_every_case_fails(request_, broken, labels):
    for path in getattr(request_, broken).iterdir():
        path.write_bytes(path.read_bytes()[:60])
    done = evaluate_folders(Request(**{**vars(request_), "labels": labels}))
    assert (request_.output / "cases.csv").read_text(encoding="utf-8") == ",".join(CASE_COLUMNS) + "\n"
    assert (request_.output / "lesions.csv").read_text(encoding="utf-8") == ",".join(LESION_COLUMNS) + "\n"
    failures = table(request_.output / "failures.csv")
    assert [row["case"] for row in failures] == [f"case{i}" for i in range(4)]
    for row in failures:
        assert f"{broken}/{row['case']}.nii.gz` to be a readable volume" in row["reason"]
    summary = json.loads((request_.output / "summary.json").read_text(encoding="utf-8"))
    assert summary["cases"] == {"paired": 4, "evaluated": 0, "failed": 4, "reused": 0}
    assert set(summary["dataset_defined"].values()) == {None}
    assert all(scores["iou"]["mean_defined"] is None for scores in summary["labels"].values())
    # What is missing counts as the worst score, where a reference says what there was to find.
    worst = 0.0 if broken == "predictions" else None
    assert summary["dataset"]["iou_i"] == worst
    assert all(scores["iou"]["mean"] == worst for scores in summary["labels"].values())
    report = (request_.output / "report.html").read_text(encoding="utf-8")
    assert "readable volume" in report
    assert done.notes == []


def test_empty_references_beside_broken_ones_are_failures_too(request_):
    (request_.references / "case0.nii.gz").write_bytes(b"")
    for i in range(1, 4):
        save(request_.references / f"case{i}.nii.gz", np.zeros(SHAPE, np.uint8))
    evaluate_folders(request_)
    reasons = [row["reason"] for row in table(request_.output / "failures.csv")]
    assert "to be a readable volume" in reasons[0]
    assert all("background only in all that can be read: name them with" in reason for reason in reasons[1:])
    named = evaluate_folders(Request(**{**vars(request_), "labels": (1, 2)}))
    assert [row["case"] for row in named.rows[::2]] == ["case1", "case2", "case3"]


def files_of(request: Request) -> dict[str, bytes]:
    names = ("cases.csv", "lesions.csv", "failures.csv")
    return {name: (request.output / name).read_bytes() for name in names}


def test_finished_cases_are_kept_until_a_file_or_an_option_changes(request_, monkeypatch):
    scored = []

    def spy(case, *arguments):
        scored.append(case)
        return original(case, *arguments)

    original = module.evaluate_files
    monkeypatch.setattr(module, "evaluate_files", spy)
    evaluate_folders(request_)
    first = files_of(request_)
    assert scored == ["case0", "case1", "case2", "case3"]
    scored.clear()
    assert evaluate_folders(request_).reused == 4
    assert scored == []
    assert files_of(request_) == first
    others = {"missing": "penalty", "present": "either", "pictures": "all", "export": ("latex",)}
    for name, value in others.items():  # as the page says of the options on which no score depends
        assert evaluate_folders(Request(**{**vars(request_), name: value})).reused == 4
    assert scored == []
    save(request_.predictions / "case2.nii.gz", volume(7))
    evaluate_folders(request_)
    assert scored == ["case2"]
    save(request_.references / "case1.nii.gz", volume(7))
    evaluate_folders(request_)
    assert scored == ["case2", "case1"]
    for name, value in {"tolerance": 2.0, "boundary_distance": "chessboard", "match": "any", "resample": True}.items():
        scored.clear()
        evaluate_folders(Request(**{**vars(request_), name: value}))
        assert len(scored) == 4, name


@pytest.fixture
def calls(monkeypatch) -> dict[str, list[str]]:
    """Names of the files that were read and hashed."""
    seen: dict[str, list[str]] = {"read": [], "hash": []}
    for kind, name in (("read", "read_labels"), ("hash", "file_hash")):
        original = getattr(case_files, name)

        def spy(path, kind=kind, original=original):
            seen[kind].append(f"{path.parent.name}/{path.name}")
            return original(path)

        monkeypatch.setattr(case_files, name, spy)
    return seen


def test_every_file_is_hashed_and_read_once(request_, calls):
    every = sorted(f"{kind}/case{i}.nii.gz" for kind in ("predictions", "references") for i in range(4))
    evaluate_folders(request_)
    assert sorted(calls["read"]) == sorted(calls["hash"]) == every
    calls["read"].clear()
    calls["hash"].clear()
    assert evaluate_folders(request_).reused == 4
    assert calls["read"] == []
    assert sorted(calls["hash"]) == every
    calls["hash"].clear()
    save(request_.predictions / "case2.nii.gz", volume(7))
    assert evaluate_folders(request_).reused == 3
    assert sorted(calls["read"]) == ["predictions/case2.nii.gz", "references/case2.nii.gz"]
    assert sorted(calls["hash"]) == every


def test_a_file_replaced_while_it_is_scored_is_scored_anew(request_, monkeypatch):
    original = case_files.read_labels

    def replace_after_reading(path):
        found = original(path)
        if path.parent.name == "predictions" and path.name == "case0.nii.gz":
            save(path, volume(0))
        return found

    monkeypatch.setattr(case_files, "read_labels", replace_after_reading)
    first = evaluate_folders(request_)
    monkeypatch.setattr(case_files, "read_labels", original)
    second = evaluate_folders(request_)
    assert second.reused == 3
    assert first.rows[0]["iou"] < second.rows[0]["iou"] == 1


def test_a_label_that_is_new_in_one_case_leaves_the_other_records(request_):
    evaluate_folders(request_)
    three = volume(5)
    three[0, 0, 0] = 3
    save(request_.predictions / "case9.nii.gz", volume(5))
    save(request_.references / "case9.nii.gz", three)
    done = evaluate_folders(request_)
    assert done.reused == 4
    assert [row["label"] for row in done.rows] == ["1", "2", "3"] * 5
    absent = done.rows[2]
    assert (absent["reference_ml"], absent["voxels_tn"], absent["lesion_fn"]) == (0.0, np.prod(SHAPE), 0)
    assert np.isnan(absent["iou"])


def test_an_interrupted_run_goes_on_where_it_was(request_):
    def interrupt(step):
        if step.stage == "cases" and step.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_folders(request_, interrupt)
    assert not (request_.output / "cases.csv").exists()
    steps = []
    done = evaluate_folders(request_, steps.append)
    assert done.reused == 2
    assert [(step.done, step.total) for step in steps if step.stage == "cases"] == [(3, 4), (4, 4)]
    whole = Request(**{**vars(request_), "output": request_.output.with_name("whole")})
    evaluate_folders(whole)
    assert files_of(request_) == files_of(whole)


def test_a_damaged_record_is_made_again(request_):
    evaluate_folders(request_)
    first, *others = sorted((request_.output / "finished").iterdir())
    first.write_text(first.read_text(encoding="utf-8")[:50], encoding="utf-8")
    others[0].write_text(others[0].read_text(encoding="utf-8").replace('"iou": 0.', '"iou": 1.', 1), encoding="utf-8")
    others[1].write_bytes(b"\xff\xfe" * 40)
    before = files_of(request_)
    assert evaluate_folders(request_).reused == 1
    assert files_of(request_) == before


@pytest.mark.slow
def test_workers_give_the_same_bytes(request_):
    evaluate_folders(request_)
    shared = Request(**{**vars(request_), "output": request_.output.with_name("workers"), "workers": 2})
    evaluate_folders(shared)
    assert files_of(shared) == files_of(request_)


def test_labels_regions_and_ignored_voxels(request_):
    by_region = Request(**{**vars(request_), "regions": {"whole": (1, 2), "core": (2,)}})
    assert [row["label"] for row in evaluate_folders(by_region).rows][:2] == ["whole", "core"]
    one = Request(**{**vars(request_), "labels": (2,)})
    assert {row["label"] for row in evaluate_folders(one).rows} == {"2"}
    absent = evaluate_folders(Request(**{**vars(request_), "labels": (1, 5)}))
    assert absent.notes == ["5: no reference holds it, so that only false positives count."]
    ignoring = Request(**{**vars(request_), "ignore": 2})
    assert {row["label"] for row in evaluate_folders(ignoring).rows} == {"1"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"labels": (1,), "regions": {"a": (2,)}},
            "Expected either `--labels` or `--regions`, but got both: keep one.",
        ),
        ({"labels": (0, 1)}, "Expected labels of structures, but got 0, the background: leave it out."),
        ({"labels": (1, 2, 1)}, "Expected every label once in `--labels`, but got 1 again: remove it."),
        (
            {"images": Path("nowhere")},
            "Expected `--images` to be a folder of volumes, but got `nowhere`: check the path.",
        ),
        ({"labels": (1,), "ignore": 1}, "Expected `--ignore` to differ from the labels, but got 1 in both: keep one."),
        ({"tolerance": -1.0}, "Expected `--tolerance` to be 0 mm or more, but got -1.0: give a distance in mm."),
        ({"workers": 0}, "Expected `--workers` to be 1 or more, but got 0: give a number of processes."),
    ],
)
def test_contradicting_options_are_refused_before_any_work(request_, options, text):
    with pytest.raises(RequestError) as error:
        evaluate_folders(Request(**{**vars(request_), **options}))
    assert str(error.value) == text
    assert not request_.output.exists()


def test_references_without_a_label_are_refused(request_):
    for path in request_.references.iterdir():
        save(path, np.zeros(SHAPE, np.uint8))
    with pytest.raises(ValueError, match="but got background only: name them with `--labels`"):
        evaluate_folders(request_)


def test_an_output_that_cannot_be_written_is_refused(request_, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"`--output` to be a folder that can be written, but got `.*file`"):
        evaluate_folders(Request(**{**vars(request_), "output": tmp_path / "file"}))
    if os.geteuid() != 0:  # the superuser may write anywhere
        request_.output.mkdir(mode=0o500)
        with pytest.raises(OutputError, match=r"\(Permission denied\): choose another folder\.$"):
            evaluate_folders(request_)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "a.csv", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_text(tmp_path / "a.csv", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "old"


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real volumes are not beside the project")
def test_iou_of_real_hippocampi_equals_monai(tmp_path):
    import torch

    references = DATA / "Task904_Hippocampus" / "labelsTs"
    chosen = sorted(references.glob("*.nii.gz"))[:3]
    for path in chosen:
        image = nibabel.load(path)
        array = np.asanyarray(image.dataobj).astype(np.uint8)
        for folder, content in (("predictions", np.roll(array, 1, axis=1)), ("references", array)):
            (tmp_path / folder).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(content, image.affine), tmp_path / folder / path.name)
    done = evaluate_folders(Request(tmp_path / "predictions", tmp_path / "references", tmp_path / "out"))
    for row in done.rows:
        reference = np.asanyarray(nibabel.load(references / f"{row['case']}.nii.gz").dataobj) == int(row["label"])
        masks = [torch.from_numpy(np.ascontiguousarray(m))[None, None] for m in (np.roll(reference, 1, 1), reference)]
        assert row["iou"] == pytest.approx(float(compute_iou(*(mask.float() for mask in masks))), abs=1e-6)


def test_names_that_are_no_text_and_linked_folders_lose_nothing(request_, tmp_path):
    odd = os.fsdecode(b"caf\xe9\r=1.nii.gz")
    deep = Path(*("d" * 100 for _ in range(3))) / "c.nii.gz"
    for folder in (request_.predictions, request_.references):
        save(folder / deep, volume(5))
        image = (folder / "case0.nii.gz").read_bytes()
        try:
            (folder / odd).write_bytes(image)
        except OSError:
            pytest.skip("the file system takes only names that are text")
        (tmp_path / "elsewhere" / folder.name).mkdir(parents=True)
        (tmp_path / "elsewhere" / folder.name / "linked.nii.gz").write_bytes(image)
        (folder / "site").symlink_to(tmp_path / "elsewhere" / folder.name)
        (tmp_path / "elsewhere" / folder.name / "loop").symlink_to(folder / "site")
    done = evaluate_folders(request_)
    assert done.failures == []
    written = {row["case"] for row in read_csv(request_.output / "cases.csv")}
    assert written == {*(f"case{i}" for i in range(4)), "caf\\udce9\r=1", "site/linked", str(deep)[: -len(".nii.gz")]}
    assert evaluate_folders(request_).reused == 7
    assert "caf" in (request_.output / "report.html").read_text(encoding="utf-8")
    rows = compare_folders([request_.output, request_.output], tmp_path / "comparison", ["iou"])
    assert [row["n"] for row in rows] == [7, 7]


def test_pairs_with_a_name_that_is_too_long_are_a_failure(request_, tmp_path):
    pairs = f"prediction,reference\n{'x' * 400}.nii.gz,case1.nii.gz\ncase0.nii.gz,case0.nii.gz\n"
    (tmp_path / "pairs.csv").write_text(pairs, encoding="utf-8")
    done = evaluate_folders(Request(**{**vars(request_), "pairs": tmp_path / "pairs.csv"}))
    assert [failure["case"] for failure in done.failures] == ["case1"]
