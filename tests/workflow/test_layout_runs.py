"""Every layout that users bring, from the folder to masks and scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from layouts import LAYOUTS, TESTING, decathlon_regions, nnunet_regions

from monai_iou.bundle_files import copy_bundle
from monai_iou.cli import main
from monai_iou.datasets.folder import read_folder
from monai_iou.demo import run_workflow
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.request import Request
from monai_iou.files import read_csv
from monai_iou.planning.fingerprint import compute_fingerprint
from monai_iou.planning.hardware import Machine
from monai_iou.planning.rules import propose
from monai_iou.planning.stored import load_plan
from monai_iou.volumes.reading import read_labels
from monai_iou.workflow.data import BundleCases
from monai_iou.workflow.postprocessing import Postprocessing, load_postprocessing
from monai_iou.workflow.settings import Settings

MACHINE = Machine("cpu", 8 * 2**30, 8 * 2**30, "8 GiB")
SMALL: dict[str, Any] = {"epochs": 2, "case_repeats": 2, "val_interval": 1, "patch_size": [16, 16, 8], "batch_size": 2}
SMALL |= {"num_samples": 1, "base_channels": 4, "full_resolution": False, "keep_weights": "last", "ema_decay": None}


def planned(data: Path) -> dict[str, Any]:
    """What `monai-iou plan` writes, and the plan that a training derives from it."""
    folder = read_folder(data)
    fingerprint = compute_fingerprint(folder)
    config = propose(folder, fingerprint, MACHINE).as_json(fingerprint, MACHINE)
    cases = BundleCases(str(data), config.get("val_fraction", 0.1))
    again = cases.plan(config["patch_size"], config["pixdim"], config["base_channels"])
    assert again.out_channels == 1 + len(folder.scheme.classes)
    assert cases.training
    assert cases.validation
    return config


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_and_planned(layout: str, tmp_path: Path) -> None:
    config = planned(LAYOUTS[layout](tmp_path / "data"))
    text = json.dumps(config["loss"])
    assert ('"sigmoid": true' in text) == ("regions" in layout)
    assert ('"soft_label": true' in text) == (layout in ("soft", "several raters"))
    assert ('"ignore_index": 4' in text) == ("ignore" in layout)
    assert (config.get("raters") == "mean") == (layout == "several raters")


def run(data: Path, bundle: Path, **changes: Any) -> dict[str, np.ndarray]:
    """Plan, train, predict, evaluate; return the masks by case."""
    config = planned(data)
    config.pop("plan_report")
    copy_bundle(bundle)
    plan_file = bundle / "configs" / "plan.json"
    plan_file.write_text(json.dumps(config))
    places = {"bundle_root": str(bundle), "dataset_dir": str(data)}
    run_workflow(bundle, ["train", "plan"], {**places, **SMALL, **changes})
    network = {key: SMALL[key] for key in ("base_channels", "patch_size", "full_resolution")}
    run_workflow(bundle, ["train", "plan", "evaluate"], {**places, **SMALL, "output_dir": str(bundle / "scores")})
    images = data if read_folder(data).test else data / "images"
    run_workflow(bundle, ["inference"], {**places, **network, "dataset_dir": str(images)})
    masks = sorted((bundle / "predictions").rglob("*.nii.gz"))
    return {mask.name.removesuffix(".nii.gz"): np.asanyarray(nib.load(mask).dataobj) for mask in masks}


def check_masks(masks: dict[str, np.ndarray], plan: dict[str, Any]) -> None:
    allowed = {int(value) for value in plan["labels"]}
    for mask in masks.values():
        assert set(np.unique(mask).tolist()) <= allowed
        assert mask.dtype.itemsize >= np.min_scalar_type(max(allowed)).itemsize
    assert any(mask.any() for mask in masks.values())


def check_png(bundle: Path, data: Path, masks: dict[str, np.ndarray]) -> None:
    """Masks in the images' own format hold what those in NIfTI hold."""
    images = data / ("imagesTs" if (data / "imagesTs").is_dir() else "images")
    output = bundle / "pictures_of_masks"
    assert main(["predict", str(bundle), str(images), "--output", str(output), "--format", "same", "--preview"]) == 0
    assert {path.name for path in output.glob("*.png")} >= {f"{name}.png" for name in masks}
    for name, mask in masks.items():
        np.testing.assert_array_equal(read_labels(output / f"{name}.png").array, mask)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_ends_in_masks_and_scores(layout: str, tmp_path: Path) -> None:
    data, bundle = LAYOUTS[layout](tmp_path / "data"), tmp_path / "bundle"
    masks = run(data, bundle)
    plan = json.loads((bundle / "models" / "model.json").read_text())
    assert len(masks) == (TESTING if read_folder(data).evaluation else 3)
    check_masks(masks, plan)
    if layout.startswith("PNG"):
        check_png(bundle, data, masks)
    (table,) = (bundle / "scores").glob("*_mean_iou_raw.csv")
    header, *rows = table.read_text().splitlines()
    names = [name for name, _ in read_folder(data).scheme.classes]
    assert header.split(",")[1:] == [*names, "mean"]
    assert all(0 <= float(cell) <= 1 or math.isnan(float(cell)) for row in rows for cell in row.split(",")[1:])
    if layout == "partly labelled":
        assert [row.split(",")[1:3].count("nan") for row in rows] == [1, 0]
    references = data / ("labelsTs" if (data / "labelsTs").is_dir() else "labels")
    if layout != "soft":  # whose references are no label maps
        found = evaluate_folders(Request(bundle / "predictions", references, tmp_path / "evaluation"))
        assert {row["case"] for row in found.rows} == set(masks)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_command_ends_in_scores_of_the_held_out_cases(layout: str, tmp_path: Path) -> None:
    data, folder = LAYOUTS[layout](tmp_path / "data"), tmp_path / "run"
    small = {**SMALL, "keep_weights": "last", "case_repeats": 1}
    keys = [word for name, value in small.items() if name != "val_interval" for word in (f"--{name}", str(value))]
    assert main(["train", str(data), "--output", str(folder), *keys, "--val_fraction", "0.34"]) == 0
    rows = read_csv(folder / "validation" / "cases.csv")
    scheme = read_folder(data).scheme
    names = {name if scheme.regions else str(values[0]) for name, values in scheme.classes}
    assert {row["label"] for row in rows} == names
    assert "Scores of the held-out cases" in (folder / "summary.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_nnunets_folder_gives_the_masks_of_its_decathlon_twin(tmp_path: Path) -> None:
    masks = [
        run(make(tmp_path / name / "data"), tmp_path / name / "bundle")
        for name, make in (("nnunet", nnunet_regions), ("decathlon", decathlon_regions))
    ]
    assert masks[0].keys() == masks[1].keys()
    for name, mask in masks[0].items():
        np.testing.assert_array_equal(mask, masks[1][name])
    assert not any((mask == 4).any() for mask in masks[0].values()), "the ignored value is never predicted"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nnU-Net regions and ignore", "partly labelled", "several raters"])
def test_post_processing_is_tuned_for_several_labels_and_applied(layout: str, tmp_path: Path) -> None:
    data, bundle = LAYOUTS[layout](tmp_path / "data"), tmp_path / "bundle"
    masks = run(data, bundle, tune_postprocessing=True)
    plan = load_plan(bundle / "models" / "model.json")
    tuned = load_postprocessing(str(bundle / "models" / "postprocessing.json"), plan.out_channels)
    assert plan.out_channels > 2
    assert len(tuned.min_size_mm3) == plan.out_channels - 1
    assert tuned != Postprocessing(None, (0.0,) * (plan.out_channels - 1)), "two epochs leave something to raise"
    check_masks(masks, json.loads((bundle / "models" / "model.json").read_text()))


@pytest.mark.slow
def test_one_rater_is_drawn_in_each_epoch(tmp_path: Path) -> None:
    data = LAYOUTS["several raters"](tmp_path / "data")
    run(data, tmp_path / "bundle", raters="draw", loss={"_target_": "monai_iou.IoUCELoss", "softmax": True})
    plan = json.loads((tmp_path / "bundle" / "models" / "model.json").read_text())
    assert plan["mean_of_raters"] is False


def test_an_unknown_way_of_raters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `raters` to be mean or draw, but got 'median': leave --raters out"):
        Settings(raters="median")
