"""The bundle's keys: all documented, and those of few cases, kept weights, full resolution and devices."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path

import pytest
import torch
from bundle_runs import causes, overrides, score_rows
from monai.bundle import ConfigParser, ConfigWorkflow
from places import DOCS

from monai_iou.bundle_files import bundle_path
from monai_iou.demo import run_workflow
from monai_iou.transforms import RandAffineElasticd
from monai_iou.workflow.postprocessing import (
    Postprocessing,
)
from monai_iou.workflow.settings import Settings, check_device

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]


OWN_PLACES = {
    "bundle_root",
    "device",
    "rank",
    "start_epoch",
    "start_step",
    "world_size",
    "plan",
    "model_files",
    "scored",
}


@pytest.mark.parametrize("name", ["train", "inference"])
@pytest.mark.parametrize(("device", "expected"), [("cpu", False), ("cuda:0", True), ("$torch.device('cpu')", False)])
def test_mixed_precision_follows_the_device_of_the_run(
    name: str, device: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not expected)  # which does not decide
    parser = ConfigParser()
    parser.read_config(str(bundle_path() / "configs" / f"{name}.json"))
    parser["device"] = device
    assert parser.get_parsed_content("amp") is expected


@pytest.mark.parametrize("name", ["train", "evaluate", "inference"])
def test_every_key_is_in_the_documents_table(name: str) -> None:
    content = json.loads((bundle_path() / "configs" / f"{name}.json").read_text())
    rows = [line for line in (DOCS / "bundle.md").read_text().splitlines() if line.startswith("| `")]
    documented = {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    settings = {key for key, value in content.items() if not isinstance(value, dict) and "#" not in key}
    settings -= {key for key, value in content.items() if isinstance(value, list) and key != "patch_size"}
    assert settings - OWN_PLACES - {"net"} <= documented


# -- few cases


def test_an_epoch_repeats_the_cases_and_prepares_them_once(bundle: Path, data: Path) -> None:
    workflow = ConfigWorkflow(
        config_file=str(bundle / "configs" / "train.json"), workflow_type="train",
        **overrides(bundle, data, val_fraction=0, epochs=2, case_repeats=3, batch_size=2),
    )  # fmt: skip
    workflow.initialize()
    cached = workflow.parser.get_parsed_content("train#dataset")
    workflow.run()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    assert len(cached) == 4
    assert trainer.state.epoch_length == 3 * 4 // 2
    assert trainer.state.iteration == 2 * 3 * 4 // 2
    assert trainer.optimizer.param_groups[0]["lr"] == 0, "the rate falls over all steps"


def test_an_epoch_of_another_length_is_reported_when_resuming(
    bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = overrides(bundle, data, val_fraction=0, epochs=1, case_repeats=2)
    run_workflow(bundle, ["train"], settings)
    run_workflow(bundle, ["train"], {**settings, "epochs": 2, "resume": True})
    assert "counts epochs" not in "".join(capsys.readouterr())
    run_workflow(bundle, ["train"], {**settings, "epochs": 3, "case_repeats": 1, "resume": True})
    assert "last_epoch.pt counts epochs of 4 steps, this run epochs of 2" in "".join(capsys.readouterr())


# -- which weights


@pytest.mark.parametrize("decay", [None, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_last_weights_are_kept_on_request(decay: float | None, bundle: Path, data: Path) -> None:
    # A rate that ruins what the first epochs learned: the best validation is not the last.
    settings = overrides(bundle, data, epochs=4, learning_rate=0.05, ema_decay=decay)
    stored = {}
    for keep in ("best", "last"):
        run_workflow(bundle, ["train"], {**settings, "keep_weights": keep})
        last = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
        final = last["average"]["network"] if decay else last["model"]
        model = torch.load(bundle / "models" / "model.pt", weights_only=True)
        stored[keep] = all(torch.equal(model[name], weights) for name, weights in final.items())
        assert keep == "last" or stored[keep] == (last["best_metric_epoch"] == 4)
    assert stored["last"]
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], {**settings, "keep_weights": "first"})
    message = 'Expected `keep_weights` to be "best" or "last", but got \'first\': leave it out for "best".'
    assert message in [str(cause) for cause in causes(caught.value)]


def test_final_weights_are_written_once_and_their_best_score_is_forgotten(bundle: Path, data: Path) -> None:
    models = bundle / "models"
    settings = overrides(bundle, data, epochs=2, keep_weights="last")
    run_workflow(bundle, ["train"], settings)
    (models / "postprocessing.json").write_text(Postprocessing(0.4, (0.0,)).to_json())
    written = (models / "model.pt").stat().st_mtime_ns
    run_workflow(bundle, ["train"], {**settings, "resume": True})
    assert (models / "postprocessing.json").is_file(), "nothing was trained, so what was tuned still fits"
    assert (models / "model.pt").stat().st_mtime_ns == written
    # Best again: the best epoch of before is not the weights that are stored.
    best = {**settings, "resume": True, "epochs": 3, "keep_weights": "best"}
    run_workflow(bundle, ["train"], best)
    last = torch.load(models / "last_epoch.pt", weights_only=True)
    assert last["best_metric_epoch"] == 3
    model = torch.load(models / "model.pt", weights_only=True)
    assert all(torch.equal(model[name], weights) for name, weights in last["model"].items())
    assert not (models / "postprocessing.json").exists()


def test_resuming_on_another_split_remembers_what_was_seen(bundle: Path, data: Path) -> None:
    run_workflow(bundle, ["train"], overrides(bundle, data, folds=4, fold=0, epochs=1, keep_weights="last"))
    settings = overrides(bundle, data, folds=4, fold=1, epochs=2, keep_weights="last", resume=True)
    run_workflow(bundle, ["train"], settings)
    assert len(json.loads((bundle / "models" / "model.json").read_text())["trained"]) == 4


# -- full resolution, and scores of the held-out cases


def test_evaluation_follows_a_model_at_full_resolution_and_scores_its_own_validation(
    bundle: Path, data: Path, tmp_path: Path
) -> None:
    split = {"folds": 4, "fold": 1}
    run_workflow(
        bundle, ["train"], overrides(bundle, data, full_resolution="true", amp_dtype="bfloat16", **split)
    )  # text, as from a command line
    plan = json.loads((bundle / "models" / "model.json").read_text())
    assert plan["strides"][0] == [1, 1, 1]
    settings = overrides(bundle, data, output_dir=str(tmp_path), evaluate_on="validation")
    run_workflow(bundle, ["train", "evaluate"], {**settings, **split})
    rows = score_rows(tmp_path / "val_mean_iou_raw.csv")
    assert len(rows) == 1
    assert not {name.removesuffix(".nii.gz") for name in rows} & set(plan["trained"])
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train", "evaluate"], {**settings, "folds": 4, "fold": 2})
    assert "Expected cases that the model has not seen, but it was trained on" in str(causes(caught.value))
    masks = {"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(tmp_path / "masks")}
    run_workflow(bundle, ["inference"], masks)
    assert len(list((tmp_path / "masks").iterdir())) == 3


def test_a_mixed_precision_that_is_none(bundle: Path, data: Path) -> None:
    message = "Expected `amp_dtype` to be float16 or bfloat16, but got 'float8': write --amp_dtype bfloat16."
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], overrides(bundle, data, amp_dtype="float8"))
    assert message in str(causes(caught.value))


# -- the random transforms


def probabilities(data: Path, augmentation: float, pixdim: list[float] | None = None) -> dict[str, float]:
    """The probability of each random transform behind the patches; of the deformation, both."""
    parser = ConfigParser(ConfigParser.load_config_file(bundle_path() / "configs" / "train.json"))
    keys = {"augmentation": augmentation, "pixdim": pixdim}
    parser.update({"dataset_dir": str(data), "bundle_root": str(bundle_path()), **keys})
    transforms = parser.get_parsed_content("train#random_transforms")
    chances = {type(item).__name__: item.prob for item in transforms if hasattr(item, "prob")}
    (deformation,) = (item for item in transforms if isinstance(item, RandAffineElasticd))
    return {**chances, "affine": deformation.affine_prob, "elastic": deformation.elastic_prob}


def test_augmentation_multiplies_the_probability_of_every_random_transform_but_flips(data: Path) -> None:
    usual, half, none = (probabilities(data, share) for share in (1.0, 0.5, 0.0))
    assert len(usual) == 9
    flip = usual.pop("RandFlipd")
    assert half.pop("RandFlipd") == none.pop("RandFlipd") == flip > 0
    assert {name: chance for name, chance in usual.items() if chance} == usual
    assert half == pytest.approx({name: chance / 2 for name, chance in usual.items()})
    assert set(none.values()) == {0.0}


def test_anisotropic_voxels_have_no_elastic_displacement(data: Path) -> None:
    usual, thick = probabilities(data, 1.0), probabilities(data, 1.0, pixdim=[1.0, 1.0, 3.0])
    assert (usual.pop("elastic"), thick.pop("elastic")) == (0.3, 0.0)
    assert usual == thick


@pytest.mark.parametrize("value", [-0.1, 1.5, "half", float("nan"), None])
def test_augmentation_is_a_share(value: object) -> None:
    with pytest.raises(
        ValueError, match=r"Expected `augmentation` to be a number from 0 to 1, but got .*: leave --aug"
    ):
        Settings(augmentation=value)


# -- the device


@pytest.mark.parametrize(("workers", "expected"), [(0, "cuda:0"), (2, "cpu")])
def test_patches_are_changed_on_the_gpu_unless_processes_cut_them(
    workers: int, expected: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parser = ConfigParser(ConfigParser.load_config_file(bundle_path() / "configs" / "train.json"))
    parser.update({"dataset_dir": str(data), "bundle_root": str(bundle_path()), "num_workers": workers})
    names = [item["_target_"].split(".")[-1] for item in parser.get("train#random_transforms")]
    assert names[:2] == ["RandCropByLesionsd", "EnsureTyped"], "it moves what was cut"
    mover = parser.get_parsed_content("train#random_transforms")[1]
    assert str(mover.converter.device) == expected


def expected_devices(key: str, known: str, value: object, written: str) -> str:
    return (
        f"Expected `{key}` to be {known}, but got {str(value)!r}: write --{key} {written}, or leave --{key} out for "
        "the default."
    )


@pytest.mark.parametrize(
    "value", ["gpu", "hpu", "privateuseone", "cuda", "cuda:1", torch.device("cuda"), "null", None, 2.5]
)
def test_a_device_that_this_machine_lacks_is_refused(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for count, known in (
        (0, "cpu, as torch can use no CUDA GPU here"),
        (1, "cpu or cuda"),
        (4, "cpu or cuda:0 to cuda:3"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        check_device("cpu")
        check_device(torch.device("cpu"))
        if str(value).startswith("cuda") and int(str(value).partition(":")[2] or 0) < count:
            check_device(value, "transform_device")
            continue
        with pytest.raises(ValueError, match=r"^Expected") as caught:
            check_device(value, "transform_device")
        assert str(caught.value) == expected_devices("transform_device", known, value, "cuda" if count else "cpu")


@pytest.mark.parametrize(
    ("configs", "loader"), [(["inference"], "handlers#0"), (["train", "evaluate"], "validate#handlers#0")]
)
def test_weights_are_loaded_onto_a_device_however_it_is_given(configs: list[str], loader: str) -> None:
    """`--device 0` of a command line is a number, which torch.load does not take."""
    files = [str(bundle_path() / "configs" / f"{name}.json") for name in configs]
    parser = ConfigParser(ConfigParser.load_config_files(files))
    numbers = [0] if torch.accelerator.is_available() else []  # else torch makes no device of it
    for given in (*numbers, "cpu", "cuda:2", torch.device("cpu")):
        parser["device"] = given
        place = parser.get_parsed_content(f"{loader}#map_location")
        assert isinstance(place, torch.device)
        assert place == torch.device(given)


def test_a_gpu_is_refused_for_processes_that_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    chosen: list[str | None] = [None]
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: chosen[-1])
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["fork", "spawn"])
    check_device("cuda", "transform_device")
    check_device("cpu", "transform_device", 2)
    with pytest.raises(ValueError, match=r"^Expected") as caught:
        check_device(torch.device("cuda:0"), "transform_device", 2)
    assert str(caught.value) == (
        "Expected `transform_device` to be cpu, as `num_workers` is 2 and forked processes cannot use a GPU, but got "
        "'cuda:0': set `num_workers` to 0, or leave --transform_device out for the default."
    )
    chosen.append("spawn")
    check_device("cuda", "transform_device", 2)


@pytest.mark.parametrize("configs", [["train"], ["train", "multi_gpu_train"]])
def test_a_training_gives_its_forked_workers_no_gpu(
    configs: list[str], bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: "fork")
    given = overrides(bundle, data, device="cpu", transform_device="cuda", num_workers=2)
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, configs, given)
    assert "Expected `transform_device` to be cpu, as `num_workers` is 2" in str(causes(caught.value))
    assert not (bundle / "models").exists()


@pytest.mark.parametrize(
    ("configs", "key"),
    [
        (["train"], "device"),
        (["train"], "transform_device"),
        (["train", "evaluate"], "device"),
        (["train", "multi_gpu_train"], "transform_device"),
        (["train", "evaluate", "multi_gpu_evaluate"], "device"),
        (["inference"], "device"),
    ],
)
def test_a_device_is_checked_before_any_work(configs: list[str], key: str, bundle: Path, data: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, configs, overrides(bundle, data, **{key: "gpu"}))
    assert re.search(rf"Expected `{key}` to be cpu.*, but got 'gpu': write --{key} c", str(causes(caught.value)))
    assert not (bundle / "models").exists()
