"""The shipped bundle, run by MONAI's own workflows on a tiny dataset: files, properties, scores, geometry, loading."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from bundle_runs import SMALL
from monai.bundle import ConfigWorkflow, ckpt_export, load, verify_net_in_out
from places import SHARED

from monai_iou.bundle_files import bundle_path, copy_bundle
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.files import OutputError

# What MONAI 1.6 and torch 2.13 themselves warn of while a workflow is built or exported; nothing of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
]

SCHEMA = SHARED / "schemas" / "meta_schema_20240725.json"


class Run(NamedTuple):
    bundle: Path
    data: Path
    overrides: dict[str, Any]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The bundle trained for two epochs on four phantoms."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_phantom_dataset(folder / "dataset", training=4, evaluation=2, shape=(32, 32, 24))
    bundle = copy_bundle(folder / "bundle")
    overrides = {"bundle_root": str(bundle), "dataset_dir": str(data), **SMALL}
    run_workflow(bundle, ["train"], overrides)
    return Run(bundle, data, overrides)


@pytest.fixture(scope="session")
def masks(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of the two test volumes."""
    folder = tmp_path_factory.mktemp("masks")
    run_workflow(trained.bundle, ["inference"], {**_places(trained), "output_dir": str(folder)})
    return folder


def _places(run: Run) -> dict[str, Any]:
    return {"bundle_root": str(run.bundle), "dataset_dir": str(run.data)}


def test_training_leaves_whole_files_that_load_without_pickle(trained: Run) -> None:
    models = trained.bundle / "models"
    assert sorted(path.name for path in models.iterdir()) == ["last_epoch.pt", "model.json", "model.pt"]
    last = torch.load(models / "last_epoch.pt", weights_only=True)
    assert last["epoch"] == 2
    assert last["optimizer"]["state"]
    weights = torch.load(models / "model.pt", weights_only=True)
    assert set(weights) == set(last["model"])
    plan = json.loads((models / "model.json").read_text())
    assert plan["labels"] == {"0": "background", "1": "lesion"}
    assert plan["intensity"][0]["kind"] == "ct"


def test_tensorboard_has_loss_and_scores(trained: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.bundle / "eval" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train_loss", "val_mean_iou", "val_mean_dice"} <= set(tags)
    assert [event.step for event in events.Scalars("val_mean_iou")] == [1, 2]


@pytest.mark.parametrize("configs", [["train"], ["train", "evaluate"], ["inference"]])
def test_no_property_is_missing(trained: Run, configs: list[str]) -> None:
    overrides = trained.overrides if configs[0] == "train" else _places(trained)
    workflow = ConfigWorkflow(
        config_file=[str(trained.bundle / "configs" / f"{name}.json") for name in configs],
        workflow_type="train" if configs[0] == "train" else "inference",
        **overrides,
    )
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.parametrize("config", ["train", "inference"])
def test_network_takes_and_gives_what_the_metadata_says(config: str) -> None:
    configs = bundle_path() / "configs"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / f"{config}.json"),
        device="cpu",
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_export_to_torchscript(trained: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.ts"
    ckpt_export(
        net_id="network_def",
        filepath=str(path),
        ckpt_file=str(trained.bundle / "models" / "model.pt"),
        meta_file=str(trained.bundle / "configs" / "metadata.json"),
        config_file=str(trained.bundle / "configs" / "inference.json"),
        bundle_root=str(trained.bundle),
    )
    image = torch.rand(1, 1, 16, 16, 16)
    network = load(trained.bundle.name, bundle_dir=trained.bundle.parent, workflow_type="inference", device="cpu")
    torch.testing.assert_close(torch.jit.load(path)(image), network.eval()(image))


@pytest.mark.parametrize("workflow_type", ["train", "inference"])
def test_load_gives_the_trained_network_from_any_directory(
    trained: Run, workflow_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = load(trained.bundle.name, bundle_dir=trained.bundle.parent, workflow_type=workflow_type, device="cpu")
    stored = torch.load(trained.bundle / "models" / "model.pt", weights_only=True)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, stored[name])
    assert list(tmp_path.iterdir()) == []


def test_scores_of_evaluate_are_those_of_the_masks_that_inference_wrote(trained: Run, masks: Path) -> None:
    run_workflow(trained.bundle, ["train", "evaluate"], trained.overrides)
    assert any(nib.load(path).get_fdata().any() for path in masks.iterdir())
    for name in ("test_mean_iou", "test_mean_dice"):
        with (trained.bundle / "eval" / f"{name}_raw.csv").open() as stream:
            rows = {Path(row["filename"]).name: float(row["mean"]) for row in csv.DictReader(stream)}
        assert len(rows) == 2
        for file, score in rows.items():
            predicted = nib.load(masks / file).get_fdata() > 0
            true = nib.load(trained.data / "labelsTs" / file.replace("image", "label")).get_fdata() > 0
            both, either = (predicted & true).sum(), (predicted | true).sum()
            expected = both / either if name == "test_mean_iou" else 2 * both / (both + either)
            assert score == pytest.approx(expected, abs=1e-4)


def test_masks_lie_exactly_on_their_images(trained: Run, masks: Path) -> None:
    files = sorted((trained.data / "imagesTs").iterdir())
    assert [path.name for path in files] == sorted(path.name for path in masks.iterdir())
    for path in files:
        _same_grid(path, masks / path.name)


@pytest.mark.parametrize("directions", ["LAS", "LPS", "RAS", "PIL"])
def test_masks_in_any_orientation(trained: Run, tmp_path: Path, directions: str) -> None:
    source = nib.load(sorted((trained.data / "imagesTs").iterdir())[0])
    affine = np.array(source.affine)
    affine[:3, :3] = affine[:3, :3] @ np.diag([-1, -1, 1])  # oblique, near RAS
    turned = nib.Nifti1Image(np.asanyarray(source.dataobj)[:31, :27], affine).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(directions))
    )
    (tmp_path / "images").mkdir()
    nib.save(turned, tmp_path / "images" / "odd.nii.gz")
    run_workflow(
        trained.bundle,
        ["inference"],
        {
            "bundle_root": str(trained.bundle),
            "dataset_dir": str(tmp_path / "images"),
            "output_dir": str(tmp_path / "out"),
        },
    )
    _same_grid(tmp_path / "images" / "odd.nii.gz", tmp_path / "out" / "odd.nii.gz")


def _same_grid(image: Path, mask: Path) -> None:
    by_nibabel = nib.load(image), nib.load(mask)
    assert by_nibabel[0].shape == by_nibabel[1].shape
    np.testing.assert_allclose(by_nibabel[0].affine, by_nibabel[1].affine, atol=1e-4)
    assert by_nibabel[1].get_data_dtype() == np.uint8
    by_itk = SimpleITK.ReadImage(str(image)), SimpleITK.ReadImage(str(mask))
    for get in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(by_itk[0], get)(), getattr(by_itk[1], get)(), atol=1e-4)


def test_masks_hold_the_datasets_own_label_values(tmp_path: Path) -> None:
    data = write_phantom_dataset(tmp_path / "dataset", training=2, evaluation=1, shape=(32, 32, 24))
    content = json.loads((data / "dataset.json").read_text())
    for part in ("labelsTr", "labelsTs"):
        for path in (data / part).iterdir():
            old = nib.load(path)
            nib.save(nib.Nifti1Image((np.asanyarray(old.dataobj) > 0).astype(np.int16) * 300, old.affine), path)
    labels = {"0": "background", "300": "lesion", "7": "other"}
    (data / "dataset.json").write_text(json.dumps({**content, "labels": labels}))
    bundle = copy_bundle(tmp_path / "bundle")
    overrides = {
        **{"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(tmp_path / "masks")},
        **{"patch_size": [24, 24, 16], "base_channels": 4},
    }
    # An untrained network answers with every class somewhere.
    torch.manual_seed(0)
    run_workflow(bundle, ["inference"], {**overrides, "load_pretrain": False})
    values = np.unique(nib.load(next((tmp_path / "masks").iterdir())).get_fdata())
    assert set(values) <= {0, 7, 300}
    assert len(values) > 1
    run_workflow(bundle, ["train"], {**overrides, **SMALL, "epochs": 1})
    assert json.loads((bundle / "models" / "model.json").read_text())["labels"]["300"] == "lesion"


def test_nothing_warns_on_a_cpu(trained: Run, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_workflow(trained.bundle, ["train"], {**trained.overrides, "epochs": 1, "ckpt_dir": str(tmp_path)})
    assert [str(warning.message) for warning in caught] == []


def test_a_terminal_gets_a_bar_with_loss_and_a_line_an_epoch(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (sys.stderr, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    run_workflow(trained.bundle, ["train"], {**trained.overrides, "ckpt_dir": str(tmp_path)})
    shown = capsys.readouterr()
    assert "epoch 2/2" in shown.err
    assert "val_mean_iou" in shown.err
    assert "loss" in shown.err
    assert "epoch 2/2" not in shown.out, "the log's lines would break the bar"
    run_workflow(trained.bundle, ["inference"], {**_places(trained), "output_dir": str(tmp_path / "masks")})
    assert "volumes" in capsys.readouterr().err


def test_metadata_fits_the_zoos_schema() -> None:
    import jsonschema

    metadata = json.loads((bundle_path() / "configs" / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]
    if not SCHEMA.is_file():
        pytest.skip(f"{SCHEMA} is not there")
    jsonschema.validate(metadata, json.loads(SCHEMA.read_text()))


def test_copy_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="new or empty folder"):
        copy_bundle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_existing_folder_is_filled_and_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "mounted"
    target.mkdir()
    before = target.stat().st_ino
    monkeypatch.chdir(target)
    copy_bundle(".")
    assert (Path.cwd() / "configs" / "train.json").is_file()
    assert target.stat().st_ino == before
    assert {path.name for path in target.iterdir()} == {"LICENSE", "configs", "docs"}


@pytest.mark.parametrize("step", ["copytree", "rename"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_copy_that_fails_leaves_nothing(
    step: str, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "run", Path.rename
    if exists:
        target.mkdir()

    def fail_at_the_configs(self: Path, other: Path) -> Path:
        if self.name == "configs":
            raise OSError(28, "No space left on device")
        return rename(self, other)

    def fail(source: Path, partial: Path, **_: object) -> None:
        partial.mkdir()
        (partial / "half").touch()
        raise OSError(28, "No space left on device")

    if step == "rename":
        monkeypatch.setattr(Path, "rename", fail_at_the_configs)
    else:
        monkeypatch.setattr(shutil, "copytree", fail)
    with pytest.raises(OutputError) as caught:
        copy_bundle(target)
    assert str(caught.value) == (
        f"Expected to copy the bundle to `{target}`, but got the error 'No space left on device': free space or choose "
        "another folder."
    )
    assert list(tmp_path.rglob("*")) == ([target] if exists else [])
