"""`monai-iou plan`: what it measures, what it writes, and training from that."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import bundle_command, run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DATA, DOCS
from scipy import ndimage

from monai_iou.bundle_files import bundle_path, copy_bundle
from monai_iou.cli import main
from monai_iou.datasets.folder import read_folder
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.planning.fingerprint import compute_fingerprint
from monai_iou.planning.hardware import GIB, Machine, detect_hardware
from monai_iou.workflow.data import BundleCases

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]

REAL = DATA


def write_folder(
    root: Path, entries: list[tuple[np.ndarray, np.ndarray]], spacing: tuple[float, ...], **keys: Any
) -> Path:
    """Write images and labels as a folder with one subfolder per patient, all files of the same two names."""
    training = []
    for index, (image, label) in enumerate(entries):
        pair = {kind: f"patient{index}/{kind}.nii.gz" for kind in ("image", "label")}
        (root / f"patient{index}").mkdir(parents=True)
        for kind, voxels in (("image", image), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, np.diag([*spacing, 1.0])), root / pair[kind])
        training.append(pair)
    content = {"modality": {"0": "PET"}, "labels": {"0": "background", "1": "lesion"}, "training": training, **keys}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def pet_folder(root: Path, cases: int = 4, **keys: Any) -> Path:
    """Two channels, a gap in the label values, thick slices, and one case without foreground."""
    rng = np.random.default_rng(0)
    entries = []
    for index in range(cases):
        label = np.zeros((20, 20, 12), np.uint8)
        if index:
            label[4:9, 5:9, 4:7] = 5
            label[14:17, 5:9, 4:7] = 5
        image = rng.normal(size=(*label.shape, 2)) + 5 * (label > 0)[..., None]
        entries.append((image.astype(np.float32), label))
    content = {"modality": {"0": "PET", "1": "$ratio"}, "labels": {"0": "background", "5": "@lesion"}, **keys}
    return write_folder(root, entries, (2.0, 2.0, 7.0), **content)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_the_fingerprint_is_what_an_independent_count_finds(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    root = tmp_path_factory.mktemp("set")
    entries = []
    for _ in range(3):
        label = rng.choice([0, 1, 4], size=(7, 8, 9), p=[0.9, 0.06, 0.04]).astype(np.uint8)
        entries.append((rng.normal(size=label.shape).astype(np.float32), label))
    labels = {"0": "background", "1": "a", "4": "b"}
    found = compute_fingerprint(read_folder(write_folder(root, entries, (1.0, 2.0, 3.0), labels=labels)))
    for measured, value in zip(found.classes, (1, 4), strict=True):
        sizes = []
        for _, label in entries:
            numbers, count = ndimage.label(label == value, np.ones((3, 3, 3)))
            sizes += np.bincount(numbers.ravel())[1:].tolist()[:count]
        assert measured.components == len(sizes)
        assert measured.cases == sum((label == value).any() for _, label in entries)
        expected = (min(sizes), float(np.median(sizes)), max(sizes)) if sizes else (0, 0, 0)
        spread = measured.size_voxels
        assert (spread.smallest[0], spread.median[0], spread.largest[0]) == expected
        assert measured.size_mm3.largest[0] == pytest.approx(6 * expected[2])
        share = np.mean([(label == value).mean() for _, label in entries])
        assert measured.fraction == pytest.approx(share, rel=1e-5)
    inside = np.concatenate([image[label > 0] for image, label in entries])
    np.testing.assert_allclose(found.intensities[0][1], np.percentile(inside, (0.5, 5, 50, 95, 99.5)), rtol=1e-4)
    shutil.rmtree(root)


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in (*value.keys(), *value.values()) for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_the_file_holds_no_expression_and_a_reason_for_everything(tmp_path: Path) -> None:
    data = pet_folder(tmp_path / "data")
    assert main(["plan", str(data), f"--output={tmp_path / 'plans' / 'plan.json'}", "--memory-gb=4"]) == 0
    text = (tmp_path / "plans" / "plan.json").read_text()
    config = json.loads(text)
    assert all(found[:1] not in tuple("$@%") and "\n" not in found for found in strings(config))
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["plan.json"]
    report = config.pop("plan_report")
    assert len(report["decisions"]) == 14
    assert all(row["value"] and row["reason"] for row in report["decisions"])
    assert report["memory"] == "4.0 GiB by --memory-gb"
    assert report["fingerprint"]["empty_cases"] == ["patient0/image"]
    assert config["pixdim"] == [2, 2, 7]
    known = set(json.loads((bundle_path() / "configs" / "train.json").read_text()))
    assert set(config) - known == {"class_weights", "lesion_threshold_mm3"}


def test_the_documents_example_is_what_the_command_decides(tmp_path: Path) -> None:
    data = write_phantom_dataset(tmp_path / "dataset", training=9, evaluation=3)
    path = tmp_path / "plan.json"
    assert main(["plan", str(data), f"--output={path}", "--device=cpu", "--memory-gb=16"]) == 0
    rows = json.loads(path.read_text())["plan_report"]["decisions"]
    lines = (DOCS / "planning.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("target spacing   "))
    width = max(len(row["value"]) for row in rows)
    expected = [f"{row['decision']:<18}{row['value']:<{width}}  {row['reason']}" for row in rows]
    assert lines[start : start + len(rows) + 1] == [*expected, "```"]


def planned_bundle(root: Path) -> tuple[Path, Path]:
    """A folder of data, and a bundle with a plan for it."""
    data, bundle = pet_folder(root / "data"), copy_bundle(root / "bundle")
    assert (
        main(["plan", str(data), f"--output={bundle / 'configs' / 'plan.json'}", "--device=cpu", "--memory-gb=2"]) == 0
    )
    return data, bundle


def check_trained(bundle: Path, epoch: int) -> None:
    stored = json.loads((bundle / "models" / "model.json").read_text())
    planned = json.loads((bundle / "configs" / "plan.json").read_text())
    assert stored["patch_size"] == planned["patch_size"]
    assert stored["pixdim"] == planned["pixdim"]
    assert stored["labels"] == {"0": "background", "5": "@lesion"}
    assert torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)["epoch"] == epoch


@pytest.mark.slow
def test_the_plan_trains_by_monais_command_without_a_hand_edit(tmp_path: Path) -> None:
    data, bundle = planned_bundle(tmp_path)
    changes = {"dataset_dir": str(data), "epochs": 2, "val_interval": 1}
    done = run_command(bundle_command(bundle, ["train", "plan"], changes))
    assert done.returncode == 0, done.stderr[-2000:]
    check_trained(bundle, epoch=2)


def test_the_plan_merges_with_training_evaluation_and_inference(tmp_path: Path) -> None:
    data, bundle = planned_bundle(tmp_path)
    places = {"bundle_root": str(bundle), "dataset_dir": str(data)}
    short = {"epochs": 1, "val_interval": 1, "case_repeats": 1, "pictures": 0}
    run_workflow(bundle, ["train", "plan"], {**places, **short})
    check_trained(bundle, epoch=1)
    workflow = run_workflow(bundle, ["train", "plan", "evaluate"], places)
    assert 0 <= workflow.evaluator.state.metrics["val_mean_iou"] <= 1
    content = json.loads((data / "dataset.json").read_text())
    content["test"] = [pair["image"] for pair in content["training"]]
    (data / "dataset.json").write_text(json.dumps(content))
    masks = tmp_path / "masks"
    run_workflow(bundle, ["inference", "plan"], {**places, "output_dir": str(masks)})
    for index in range(4):
        mask = nib.load(masks / f"patient{index}" / "image.nii.gz")
        assert mask.shape == (20, 20, 12)
        assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 5}


def test_folds_are_written_and_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pet_folder(tmp_path / "data", patient_groups={"one": ["patient0/", "patient1/"]})
    path = tmp_path / "plan.json"
    assert main(["plan", str(data), f"--output={path}", "--folds=3", "--fold=1", "--memory-gb=2"]) == 0
    config = json.loads(path.read_text())
    assert (config["folds"], config["fold"]) == (3, 1)
    assert "val_fraction" not in config
    cases = BundleCases(str(data), folds=3, fold=1)
    assert len(cases.training) + len(cases.validation) == 4
    path.unlink()
    capsys.readouterr()
    assert main(["plan", str(data), f"--output={path}", "--folds=4", "--memory-gb=2"]) == 1
    error = capsys.readouterr().err
    assert "Expected `folds` to be at most 3, the number of patients to divide into folds, but got 4" in error
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--memory-gb=0"], 2, "'--memory-gb': Expected a positive number, but got '0': give GiB, such as 8."),
        (["--memory-gb=0.001"], 1, "Expected memory for a training step of two patches of"),
        (["--device=tpu"], 2, "Expected one of auto, cpu, cuda, but got 'tpu': perhaps you meant cpu."),
        (["--folds=1"], 2, "Expected a whole number of at least 2, but got '1': give 2 or more folds, usually 5."),
        (["--output=plan.txt"], 2, "Expected `--output` to be a .json file, but got `plan.txt`: add the extension, by"),
        (["--folds=2", "--fold=2"], 2, "Expected `--fold` to be below `--folds 2`, but got 2: count from 0."),
        (["--fold=3"], 2, "Expected `--folds` to be given with `--fold 3`, but it is not: add --folds 5 or drop"),
        (["--output=/proc/no/plan.json"], 1, "Expected `--output` to be a folder that can be written"),
    ],
)
def test_wrong_options_give_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, text: str
) -> None:
    data = pet_folder(tmp_path / "data")
    assert main(["plan", str(data), f"--output={tmp_path / 'plan.json'}", *options]) == code
    error = capsys.readouterr().err
    assert text in re.sub(r"\s+", " ", error)
    assert "Traceback" not in error
    assert not (tmp_path / "plan.json").exists()


def test_folds_are_checked_before_any_volume_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pet_folder(tmp_path / "data")
    assert main(["plan", str(data), f"--output={tmp_path / 'plan.json'}", "--folds=99", "--memory-gb=4"]) == 1
    error = capsys.readouterr().err
    assert "Expected `folds` to be at most 4, the number of patients to divide into folds, but got 99" in error
    assert "Reading training cases" not in error


def test_a_folder_that_cannot_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "none"), f"--output={tmp_path / 'plan.json'}"]) == 2
    none = f"Expected DATASET to be a folder of labelled volumes, but got `{tmp_path / 'none'}`: check the path."
    assert none in capsys.readouterr().err
    data = pet_folder(tmp_path / "data")
    (data / "patient1" / "image.nii.gz").write_bytes(b"no gzip")
    assert main(["plan", str(data), f"--output={tmp_path / 'plan.json'}"]) == 1
    assert "patient1/image.nii.gz` to be a readable volume, but got no NIfTI header" in capsys.readouterr().err
    empty = write_folder(
        tmp_path / "empty", [(np.ones((6, 6, 6), np.float32), np.zeros((6, 6, 6), np.uint8))], (1, 1, 1)
    )
    assert main(["plan", str(empty), f"--output={tmp_path / 'plan.json'}"]) == 1
    assert "have foreground, but all 1 are empty" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_iou.planning.hardware.free_memory", lambda: 6 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect_hardware() == Machine("cpu", 3 * GIB, 3 * GIB, "6.0 GiB of RAM free")
    assert detect_hardware("cuda", 10).step_bytes == 9 * GIB
    with pytest.raises(
        ValueError, match="Expected a GPU for `--device cuda`, but torch finds none: give `--memory-gb`"
    ):
        detect_hardware("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * GIB, 24 * GIB))
    assert detect_hardware() == Machine("cuda", 18 * GIB, 3 * GIB, "20.0 GiB free on the GPU")


def test_the_demo_set_gets_a_plan_for_ct(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_phantom_dataset(tmp_path / "data", training=3, evaluation=1, shape=(32, 32, 24))
    assert main(["plan", str(data), f"--output={tmp_path / 'plan.json'}", "--memory-gb=4"]) == 0
    out, err = capsys.readouterr()
    assert "CT window" in out
    assert "Reading training cases 3/3: phantom_0" in err
    assert out.splitlines()[-1].startswith("python -m monai.bundle run --config_file ")


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("Task901_MSLesionFLAIR", {"pixdim": [1, 1, 1], "patch_size": [64, 64, 64]}),
        ("Task902_STSTumourCT", {"pixdim": [0.976562, 0.976562, 3.27]}),
        ("Task904_Hippocampus", {"pixdim": [1, 1, 1], "patch_size": [40, 56, 40], "num_samples": 1, "batch_size": 4}),
    ],
)
def test_real_folders(tmp_path: Path, task: str, expected: dict[str, Any]) -> None:
    if not (REAL / task).is_dir():
        pytest.skip(f"{REAL / task} is not there")
    path = tmp_path / "plan.json"
    assert main(["plan", str(REAL / task), f"--output={path}", "--device=cpu", "--memory-gb=16"]) == 0
    config = json.loads(path.read_text())
    assert {key: config[key] for key in expected} == expected
    many = task == "Task901_MSLesionFLAIR"  # 16 and more lesions a scan, the largest 10^4 times the smallest
    assert config["loss"]["_target_"] == f"monai_iou.{'InstanceIoULoss' if many else 'IoUCELoss'}"


CT_NOTE = (
    "The values of channel {} look like Hounsfield units, but its name is not one of CT, so that every image is "
    'normalised by itself. If the images are CT, name the channel "CT" in dataset.json, as docs/bundle.md shows.'
)


@pytest.mark.parametrize("channel", [None, "PET", "CT"])
def test_ct_under_another_name_is_noted_once_and_in_the_plan(
    channel: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_phantom_dataset(tmp_path / "data", training=3, evaluation=1, shape=(32, 32, 24))
    if channel is None:  # the folders alone
        (data / "dataset.json").unlink()
    else:
        content = json.loads((data / "dataset.json").read_text())
        (data / "dataset.json").write_text(json.dumps({**content, "modality": {"0": channel}}))
    path = tmp_path / "plan.json"
    assert main(["plan", str(data), "-o", str(path), "--memory-gb=4"]) == 0
    rows = {row["decision"]: row for row in json.loads(path.read_text())["plan_report"]["decisions"]}
    name = channel or "image"
    notes = [CT_NOTE.format(name)] * (name != "CT")
    assert [record.getMessage() for record in caplog.records if "Hounsfield" in record.getMessage()] == notes
    assert rows["normalisation"]["value"].startswith("CT window" if name == "CT" else "z-score")
    remedy = f'channel {name} looks like CT by its values: if it is CT, name it "CT" in dataset.json'
    assert (rows["normalisation"]["reason"] == remedy) == (name != "CT")
    caplog.clear()
    BundleCases(str(data)).plan([16, 16, 16])
    assert [record.getMessage() for record in caplog.records if "Hounsfield" in record.getMessage()] == notes


def test_one_case_is_no_plural(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [(np.ones((12, 12, 12), np.float32), np.pad(np.ones((4, 4, 4), np.uint8), 4))]
    data = write_folder(tmp_path / "data", entries, (1, 1, 1))
    assert main(["plan", str(data), f"--output={tmp_path / 'plan.json'}", "--memory-gb=4"]) == 0
    text = capsys.readouterr().out
    assert "data: 1 training case of 1 patient" in text
    assert "1 volume x " in text
    assert "one patient, whose cases are on both sides" in text
    assert not re.search(r"\b1 (?:cases|patients|volumes|patches|training cases)\b", text)
