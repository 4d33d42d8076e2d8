"""The MONAI model zoo's own checks of a bundle, and of its documents; what `test_bundle.py` checks is not repeated."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import SMALL
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from places import ROOT

from monai_iou.bundle_files import bundle_path, copy_bundle
from monai_iou.cli import main
from monai_iou.planning.plan import Plan, make_plan
from monai_iou.workflow.architecture import NETWORKS, with_network
from monai_iou.workflow.config_errors import ConfigError
from monai_iou.workflow.metadata import describe_model

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")

SCHEMA = ROOT.parent / "shared" / "schemas" / "meta_schema_20240725.json"
MAX_FILE = 25 * 1024**2  # bytes: the zoo keeps larger ones outside its repository
FILES = {
    "LICENSE",
    "docs/README.md",
    "docs/data_license.txt",
    *(f"configs/{name}.json" for name in ("metadata", "train", "evaluate", "inference", "multi_gpu_train")),
    "configs/logging.conf",
}
HEADINGS = [
    "Data", "Preprocessing", "Training configuration", "Input and output", "Performance", "MONAI Bundle Commands",
    "Limitations", "References", "License",
]  # fmt: skip


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle_path() / "configs" / "metadata.json").read_text())
    return content


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_bundle(tmp_path_factory.mktemp("zoo") / "bundle")


def test_files_that_the_zoo_asks_for_and_none_that_it_refuses(shipped: Path) -> None:
    files = {str(path.relative_to(shipped)): path for path in shipped.rglob("*") if path.is_file()}
    assert set(files) >= FILES
    for name, path in files.items():
        assert path.suffix in {"", ".json", ".conf", ".md", ".txt", ".png"}, name
        assert path.stat().st_size < MAX_FILE, name
    assert files["LICENSE"].read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_version_stands_in_the_changelog_first_and_is_the_packages(metadata: dict[str, Any]) -> None:
    assert next(iter(metadata["changelog"])) == metadata["version"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", number) and text for number, text in metadata["changelog"].items())
    assert metadata["required_packages_version"]["monai-iou"] == version("monai-iou")


def test_what_the_zoo_would_install_is_what_was_tested(metadata: dict[str, Any]) -> None:
    held = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    asked = {name: metadata[f"{name}_version"] for name in ("monai", "numpy")} | {"torch": metadata["pytorch_version"]}
    asked |= {name: number for name, number in metadata["required_packages_version"].items() if name != "monai-iou"}
    assert {name: held[name] for name in asked} == asked
    assert "optional_packages_version" not in metadata, "the schema of 2024 has replaced it"


def test_every_field_of_the_schema_is_there(metadata: dict[str, Any]) -> None:
    if not SCHEMA.is_file():
        pytest.skip(f"{SCHEMA} is not there")
    properties = json.loads(SCHEMA.read_text())["properties"]
    assert [name for name in properties if name not in metadata] == []
    assert metadata["schema"].endswith(SCHEMA.name)


def test_verify_metadata_offline(shipped: Path, tmp_path: Path) -> None:
    if not SCHEMA.is_file():
        pytest.skip(f"{SCHEMA} is not there")
    schema = shutil.copy(SCHEMA, tmp_path / "schema.json")  # where it is already, MONAI does not download it
    verify_metadata(
        meta_file=str(shipped / "configs" / "metadata.json"),
        filepath=str(schema),
        hash_val=hashlib.sha256(SCHEMA.read_bytes()).hexdigest(),
        hash_type="sha256",
    )


def test_readme_has_the_zoos_headings_and_commands_of_files_that_exist(shipped: Path) -> None:
    text = (shipped / "docs" / "README.md").read_text()
    assert text.startswith("# Model Overview\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    named = set(re.findall(r"configs/\w+\.json", text))
    assert named >= {f"configs/{name}.json" for name in ("train", "evaluate", "inference", "multi_gpu_train")}
    for name in named:
        assert (shipped / name).is_file(), name
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (shipped / "docs" / picture).is_file(), picture


def test_readme_overrides_only_keys_of_its_configs(shipped: Path) -> None:
    text = (shipped / "docs" / "README.md").read_text()
    keys = set()
    for name in ("train", "inference"):
        keys |= set(json.loads((shipped / "configs" / f"{name}.json").read_text()))
    asked = set(re.findall(r"--([a-z_]+)", text)) - {
        *("config_file", "nproc_per_node", "filepath", "ckpt_file", "meta_file", "logdir")
    }
    assert asked <= keys


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the zoo's unit tests feed a bundle: noise with noise for labels, here with three classes."""
    folder = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    entries = []
    for index in range(4):
        for kind, high in (("image", 2), ("label", 3)):
            voxels = rng.integers(0, high, (32, 32, 32)).astype(np.uint8)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / f"{kind}_{index}.nii.gz")
        entries.append({"image": f"image_{index}.nii.gz", "label": f"label_{index}.nii.gz"})
    labels = {"0": "background", "1": "core", "2": "rim"}
    content = {"modality": {"0": "MRI"}, "labels": labels, "training": entries, "test": [entries[0]["image"]]}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def zoo_workflow(bundle: Path, configs: list[str], kind: str, overrides: dict[str, Any]) -> ConfigWorkflow:
    """Build a workflow as the zoo's unit tests do, with the bundle's metadata and logging."""
    return ConfigWorkflow(
        workflow_type=kind,
        config_file=[str(bundle / "configs" / f"{name}.json") for name in configs],
        logging_file=str(bundle / "configs" / "logging.conf"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        bundle_root=str(bundle),
        **overrides,
    )


@pytest.fixture(scope="module")
def trained(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle through the zoo's unit test: properties checked, one epoch, evaluation, inference."""
    bundle = copy_bundle(tmp_path_factory.mktemp("zoo_trained") / "bundle")
    overrides = {**SMALL, "dataset_dir": str(volumes), "epochs": 1}
    for configs in (["train"], ["train", "evaluate"]):
        workflow = zoo_workflow(bundle, configs, "train", overrides)
        workflow.initialize()
        assert workflow.check_properties() == []
        workflow.run()
        workflow.finalize()
    return bundle


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_trained_bundle_passes_the_checks_of_shape_and_export(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = trained / "configs"
    before = json.loads((configs / "metadata.json").read_text())
    assert main(["describe", str(trained)]) == 0
    assert capsys.readouterr().out == f"Written: {configs / 'metadata.json'}\n"
    after = json.loads((configs / "metadata.json").read_text())
    prediction = after["network_data_format"]["outputs"]["pred"]
    assert prediction["num_channels"] == 3
    assert prediction["channel_def"] == {"0": "background", "1": "core", "2": "rim"}
    assert {name for name in before if before[name] != after[name]} <= {
        "label_classes", "pred_classes", "network_data_format"
    }  # fmt: skip
    common = {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.json")}
    verify_net_in_out(net_id="network_def", device="cpu", bundle_root=str(trained), **common)
    model = trained / "models" / "model.ts"
    ckpt_export(
        net_id="network_def", filepath=str(model), ckpt_file=str(trained / "models" / "model.pt"),
        bundle_root=str(trained), **common,
    )  # fmt: skip
    assert torch.jit.load(model)(torch.rand(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


def described(bundle: Path, plan: Plan) -> list[Any]:
    """The sides that `monai-iou describe` writes for a model with this plan, which MONAI's check has tried."""
    (bundle / "models").mkdir(exist_ok=True)
    (bundle / "models" / "model.json").write_text(plan.to_json())
    formats = json.loads(describe_model(bundle).read_text())["network_data_format"]
    places = {"meta_file": str(bundle / "configs" / "metadata.json"), "bundle_root": str(bundle)}
    verify_net_in_out(
        net_id="network_def", config_file=str(bundle / "configs" / "inference.json"), device="cpu", **places
    )
    assert formats["outputs"]["pred"]["spatial_shape"] == formats["inputs"]["image"]["spatial_shape"]
    return list(formats["inputs"]["image"]["spatial_shape"])


@pytest.mark.parametrize("network", NETWORKS)
def test_the_sides_of_every_network_are_what_it_takes(network: str, bundle: Path) -> None:
    thick = with_network(make_plan(None, [], [64, 64, 12], [1.0, 1.0, 4.0], base_channels=4), network)
    slices = with_network(make_plan(None, [], [40, 56, 1], base_channels=4, spatial_dims=2), network)
    follows_the_plan = network in ("unet", "dynunet", "attention_unet")
    expected = ["8*(n+1)", "8*n", "2*n"] if follows_the_plan else ["8*(n+1)", "8*n", "8*n"]
    flat = ["8*n", "8*(n+1)", 1]
    if network == "swin_unetr":
        expected, flat = ["32*(n+1)", "32*n", "32*n"], ["32*(n+1)", "32*n", 1]
    assert described(bundle, thick) == expected
    assert described(bundle, slices) == flat


def test_of_an_own_network_the_patch_is_known(bundle: Path) -> None:
    own = {"network_def": {"_target_": "BasicUNet", "spatial_dims": 3, "out_channels": 2, "features": [4] * 6}}
    plan = with_network(make_plan(None, [], [32, 48, 32], base_channels=4), definition=own)
    assert described(bundle, plan) == list(plan.patch_size)


def test_inference_without_weights_as_the_zoo_runs_it(shipped: Path, volumes: Path, tmp_path: Path) -> None:
    content = json.loads((shipped / "configs" / "inference.json").read_text())
    loader = content["handlers"][0]
    assert "_disabled_" in loader, "the zoo's tests turn off the first handler, which loads the weights"
    overrides = {
        **{"dataset_dir": str(volumes), "output_dir": str(tmp_path), "handlers#0#_disabled_": True},
        **{"patch_size": [16, 16, 16], "base_channels": 4},
    }
    workflow = zoo_workflow(shipped, ["inference"], "inference", overrides)
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    workflow.finalize()
    assert [path.name for path in tmp_path.iterdir()] == ["image_0.nii.gz"]


def test_metadata_of_what_was_never_trained_is_refused(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ValueError, match=r"^Expected `.*model\.json` to be there, but it is not: train the bundle first"
    ):
        describe_model(shipped)
    with pytest.raises(ValueError, match=r"metadata\.json` to be there, but it is not: name the folder of a bundle\.$"):
        describe_model(tmp_path)
    assert main(["describe", str(tmp_path)]) == 1
    assert "name the folder of a bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"\xff", "it cannot be read ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
        (b"{", "it cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        (b"[]", "it holds no object, {...}"),
    ],
)
def test_damaged_metadata_are_named(text: bytes, why: str, tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "run")
    (bundle / "models").mkdir()
    (bundle / "models" / "model.json").touch()
    path = bundle / "configs" / "metadata.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        describe_model(bundle)
    remedy = "save it in UTF-8" if "codec" in why else "correct it"
    assert str(caught.value) == (
        f"Expected {path} to be a JSON file of the bundle's metadata in UTF-8, but {why}: {remedy}."
    )
    assert main(["describe", str(bundle)]) == 1


@pytest.mark.parametrize("described", [".", "fold1"])
def test_metadata_of_folds_are_those_of_their_one_plan(
    described: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_bundle(tmp_path / "run")
    plan = Plan(("T1", "T2"), {0: "background", 1: "oedema", 2: "core"}, (1.0,) * 3, (16,) * 3, (8, 16), ((2, 2, 2),),
                ({"kind": "zscore"},) * 2)  # fmt: skip
    for fold in ("fold1", "fold10"):
        (run / fold / "models").mkdir(parents=True)
        (run / fold / "models" / "model.json").write_text(plan.to_json(), encoding="utf-8")
        (run / fold / "models" / "model.pt").touch()
    monkeypatch.chdir(run / described)
    for named in (run / described, Path()):
        written = describe_model(named)
        assert written.samefile(run / "configs" / "metadata.json")
        formats = json.loads(written.read_text(encoding="utf-8"))["network_data_format"]
        assert formats["inputs"]["image"]["channel_def"] == {"0": "T1", "1": "T2"}
        assert formats["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "oedema", "2": "core"}
    assert not (run / "fold1" / "configs").exists()


def test_names_with_the_signs_of_a_config_are_plain_text_in_metadata(tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "run")
    labels = {0: "$background", 1: "%stenosis", 2: "50 % (a@#b)"}
    plan = Plan(("@T1", "$import os"), labels, (1.0,) * 3, (16,) * 3, (8, 16), ((2, 2, 2),), ({"kind": "zscore"},) * 2)
    (bundle / "models").mkdir()
    (bundle / "models" / "model.json").write_text(plan.to_json(), encoding="utf-8")
    written = json.loads(describe_model(bundle).read_text(encoding="utf-8"))
    parser = ConfigParser()
    parser.read_meta(bundle / "configs" / "metadata.json")
    parser.parse()
    read = parser.get_parsed_content("_meta_")
    for content in (written, read):
        formats = content["network_data_format"]
        assert formats["inputs"]["image"]["channel_def"] == {"0": "_T1", "1": "_import os"}
        assert formats["outputs"]["pred"]["channel_def"]["1"] == "_stenosis"
        assert "1 _stenosis, 2 50 _ (a_#b)" in content["label_classes"].replace("::", "#")
        assert content["pred_classes"].startswith("one channel per class: _background, _stenosis, 50 _ ")


def test_metadata_that_cannot_be_written_stay_as_they_were(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "models").mkdir()
    (bundle / "models" / "model.json").write_text(make_plan(None, [], [16, 16, 16], base_channels=4).to_json())
    path = bundle / "configs" / "metadata.json"
    before, files = path.read_bytes(), sorted(path.parent.iterdir())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(["describe", str(bundle)]) == 1
    assert capsys.readouterr().err == (
        f"Error: Expected to write `{path}`, but got the error 'No space left on device': free space or choose another "
        "folder.\n"
    )
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == files


def test_a_folder_in_a_bundle_that_is_no_fold_has_no_metadata(tmp_path: Path) -> None:
    run = copy_bundle(tmp_path / "run")
    (run / "fold0_old" / "models").mkdir(parents=True)
    for file in ("model.json", "model.pt"):
        (run / "fold0_old" / "models" / file).touch()
    with pytest.raises(ValueError, match=r"fold0_old/configs/metadata\.json` to be there, but it is not: name the"):
        describe_model(run / "fold0_old")
    with pytest.raises(ValueError, match=r"run/models/model\.json` to be there, but it is not: train the bundle first"):
        describe_model(run)
