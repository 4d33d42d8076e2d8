"""Keys of a command line: a mistyped one is named."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import causes
from monai.bundle import ConfigWorkflow

from monai_iou.bundle_files import bundle_path
from monai_iou.workflow import keys


def test_examples() -> None:
    assert doctest.testmod(keys).failed == 0


def sentence(bundle: Path, configs: list[str], **overrides: Any) -> str:
    files = [str(bundle / "configs" / f"{name}.json") for name in configs]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        ConfigWorkflow(config_file=files, workflow_type="train", **overrides).initialize()
    return next(str(each) for each in reversed(causes(caught.value)) if isinstance(each, ValueError))


@pytest.mark.parametrize(
    ("configs", "typed", "meant"),
    [
        (["train"], "epoch", "epochs"),
        (["train"], "resumed", "resume"),
        (["train", "multi_gpu_train"], "datasetdir", "dataset_dir"),
        (["train", "evaluate"], "outputdir", "output_dir"),
        (["inference"], "num_worker", "num_workers"),
    ],
)
def test_a_mistyped_key_is_named_with_what_was_meant(
    configs: list[str], typed: str, meant: str, bundle: Path, tmp_path: Path
) -> None:
    expected = f"Expected `{typed}` to be a key of the bundle, but nothing uses it: write --{meant} if that was meant"
    assert sentence(bundle, configs, **{typed: "3"}).startswith(expected)


@pytest.mark.parametrize(("first", "key"), [("instance", "instance"), ("plan", "patch_size")])
def test_a_config_before_train_json_whose_keys_it_replaces_is_refused(first: str, key: str, bundle: Path) -> None:
    plan = {"patch_size": [32, 32, 16], "plan_report": {}}
    (bundle / "configs" / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert sentence(bundle, [first, "train"]) == (
        f"Expected train.json to be the first of --config_file, but a config before it sets `{key}`, which train.json "
        "replaces: name that config after train.json."
    )


def test_a_config_before_train_json_may_import_and_train_json_may_have_another_order(bundle: Path) -> None:
    (bundle / "configs" / "mine.json").write_text('{"imports": ["$import os"], "epochs": 5}', encoding="utf-8")
    assert "a config before it sets `imports`" in sentence(bundle, ["mine", "train"])
    path = bundle / "configs" / "train.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({"epochs": content.pop("epochs"), **content}), encoding="utf-8")
    ConfigWorkflow(config_file=str(path), workflow_type="train").initialize()


def test_a_key_of_inference_has_no_effect_on_a_training_which_is_said(bundle: Path) -> None:
    files = str(bundle / "configs" / "train.json")
    workflow = ConfigWorkflow(config_file=files, workflow_type="train", tta_flips=True, save_probabilities=True)
    expected = "^`tta_flips`, `save_probabilities` have no effect on a training, because only inference.json uses them"
    with pytest.warns(UserWarning, match=expected):
        workflow.initialize()


def test_a_setting_that_an_earlier_train_config_does_not_know_is_named(bundle: Path) -> None:
    path = bundle / "configs" / "train.json"
    content = json.loads(path.read_text(encoding="utf-8").replace("$not @settings.calibration", "$True"))
    del content["calibration"], content["settings"]["calibration"]
    path.write_text(json.dumps(content), encoding="utf-8")
    workflow = ConfigWorkflow(config_file=str(path), workflow_type="train", calibration=True)
    expected = "^`calibration` has no effect here, because train.json was made by an earlier version, which did not"
    with pytest.warns(UserWarning, match=expected):
        workflow.initialize()


@pytest.mark.parametrize(
    ("configs", "key"),
    [
        (["train"], "validate#inferer#device"),
        (["train", "multi_gpu_train"], "validate#inferer#sw_device"),
        (["train", "evaluate"], "validate#inferer#device"),
        (["inference"], "inferer#device"),
        (["inference"], "inferer#sw_device"),
    ],
)
def test_a_device_of_an_inferer_that_is_not_there_is_refused_before_the_first_epoch(
    configs: list[str], key: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told at the first validation, after epochs of training."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    place, name = key.rsplit("#", 1)
    (bundle / "configs" / "mine.json").write_text(json.dumps({f"+{place}": {name: "gpu"}}), encoding="utf-8")
    expected = (
        f"Expected `{key}` to be cpu, as torch can use no CUDA GPU here, but got 'gpu': write --{key} cpu, or leave "
        f"--{key} out for the default."
    )
    for files, given in ((configs, {key: "gpu"}), (configs, {key: "@place", "place": "gpu"}), ([*configs, "mine"], {})):
        assert sentence(bundle, files, **given) == expected
    assert not (bundle / "models").exists()


@pytest.mark.parametrize("value", [None, "null", "cpu", torch.device("cpu"), "@device", "@place", "$@device", "@cases"])
def test_a_device_of_an_inferer_may_be_open_and_what_monai_resolves_is_left_to_it(value: Any, bundle: Path) -> None:
    given = {"inferer#device": value, "device": "cpu", "place": {"_target_": "torch.device", "type": "cpu"}}
    config = str(bundle / "configs" / "inference.json")
    ConfigWorkflow(config_file=config, workflow_type="inference", **given).initialize()


def test_keys_of_ones_own_are_taken(bundle: Path) -> None:
    ConfigWorkflow(
        config_file=str(bundle / "configs" / "inference.json"), workflow_type="inference",
        my_window=3, epochs2=4, other="$@epochs2 + 1",
    ).initialize()  # fmt: skip


def test_start_from_is_refused_where_an_earlier_train_config_would_pass_over_it(bundle: Path) -> None:
    path = bundle / "configs" / "train.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["start_from"], content["settings"]["start_from"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert sentence(bundle, ["train"], start_from="earlier") == (
        "Expected train.json to know `start_from`, but it is of an earlier version: copy the bundle anew with "
        "`monai-iou init`, or choose a new --output."
    )
    keys._check_start_from({**content, "start_from": "null"})
    keys._check_start_from({**content, "start_from": "earlier", "mine": "$@start_from"})
    keys._check_start_from({"start_from": "earlier", "infer": []})


@pytest.mark.filterwarnings("ignore:Can't merge entry:UserWarning")
@pytest.mark.parametrize("configs", [["evaluate"], ["multi_gpu_train"], ["multi_gpu_evaluate"], ["evaluate", "train"]])
def test_a_config_that_changes_another_names_it_when_it_is_not_there_before(configs: list[str]) -> None:
    name = configs[0]
    files = ["train", *(["evaluate"] if name == "multi_gpu_evaluate" else []), name]
    paths = ",".join(f"'{(bundle_path() / 'configs' / file).as_posix()}.json'" for file in files)
    state = "it comes before that" if len(configs) > 1 else "there is none"
    assert sentence(bundle_path(), configs) == (
        f"Expected train.json before {name}.json in --config_file, because {name}.json changes keys of it, but "
        f'{state}: write --config_file "[{paths}]".'
    )
