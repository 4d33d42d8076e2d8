"""References to keys that a config does not have are named before anything runs: place, file and nearest key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monai_iou.bundle_files import copy_bundle
from monai_iou.workflow.config_errors import ConfigError, explained
from monai_iou.workflow.inference_keys import OF_COMMANDS
from monai_iou.workflow.running import run_configs
from monai_iou.workflow.undefined_references import check_inference_references, check_takes_images

HERE = "define it there, because train.json and plan.json are not read with that file"


def write(path: Path, **config: Any) -> Path:
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def refusal(files: list[Path], kind: str = "train", **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        run_configs(files, overrides, kind)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:Default logging file:UserWarning")
@pytest.mark.parametrize("sign", ["#", "::"])
def test_place_file_and_nearest_key_are_named_before_anything_runs(
    tmp_path: Path, sign: str, capfd: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path / "train.json", optimizer={"lr": 1}, initialize=["$print('begun')"], run=["@lr_scheduler"])
    other = write(tmp_path / "extra.json", lr_scheduler={"steps": [1, f"@optimiser{sign}lr"]})
    assert refusal([first, other]) == (
        f"Expected `@optimiser#lr` in `lr_scheduler#steps#1` of {other} to refer to a key, but the config has none of "
        "that name: write `@optimizer#lr` if that was meant, or define it."
    )
    config = write(tmp_path / "inference.json", run=["$@width + 1"])
    assert refusal([config], "inference") == (
        f"Expected `@width` in `run#0` of {config} to refer to a key, but the config has none of that name: correct "
        f"its name, or {HERE}."
    )
    config = write(tmp_path / "inference.json", size=1, run=["$@size"])
    assert refusal([config], "inference", size="@widths") == (
        f"Expected `@widths` in `size` to refer to a key, but the config has none of that name: correct its name, or "
        f"{HERE}."
    ), "that of a command line is in no file"
    assert "begun" not in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore:Default logging file:UserWarning")
def test_what_nothing_refers_to_may_be_undefined_as_for_monai(tmp_path: Path) -> None:
    config = write(tmp_path / "a.json", spare="@nothing", text="an @nothing", given="$1", run=["$[@given, @text]"])
    run_configs([config], {}, "inference")


def test_an_inference_takes_the_images_of_a_command(tmp_path: Path) -> None:
    config = copy_bundle(tmp_path / "run") / "configs" / "inference.json"
    check_takes_images(config)
    check_takes_images(tmp_path / "none.json")
    write(config, dataset={"data": "$monai_iou.workflow.data.BundleCases('', images=@images).inference"})
    check_takes_images(config)
    for reference in ("%images", "@::::images", "@##images"):
        write(config, images=None, dataset={"data": reference})
        check_takes_images(config)
    write(config, images=None, dataset={"data": "@images_of_mine"})
    with pytest.raises(ConfigError, match=r"to refer to the key `images`, but it does not, perhaps because an earlier"):
        check_takes_images(config)


def test_an_inference_is_checked_as_the_commands_will_run_it(tmp_path: Path) -> None:
    config = copy_bundle(tmp_path / "run") / "configs" / "inference.json"
    shipped = json.loads(config.read_text(encoding="utf-8"))
    check_inference_references(config, OF_COMMANDS)
    check_inference_references(tmp_path / "none.json", OF_COMMANDS)
    write(config, **{key: value for key, value in shipped.items() if key not in OF_COMMANDS})
    check_inference_references(config, OF_COMMANDS)
    write(config, **{**shipped, "version": "$@_meta_#version", "more": ["@version"], "run": ["@more"]})
    check_inference_references(config, OF_COMMANDS)
    write(config, **{**shipped, "pixdim": "%models/later.json::pixdim", "run": ["@missing"]})
    check_inference_references(config, OF_COMMANDS)
    shipped["postprocessing"]["transforms"][3]["settings"] = "@lesion_threshold_mm3"
    write(config, **shipped)
    with pytest.raises(ConfigError) as caught:
        check_inference_references(config, OF_COMMANDS)
    assert str(caught.value) == (
        f"Expected `@lesion_threshold_mm3` in `postprocessing#transforms#3#settings` of {config} to refer to a key, "
        f"but the config has none of that name: correct its name, or {HERE}."
    )


def test_one_that_monai_meets_later_is_named_too() -> None:
    error = ValueError("the referring item `@loss::widht` is not defined in the config content.")
    error.__cause__ = ValueError("Unsupported option 'loss::widht', ")
    assert str(explained(error, "look")) == (
        "Expected `@loss#widht` to refer to a key of the config, but there is none: define it."
    )
