"""What is wrong in a config of the user's is said in one sentence, with the cause that MONAI buries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from monai_iou.workflow.config_errors import ConfigError
from monai_iou.workflow.log_file import open_log
from monai_iou.workflow.running import run_configs


def sentence(folder: Path, **config: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        run_configs([path], {}, "inference")
    message = str(caught.value)
    assert re.fullmatch(r"Expected .+, but .+: .+\.", message), message
    return message


@pytest.mark.filterwarnings("ignore:Default logging file:UserWarning")
def test_each_kind_of_mistake_is_named(tmp_path: Path) -> None:
    open_log(tmp_path)
    assert sentence(tmp_path, net={"_target_": "monai_iou.IoULos"}, run=["$@net"]) == (
        "Expected `_target_` to name a class or function, but monai_iou.IoULos cannot be found: perhaps you meant "
        "monai_iou.IoULoss."
    )
    assert "but nowhere.Net cannot be found: correct its name, or install its package." in sentence(
        tmp_path, net={"_target_": "nowhere.Net"}, run=["$@net"]
    )
    told = sentence(tmp_path, net={"_target_": "torch.nn.Linear", "in_features": 3, "out": 4}, run=["$@net"])
    assert told.startswith("Expected torch.nn.Linear to take in_features, out, but got TypeError: ")
    assert "unexpected keyword argument 'out'" in told
    told = sentence(tmp_path, width=3, run=["$@width / 0"])
    assert "to have a value, but got ZeroDivisionError: division by zero" in told
    told = sentence(
        tmp_path, imports=["$import monai_iou.workflow.failures"], run=["$monai_iou.workflow.failures.run(1)"]
    )
    assert told.startswith("Expected the run to go on, but got ")
    assert told.endswith(": its log.txt has the traceback."), "our own expressions are not the user's to correct"
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in log
    assert told in log
