"""The network's keys are stored with the model: evaluation and inference need none, and refuse others by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from monai_iou.bundle_files import bundle_path
from monai_iou.datasets.cases import DatasetError
from monai_iou.planning.plan import Plan, make_plan
from monai_iou.planning.stored import load_plan
from monai_iou.workflow.architecture import NETWORKS, switch, with_network
from monai_iou.workflow.models import check_models
from monai_iou.workflow.records import differences
from monai_iou.workflow.variants import build_network

CHOICES: list[dict[str, Any]] = [
    {},
    {"deep_supervision": True},
    {"attention": True, "deep_supervision": True},
    {"network": "dynunet"},
    {"network": "segresnet", "deep_supervision": True},
]
pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]


def tiny_plan() -> Plan:
    return make_plan(None, [], [24, 24, 16], base_channels=4)


def trained(folder: Path, **choice: Any) -> Plan:
    """Write the files of a trained model."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = with_network(tiny_plan(), **choice)
    (folder / "model.json").write_text(plan.to_json())
    torch.save(build_network(plan).state_dict(), folder / "model.pt")
    return plan


def parser(folder: Path, configs: list[str], **keys: Any) -> ConfigParser:
    found = ConfigParser()
    found.read_config([str(bundle_path() / "configs" / f"{name}.json") for name in configs])
    found.update({"bundle_root": str(folder), "ckpt_dir": str(folder), "dataset_dir": str(folder / "none"), **keys})
    return found


@pytest.mark.parametrize("configs", [["inference"], ["train", "evaluate"], ["train", "multi_scale", "evaluate"]])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_evaluation_and_inference_take_the_network_of_the_model(
    choice: dict[str, Any], configs: list[str], tmp_path: Path
) -> None:
    plan = trained(tmp_path, **choice)
    for keys in ({}, choice):
        found = parser(tmp_path, configs, **keys)
        assert found.get_parsed_content("plan") == plan
        network = found.get_parsed_content("network_def")
        assert type(network) is type(build_network(plan))
        check_models([str(tmp_path / "model.pt")], network)


def test_keys_that_are_not_the_models_are_refused_by_name(tmp_path: Path) -> None:
    plan = trained(tmp_path, deep_supervision=True)
    for key, value, other in (
        ("network", "'segresnet'", "dynunet"),
        ("deep_supervision", "True", "false"),
        ("attention", "False", "true"),
    ):
        with pytest.raises(ValueError, match=r"^Expected") as caught:
            with_network(load_plan(tmp_path / "model.json"), **{key: other})
        given = repr(other if key == "network" else other == "true")
        assert str(caught.value) == (
            f"Expected `{key}` to be {value}, with which the model was trained, but got {given}: leave --{key} out, or "
            "name another model."
        )
        assert with_network(plan, **{key: "null"}) is plan


def test_models_of_one_ensemble_have_one_network(tmp_path: Path) -> None:
    trained(tmp_path / "a", network="segresnet")
    trained(tmp_path / "b", network="segresnet", deep_supervision=True)
    weights = torch.load(tmp_path / "a" / "model.pt", weights_only=True)
    torch.save(weights, tmp_path / "b" / "model.pt")
    files = [str(tmp_path / name / "model.pt") for name in "ab"]
    with pytest.raises(DatasetError, match="but their `network` is"):
        check_models(files, build_network(load_plan(tmp_path / "a" / "model.json")))


def test_a_resumed_training_names_another_network() -> None:
    before, now = ({"network": with_network(tiny_plan(), name).network} for name in ("unet", "dynunet"))
    (sentence,) = differences(before, now)
    assert sentence.startswith("its `network` was {'network': 'unet', ")


@pytest.mark.parametrize("network", ["unet", {"network": 3}, {"network": "unet", "deep_supervision": "no"}, [1]])
def test_a_damaged_network_is_refused(network: Any, tmp_path: Path) -> None:
    plan = json.loads(trained(tmp_path).to_json())
    (tmp_path / "model.json").write_text(json.dumps({**plan, "network": network}))
    with pytest.raises(DatasetError, match=r"model.json to be the plan that training stored, but it cannot be read"):
        load_plan(tmp_path / "model.json")


def test_a_model_from_before_the_keys_were_stored_takes_them(tmp_path: Path) -> None:
    old = replace(tiny_plan(), network={})
    assert load_plan_of(old, tmp_path) == old
    assert {with_network(old, name).network["network"] for name in NETWORKS} == set(NETWORKS)
    assert switch(None, "attention") is None


def load_plan_of(plan: Plan, folder: Path) -> Plan:
    (folder / "model.json").write_text(plan.to_json())
    return load_plan(folder / "model.json")
