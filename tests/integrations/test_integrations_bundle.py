"""Programs that take the bundle's folder: MONAI's loader and exporters, federated learning, labelling, deployment."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integration_environment import TORCHVISION, recipe, run
from monai.bundle import ConfigParser, verify_metadata
from places import SHARED

from monai_iou.bundle_files import BUNDLE_NAME, copy_bundle
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.planning.stored import load_plan
from monai_iou.workflow.postprocessing import LabelsFromProbabilitiesd, Postprocessing

# The warnings are other packages' own.
pytestmark = pytest.mark.filterwarnings("default")

SCHEMA = SHARED / "schemas" / "meta_schema_20240725.json"
SMALL = {"patch_size": [32, 32, 16], "base_channels": 4, "epochs": 2, "val_interval": 1, "num_samples": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dataset` and the bundle, trained for two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    write_phantom_dataset(folder / "dataset", training=3, evaluation=1, shape=(48, 48, 24))
    bundle = copy_bundle(folder / BUNDLE_NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_workflow(bundle, ["train"], {"bundle_root": str(bundle), "dataset_dir": str(folder / "dataset"), **SMALL})
    return folder


@pytest.fixture
def workspace(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it as the working directory, in which recipes run; without the dataset's place in the bundle."""
    path = shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(path)
    before = list(sys.path)
    yield path
    sys.path[:] = before


def follow(heading: str, index: int = 0) -> dict[str, Any]:
    """Run a recipe's Python block and return its names."""
    names: dict[str, Any] = {}
    exec(compile(recipe(heading, "py")[index], heading, "exec"), names)
    return names


def patch(workspace: Path) -> torch.Tensor:
    size = load_plan(workspace / BUNDLE_NAME / "models" / "model.json").patch_size
    return torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))


def weights(workspace: Path) -> dict[str, torch.Tensor]:
    return torch.load(workspace / BUNDLE_NAME / "models" / "model.pt", weights_only=True)


def test_load_gives_the_trained_network_for_inference_and_for_training(workspace: Path) -> None:
    names = follow("monai.bundle.load and create_workflow")
    for network in (names["network"], names["network_to_train"]):
        assert isinstance(network, torch.nn.Module)
        loaded = network.state_dict()
        assert loaded.keys() == weights(workspace).keys()
        assert all(torch.equal(loaded[name], value) for name, value in weights(workspace).items())


def test_create_workflow_runs_inference(workspace: Path) -> None:
    follow("monai.bundle.load and create_workflow", 1)
    (mask,) = (workspace / "masks").glob("*.nii.gz")
    assert mask.name.startswith("phantom_03")


@pytest.mark.skipif(not SCHEMA.exists(), reason="needs the model zoo's schema in ../shared/schemas")
def test_metadata_fits_the_model_zoos_schema(workspace: Path) -> None:
    shutil.copy(SCHEMA, "schema.json")
    verify_metadata(meta_file=f"{BUNDLE_NAME}/configs/metadata.json", filepath="schema.json")
    broken = json.loads(Path(BUNDLE_NAME, "configs", "metadata.json").read_text())
    del broken["network_data_format"]["inputs"]["image"]["num_channels"]
    Path("broken.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="num_channels"):
        verify_metadata(meta_file="broken.json", filepath="schema.json")


def test_a_federated_client_trains_and_evaluates(workspace: Path) -> None:
    before = weights(workspace)
    names = follow("NVFlare")
    update = {name: torch.as_tensor(value) for name, value in names["update"].weights.items()}
    assert update.keys() == before.keys()
    assert any(not torch.equal(value, before[name]) for name, value in update.items())
    assert 0 <= names["scores"].metrics["test_mean_iou"] <= 1
    # the weights of the best model on disk, as the server asks for them at the end
    from monai.fl.utils.constants import ExtraItems, ModelType

    best = names["client"].get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL}).weights
    assert best.keys() == weights(workspace).keys()


def test_the_best_model_of_a_federated_client_is_that_of_all_rounds(workspace: Path) -> None:
    from monai.fl.client import MonaiAlgo
    from monai.fl.utils.constants import ExtraItems, ModelType
    from monai.fl.utils.exchange_object import ExchangeObject

    given = workspace / BUNDLE_NAME / "models" / "model.json"
    keys = {"dataset_dir": "dataset", "plan": f"$monai_iou.planning.load_plan('{given}')", "val_interval": 1}
    client = MonaiAlgo(
        bundle_root=BUNDLE_NAME,
        local_epochs=1,
        send_weight_diff=False,
        train_kwargs={**keys, "val_fraction": 0.4},
        config_evaluate_filename=None,
    )
    client.initialize()
    evaluator = client.train_workflow.parser.get_parsed_content("validate#evaluator")
    best = []
    for finished in (1, 2):
        client.train(ExchangeObject(weights=client.get_weights().weights))
        assert (evaluator.state.best_metric_epoch, client.trainer.state.epoch) == (1, finished)
        evaluator.state.best_metric = 2.0  # no later round is better
        best.append(client.get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL}).weights)
    client.finalize()
    assert all(torch.equal(torch.as_tensor(best[0][name]), torch.as_tensor(best[1][name])) for name in best[0])
    own = client.train_workflow.parser.get_parsed_content("cases").training
    assert load_plan(given).trained == tuple(item["case"] for item in own)


def test_auto3dseg_parses_the_loss_alone_and_supervises_deeply() -> None:
    import yaml
    from monai.losses import DeepSupervisionLoss

    parser = ConfigParser({"sigmoid": False, **yaml.safe_load(recipe("Auto3DSeg", "yaml")[0])})
    config = {"loss": parser.get_parsed_content("loss", instantiate=False).get_config()}
    # what the templates do with the resolved config
    loss_function = DeepSupervisionLoss(ConfigParser(config["loss"]).get_parsed_content(instantiate=True))
    outputs = [torch.randn(2, 3, *[16 // 2**scale] * 3, requires_grad=True) for scale in range(3)]
    labels = torch.randint(0, 3, (2, 1, 16, 16, 16)).to(torch.uint8)
    loss = loss_function(outputs, labels)
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(output.grad is not None and output.grad.abs().sum() > 0 for output in outputs)


@pytest.mark.slow
def test_onnxruntime_gives_the_same_mask(workspace: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}, which .ci/integrations installs")
    size = load_plan(workspace / BUNDLE_NAME / "models" / "model.json").patch_size
    command = recipe("ONNX", "sh")[0]
    assert "[1,1,64,64,64]" in command
    run(command.replace("[1,1,64,64,64]", str([1, 1, *size]).replace(" ", "")), workspace)
    names = follow("ONNX")
    network = follow("monai.bundle.load and create_workflow")["network"].eval()
    volume = torch.nn.functional.interpolate(patch(workspace), scale_factor=1.5)
    with torch.no_grad():
        from monai.inferers import SlidingWindowInferer

        inferer = SlidingWindowInferer(size, sw_batch_size=1, overlap=0.5, mode="gaussian")
        expected, found = inferer(volume, network), inferer(volume, names["network"])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    mask = expected.argmax(1)
    assert 0 < mask.float().mean() < 1
    assert torch.equal(found.argmax(1), mask)


@pytest.mark.slow
def test_an_exported_network_gives_the_bundles_mask(workspace: Path) -> None:
    import nibabel as nib

    follow("monai.bundle.load and create_workflow", 1)
    export, segment = recipe("TorchScript", "sh")
    run(export, workspace)
    (workspace / BUNDLE_NAME / "models" / "model.pt").unlink()  # the exported file is what segments
    run(segment, workspace)
    (expected,) = (workspace / "masks").glob("*.nii.gz")
    found = np.asarray(nib.load(workspace / "masks_of_torchscript" / expected.name).dataobj)
    assert found.any()
    assert (found == np.asarray(nib.load(expected).dataobj)).all()


@pytest.mark.slow
def test_mlflow_records_the_training(workspace: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow, which .ci/integrations installs")
    (command,) = recipe("MLflow", "sh")
    settings = " ".join(f"--{name} '{value}'" for name, value in SMALL.items())
    run(command.strip() + " " + settings, workspace)
    client = mlflow.tracking.MlflowClient(f"sqlite:///{workspace}/{BUNDLE_NAME}/eval/mlruns.db")
    found = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    assert len(found) == 1
    metrics = found[0].data.metrics
    assert {"train_loss", "val_mean_iou"} <= metrics.keys()
    assert len(client.get_metric_history(found[0].info.run_id, "val_mean_iou")) == SMALL["epochs"]


@pytest.fixture
def frozen(workspace: Path) -> Path:
    """The folder of deployment's recipe: a bundle whose inference.json holds the plan."""
    follow("MONAI Deploy")
    return workspace / "deploy"


def test_a_frozen_config_needs_no_file_beside_it(frozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = load_plan(frozen.parent / BUNDLE_NAME / "models" / "model.json")
    monkeypatch.chdir(frozen.parent.parent)
    parser = ConfigParser(ConfigParser.load_config_file(frozen / "configs" / "inference.json"))
    assert parser.get_parsed_content("plan") == stored


def test_a_frozen_config_holds_a_network_of_ones_own_and_names_of_any_signs(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = workspace / BUNDLE_NAME / "models" / "model.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["modalities"] = ["MR@3T #1 %::x"]
    own = {
        "_target_": "BasicUNet", "spatial_dims": "$@plan.spatial_dims", "in_channels": "$@plan.in_channels",
        "out_channels": "$@plan.out_channels", "features": [4, 4, 8, 8, 8, 4],
    }  # fmt: skip
    network = {"network": "own", "deep_supervision": False, "attention": False, "definition": {"network_def": own}}
    content["network"] = network
    path.write_text(json.dumps(content), encoding="utf-8")
    follow("MONAI Deploy")
    monkeypatch.chdir(workspace.parent)
    parser = ConfigParser(ConfigParser.load_config_file(workspace / "deploy" / "configs" / "inference.json"))
    assert parser.get_parsed_content("plan") == load_plan(path)
    assert type(parser.get_parsed_content("network_def")).__name__ == "BasicUNet"


TUNED = Postprocessing(0.35, (60.0,))


def deploy(workspace: Path, tuned: Postprocessing | None) -> Path:
    """Follow deployment's recipe with a bundle that was tuned, or was not."""
    if tuned is not None:
        (workspace / BUNDLE_NAME / "models" / "postprocessing.json").write_text(tuned.to_json())
    follow("MONAI Deploy")
    return workspace / "deploy"


@pytest.mark.parametrize("tuned", [None, TUNED], ids=["untuned", "tuned"])
def test_a_frozen_config_makes_the_bundles_labels(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, tuned: Postprocessing | None
) -> None:
    folder = deploy(workspace, tuned)
    monkeypatch.chdir(workspace.parent)
    parser = ConfigParser(ConfigParser.load_config_file(folder / "configs" / "inference.json"))
    found = [each["_target_"].rpartition(".")[2] for each in parser["postprocessing"]["transforms"]]
    place = f"postprocessing::transforms::{found.index('LabelsFromProbabilitiesd')}"
    assert parser.get_parsed_content(f"{place}::settings") == (tuned or Postprocessing())
    probabilities = torch.rand(1, 12, 10, 8, generator=torch.Generator().manual_seed(0))
    item = {"pred": torch.cat([1 - probabilities, probabilities])}
    labels = parser.get_parsed_content(place)(item)["pred"]
    assert torch.equal(labels, LabelsFromProbabilitiesd("pred", tuned)(item)["pred"])
    assert torch.equal(labels, LabelsFromProbabilitiesd("pred")(item)["pred"]) == (tuned is None)


def deploy_operator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import monai-deploy-app-sdk's bundle operator from its wheel, with stand-ins for the runtime (holoscan)."""
    folder = os.environ.get("MONAI_DEPLOY_WHEEL")
    if not folder:
        pytest.skip("needs MONAI_DEPLOY_WHEEL, the unpacked monai-deploy-app-sdk of .ci/integrations")
    import importlib.util

    import monai

    root = Path(folder) / "monai" / "deploy"
    for name in ("monai.deploy", "monai.deploy.core", "monai.deploy.operators", "monai.deploy.utils"):
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[2:]))]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    core = sys.modules["monai.deploy.core"]
    for name in ("AppContext", "Fragment", "Image", "IOType", "OperatorSpec"):
        setattr(core, name, type(name, (), {}))
    base = types.ModuleType("monai.deploy.operators.inference_operator")
    base.InferenceOperator = type("InferenceOperator", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.setattr(monai, "deploy", sys.modules["monai.deploy"], raising=False)
    name = "monai.deploy.operators.monai_bundle_inference_operator"
    spec = importlib.util.spec_from_file_location(name, root / "operators" / "monai_bundle_inference_operator.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("form", ["directory", "torchscript"])
@pytest.mark.parametrize("tuned", [None, TUNED], ids=["untuned", "tuned"])
def test_deploys_operator_gives_the_bundles_mask(
    form: str, tuned: Postprocessing | None, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator's own reading of configs, preprocessing, network, inferer and postprocessing."""
    import nibabel as nib
    from monai.data import MetaTensor
    from monai.transforms import LoadImage

    operators = deploy_operator(monkeypatch)
    work, frozen = workspace, deploy(workspace, tuned)
    follow("monai.bundle.load and create_workflow", 1)
    (expected_path,) = (work / "masks").glob("*.nii.gz")
    expected = np.asarray(nib.load(expected_path).dataobj)
    if form == "torchscript":
        run(recipe("MONAI Deploy", "sh")[0], work)

    monkeypatch.chdir(work.parent)
    operator = object.__new__(operators.MonaiBundleInferenceOperator)
    operator._bundle_config_names = operators.BundleConfigNames()
    operator._bundle_path = frozen if form == "directory" else frozen / "models" / "model.ts"
    operator._init_config(["inference"])
    assert list(operator._inputs) == ["image"]
    assert list(operator._outputs) == ["pred"]
    names = [type(t).__name__ for t in (*operator._preproc.transforms, *operator._postproc.transforms)]
    assert not [name for name in names if "LoadImage" in name or "SaveImage" in name]
    if form == "directory":
        network = operators._load_model_from_directory_bundle(frozen, torch.device("cpu"), operator._parser)
    else:
        network = torch.jit.load(str(operator._bundle_path), map_location="cpu").eval()
    operator._model_network = network

    image = LoadImage(image_only=True)(str(work / "dataset" / "imagesTs" / "phantom_03.nii.gz"))
    assert isinstance(image, MetaTensor)
    inputs = operator.pre_process({"image": image})
    with torch.no_grad():
        output = operator.predict(data=inputs["image"][None])
    result = operator.post_process(output[0], **{operator.kw_preprocessed_inputs: inputs})
    mask = np.asarray(result["pred"] if isinstance(result, dict) else result).squeeze()
    assert mask.shape == expected.shape
    assert (mask == expected).all()


def monai_label() -> Any:
    """Import MONAI Label's tasks for bundles."""
    pytest.importorskip("monailabel", reason="needs monailabel, which .ci/integrations installs")
    exec(TORCHVISION, {})
    from monailabel.tasks.infer.bundle import BundleInferTask
    from monailabel.tasks.train.bundle import BundleTrainTask

    return BundleInferTask, BundleTrainTask


@pytest.mark.slow
def test_monai_label_segments(workspace: Path) -> None:
    import nibabel as nib

    monai_label()
    names = follow("MONAI Label")
    follow("monai.bundle.load and create_workflow", 1)
    (expected_path,) = (workspace / "masks").glob("*.nii.gz")
    task = names["task"]
    assert task.is_valid()
    assert task.labels == {"lesion": 1}
    found = np.asarray(nib.load(names["mask"]).dataobj)
    assert (found == np.asarray(nib.load(expected_path).dataobj)).all()


@pytest.mark.slow
def test_monai_label_replaces_no_training(workspace: Path) -> None:
    """Training there is not supported, as the page says: it would go on from a model and replace it."""
    _, train_task = monai_label()
    task = train_task(f"{workspace}/{BUNDLE_NAME}", {})
    assert task.is_valid()
    cases = sorted((workspace / "dataset" / "imagesTr").glob("*.nii.gz"))
    items = [{"image": str(case), "label": str(case).replace("imagesTr", "labelsTr")} for case in cases]
    request = {"model": BUNDLE_NAME, "max_epochs": 1, "device": "cpu", "val_split": 0.34, "multi_gpu": False}
    before = weights(workspace)
    with pytest.raises(RuntimeError) as error:
        task(request, types.SimpleNamespace(datalist=lambda: items))
    assert "Expected `ckpt_dir` to be without a training, but " in str(error.value.__cause__)
    after = weights(workspace)
    assert all(torch.equal(after[name], before[name]) for name in before)
