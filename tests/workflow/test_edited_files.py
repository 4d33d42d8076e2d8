"""A run whose configs were edited since its training began: nothing is mixed unawares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from monai_iou.evaluation.request import RESULTS
from monai_iou.files import OutputError
from monai_iou.workflow import training_runs
from monai_iou.workflow.checkpoint_files import write_atomically
from monai_iou.workflow.inference_keys import inference_identity
from monai_iou.workflow.joint_report import what_is_missing, why_no_report
from monai_iou.workflow.run_checks import unlike_notes
from monai_iou.workflow.run_state import RunState, model_identity, no_longer_held_out
from monai_iou.workflow.trained_models import TrainedModels
from monai_iou.workflow.training_runs import SCORES, Training, TrainingRun


def files_run(folder: Path, folds: int | None = None) -> TrainingRun:
    """A run with a train.json, an inference.json and a plan of its own."""
    configs = folder / "configs"
    if not configs.exists():
        configs.mkdir(parents=True)
        (configs / "train.json").write_text(json.dumps({"epochs": 300, "train": {"inferer": "x" * 200}}))
        (configs / "plan.json").write_text(json.dumps({"learning_rate": 0.002, "amp": True, "plan_report": {"a": 1}}))
        (configs / "inference.json").write_text("{}")
    files = (configs / "train.json", configs / "plan.json")
    folders = [folder] if folds is None else [folder / f"fold{fold}" for fold in range(folds)]
    asked: dict[str, Any] = {"dataset": "d", "keys": {}}
    return TrainingRun(folder, Path("d"), tuple(Training(each, files, {}, asked) for each in folders), folds)


def make_started(training: Training) -> None:
    (training.folder / "models").mkdir(parents=True)
    (training.folder / "models" / "model.pt").touch()
    RunState(training.folder, training.asked, ["trained"]).write()


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_an_edited_plan_is_not_mixed_with_the_one_before(tmp_path: Path) -> None:
    (training,) = files_run(tmp_path).trainings
    make_started(training)
    edit(tmp_path / "configs" / "plan.json", plan_report={"a": 2})
    files_run(tmp_path).check(resume=False, overwrite=False)
    assert files_run(tmp_path).trainings[0].is_done("trained"), "the report is for readers"
    edit(tmp_path / "configs" / "plan.json", learning_rate=0.01, batch_size=4)
    edit(tmp_path / "configs" / "train.json", epochs=400, train={"inferer": "y" * 200})
    run = files_run(tmp_path)
    with pytest.raises(OutputError) as caught:
        run.check(resume=False, overwrite=False)
    assert str(caught.value) == (
        f"Expected {tmp_path} to be without a training, but it has one (epochs of train.json was 300 and is 400; train "
        "of train.json is another one; learning_rate of plan.json was 0.002 and is 0.01; plan.json has batch_size 4): "
        "continue it with --resume, replace it with --overwrite, or choose another folder with --output."
    )
    run.check(resume=True, overwrite=False)
    assert not run.trainings[0].is_done("trained")


def test_a_run_of_an_earlier_version_or_without_its_plan_goes_on(tmp_path: Path) -> None:
    (training,) = files_run(tmp_path).trainings
    make_started(training)
    RunState(tmp_path, dict(training.request), ["trained"]).write()  # as an earlier version wrote it
    assert "plan_keys" not in training.request
    files_run(tmp_path).check(resume=False, overwrite=False)
    RunState(tmp_path, training.asked, ["trained"]).write()
    (tmp_path / "configs" / "plan.json").unlink()
    files_run(tmp_path).check(resume=False, overwrite=False)
    (tmp_path / "configs" / "plan.json").write_text("{")
    files_run(tmp_path).check(resume=False, overwrite=False)


def test_a_fold_with_another_plan_than_the_others_is_refused(tmp_path: Path) -> None:
    first, second = files_run(tmp_path, folds=2).trainings
    make_started(first)
    job = TrainingRun(tmp_path, Path("d"), (second,), 2)
    job.check(resume=False, overwrite=False)
    edit(tmp_path / "configs" / "plan.json", amp=False)
    job.check(resume=False, overwrite=False)  # the first fold has no checkpoint yet by which it would go on
    (first.folder / "models" / "last_epoch.pt").touch()
    for overwrite in (False, True):
        with pytest.raises(OutputError) as caught:
            job.check(resume=False, overwrite=overwrite)
        assert str(caught.value) == (
            f"Expected all folds in {tmp_path} to follow one train.json and one plan.json, but got others than those "
            "of fold0 (amp of plan.json was True and is False): write the earlier values into train.json and "
            "plan.json, choose another folder with --output, or use these nevertheless with --resume."
        )
    job.check(resume=True, overwrite=False)


def test_a_fold_with_another_train_json_than_the_others_is_refused(tmp_path: Path) -> None:
    first, second = files_run(tmp_path, folds=2).trainings
    make_started(first)
    (first.folder / "models" / "last_epoch.pt").touch()
    job = TrainingRun(tmp_path, Path("d"), (second,), 2)
    job.check(resume=False, overwrite=False)
    edit(tmp_path / "configs" / "train.json", epochs=400)
    with pytest.raises(
        OutputError, match=r"fold0 \(epochs of train.json was 300 and is 400\): write the earlier values"
    ):
        job.check(resume=False, overwrite=False)
    job.check(resume=True, overwrite=False)
    (tmp_path / "configs" / "plan.json").unlink()
    with pytest.raises(OutputError, match=r"fold0 \(epochs of train.json was 300 and is 400\)"):
        job.check(resume=False, overwrite=False)


def asking(training: Training, keys: dict[str, Any], config: dict[str, Any] | None = None) -> Training:
    """The training with options and, unless an earlier version noted it, with what the configs say."""
    content = {} if config is None else {"config_keys": config}
    return replace(training, request={**training.request, "keys": keys, **content})


def test_a_fold_with_other_options_than_the_others_is_refused_before_it_begins(tmp_path: Path) -> None:
    first, second = files_run(tmp_path, folds=2).trainings
    first = asking(first, {"learning_rate": 0.01, "num_workers": 4, "seed": 1}, {})
    make_started(first)
    (first.folder / "models" / "last_epoch.pt").touch()

    def check(keys: dict[str, Any], config: dict[str, Any] | None, **how: bool) -> None:
        job = TrainingRun(tmp_path, Path("d"), (asking(second, keys, config),), 2)
        job.check(**{"resume": False, "overwrite": False, **how})

    check({"learning_rate": 0.01}, {})
    check({"learning_rate": 0.01, "device": "cpu", "seed": 2, "cache_dir": "c"}, {"pictures": 0})
    check({"learning_rate": 0.01, "validate::inferer::device": "cpu"}, {"validate#inferer#sw_device": "cpu"})
    with pytest.raises(OutputError, match=r"of fold0 \(keys have validate#inferer#overlap 0.5\)"):
        check({"learning_rate": 0.01, "validate#inferer#overlap": 0.5}, {})
    check({"num_workers": 0}, {"learning_rate": 0.01})
    check({"learning_rate": 0.01}, None)
    with pytest.raises(OutputError) as caught:
        check({}, {})
    assert str(caught.value) == (
        f"Expected all folds in {tmp_path} to be trained with the same options and configs, but got others than those "
        "of fold0 (keys had learning_rate 0.01): give those of fold0, choose another folder with --output, or use "
        "these nevertheless with --resume."
    )
    check({}, {}, resume=True)
    check({}, {}, overwrite=True)  # as jobs do that replace all folds one after the other
    with pytest.raises(OutputError, match=r"of fold0 \(learning_rate was 0.01 and is 0.1; keys have loss {'_target_'"):
        check({}, {"learning_rate": 0.1, "loss": {"_target_": "IoULoss"}})
    make_started(asking(second, {"epochs": 3}, {}))
    check({"epochs": 3}, {})  # what has begun goes on
    check({"epochs": 3, "calibration": True}, {}, overwrite=True)


def test_two_spellings_of_a_nested_option_are_one(tmp_path: Path) -> None:
    first, second = files_run(tmp_path, folds=2).trainings
    make_started(asking(first, {"loss::batch": True, "+train#handlers": []}, {}))
    (first.folder / "models" / "last_epoch.pt").touch()

    def check(keys: dict[str, Any], config: dict[str, Any]) -> None:
        TrainingRun(tmp_path, Path("d"), (asking(second, keys, config),), 2).check(resume=False, overwrite=False)

    check({"loss#batch": True, "+train::handlers": []}, {})
    check({"+train#handlers": []}, {"loss::batch": True})
    with pytest.raises(OutputError, match=r"of fold0 \(loss#batch was True and is False\)"):
        check({"loss#batch": False, "+train#handlers": []}, {})


def test_a_report_says_which_folds_were_not_trained_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_masks_by(monkeypatch, ["mask"])
    run = files_run(tmp_path, folds=3)
    make_scored(run)
    noted: list[str] = []
    monkeypatch.setattr(training_runs, "score_request", lambda *_: None)
    monkeypatch.setattr(training_runs, "evaluate_folders", lambda *_, notes: noted.extend(notes))

    def note(number: int, keys: dict[str, Any]) -> list[str]:
        training = run.trainings[number]
        training.state.request = {**training.asked, "keys": keys}
        training.state.write()
        noted.clear()
        files_run(tmp_path, folds=3)._score(print, print, {})
        return noted

    assert note(1, {"seed": 3}) == []
    differs = "Not trained alike: fold1 differs from fold0 (keys have epochs 200)."
    assert note(1, {"epochs": 200}) == [differs]
    edit(tmp_path / "configs" / "plan.json", amp=False)
    assert note(2, {}) == [
        differs,
        "Not trained alike: fold2 differs from fold0 (amp of plan.json was True and is False).",
    ]
    assert unlike_notes([run.trainings[1].state]) == []


def test_masks_of_two_inference_configs_are_not_scored_together(tmp_path: Path) -> None:
    trainings = files_run(tmp_path, folds=3).trainings
    masks = tmp_path / "masks"
    masks.mkdir()

    def make_masks(number: int) -> None:
        (masks / f"c{number}.nii.gz").touch()
        trainings[number].state.finish("predicted", inference=inference_identity(trainings[number].configs))

    for number, training in enumerate(trainings):
        make_started(training)
        held_out = [{"case": f"c{number}", "image": "i", "label": "l"}] if number < 2 else []
        RunState(training.folder, training.asked, ["trained"], {"held_out": held_out}).write()
        make_masks(number)
    trainings[2].state.finish("predicted", inference="of no case")

    def why(without: tuple[int, ...] = ()) -> str:
        return why_no_report([RunState.read(training.folder) for training in trainings], masks, without)

    assert why() == ""
    edit(tmp_path / "configs" / "inference.json", sw_overlap=0.75)
    assert not trainings[1].is_predicted(masks)
    make_masks(1)
    assert why() == (
        "Not scored together: the masks of the folds were made with different versions of inference.json: start the "
        "commands of the other folds again."
    )
    (masks / "c0.nii.gz").unlink()
    assert why((0,)) == "", "a fold without masks has none that could differ"
    make_masks(0)
    assert why() == "", "after what the sentence says"
    trainings[0].state.facts["inference"] = "another"
    trainings[0].state.write()
    assert why().startswith("Not scored together")
    del trainings[0].state.facts["inference"]
    trainings[0].state.write()
    assert why() == "", "of a version that did not note it"


def test_masks_are_made_again_after_inference_was_edited(tmp_path: Path) -> None:
    (training,) = files_run(tmp_path).trainings
    make_started(training)
    RunState(tmp_path, training.asked, ["trained"], {"held_out": []}).write()
    training.predict(tmp_path / "masks")
    assert training.is_predicted(tmp_path / "masks")
    edit(tmp_path / "configs" / "inference.json", sw_overlap=0.75)
    assert not training.is_predicted(tmp_path / "masks")
    assert training.is_done("trained")


def with_masks_by(monkeypatch: pytest.MonkeyPatch, text: list[str]) -> None:
    """Let each run of inference write the last of some texts as its masks, without a model."""

    def make(configs: object, keys: dict[str, Any], kind: str) -> None:
        Path(keys["output_dir"]).mkdir(parents=True, exist_ok=True)
        for image in keys["images"]:
            (Path(keys["output_dir"]) / f"{image['case']}.nii.gz").write_text(text[-1])

    monkeypatch.setattr(training_runs, "run_configs", make)
    monkeypatch.setattr(training_runs, "find_models", lambda folder: TrainedModels((folder / "model.pt",), folder))


def make_scored(run: TrainingRun) -> None:
    for number, training in enumerate(run.trainings):
        make_started(training)
        held_out = [{"case": f"c{number}", "image": "i", "label": "l"}]
        RunState(training.folder, training.asked, ["trained"], {"held_out": held_out, "labels": [1]}).write()
        training.read_again()
        training.predict(run.masks)
    for name in RESULTS:
        (run.folder / SCORES / name).write_text("of the first masks")
    assert run.is_finished


@pytest.mark.parametrize(
    "changed", [None, "models/model.pt", "models/postprocessing.json", "configs/inference.json", "train"]
)
def test_masks_that_were_done_before_a_stop_are_kept_unless_others_would_be_made(
    changed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, made, masks = ["a", "b", "c"], list[str](), tmp_path / SCORES / "masks"

    def make(configs: object, keys: dict[str, Any], kind: str) -> None:
        masks.mkdir(parents=True, exist_ok=True)
        for image in keys["images"]:
            if len(made) == 2:
                made.append("stopped")
                raise KeyboardInterrupt
            made.append(image["case"])
            (masks / f"{image['case']}.nii.gz").write_text(image["image"])

    monkeypatch.setattr(training_runs, "run_configs", make)
    monkeypatch.setattr(training_runs, "find_models", lambda folder: TrainedModels((folder / "model.pt",), folder))
    (training,) = files_run(tmp_path).trainings
    make_started(training)
    held_out = [{"case": case, "image": "i", "label": "l"} for case in cases]
    RunState(tmp_path, training.asked, ["trained"], {"held_out": held_out, "labels": [1]}).write()
    masks.mkdir(parents=True)
    (masks / "c.nii.gz").write_text("of nobody knows which model")
    with pytest.raises(KeyboardInterrupt):
        training.predict(masks)
    assert sorted(path.name for path in masks.iterdir()) == ["a.nii.gz", "b.nii.gz"]
    (again,) = files_run(tmp_path).trainings
    if changed == "configs/inference.json":
        edit(tmp_path / changed, sw_overlap=0.75)
    elif changed == "train":  # with nothing left to train, but on data that may be others
        again.state.finish("trained")
    elif changed is not None:
        (tmp_path / changed).write_text("of more epochs")
    again.predict(masks)
    assert made == ["a", "b", "stopped", *(cases if changed else ["c"])]
    assert again.is_predicted(masks)
    assert "begun" not in again.state.facts


@pytest.mark.parametrize("name", ["model.pt", "model.json", "postprocessing.json"])
def test_masks_are_made_again_of_a_model_that_was_trained_further_by_other_means(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `python -m monai.bundle run` does, which notes nothing in run.json."""
    masks, told = ["first"], list[str]()
    with_masks_by(monkeypatch, masks)
    make_scored(files_run(tmp_path, 2))
    monkeypatch.setattr(training_runs, "score_request", lambda *_: None)
    monkeypatch.setattr(training_runs, "evaluate_folders", lambda *_, notes: told.extend(notes))
    (tmp_path / "fold0" / "models" / name).write_text("of more epochs")
    masks.append("second")
    run = files_run(tmp_path, 2)
    TrainingRun(tmp_path, Path("d"), run.trainings[1:], 2).run(told.append, print)
    assert told == [
        f"Done before: {tmp_path / 'fold1'}",
        "Not scored yet: the report follows when fold 0 has its masks: start the command of fold 0 again unless it is "
        "running.",
    ]
    assert not (tmp_path / SCORES / "report.html").exists()
    run = files_run(tmp_path, 2)
    run.check(resume=False, overwrite=False)
    run.run(told.append, print)
    assert [(run.masks / f"c{fold}.nii.gz").read_text() for fold in (0, 1)] == ["second", "first"]
    assert all(training.is_predicted(run.masks) for training in run.trainings)


def test_masks_stay_where_their_model_is_unknown_or_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_masks_by(monkeypatch, ["first"])
    run = files_run(tmp_path)
    make_scored(run)
    (training,) = run.trainings
    model = tmp_path / "models" / "model.pt"
    model.unlink()
    assert training.is_predicted(run.masks)
    model.write_text("another")
    assert not training.is_predicted(run.masks)
    del training.state.facts["model"]  # of an earlier version
    assert training.is_predicted(run.masks)


@pytest.mark.parametrize("save", [write_atomically, torch.save])
def test_one_weight_makes_another_model(save: Any, tmp_path: Path) -> None:
    """Whoever wrote the file, and wherever in it the weight is."""
    (tmp_path / "models").mkdir()
    weights = torch.zeros(1 << 18)
    found = []
    for place in (0, 0, 1 << 17, (1 << 18) - 1):
        weights[place] += 1 if len(found) != 1 else 0
        save({"w": weights}, tmp_path / "models" / "model.pt")
        found.append(model_identity(tmp_path))
    assert len({*found}) == 3
    assert found[0] == found[1]
    assert None not in found


def test_masks_of_cases_that_are_no_longer_held_out_go_unless_another_fold_holds_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of earlier weights, and of cases that the training has seen since."""
    with_masks_by(monkeypatch, ["mask"])
    run = files_run(tmp_path, 2)
    make_scored(run)
    (run.masks / "c9.nii.gz").write_text("of a case that the first fold held out before c0")
    first = run.trainings[0]
    first.state.facts = {**first.state.facts, "held_out": [{"case": "c0"}], "earlier": ["c9", "c1"]}
    new = [{"case": "c5", "image": "i", "label": "l"}]
    earlier = no_longer_held_out(first.state, new)
    first.state.finish("trained", held_out=new, earlier=earlier)
    first.state.done.remove("predicted")
    first.predict(run.masks)
    assert earlier == ["c0", "c9", "c1"]
    assert {path.name for path in run.masks.iterdir()} == {"c1.nii.gz", "c5.nii.gz"}, "c1 is the second fold's"


def test_a_kill_while_new_masks_are_scored_leaves_no_scores_of_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = ["first"]
    with_masks_by(monkeypatch, masks)
    make_scored(files_run(tmp_path))
    edit(tmp_path / "configs" / "inference.json", sw_overlap=0.75)
    masks.append("second")

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training_runs, "score_request", kill)
    run = files_run(tmp_path)
    run.check(resume=False, overwrite=False)
    with pytest.raises(KeyboardInterrupt):
        run.run(print, print)
    assert (run.masks / "c0.nii.gz").read_text() == "second"
    assert not [name for name in RESULTS if (tmp_path / SCORES / name).exists()]
    files_run(tmp_path).check(resume=False, overwrite=False)  # the same command goes on


def test_no_report_stays_beside_masks_that_are_not_scored_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_masks_by(monkeypatch, ["first"])
    folds = files_run(tmp_path, folds=2)
    make_scored(folds)
    edit(tmp_path / "configs" / "inference.json", sw_overlap=0.75)
    told: list[str] = []
    for report in (tmp_path / SCORES / "report.html",) * 2:  # the second time, it is of an earlier version's command
        TrainingRun(tmp_path, Path("d"), files_run(tmp_path, folds=2).trainings[:1], 2).run(told.append, print)
        assert told[-1].startswith("Not scored together: the masks of the folds were made with different versions of")
        assert not report.exists()
        report.touch()


@pytest.mark.parametrize(
    ("folds", "said"),
    [
        ([0], "fold 0 is trained as well"),
        ([0, 1], "folds 0 and 1 are trained as well"),
        (
            [1, 2],
            "fold 1 is trained as well, and fold 2 has its masks: start the command of fold 2 again unless it is "
            "running",
        ),
        (
            [0, 1, 2, 3],
            "folds 0 and 1 are trained as well, and folds 2 and 3 have their masks: start the commands of "
            "folds 2 and 3 again unless they are running",
        ),
    ],
)
def test_what_the_joint_report_waits_for_is_said_in_one_number(folds: list[int], said: str) -> None:
    trained = RunState(Path(), {}, ["trained"])
    assert what_is_missing([None, None, trained, trained], folds) == said
