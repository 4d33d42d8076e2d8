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
from monai.bundle import ConfigParser, ConfigWorkflow, load

from monai_iou.bundle_files import bundle_path, copy_bundle
from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.planning.plan import make_plan
from monai_iou.workflow.architecture import with_network
from monai_iou.workflow.checkpoint_files import write_together
from monai_iou.workflow.models import trained_plan
from monai_iou.workflow.settings import Settings
from monai_iou.workflow.variants import build_network

# Python's advice against forking beside threads, which torch's loader does by design.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*os.fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
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


@pytest.mark.parametrize("kind", [None, "train", "inference"])
def test_a_loaded_bundle_has_the_weights_of_its_model_also_beside_a_dataset(
    kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MONAI's default is the config of the training, which plans by the data; a model of another plan lies there."""
    monkeypatch.chdir(tmp_path)
    bundle = copy_bundle(tmp_path / "own")
    write_phantom_dataset(bundle / "dataset", training=3, evaluation=1, shape=(32, 32, 24))
    plan = with_network(make_plan(None, [], [24, 24, 16], None, 4), deep_supervision=True)
    network = build_network(plan)
    models = bundle / "models"
    write_together({models / "model.json": plan.to_json(), models / "model.pt": network.state_dict()})
    loaded = load(name="own", bundle_dir=".", **({} if kind is None else {"workflow_type": kind})).state_dict()
    assert loaded.keys() == network.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


def test_a_training_that_may_start_makes_its_own_plan(tmp_path: Path) -> None:
    def found(*, resume: bool = False, overwrite: bool = False) -> Any:
        return trained_plan(Settings(ckpt_dir=str(tmp_path), resume=resume, overwrite=overwrite))

    plan = make_plan(None, [], [24, 24, 16])
    (tmp_path / "model.json").write_text(plan.to_json(), encoding="utf-8")
    assert found() is None, "weights are missing"
    (tmp_path / "model.pt").touch()
    assert found() == plan
    assert found(resume=True) is found(overwrite=True) is None
    (tmp_path / "model.json").write_text("{", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"model\.json"):
        found()
    assert found(overwrite=True) is None
