"""What is wrong in a config of the user's is said in one sentence, with the cause that MONAI buries."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch._utils import ExceptionWrapper

from monai_iou.datasets.cases import DatasetError
from monai_iou.workflow.config_errors import ConfigError, explained
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
    assert sentence(tmp_path, net={"_target_": "monai_iou.gone.Net"}, run=["$@net"]) == (
        "Expected `_target_` to name a class or function, but monai_iou.gone.Net cannot be found: correct its name, or "
        "copy the bundle anew with `monai-iou init` if another version made the config."
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
    assert told.endswith(f": see the traceback in {tmp_path / 'log.txt'}."), (
        "our own expressions are not the user's to correct"
    )
    assert told in (tmp_path / "log.txt").read_text(encoding="utf-8")
    imports = ["$import monai_iou", "$import monai_iou.workflow.settings"]
    assert sentence(tmp_path, imports=imports, run=["$monai_iou.workflow.settings.check_settings(epochs=1)"]) == (
        "Expected the config to be of this version of monai_iou, but monai_iou.workflow.settings has no "
        "`check_settings`: copy the bundle anew with `monai-iou init`."
    )
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in log


def of_worker(error: Exception, wrapped: bool) -> RuntimeError:
    """What torch raises where an error arose in a loader's process, in a transform of MONAI's or outside of one."""
    try:
        try:
            raise error  # noqa: TRY301
        except Exception as cause:
            if not wrapped:
                raise
            message = f"applying transform {'<long>' * 50}"
            raise RuntimeError(message) from cause
    except Exception:  # as torch's worker does
        handed_over = ExceptionWrapper(where="in DataLoader worker process 0")
    buried = RuntimeError("Failed to evaluate ConfigExpression: '$monai_iou.workflow.failures.run(@train#trainer)'")
    try:
        handed_over.reraise()
    except Exception as raised:
        buried.__cause__ = raised
    return buried


class TwoWordsError(Exception):
    """One that torch cannot make again from the traceback alone."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(
    ("error", "root"),
    [
        (IndexError("index 7 is out of range.\nIt has 3."), "IndexError: index 7 is out of range. It has 3"),
        (KeyError("mask"), "KeyError: 'mask'"),
        (AssertionError(), "AssertionError"),
        (TwoWordsError("broken", "file: a.nii"), "TwoWordsError: broken file: a.nii"),
    ],
)
def test_an_error_in_a_process_of_a_loader_is_named_with_its_reason_and_line(
    error: Exception, root: str, wrapped: bool
) -> None:
    line = of_worker.__code__.co_firstlineno + 4
    assert str(explained(of_worker(error, wrapped), "see the traceback above")) == (
        f"Expected the run to go on, but got {root} (line {line} of test_config_errors.py): see the traceback above."
    )


def test_a_sentence_of_ours_arrives_from_a_process_of_a_loader() -> None:
    said = "Expected `a.nii` to have voxels,\nbut it is empty: leave it out."
    for error in (ValueError(said), DatasetError(said)):
        assert str(explained(of_worker(error, wrapped=True), "look")) == said
    other = str(explained(of_worker(RuntimeError("Expected all tensors to be on one device"), wrapped=True), "look"))
    assert other.startswith("Expected the run to go on, but got RuntimeError: Expected all tensors to be on one device")


def test_what_a_file_of_the_user_s_asks_of_this_package_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_module.py").write_text("import monai_iou.spacing\n\ndef run():\n    monai_iou.spacing.Gone()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AttributeError) as caught:
        importlib.import_module("own_module").run()
    told = str(explained(caught.value, "see the traceback above"))
    assert told.endswith("has no attribute 'Gone' (line 4 of own_module.py): see the traceback above.")
