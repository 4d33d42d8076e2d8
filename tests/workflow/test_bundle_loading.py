"""The bundle's data loading: what leaves the training loader, with and without worker processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import SMALL
from monai.bundle import ConfigParser, ConfigWorkflow

from monai_iou.bundle_files import bundle_path

# Python's advice against forking beside threads, which torch's loader does by design.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*os.fork:DeprecationWarning"),
]


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A dataset whose images are their labels plus one."""
    rng = np.random.default_rng(0)
    entries = []
    for index in range(8):
        label = (rng.random((28, 28, 20)) < 0.3).astype(np.uint8)
        for kind, voxels in (("image", label + 1), ("label", label)):
            nib.save(nib.Nifti1Image(voxels.astype(np.uint8), np.eye(4)), tmp_path / f"{kind}{index}.nii.gz")
        entries.append({"image": f"image{index}.nii.gz", "label": f"label{index}.nii.gz"})
    content = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "lesion"}, "training": entries}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_image_and_label_get_the_same_crop_flips_and_deformation(workers: int, copies: Path, tmp_path: Path) -> None:
    # Without the transforms of intensities, and with one interpolation, both must be deformed alike.
    random = "train#random_transforms"
    geometry_only: dict[str, Any] = {f"{random}#{index}#prob": 0.0 for index in range(6, 12)}
    geometry_only |= {f"{random}#5#mode": ["nearest"] * 2}
    geometry_only |= {f"{random}#5#{name}_prob": 0.5 for name in ("affine", "elastic")}
    workflow = ConfigWorkflow(
        config_file=str(bundle_path() / "configs" / "train.json"),
        workflow_type="train",
        **{**SMALL, **geometry_only, "num_samples": 4, "val_fraction": 0, "num_workers": workers},
        dataset_dir=str(copies),
        ckpt_dir=str(tmp_path / "models"),
        output_dir=str(tmp_path / "eval"),
    )
    workflow.initialize()
    loader = workflow.parser.get_parsed_content("train#dataloader")
    first: list[bytes] = []
    for _ in range(6):
        for number, batch in enumerate(loader):
            assert torch.equal(batch["image"] > 0, batch["label"] > 0)
            # The network pays for a MetaTensor's bookkeeping in every operation.
            assert type(batch["image"]) is type(batch["label"]) is torch.Tensor
            # MONAI's losses subtract labels and sum their squares, for which the bytes of a cached label are too small.
            assert batch["image"].dtype == batch["label"].dtype == torch.float32
            if number == 0:
                first.append(batch["label"].numpy().tobytes())
    assert len(set(first)) == len(first), "every epoch cuts other patches"


def test_configs_resolve_where_a_consumer_brings_the_data(copies: Path, tmp_path: Path) -> None:
    # MONAI Deploy builds the postprocessing, and MONAI Label the trainer, without a folder in the Decathlon layout.
    configs = bundle_path() / "configs"
    places = {"bundle_root": str(tmp_path), "dataset_dir": str(tmp_path / "dataset")}
    parser = ConfigParser(ConfigParser.load_config_file(configs / "inference.json"))
    parser.update(places)
    assert parser.get_parsed_content("postprocessing") is not None
    pairs = json.loads((copies / "dataset.json").read_text())["training"]
    items = [{kind: str(copies / file) for kind, file in pair.items()} for pair in pairs]
    parser = ConfigParser(ConfigParser.load_config_file(configs / "train.json"))
    parser.update({**places, **SMALL, "train#dataset#data": items, "validate#dataset#data": items[:1]})
    assert parser.get_parsed_content("train#trainer").state.max_epochs == SMALL["epochs"]
