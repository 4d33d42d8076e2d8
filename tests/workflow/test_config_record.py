"""What a resumed training says of settings that are not those of the training that it continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import overrides

from monai_iou.workflow.config_record import BESIDE, _flat, other_settings
from monai_iou.workflow.running import run_configs

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]

CONTINUED = "is continued with other settings: "


def test_a_resumed_training_names_the_keys_of_an_edited_plan(
    bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = bundle / "configs" / "plan.json"
    files = [bundle / "configs" / "train.json", plan]

    def train(content: dict[str, Any], **changes: Any) -> list[str]:
        plan.write_text(json.dumps(content))
        run_configs(files, overrides(bundle, data, val_interval=1, **changes))
        said = [line for line in capsys.readouterr().out.splitlines() if CONTINUED in line]
        return [line.partition(CONTINUED)[2] for line in said]

    before = {"learning_rate": 0.01, "weight_decay": 0.0, "plan_report": {"minutes": 1}}
    assert train(before, epochs=1) == []
    assert train({**before, "plan_report": {}}, epochs=1, resume=True, num_workers=0, pictures=1) == []
    # what it was continued with is what counts from then on
    assert train({**before, "learning_rate": 0.02}, epochs=2, resume="true") == [
        "`epochs` was 1 and is 2; `learning_rate` was 0.01 and is 0.02."
    ]
    edited = {**before, "learning_rate": 0.02, "loss": {"_target_": "monai_iou.IoULoss", "softmax": True}}
    (said,) = train(edited, epochs=2, resume=True)
    assert said.startswith("`loss#_target_` was monai_iou.workflow.variants.default_loss and is monai_iou.IoULoss; ")
    state = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    assert state["data"]["config"]["learning_rate"] == 0.02
    del state["data"]["config"]  # as an earlier version wrote it
    torch.save(state, bundle / "models" / "last_epoch.pt")
    assert train(before, epochs=2, resume=True) == []


def test_an_edited_file_of_the_users_own_is_another_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    loss = {"_target_": "monai_iou.workflow.own_network.from_file", "file": str(file), "name": "Mine"}
    records = []
    for text in ("x = 1", "x = 1", "x = 2"):
        file.write_text(text)
        records.append(_flat({"loss": loss, "amp": "null"}))
    assert other_settings(records[0], records[1]) == ""
    assert other_settings(records[0], records[2]) == "`loss#source` is another one"
    assert other_settings({"amp": None}, {"amp": True}) == "`amp` was null and is true"


def test_many_keys_are_counted_and_long_values_left_out() -> None:
    stored, current = ({f"k{number}": value * number for number in range(1, 9)} for value in ("a", "b"))
    assert other_settings(stored, current).endswith("; `k5` was aaaaa and is bbbbb; 3 more keys differ")
    assert other_settings({"loss": "x" * 100}, {"loss": "y"}) == "`loss` is another one"


def test_what_changes_only_the_speed_and_values_that_are_no_json_are_no_other_settings(tmp_path: Path) -> None:
    assert {"memory_format", "transform_device"} <= set(BESIDE)
    config = {"w": float("nan"), "ws": [1.0, float("inf"), float("nan")], "v": [{(1, 2): "a"}], "u": [object()]}
    torch.save(_flat(config), tmp_path / "record.pt")
    stored = torch.load(tmp_path / "record.pt", weights_only=True)
    assert other_settings(stored, _flat({**config, "u": [object()]})) == ""
    assert other_settings(stored, _flat({**config, "w": 1.0})) == "`w` was NaN and is 1.0"
    assert other_settings({"w": 1, "v": {"a": 1, "b": 2}}, {"w": 1.0, "v": {"b": 2, "a": 1}}) == ""


def test_what_a_version_adds_for_scores_that_are_off_is_no_other_setting() -> None:
    def config(*transforms: Any, **metrics: Any) -> dict[str, Any]:
        return {"epochs": 2, "settings": {"epochs": "@epochs"}, "transforms": [*transforms, "x"], "metrics": metrics}

    part = {"_target_": "KeptProbabilitiesd", "_disabled_": "$not @settings.calibration"}
    before, now = config(dice="y"), config(part, dice="y", val_ece=part)
    now["settings"]["calibration"] = "@calibration"
    assert other_settings(_flat(before), _flat(now)) == ""
    assert other_settings(_flat(before), _flat({**now, "epochs": 3})) == "`epochs` was 2 and is 3"
