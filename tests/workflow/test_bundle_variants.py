"""Variants of the bundle's training: other losses by one override, and the configs for attention, scales, instances."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundle_runs import causes
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from places import DOCS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_iou.bundle_files import bundle_path

TINY: dict[str, Any] = {
    "epochs": 6,
    "val_interval": 6,
    "val_fraction": 0.3,
    "patch_size": [24, 24, 16],
    "base_channels": 4,
    "batch_size": 3,
    "num_samples": 2,
    "learning_rate": 0.02,
    "cache_workers": 1,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Decathlon folder: five volumes with bright lesions of two sizes, 2 % of the voxels."""
    root = tmp_path_factory.mktemp("data") / "Task001_Lesions"
    generator = np.random.default_rng(0)
    pairs = []
    for case in range(5):
        label = np.zeros((28, 28, 20), dtype=np.uint8)
        for size in (3, 6):
            x, y, z = (int(generator.integers(0, side - size)) for side in label.shape)
            label[x : x + size, y : y + size, z : z + size] = 1
        image = generator.normal(1, 0.2, label.shape).astype(np.float32) + 2 * label
        for kind, array in (("imagesTr", image), ("labelsTr", label)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.5, 1.0])).to_filename(root / kind / f"case{case}.nii.gz")
        pairs.append({"image": f"./imagesTr/case{case}.nii.gz", "label": f"./labelsTr/case{case}.nii.gz"})
    description = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "lesion"},
        "training": pairs,
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def train(dataset: Path, output: Path, configs: list[str], **override: Any) -> list[float]:
    """Train and return the loss of every iteration."""
    files = [str(bundle_path() / "configs" / f"{name}.json") for name in ("train", *configs)]
    folders = {"dataset_dir": str(dataset), "ckpt_dir": str(output / "models"), "output_dir": str(output / "eval")}
    losses: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's and torch's own; the bundle's tests say which
        workflow = ConfigWorkflow(
            config_file=files, workflow_type="train", logging_file=False, **{**TINY, **folders, **override}
        )
        workflow.initialize()
        trainer = workflow.parser.get_parsed_content("train#trainer")
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output[0]["loss"]))
        )
        workflow.run()
        workflow.finalize()
    assert (output / "models" / "model.pt").is_file()
    return losses


def assert_falling(losses: list[float]) -> None:
    assert all(math.isfinite(value) for value in losses)
    assert np.mean(losses[-2:]) < np.mean(losses[:2])


TERMS = {
    "attention": {"segmentation", "attention"},
    "multi_scale": {"scale_0", "scale_1"},
    "instance": {"global", "instance"},
}


@pytest.mark.parametrize("variant", TERMS)
def test_variant_trains_and_logs_its_terms(variant: str, dataset: Path, tmp_path: Path) -> None:
    assert_falling(train(dataset, tmp_path, [variant]))
    events = EventAccumulator(str(tmp_path / "eval" / "tensorboard"))
    events.Reload()
    expected = {"train_loss", *(f"train_loss_{term}" for term in TERMS[variant])}
    assert expected <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train_loss")) == TINY["epochs"]


@pytest.mark.parametrize("variant", ["attention", "multi_scale"])
def test_variants_with_a_head_at_full_resolution_need_no_second_one(variant: str, dataset: Path) -> None:
    networks = []
    for base_channels, full_resolution in ((8, False), (4, True)):
        configs = bundle_path() / "configs"
        parser = ConfigParser(ConfigParser.load_config_file(configs / "train.json"))
        parser.update(json.loads((configs / f"{variant}.json").read_text()))
        parser.update({**TINY, "dataset_dir": str(dataset), "bundle_root": str(bundle_path())})
        parser.update({"base_channels": base_channels, "full_resolution": full_resolution})
        assert max(parser.get_parsed_content("plan").strides[0]) == (1 if full_resolution else 2)
        networks.append(parser.get_parsed_content("network_def").state_dict())
    strided, full = ({name: tuple(weights.shape) for name, weights in network.items()} for network in networks)
    assert strided == full


@pytest.mark.slow
@pytest.mark.parametrize("switches", list(itertools.product((False, True), repeat=3)))
def test_all_combinations_train_an_epoch(switches: tuple[bool, ...], dataset: Path, tmp_path: Path) -> None:
    keys = dict(zip(("instance", "deep_supervision", "attention"), switches, strict=True))
    losses = train(dataset, tmp_path, [], **keys, epochs=1, val_interval=1)
    assert losses
    assert all(math.isfinite(value) for value in losses)


OVERRIDES: dict[str, dict[str, Any]] = {
    "cross_entropy": {"_target_": "monai_iou.WeightedCrossEntropyLoss"},
    "weighted_cross_entropy": {"_target_": "monai_iou.WeightedCrossEntropyLoss", "weight": [0.1, 0.9]},
    "focal": {"_target_": "monai_iou.WeightedCrossEntropyLoss", "gamma": 2.0},
    "iou": {"_target_": "monai_iou.IoULoss", "softmax": True, "batch": True},
    "log_iou": {"_target_": "monai_iou.LogIoULoss", "softmax": True, "batch": True},
    "focal_iou": {"_target_": "monai_iou.FocalIoULoss", "softmax": True, "batch": True},
    "focal_tversky": {"_target_": "monai_iou.FocalTverskyLoss", "softmax": True, "batch": True},
    "generalized_iou": {"_target_": "monai_iou.GeneralizedIoULoss", "softmax": True, "batch": True},
    "iou_ce": {"_target_": "monai_iou.IoUCELoss", "softmax": True, "batch": True},
    "instance_on_the_fly": {"_target_": "monai_iou.InstanceIoULoss", "softmax": True, "regions": "blob"},
}


# The others take the same way through the bundle.
OFTEN = ("cross_entropy",)


@pytest.mark.parametrize(
    "loss",
    [pytest.param(loss, id=name, marks=[] if name in OFTEN else pytest.mark.slow) for name, loss in OVERRIDES.items()],
)
def test_each_loss_trains_by_one_override(loss: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    assert_falling(train(dataset, tmp_path, [], loss=loss))


def test_patches_by_another_transform_as_the_documents_tell(dataset: Path, tmp_path: Path) -> None:
    page = (DOCS / "bundle.md").read_text(encoding="utf-8")
    (line,) = re.findall(
        r'"(train#preprocessing#transforms)": "(\$monai_iou\.workflow\.targets\.without_lesions\([^"]*)"`', page
    )
    content = json.loads((bundle_path() / "configs" / "train.json").read_text(encoding="utf-8"))["train"]
    assert content["random_transforms"][0]["_target_"].endswith("RandCropByLesionsd")
    assert content["deterministic_transforms"][-1]["_target_"].endswith("LesionIndicesd")
    crop = {
        "_target_": "RandCropByPosNegLabeld", "keys": ["image", "label"], "label_key": "label",
        "spatial_size": "$@plan.patch_size", "num_samples": "@num_samples",
    }  # fmt: skip
    keys = {"train#random_transforms#0": crop, "epochs": 1, "batch_size": 5, "val_fraction": 0}
    copy = shutil.copytree(dataset, tmp_path / "data")
    path = copy / "labelsTr" / "case0.nii.gz"
    label = nib.load(path)
    voxels = np.asanyarray(label.dataobj).copy()
    voxels[0, 0, 0] = 1  # one lesion more than in the other cases
    nib.save(nib.Nifti1Image(voxels, label.affine, label.header), path)
    assert all(map(math.isfinite, train(copy, tmp_path / "a", [], **keys, **dict([line]))))
    with pytest.raises(RuntimeError, match="Failed to evaluate") as caught:
        train(copy, tmp_path / "b", [], **keys)
    assert "stack expects each tensor to be equal size" in str(causes(caught.value))
