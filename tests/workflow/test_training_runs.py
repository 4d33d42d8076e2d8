"""The folder of `monai-iou train`: what is refused, what goes on, and what is done once."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import nibabel as nib
import numpy as np
import pytest
from forked_runs import finish, fork
from layouts import plain_pair
from monai.bundle import ConfigParser

import monai_iou
from monai_iou import IoULoss
from monai_iou.bundle_files import bundle_path, copy_bundle
from monai_iou.commands import train as train_command
from monai_iou.commands.command_lines import options_line
from monai_iou.evaluation.results import Evaluation
from monai_iou.files import OutputError, read_csv
from monai_iou.locks import folder_lock
from monai_iou.workflow import held_out, training_runs
from monai_iou.workflow.config_errors import ConfigError
from monai_iou.workflow.inference_keys import keys_for_inference
from monai_iou.workflow.loss_override import check_loss, with_whole_loss
from monai_iou.workflow.run_state import RunState
from monai_iou.workflow.run_summary import write_summary
from monai_iou.workflow.settings import Settings
from monai_iou.workflow.trained_models import find_models
from monai_iou.workflow.training_runs import SCORES, STAGES, Training, TrainingRun

KEYS = {"epochs": 2}


def run_of(folder: Path, keys: dict[str, Any] | None = None, folds: int | None = None) -> TrainingRun:
    asked = {"dataset": "d", "keys": keys or KEYS}
    folders = [folder] if folds is None else [folder / f"fold{fold}" for fold in range(folds)]
    return TrainingRun(folder, Path("d"), tuple(Training(each, (), KEYS, asked) for each in folders), folds)


def make_started(training: Training, *done: str) -> None:
    (training.folder / "models").mkdir(parents=True)
    (training.folder / "models" / "model.pt").touch()
    RunState(training.folder, dict(training.request), list(done)).write()


def make_finished(folder: Path) -> None:
    make_started(run_of(folder).trainings[0], *STAGES)
    (folder / SCORES).mkdir()
    (folder / SCORES / "report.html").touch()


def test_a_finished_training_is_not_replaced(tmp_path: Path) -> None:
    make_finished(tmp_path)
    with pytest.raises(OutputError, match=re.escape("it with --resume, replace it with --overwrite, or choose")):
        run_of(tmp_path).check(resume=False, overwrite=False)
    run_of(tmp_path).check(resume=True, overwrite=False)
    run = run_of(tmp_path)
    run.check(resume=True, overwrite=True)
    assert not any(run.trainings[0].is_done(stage) for stage in STAGES), "the data may have changed"
    assert (tmp_path / "models" / "model.pt").exists()
    run_of(tmp_path).check(resume=False, overwrite=True)
    assert (tmp_path / "models" / "model.pt").exists(), "a check removes nothing"


def test_a_check_sees_what_another_command_did_since_the_last_one(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    make_started(run.trainings[0], "trained")
    run.check(resume=False, overwrite=False)
    shutil.rmtree(tmp_path / "models")
    make_finished(tmp_path)
    with pytest.raises(OutputError, match="to be without a training, but it has one: continue"):
        run.check(resume=False, overwrite=False)


def test_to_resume_and_to_overwrite_reaches_the_bundle(tmp_path: Path) -> None:
    for words, expected in (["--resume"], {}), (["--resume", "--overwrite"], {"overwrite": True}):
        with train_command.train.make_context("train", [str(tmp_path), *words]) as context:
            options = {name: value for name, value in context.params.items() if name != "dataset"}
            keys = train_command._keys(context, tmp_path, options)
            assert keys == expected
            (training,) = train_command._run(tmp_path, tmp_path, keys, options).trainings
            assert training.request["keys"] == {}, "the same command goes on from there"
            assert training.bundle_keys.get("resume", False) is ("--overwrite" in words)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keys of the runs of inference, whose masks are empty files."""
    found: list[dict[str, Any]] = []

    def run_configs(_: object, keys: dict[str, Any], *__: str) -> None:
        found.append(keys)
        Path(keys["output_dir"]).mkdir(exist_ok=True)
        for item in keys["images"]:
            Path(keys["output_dir"], f"{item['case']}.nii.gz").touch()

    monkeypatch.setattr(training_runs, "run_configs", run_configs)
    return found


def test_the_device_that_is_planned_for_is_that_of_training_and_masks(
    tmp_path: Path, given: list[dict[str, Any]]
) -> None:
    for words, expected in (["--device", "cpu"], "cpu"), (["--device", "cuda"], "cuda"), ([], None):
        with train_command.train.make_context("train", [str(tmp_path), *words]) as context:
            options = {name: value for name, value in context.params.items() if name != "dataset"}
            keys = train_command._keys(context, tmp_path, options)
            (training,) = train_command._run(tmp_path, tmp_path, keys, options).trainings
        assert training.bundle_keys.get("device") == expected
        make_started(training, "trained")
        training.state.facts["held_out"] = [{"case": "c", "image": "i", "label": "l"}]
        training.predict(tmp_path / "masks")
        assert given.pop().get("device") == expected
        shutil.rmtree(tmp_path / "models")


def test_masks_are_made_as_the_training_runs_the_network(
    tmp_path: Path, given: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_bundle(tmp_path / "run")
    mine = tmp_path / "mine.json"
    mine.write_text('{"workers": 1, "num_workers": "$@workers + 1", "amp": true, "train#trainer#epoch_length": 2}')
    words = ["--config", str(mine), "--sw_batch_size", "1", "--amp", "false", "--amp_dtype=bfloat16", "--epochs", "1"]
    with train_command.train.make_context("train", [str(tmp_path), "--device", "cpu", *words]) as context:
        options = {name: value for name, value in context.params.items() if name != "dataset"}
        keys = train_command._keys(context, tmp_path, options)
        (training,) = train_command._run(run, tmp_path, keys, options).trainings
    make_started(training, "trained")
    training.state.facts["held_out"] = [{"case": "c", "image": "i", "label": "l"}]
    training.predict(tmp_path / "masks")
    (found,) = given
    assert {name: value for name, value in found.items() if name not in ("images", "ckpt_dir", "output_dir")} == {
        "sw_batch_size": 1, "amp": "false", "amp_dtype": "bfloat16", "num_workers": 2, "device": "cpu",
    }  # fmt: skip
    train_command._tell_results(TrainingRun(run, tmp_path, (training,)), None)
    options = "--amp false --amp_dtype bfloat16 --device cpu --num_workers 2 --sw_batch_size 1"
    assert f"monai-iou predict {run} YOUR_IMAGES {options}\n" in capsys.readouterr().out
    shutil.rmtree(run / "models")
    with pytest.raises(click.ClickException) as caught:
        train_command._tell_results(TrainingRun(run, tmp_path, (training,)), None)
    assert str(caught.value) == (
        f"Expected the training to store its weights in {run / 'models' / 'model.pt'}, but it ended without: give its "
        "CheckpointHandler the `ckpt_dir` of the train.json that `monai-iou init` copies."
    )
    assert "Model:" not in capsys.readouterr().out


def test_an_overlap_for_each_axis_holds_for_the_masks_as_it_is(tmp_path: Path) -> None:
    """As text, inference would refuse it after the whole training."""
    run, mine = copy_bundle(tmp_path / "run"), tmp_path / "mine.json"
    mine.write_text('{"sw_overlap": [0.5, 0.5, 0.25]}')
    configs = [run / "configs" / "train.json"]
    for given in (
        keys_for_inference([*configs, mine], {}),
        keys_for_inference(configs, {"sw_overlap": [0.5, 0.5, 0.25]}),
        keys_for_inference(configs, {"sw_overlap": (0.5, 0.5, 0.25)}),
    ):
        assert given == {"sw_overlap": [0.5, 0.5, 0.25]}
        assert Settings(**given).sw_overlap == given["sw_overlap"]
        assert shlex.split(options_line(given)) == ["--sw_overlap", "[0.5, 0.5, 0.25]"]
    assert keys_for_inference(configs, {"amp_dtype": "$torch.float16"}) == {"amp_dtype": "torch.float16"}


@pytest.mark.parametrize(
    ("keys", "config"),
    [
        ({"validate#inferer#device": "cpu", "validate::inferer::sw_device": "$torch.device('cpu')"}, {}),
        ({}, {"validate#inferer#device": "cpu", "validate#inferer#sw_device": "cpu"}),
        ({}, {"+validate#inferer": {"device": "cpu", "sw_device": "cpu"}}),
        ({"validate#inferer#sw_device": "@place"}, {"place": "cpu", "validate#inferer#device": "@place"}),
    ],
)
def test_where_a_validation_keeps_its_output_holds_for_the_masks(
    keys: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    run, mine = copy_bundle(tmp_path / "run"), tmp_path / "mine.json"
    mine.write_text(json.dumps(config))
    configs = [run / "configs" / "train.json", mine]
    found = keys_for_inference(configs, keys)
    assert found == {"inferer#device": "cpu", "inferer#sw_device": "cpu"}
    assert keys_for_inference(configs[:1], {"validate#inferer#device": None, "validate#inferer#overlap": 0.5}) == {}
    parser = ConfigParser(ConfigParser.load_config_file(run / "configs" / "inference.json"))
    for name, value in found.items():
        parser[name] = value
    assert {parser.get("inferer")[name] for name in ("device", "sw_device")} == {"cpu"}


def keys_of(words: list[str], tmp_path: Path) -> dict[str, Any]:
    """What a command line passes on to the bundle."""
    run = copy_bundle(tmp_path / "run")
    with train_command.train.make_context("train", [str(tmp_path), *words]) as context:
        options = {name: value for name, value in context.params.items() if name != "dataset"}
        keys = train_command._keys(context, tmp_path, options)
        (training,) = train_command._run(run, tmp_path, keys, options).trainings
        return training.bundle_keys


def test_another_loss_takes_the_place_of_the_planned_one_and_of_its_arguments(tmp_path: Path) -> None:
    """`lambda_ce` of a planned IoUCELoss, say, is no argument of IoULoss."""
    keys = keys_of(["--loss::_target_", "monai_iou.IoULoss"], tmp_path)
    shipped = json.loads((tmp_path / "run" / "configs" / "train.json").read_text())["loss"]
    assert [name for name in keys if name.startswith("loss")] == ["loss", "loss::_target_"], "in this order"
    assert keys["loss"] == shipped
    assert set(shipped) <= {"_target_", *inspect.signature(IoULoss).parameters}
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "own.json").write_text('{"loss": {"_target_": "monai_iou.IoULoss", "softmax": true}}')
    keys = keys_of(["--loss::_target_", "monai_iou.LogIoULoss", "--config", str(tmp_path / "own.json")], tmp_path)
    assert "loss" not in keys, "that of the user's own config stays"
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "own.json").write_text('{"loss::smooth_dr": 0.5, "epochs": 3}')
    keys = keys_of(["--config", str(tmp_path / "own.json"), "--loss::_target_", "monai_iou.IoULoss"], tmp_path)
    assert [name for name in keys if name.startswith("loss")] == ["loss", "loss::smooth_dr", "loss::_target_"]
    assert "epochs" not in keys, "it is merged as it was"
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "own.json").write_text('{"loss::_target_": "monai_iou.IoULoss"}')
    assert keys_of(["--config", str(tmp_path / "own.json")], tmp_path)["loss"] == shipped
    shutil.rmtree(tmp_path / "run")
    assert "loss" not in keys_of(["--loss::lambda_ce", "1"], tmp_path)


@pytest.mark.parametrize("name", sorted(name for name in monai_iou.__all__ if name.endswith("Loss")))
def test_a_loss_takes_what_replaces_the_planned_ones_arguments_or_is_refused(name: str, tmp_path: Path) -> None:
    kind, configs = getattr(monai_iou, name), (bundle_path() / "configs" / "train.json", tmp_path / "plan.json")
    keys = {"loss::_target_": f"monai_iou.{name}"}
    arguments = {key: value for key, value in with_whole_loss(keys, configs)["loss"].items() if key != "_target_"}
    takes = inspect.signature(kind).parameters
    others = [argument for argument in arguments if argument not in takes]
    if any(each.kind is each.VAR_KEYWORD for each in takes.values()) or not others:
        check_loss(keys, configs)
        assert {"include_background", "softmax", "sigmoid", "ignore_index", "sync_batch"} <= {*arguments}
        assert {"batch", "soft_label"} & {*takes} <= {*arguments}
        return
    with pytest.raises(ConfigError) as caught:
        check_loss(keys, configs)
    assert str(caught.value) == (
        f"Expected the class of --loss::_target_ to take the arguments of the bundle's own loss, but {name} does not "
        f"take {', '.join(others)}: write that loss with its own arguments as the whole `loss` into a JSON file, and "
        "give the file with --config."
    )


def test_a_loss_of_monai_is_refused_unless_it_is_given_whole(tmp_path: Path) -> None:
    configs = (bundle_path() / "configs" / "train.json", tmp_path / "plan.json")
    for name in ("DiceCELoss", "monai.losses.DiceCELoss"):
        with pytest.raises(ConfigError, match="DiceCELoss does not take soft_label, ignore_index, sync_batch: write"):
            check_loss({"loss::_target_": name}, configs)
    own = tmp_path / "own.json"
    own.write_text('{"loss": {"_target_": "DiceCELoss", "softmax": true, "to_onehot_y": true}}', encoding="utf-8")
    check_loss({}, (*configs, own))
    own.write_text('{"~loss::soft_label": 0, "~loss#ignore_index": 0, "~loss#sync_batch": 0}', encoding="utf-8")
    check_loss({"loss::_target_": "DiceCELoss"}, (*configs, own))
    check_loss({"loss::_target_": "no.such.Loss"}, configs)  # is named when it is made


def test_a_config_may_give_the_interval_of_validations(tmp_path: Path) -> None:
    assert keys_of(["--epochs", "40"], tmp_path)["val_interval"] == 2
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "own.json").write_text('{"val_interval": 7}')
    assert "val_interval" not in keys_of(["--epochs", "40", "--config", str(tmp_path / "own.json")], tmp_path)


def test_the_same_command_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    make_started(run_of(tmp_path).trainings[0], "trained")
    run_of(tmp_path).check(resume=False, overwrite=False)
    with pytest.raises(OutputError, match=r"it has one \(epochs was 2 and is 3\): continue it with --resume"):
        run_of(tmp_path, {"epochs": 3}).check(resume=False, overwrite=False)
    run_of(tmp_path, {"epochs": 3}).check(resume=True, overwrite=False)


def test_a_training_of_the_bundles_own_command_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "last_epoch.pt").touch()
    with pytest.raises(OutputError, match="to be without a training"):
        run_of(tmp_path).check(resume=False, overwrite=False)


def test_with_other_keys_every_stage_is_to_be_done_again(tmp_path: Path) -> None:
    make_started(run_of(tmp_path).trainings[0], *STAGES)
    assert all(run_of(tmp_path).trainings[0].is_done(stage) for stage in STAGES)
    assert not any(run_of(tmp_path, {"epochs": 3}).trainings[0].is_done(stage) for stage in STAGES)


def test_a_cross_validation_with_one_fold_to_go_goes_on(tmp_path: Path) -> None:
    first, _, _ = run_of(tmp_path, folds=3).trainings
    make_started(first, *STAGES)
    run_of(tmp_path, folds=3).check(resume=False, overwrite=False)


def test_folds_may_be_jobs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(Training, "train", lambda self: (make_started(self), self.state.finish("trained")))
    monkeypatch.setattr(Training, "predict", lambda self, masks: self.state.finish("predicted"))
    whole = run_of(tmp_path, folds=3)
    told: list[str] = []
    for training in whole.trainings[:2]:
        job = TrainingRun(tmp_path, Path("d"), (training,), 3)
        job.check(resume=False, overwrite=False)
        assert job.run(told.append, lambda _: None) is None
    assert told[-1] == "Not scored yet: the report follows when fold 2 is trained as well."
    assert json.loads((tmp_path / "configs" / "ensemble.json").read_text())["models"] == [
        f"$@bundle_root + '/fold{fold}/models'" for fold in (0, 1)
    ]


def test_jobs_whose_folds_hold_out_a_case_twice_end_without_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    held = {"fold0": ["a", "b"], "fold1": ["c"], "fold2": ["b"]}

    def train(self: Training) -> None:
        make_started(self)
        items = [{"case": case, "image": "i", "label": "l"} for case in held[self.folder.name]]
        self.state.finish("trained", held_out=items, labels=[1])

    def predict(self: Training, masks: Path) -> None:
        masks.mkdir(parents=True, exist_ok=True)
        for case in held[self.folder.name]:
            (masks / f"{case}.nii.gz").touch()
        self.state.finish("predicted")

    monkeypatch.setattr(Training, "train", train)
    monkeypatch.setattr(Training, "predict", predict)
    told: list[str] = []
    for training in run_of(tmp_path, folds=3).trainings:
        assert TrainingRun(tmp_path, Path("d"), (training,), 3).run(told.append, lambda _: None) is None
    assert told[-1] == (
        "Not scored together: folds 0 and 2 both hold out b, which a report can have only once. If the cases or the "
        "split changed between their trainings, replace all folds with --overwrite."
    )


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_jobs_that_end_together_predict_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    whole, log = run_of(tmp_path, folds=3), tmp_path / "log"

    def train(self: Training) -> None:
        make_started(self)
        self.state.finish("trained", held_out=[], labels=[1])

    def predict(self: Training, masks: Path) -> None:
        masks.mkdir(parents=True, exist_ok=True)
        with folder_lock(masks, "evaluation"):  # as the bundle does
            time.sleep(0.3)
        self.state.finish("predicted")

    def job(training: Training) -> Evaluation | None:
        return TrainingRun(tmp_path, Path("d"), (training,), 3).run(print, lambda _: None)

    monkeypatch.setattr(Training, "train", train)
    monkeypatch.setattr(Training, "predict", predict)
    children = [fork(lambda training=training: job(training), log) for training in whole.trainings]
    assert [finish(child) for child in children] == [0] * 3, log.read_text()
    assert "prediction by process" in log.read_text()


def test_each_folds_page_has_its_own_scores_and_the_report_those_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, run = plain_pair(tmp_path / "data"), tmp_path / "run"
    (run / "configs").mkdir(parents=True)

    def train(self: Training) -> None:
        case = f"c{self.folder.name[-1]}"
        make_started(self, "trained")
        (self.folder / "epochs.csv").write_text("epoch,loss\n1,0.5\n")
        held = [{"case": case, **{kind: str(dataset / f"{kind}s" / f"{case}.nii.gz") for kind in ("image", "label")}}]
        self.state.finish("trained", held_out=held, labels=[1, 2, 3])

    def predict(self: Training, masks: Path) -> None:
        (item,) = self.state.facts["held_out"]
        label = nib.load(item["label"])
        nothing = nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine)
        masks.mkdir(parents=True, exist_ok=True)
        nib.save(label if item["case"] == "c0" else nothing, masks / f"{item['case']}.nii.gz")
        self.state.finish("predicted")

    monkeypatch.setattr(Training, "train", train)
    monkeypatch.setattr(Training, "predict", predict)
    folds = TrainingRun(run, dataset, run_of(run, folds=2).trainings, 2)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(held_out, "write_summary", stopped)
        with pytest.raises(KeyboardInterrupt):
            folds.run(lambda _: None, lambda _: None)
    assert (run / SCORES / "report.html").is_file()
    assert not folds.is_finished, "a page is missing"
    monkeypatch.setattr(Training, "train", None)
    monkeypatch.setattr(Training, "predict", None)
    folds.check(resume=False, overwrite=False)
    scores = folds.run(lambda _: None, lambda _: None)
    assert scores is not None
    assert folds.is_finished
    page = run / "fold1" / "summary.html"
    os.utime(page, ns=(0, 0))
    assert folds.is_finished, "also in a copy, whose files have other times"
    shutil.copy(page, tmp_path / "page")
    write_summary(run / "fold1")
    assert not folds.is_finished, "that page is of the training alone"
    page.unlink()
    assert not folds.is_finished
    (run / "fold1" / "epochs.csv").rename(tmp_path / "epochs.csv")
    assert folds.is_finished, "without it there is no page"
    (tmp_path / "epochs.csv").rename(run / "fold1" / "epochs.csv")
    shutil.copy(tmp_path / "page", page)
    assert [scores.summary["labels"][name]["iou"]["mean"] for name in scores.names] == [0.5] * 3
    for fold, expected in enumerate(("1.000", "0.000")):
        page = (run / f"fold{fold}" / "summary.html").read_text(encoding="utf-8")
        first_cells = re.findall(r'<th scope="row" class="left">[^<]*</th><td>([^<]*)</td>', page)
        assert [float(cell) for cell in first_cells] == [float(expected)] * 3
        assert "Means over the 1 case that" in page
        assert "report is ../validation/report.html" in page


def test_options_that_an_earlier_version_did_not_note_are_not_compared(tmp_path: Path) -> None:
    earlier = {"dataset": "d", "folds": None, "minutes": None, "configs": [], "fold": None, "keys": {"epochs": 2}}
    now = {**earlier, "memory_gb": 4.0, "device": "cpu", "keys": {"epochs": 2, "device": "cpu"}}
    assert RunState(tmp_path, earlier).differences(now) == []
    assert RunState(tmp_path, earlier).differences({**now, "minutes": 3.0}) == ["minutes was None and is 3.0"]
    noted = {**earlier, "memory_gb": None, "device": None}
    assert RunState(tmp_path, noted).differences(now) == [
        "memory_gb was None and is 4.0",
        "device was None and is cpu",
        "keys have device cpu",
    ]


def run_with(config: Path, folder: Path) -> TrainingRun:
    options = {"configs": (config,), "folds": None, "fold": None, "minutes": None, "memory_gb": None, "device": "auto"}
    return train_command._run(folder, folder.parent, {}, options)


def test_what_a_config_says_belongs_to_the_request_and_not_where_it_lies(tmp_path: Path) -> None:
    extra, folder = tmp_path / "extra.json", tmp_path / "run"
    extra.write_text('{"epochs": 10, "learning_rate": 0.002, "loss": {"smooth": [1, 2]}}')
    first = run_with(extra, folder).trainings[0]
    make_started(first, *STAGES)
    shutil.copy(extra, tmp_path / "same.json")
    for config in (extra, tmp_path / "same.json"):
        again = run_with(config, folder)
        again.check(resume=False, overwrite=False)
        assert all(again.trainings[0].is_done(stage) for stage in STAGES)
    extra.write_text('{"epochs": 100, "loss": {"smooth": [1, 3]}, "seed": "' + 200 * "7" + '"}')
    other = run_with(extra, folder)
    with pytest.raises(OutputError) as caught:
        other.check(resume=False, overwrite=False)
    assert str(caught.value) == (
        f"Expected {folder} to be without a training, but it has one (epochs was 10 and is 100; configs had "
        "learning_rate 0.002; loss was {'smooth': [1, 2]} and is {'smooth': [1, 3]}; configs have seed "
        f"{100 * '7'}...): continue it with --resume, replace it with --overwrite, or choose another folder with "
        "--output."
    )
    other.check(resume=True, overwrite=False)
    assert not any(other.trainings[0].is_done(stage) for stage in STAGES)


def test_a_run_of_a_version_that_did_not_note_what_configs_say_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, folder = tmp_path / "extra.json", tmp_path / "run"
    extra.write_text('{"epochs": 10}')
    first = run_with(extra, folder).trainings[0]
    earlier = {name: value for name, value in first.request.items() if name != "config_keys"}
    make_started(Training(folder, (), {}, earlier))
    again = run_with(extra, folder)
    again.check(resume=False, overwrite=False)
    shutil.copy(extra, tmp_path / "other.json")
    assert again.trainings[0].state.differences(run_with(tmp_path / "other.json", folder).trainings[0].request) == [
        f"configs was ['{extra}'] and is ['{tmp_path / 'other.json'}']"
    ]

    def run_configs(*_: object) -> None:
        (folder / "models" / "last_epoch.pt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(training_runs, "run_configs", run_configs)
    (folder / "configs").mkdir()
    for name in ("train.json", "plan.json"):
        (folder / "configs" / name).write_text('{"loss": {}}')
    with pytest.raises(KeyboardInterrupt):
        again.trainings[0].train()
    stored = RunState.read(folder)
    assert stored is not None
    assert stored.request["config_keys"] == {"epochs": 10}, "what it was trained with is known from now on"


def without_configs(run: TrainingRun, folder: Path) -> TrainingRun:
    """The run by configs that hold nothing."""
    (folder / "empty.json").write_text('{"loss": {}}')
    configs = (folder / "empty.json", folder / "empty.json")
    return replace(run, trainings=tuple(replace(training, configs=configs) for training in run.trainings))


@pytest.mark.parametrize("checkpoint", ["last_epoch.pt", "model.pt", None])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_resumption_that_is_refused_leaves_the_state_as_it_was(
    kind: type[BaseException], checkpoint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_finished(tmp_path)
    models = tmp_path / "models"
    (models / "last_epoch.pt").touch()
    before = (tmp_path / "run.json").read_bytes()

    def run_configs(*_: object) -> None:
        assert RunState.read(tmp_path).request["keys"] == KEYS, "what a kill would leave"  # type: ignore[union-attr]
        if checkpoint is not None:
            (models / checkpoint).write_text("new")
            assert RunState.read(tmp_path).request["keys"] == {"batch_size": 0}  # type: ignore[union-attr]
        message = "Expected `batch_size` to be an integer of at least 1, but got 0: leave --batch_size out."
        raise kind(message)

    monkeypatch.setattr(training_runs, "run_configs", run_configs)
    run = without_configs(run_of(tmp_path, {"batch_size": 0}), tmp_path)
    run.check(resume=True, overwrite=False)
    with pytest.raises(kind, match="Expected `batch_size`"):
        run.run(lambda _: None, lambda _: None)
    assert ((tmp_path / "run.json").read_bytes() == before) is (checkpoint is None)
    first = run_of(tmp_path).trainings[0]
    assert all(first.is_done(stage) is (checkpoint is None) for stage in STAGES)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("checkpoint", ["last_epoch.pt", None])
def test_a_fold_whose_resumption_was_killed_is_complete_until_it_has_a_new_checkpoint(
    checkpoint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "run", run_of(tmp_path / "run", folds=2)
    for training in run.trainings:
        make_started(training, *STAGES)
        (training.folder / "models" / "last_epoch.pt").touch()

    def run_configs(*_: object) -> None:
        if checkpoint is not None:
            (whole / "fold0" / "models" / checkpoint).write_text("new")
        os._exit(9)

    monkeypatch.setattr(training_runs, "run_configs", run_configs)
    longer = without_configs(run_of(whole, {"epochs": 3}, folds=2), tmp_path)
    longer.check(resume=True, overwrite=False)
    assert finish(fork(longer.trainings[0].train, tmp_path / "log")) == 9
    copied = shutil.copytree(whole, tmp_path / "copied")  # other times and inodes
    for folder in (whole, copied):
        known = RunState.read(folder / "fold0")
        assert known is not None
        assert (known.request["keys"], known.done) == ((KEYS, [*STAGES]) if checkpoint is None else ({"epochs": 3}, []))
        complete = [0, 1] if checkpoint is None else [1]
        assert find_models(folder).files == tuple(folder / f"fold{fold}" / "models" / "model.pt" for fold in complete)
    assert RunState.read(whole / "fold1") == RunState(whole / "fold1", dict(run.trainings[1].request), [*STAGES])


def test_a_training_that_cannot_begin_leaves_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_configs(*_: object) -> None:
        message = "Expected a loss, but got none: name one."
        raise ConfigError(message)

    monkeypatch.setattr(training_runs, "run_configs", run_configs)
    with pytest.raises(ConfigError):
        without_configs(run_of(tmp_path), tmp_path).trainings[0].train()
    assert not (tmp_path / "run.json").exists()


def test_a_state_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert RunState.read(tmp_path) is None
    (tmp_path / "run.json").write_text("[]", encoding="utf-8")
    assert RunState.read(tmp_path) is None


def train(data: Path, output: Path, *words: str) -> list[str]:
    small = ["--base_channels", "4", "--patch_size", "[24,24,16]", "--case_repeats", "1", "--batch_size", "2"]
    code = "import sys, monai_iou_command; sys.exit(monai_iou_command.main())"
    return [sys.executable, "-c", code, "train", str(data), "--output", str(output), *small, *words]


@pytest.mark.slow
def test_killed_in_the_second_fold_and_started_again(data: Path, tmp_path: Path) -> None:
    run, environment = tmp_path / "my run", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = train(data, run, "--folds", "3", "--epochs", "2")
    with (tmp_path / "log").open("w") as log:
        killed = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        last_epoch = run / "fold1" / "models" / "last_epoch.pt"
        limit = time.monotonic() + 900
        while not last_epoch.exists() and killed.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        os.killpg(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    first = (run / "fold0" / "models" / "model.pt").stat()

    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Done before: " in again.stdout
    assert (run / "fold0" / "models" / "model.pt").stat().st_mtime_ns == first.st_mtime_ns
    assert "Resumed from" in again.stdout
    rows = read_csv(run / SCORES / "cases.csv")
    assert len({row["case"] for row in rows}) == len(rows) == 4  # every training case once
    assert f"Report: {run / SCORES / 'report.html'}" in again.stdout

    third = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert third.returncode == 1
    assert "continue it with --resume" in third.stderr
    scan = sorted((data / "imagesTs").glob("*.nii.gz"))[0]
    code = "import sys, monai_iou_command; sys.exit(monai_iou_command.main())"
    output = str(tmp_path / "masks")
    predicted = [sys.executable, "-c", code, "predict", str(run), str(scan), "--folds", "all", "--output", output]
    done = subprocess.run(predicted, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "masks" / scan.name).is_file()


def test_long_values_that_differ_are_not_shown_as_the_same() -> None:
    state = RunState(Path(), {"config_keys": {"a": "x" * 200 + "1"}})
    assert state.differences({"config_keys": {"a": "x" * 200 + "2"}}) == ["a is another one"]
