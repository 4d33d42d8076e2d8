"""The models that evaluation and inference use: one, or several that belong together."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import causes, check_masks, overrides
from monai.bundle import ConfigParser

from monai_iou.datasets.cases import DatasetError
from monai_iou.demo import run_workflow
from monai_iou.planning.plan import make_plan
from monai_iou.workflow.inferers import Ensemble
from monai_iou.workflow.models import _check_same_plans, model_files

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]


def test_the_folds_masks_are_those_of_their_mean(folds: Path, data: Path, tmp_path: Path) -> None:
    places = {"bundle_root": str(folds), "dataset_dir": str(data), "output_dir": str(tmp_path / "masks")}
    models = [str(folds / "fold0"), str(folds / "fold1" / "model.pt")]
    run_workflow(folds, ["inference"], {**places, "models": models, "tta_flips": True})
    scores = run_workflow(
        folds, ["train", "evaluate"], overrides(folds, data, models=models, tta_flips=True, output_dir=str(tmp_path))
    )
    network = scores.parser.get_parsed_content("validate#evaluator").network
    assert isinstance(network, Ensemble)
    for member, path in zip(network.members, model_files(models, ""), strict=True):
        weights = torch.load(path, weights_only=True)
        assert all(torch.equal(member.state_dict()[name], value) for name, value in weights.items())
    check_masks(tmp_path, data)


@pytest.mark.parametrize("configs", [["inference"], ["train", "evaluate"]], ids=str)
def test_each_model_sees_the_images_as_it_does_alone(configs: list[str], folds: Path, data: Path) -> None:
    names = [str(folds / "fold0"), str(folds / "fold1")]
    windows = [json.loads((Path(name) / "model.json").read_text())["intensity"][0] for name in names]
    assert len({(window["lower"], window["upper"]) for window in windows}) == 2

    def seen(models: list[str]) -> list[torch.Tensor]:
        parser = ConfigParser()
        parser.read_config([str(folds / "configs" / f"{name}.json") for name in configs])
        parser.update({"bundle_root": str(folds), "dataset_dir": str(data), "models": models})
        part = "validate#" if "evaluate" in configs else ""
        cases = parser.get_parsed_content(f"{part}dataset")
        engine = parser.get_parsed_content(f"{part}evaluator")
        image = cases[0]["image"][None]
        if len(models) == 1:
            return [image]
        return [own for _, own in engine.network.with_images(image)]

    for together, name in zip(seen(names), names, strict=True):
        (alone,) = seen([name])
        torch.testing.assert_close(together, alone)
        assert alone.max() > 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pixdim": [2.0, 2.0, 2.0]}, r"their `pixdim` is \(2.0, 2.0, 2.0\) and \(1.0, 1.0, 1.5\)"),
        ({"labels": {"0": "background", "2": "tumour"}}, "their `labels` is"),
        ({"intensity": [{"kind": "zscore"}]}, r"their `intensity` is \['zscore'\] and \['ct'\]: train"),
        (None, "fold1/model.pt, but there is no such file"),
    ],
)
def test_models_that_do_not_belong_together(
    changes: dict[str, Any] | None, expected: str, folds: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "fold1"
    if changes is not None:
        other.mkdir()
        (other / "model.pt").write_bytes((folds / "fold1" / "model.pt").read_bytes())
        plan = json.loads((folds / "fold1" / "model.json").read_text())
        (other / "model.json").write_text(json.dumps({**plan, **changes}))
    places = {"bundle_root": str(folds), "dataset_dir": str(data), "output_dir": str(tmp_path / "masks")}
    with pytest.raises(RuntimeError) as caught:
        run_workflow(folds, ["inference"], {**places, "models": [str(folds / "fold0"), str(other)]})
    found = [str(cause) for cause in causes(caught.value) if isinstance(cause, DatasetError)]
    assert len(found) == 1
    assert re.search(expected, found[0]), found
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("value", [[], 7, [1], [""]])
def test_models_that_are_no_list(value: object) -> None:
    with pytest.raises(ValueError, match="Expected `models` to be null or a list of folders, but got"):
        model_files(value, "models")


def test_models_as_the_command_line_gives_them() -> None:
    assert model_files("['a', 'b']", "m") == ["a/model.pt", "b/model.pt"]
    assert model_files("null", "m") == ["m/model.pt"]
    assert model_files("a", "m") == ["a/model.pt"]


def test_models_whose_regions_are_in_other_orders_do_not_belong_together(tmp_path: Path) -> None:
    """Their outputs are of other classes, which a mean would mix."""
    base = replace(make_plan(None, [], [16, 16, 16]), labels={0: "background", 1: "oedema", 2: "core"})
    one = replace(base, regions={"whole": (1, 2), "core": (2,)}, regions_order=(1, 2))
    turned = replace(base, regions={"core": (2,), "whole": (1, 2)}, regions_order=(2, 1))
    written = replace(one, regions_order=(2, 2))
    files = []
    for name, plan in {"one": one, "same": one, "turned": turned, "written": written}.items():
        (tmp_path / f"{name}.json").write_text(plan.to_json())
        files.append(str(tmp_path / f"{name}.pt"))
    _check_same_plans(files[:2])
    for file, what in (
        (files[2], "`regions` is {'core': (2,), 'whole': (1, 2)} and {'whole': (1, 2), 'core': (2,)}"),
        (files[3], "`regions_order` is (2, 2) and (1, 2)"),
    ):
        with pytest.raises(DatasetError) as caught:
            _check_same_plans([files[0], file])
        assert str(caught.value) == (
            f"Expected {file} to be planned as {files[0]}, but their {what}: train the models of an ensemble on one "
            "dataset, with the same network, `pixdim` and `patch_size`."
        )
