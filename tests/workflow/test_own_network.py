"""The networks that a training may have: MONAI's by name, one of the user's config, and one of the user's file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import causes, overrides
from monai.bundle import ConfigParser
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor, nn

from monai_iou.bundle_files import bundle_path, copy_bundle
from monai_iou.cli import main
from monai_iou.datasets.cases import DatasetError
from monai_iou.demo import run_workflow
from monai_iou.planning.plan import make_plan
from monai_iou.planning.stored import load_plan
from monai_iou.workflow.architecture import NETWORKS, with_network
from monai_iou.workflow.failures import TrainingError
from monai_iou.workflow.models import check_models
from monai_iou.workflow.own_network import build_definition, check_network, encoded, from_file
from monai_iou.workflow.records import differences
from monai_iou.workflow.variants import build_network

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]

FILE = """
from dataclasses import dataclass

from torch import nn


@dataclass
class Size:
    width: int = 6


class MyNetwork(nn.Module):
    def __init__(self, in_channels, out_channels, width):
        super().__init__()
        first = nn.Conv3d(in_channels, Size(width).width, 3, padding=1)
        self.layers = nn.Sequential(first, nn.ReLU(), nn.Conv3d(width, out_channels, 3, padding=1))

    def forward(self, image):
        return self.layers(image)

    def extra_repr(self):
        return f"{7:#x}" + " with @width and %#width"  # which MONAI's parser must leave alone
"""
FILE_SAYS = "0x7 with @width and %#width"
CHANNELS = {"in_channels": "$@plan.in_channels", "out_channels": "$@plan.out_channels"}


@pytest.fixture
def mine(tmp_path: Path) -> dict[str, Any]:
    """An overlay with a network of a file that is there for the training only."""
    path = tmp_path / "my_network.py"
    path.write_text(FILE, encoding="utf-8")
    target = "monai_iou.workflow.own_network.from_file"
    network = {"_target_": target, "file": str(path), "name": "MyNetwork", **CHANNELS, "width": "@width"}
    return {"width": 5, "network_def": network}


def resolved(folder: Path, **keys: Any) -> ConfigParser:
    """The training's config, without data."""
    found = ConfigParser()
    found.read_config(str(bundle_path() / "configs" / "train.json"))
    places = {"bundle_root": str(folder), "ckpt_dir": str(folder / "models"), "dataset_dir": str(folder / "none")}
    found.update({**places, "patch_size": [16, 16, 16], **keys})
    return found


def stored(folder: Path, parser: ConfigParser) -> Path:
    """Write what a training writes of its network, and return the model."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = parser.get_parsed_content("plan")
    (folder / "model.json").write_text(plan.to_json(), encoding="utf-8")
    torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "model.pt")
    return folder / "model.pt"


def test_a_network_of_a_file_is_built_again_from_the_model_alone(mine: dict[str, Any], tmp_path: Path) -> None:
    model = stored(tmp_path / "models", resolved(tmp_path, **mine))
    (tmp_path / "my_network.py").unlink()
    plan = load_plan(model.with_suffix(".json"))
    assert plan.network["network"] == "own"
    network = build_network(plan)
    assert type(network).__name__ == "MyNetwork"
    assert network.extra_repr() == FILE_SAYS
    check_models([str(model)], network)
    check_network(network, plan)
    image = torch.rand(1, 1, *plan.patch_size)
    torch.testing.assert_close(torch.jit.script(network.eval())(image), network(image))
    moved = shutil.move(tmp_path / "models", tmp_path / "elsewhere" / "models")
    found = ConfigParser()
    found.read_config(str(bundle_path() / "configs" / "inference.json"))
    found.update({"bundle_root": str(tmp_path), "ckpt_dir": str(moved), "dataset_dir": str(tmp_path / "none")})
    assert type(found.get_parsed_content("network_def")).__name__ == "MyNetwork"


def test_another_network_than_the_models_is_refused(mine: dict[str, Any], tmp_path: Path) -> None:
    parser = resolved(tmp_path, **mine)
    model = stored(tmp_path / "models", parser)
    plan = load_plan(model.with_suffix(".json"))
    same = resolved(tmp_path, **mine)
    same.get_parsed_content("plan")
    given = plan.network["definition"]
    assert with_network(plan, definition=given) is plan
    message = (
        "Expected `network_def` to be that with which the model was trained, but got another one: leave --network_def "
        "out, or name another model, or give an exported network, such as one of TorchScript, as `evaluator#network` "
        "instead."
    )
    for other_one in ({**given, "width": 7}, {"network_def": "$torch.jit.load('model.ts')"}):
        with pytest.raises(ValueError, match=re.escape(message)):
            with_network(plan, definition=other_one)
    with pytest.raises(ValueError, match=r"`network` to be 'own', with which the model was trained, but got 'unet'"):
        with_network(plan, "unet")
    other = with_network(make_plan(None, [], [16, 16, 16]), definition={**given, "width": 7})
    assert differences({"network": plan.network}, {"network": other.network}) == ["its `network_def` is another one"]
    assert differences({"network": plan.network}, {"network": dict(plan.network)}) == []
    (tmp_path / "other").mkdir()
    shutil.copy(model, tmp_path / "other" / "model.pt")
    (tmp_path / "other" / "model.json").write_text(other.to_json(), encoding="utf-8")
    with pytest.raises(DatasetError, match="but their `network_def` differs: train the models of an ensemble"):
        check_models([str(model), str(tmp_path / "other" / "model.pt")], build_network(plan))


def test_an_import_that_the_network_does_not_need_is_no_part_of_it(mine: dict[str, Any], tmp_path: Path) -> None:
    def stored_imports(network: dict[str, Any], *lines: str) -> Any:
        parser = resolved(tmp_path, **network)
        parser["imports"] = [*parser["imports"], *lines]
        return parser.get_parsed_content("plan").network["definition"].get("imports")

    lines = ("$import numpy as np", "$import os.path", "$from torch import nn")
    assert stored_imports(mine) == stored_imports(mine, *lines)
    used = {"network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": "$np.int64(2).item()"}}
    assert "$import numpy as np" in stored_imports(used, *lines)
    assert "$import os.path" in stored_imports(used, *lines, "$os.environ.setdefault('A', 'B')")
    assert stored_imports(used, "$from numpy import *")[-1] == "$from numpy import *"


def test_arguments_over_a_named_network_are_stored_too(tmp_path: Path) -> None:
    parser = resolved(tmp_path, network="resenc", base_channels=4, **{"network_def#blocks_down": [1, 2, 2]})
    model = stored(tmp_path / "models", parser)
    plan = load_plan(model.with_suffix(".json"))
    assert plan.network["network"] == "resenc"
    check_models([str(model)], build_network(plan))


def test_a_network_in_another_encoding_is_not_answered_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_bytes("# M\xfcller".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"but .*net\.py cannot be read \('utf-8' .*\): save it in UTF-8\.$"):
        from_file(str(tmp_path / "net.py"), "Network")
    with pytest.raises(
        DatasetError, match=r"but .*no\.py cannot be read \(.*\): write its path as it is seen from the"
    ):
        from_file(str(tmp_path / "no.py"), "Network")


def test_what_is_no_network_is_refused_in_one_sentence(mine: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"`name` of `network_def` to be a class .* has Size, MyNetwork: correct"):
        from_file("my_network.py", "Network", encoded(FILE))
    with pytest.raises(DatasetError, match=r"my_network.py, to run, but got SyntaxError: .* in line 2: correct it\.$"):
        from_file("my_network.py", "Network", encoded("import torch\nclass Network(:"))
    with pytest.raises(DatasetError, match=r"to run, but got ModuleNotFoundError: No module named 'my_blocks'"):
        from_file("my_network.py", "Network", encoded("import my_blocks"))
    plan = make_plan(None, [], [16, 16, 16])
    with pytest.raises(DatasetError, match=r"to be a torch.nn.Module, but got <class 'dict'>: name a class"):
        check_network({}, plan)
    wrong = from_file("my_network.py", "MyNetwork", encoded(FILE), in_channels=1, out_channels=3, width=4).train()
    with pytest.raises(DatasetError, match=r"\(1, 2, 16, 16, 16\) .* but got a tensor of shape \(1, 3, 16, 16, 16\)"):
        check_network(wrong, plan)
    assert wrong.training
    swin = SwinUNETR(1, 2, feature_size=12)
    with pytest.raises(DatasetError, match=r"the error ValueError: .* must be divisible .* and `patch_size` to"):
        check_network(swin, plan)
    missing = {**mine, "network_def": {**mine["network_def"], "file": str(tmp_path / "nowhere.py")}}
    with pytest.raises(RuntimeError) as caught:
        resolved(tmp_path, **missing).get_parsed_content("plan")
    assert "nowhere.py cannot be read" in str(causes(caught.value))
    with pytest.raises(RuntimeError) as caught:
        resolved(tmp_path, **mine, network="unet").get_parsed_content("plan")
    assert "Expected either `network` or a `network_def` of your own" in str(causes(caught.value))


class Supervised(nn.Module):
    """A network with state of its own that gives in training what `give` makes of its logits."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm3d(1), nn.Dropout(0.5), nn.Conv3d(1, 2, 1))
        self.give = give

    def forward(self, image: Tensor) -> Any:
        logits = self.layers(image)
        return self.give(logits) if self.training else logits


def fail(_: Tensor) -> Any:
    message = "no maps here"
    raise RuntimeError(message)


GIVEN: dict[str, Callable[[Tensor], Any]] = {
    "logits": lambda x: x,
    "one scale": lambda x: [x],
    "scales": lambda x: [x, x[..., ::2, ::2, ::2]],
    "stack": lambda x: torch.stack([x, x], 1),
    "maps": lambda x: (x, [x[:, :1].sigmoid()]),
    "scales and maps": lambda x: ((x, x[..., ::2, ::2, ::2]), [x[:, :1].sigmoid()]),
    "error": fail,
}
A_TENSOR = "a tensor of shape (2, 2, 16, 16, 16)"
REFUSED = {
    ("attention", "logits"): ("attention", A_TENSOR),
    ("attention", "one scale"): ("attention", "a list of 1"),
    ("attention", "stack"): ("attention", "a tensor of shape (2, 2, 2, 16, 16, 16)"),
    ("attention", "error"): ("attention", "the error RuntimeError: no maps here"),
    ("deep_supervision", "logits"): ("deep_supervision", A_TENSOR),
    ("deep_supervision", "one scale"): ("deep_supervision", "a list of 1"),
    ("both", "logits"): ("attention", A_TENSOR),
    ("both", "maps"): ("deep_supervision", A_TENSOR),
}
SENTENCES = {
    "attention": "Expected `network_def` to give (logits, maps) in training with --attention true, but got {}: return "
    "its attention maps as well, as AttentionMapUnet does, or leave --attention out.",
    "deep_supervision": "Expected `network_def` to give logits of several scales in training with --deep_supervision "
    "true, but got {}: return a list of them, the finest first, or leave --deep_supervision out.",
}
ACCEPTED = [
    ("neither", "logits"),
    ("neither", "error"),
    ("attention", "maps"),
    ("attention", "scales and maps"),
    ("deep_supervision", "scales"),
    ("deep_supervision", "stack"),
    ("both", "scales and maps"),
]


@pytest.mark.parametrize(("keys", "given"), [*REFUSED, *ACCEPTED])
def test_what_a_key_supervises_has_to_be_there_in_training(keys: str, given: str) -> None:
    """The losses of both keys take plain logits as well, as networks give them in evaluation."""
    chosen = {key: keys in (key, "both") for key in ("attention", "deep_supervision")}
    own = {"network_def": {"_target_": "mine.Network"}}
    plan = with_network(make_plan(None, [], [16, 16, 16]), definition=own, **chosen)
    network = Supervised(GIVEN[given])
    before = {name: values.clone() for name, values in network.state_dict().items()}
    random = torch.get_rng_state()
    if (keys, given) in REFUSED:
        key, found = REFUSED[keys, given]
        with pytest.raises(TrainingError) as caught:
            check_network(network, plan)
        assert str(caught.value) == SENTENCES[key].format(found)
    else:
        check_network(network, plan)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training


def test_one_of_our_networks_may_have_one_scale_for_a_small_patch() -> None:
    plan = with_network(make_plan(None, [], [16, 16, 16], base_channels=4), deep_supervision=True)
    check_network(build_network(plan), plan)


def test_a_class_that_is_gone_is_named(tmp_path: Path) -> None:
    plan = with_network(make_plan(None, [], [16, 16, 16]), definition={"network_def": {"_target_": "gone.Network"}})
    with pytest.raises(DatasetError, match=r"to be built again, but got .*gone.Network.*can be imported\.$"):
        build_definition(plan)


@pytest.mark.parametrize("flat", [False, True])
def test_the_patch_of_swin_unetr_is_of_multiples_of_32(flat: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    options: dict[str, Any] = {"spatial_dims": 2} if flat else {}
    plan = with_network(make_plan(None, [], [48, 32, 16], base_channels=4, **options), "swin_unetr")
    assert plan.patch_size == (64, 32, 1 if flat else 32)
    assert "swin_unetr takes multiples of 32" in caplog.text
    assert with_network(plan) == plan
    small = with_network(make_plan(None, [], [16, 16, 16], base_channels=4, **options), "swin_unetr")
    assert small.patch_size == (64, 32, 1 if flat else 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, "own"])
def test_every_network_trains_and_predicts_from_its_folder(
    name: str, mine: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    bundle = copy_bundle(tmp_path / "run")
    keys = mine if name == "own" else {"network": name}
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=1, **keys))
    (tmp_path / "my_network.py").unlink()
    assert json.loads((bundle / "models" / "model.json").read_text())["network"]["network"] == name
    scan = min((data / "imagesTs").glob("*.nii.gz"))
    assert main(["predict", str(bundle), str(scan), "--output", str(tmp_path / "masks")]) == 0
    assert (tmp_path / "masks" / scan.name).is_file()
    run_workflow(bundle, ["train", "evaluate"], overrides(bundle, data))
    assert (bundle / "eval" / "test_mean_iou_raw.csv").is_file()
