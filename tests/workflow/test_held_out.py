"""What a training held out: cases that its model has seen are left out, and what cannot be scored is said."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from layouts import decathlon, describe, make_case, save

from monai_iou.commands import train as train_command
from monai_iou.datasets.folder import read_folder
from monai_iou.evaluation.results import Evaluation
from monai_iou.files import OutputError, read_csv, write_csv
from monai_iou.workflow import failures, training_runs
from monai_iou.workflow.data import BundleCases
from monai_iou.workflow.failures import TrainingError
from monai_iou.workflow.held_out import held_out_facts, seen_before
from monai_iou.workflow.records import image_identity
from monai_iou.workflow.run_state import RunState
from monai_iou.workflow.settings import Settings
from monai_iou.workflow.training_runs import Training, TrainingRun

FAILED = "Expected a finite network output for c0, but it has NaN or infinity: look at its intensities."


@dataclass
class Bundle:
    """Stands for the bundle: a training holds out given cases, and inference finds nothing in those it can segment."""

    dataset: Path
    held: Mapping[str, Sequence[str]]  # name of a training's folder -> its cases
    broken: set[str] = field(default_factory=set)
    trained: list[str] = field(default_factory=list)
    trained_on: Sequence[str] = ()
    keep: str = "last"
    elsewhere: str = ""  # folder beside that of the masks, which inference writes to instead

    def __call__(self, _: object, keys: Mapping[str, Any], kind: str = "train") -> Any:
        folder = Path(keys["output_dir"])
        if kind == "inference":
            return self.write_masks([item["case"] for item in keys["images"]], folder / self.elsewhere)
        (folder / "models").mkdir(parents=True, exist_ok=True)
        (folder / "models" / "model.pt").touch()
        self.trained.append(folder.name)
        held = [case.as_item() for case in read_folder(self.dataset).training if case.name in self.held[folder.name]]
        parts = {
            "cases": SimpleNamespace(validation=held, training=[{"case": case} for case in self.trained_on]),
            "plan": SimpleNamespace(label_values=[0, 1, 2, 3]),
            "settings": SimpleNamespace(validates=True),
            "keep_weights": self.keep,
        }
        return SimpleNamespace(parser=SimpleNamespace(get_parsed_content=lambda name, **_: parts[name]))

    def write_masks(self, cases: Sequence[str], folder: Path) -> None:
        for case in cases:
            if case not in self.broken:
                save(folder / f"{case}.nii.gz", np.zeros_like(make_case(0)[1]))
        if self.broken & {*cases}:
            raise TrainingError(FAILED)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return describe(tmp_path / "data", decathlon(tmp_path / "data"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "configs").mkdir(parents=True)
    return tmp_path / "run"


def start(run: Path, bundle: Bundle, folds: Sequence[int] = (), told: list[str] | None = None) -> Evaluation | None:
    """Give the command, for some of three folds or for a single training."""
    return command(run, bundle, folds).run((told if told is not None else []).append, lambda _: None)


def command(run: Path, bundle: Bundle, folds: Sequence[int]) -> TrainingRun:
    folders = [run / f"fold{fold}" for fold in folds] or [run]
    configs = (run / "configs" / "train.json", run / "configs" / "plan.json")
    trainings = tuple(Training(folder, configs, {}, {"fold": folder.name, "keys": {}}) for folder in folders)
    return TrainingRun(run, bundle.dataset, trainings, 3 if folds else None)


def notes_of(run: Path) -> list[str]:
    notes: list[str] = json.loads((run / "validation" / "summary.json").read_text(encoding="utf-8"))["notes"]
    return notes


def test_what_an_earlier_split_trained_on_is_seen(dataset: Path, tmp_path: Path) -> None:
    cases, model = BundleCases(str(dataset), val_fraction=0.3), tmp_path / "model.json"
    plan = cases.plan([16, 16, 8])
    (held_out,) = (item["case"] for item in cases.validation)
    (case,) = (case for case in read_folder(dataset).training if case.name == held_out)
    assert seen_before(cases, plan, model) == [], "there is no model"
    names, images = (*plan.trained, held_out), (*plan.trained_images, image_identity(case))
    for stored, expected in (
        (plan, []),
        (replace(plan, trained=names, trained_images=images), [held_out]),
        (replace(plan, trained=names), []),  # by a case of this name with another image
        (replace(plan, trained=names, trained_images=()), [held_out]),  # by an earlier version
        (replace(plan, trained=(*plan.trained, "named so before"), trained_images=images), [held_out]),
    ):
        model.write_text(stored.to_json(), encoding="utf-8")
        assert seen_before(cases, plan, model) == expected


def test_a_case_that_is_trained_on_and_validated_now_stays(tmp_path: Path) -> None:
    content = decathlon(tmp_path / "data", patient_groups={"P": ["c0", "c1", "c2"]})
    cases = BundleCases(str(describe(tmp_path / "data", {**content, "test_labelled": [], "test": []})))
    plan = cases.plan([16, 16, 8])
    assert [item["case"] for item in cases.validation] == list(plan.trained)
    (tmp_path / "model.json").write_text(plan.to_json(), encoding="utf-8")
    assert seen_before(cases, plan, tmp_path / "model.json") == []
    more = {"trained": (*plan.trained, "removed"), "trained_images": (*plan.trained_images, "of an earlier form")}
    (tmp_path / "model.json").write_text(replace(plan, **more).to_json(), encoding="utf-8")
    assert seen_before(cases, plan, tmp_path / "model.json") == []


def test_the_report_leaves_out_what_the_model_has_seen_and_says_so(
    dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle(dataset, {"run": ["c0", "c1", "c2"]})
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    monkeypatch.setattr(training_runs, "seen_before", lambda *_: ["c0", "c2"])
    scores = start(run, bundle)
    assert scores is not None
    for rows in (scores.rows, read_csv(run / "validation" / "cases.csv")):
        assert {row["case"] for row in rows} == {"c1"}
    why = "has already been trained on them: on another split, or through the model that it started from."
    note = f"Left out: c0, c2. The model in {run} {why}"
    assert notes_of(run) == [note]
    assert note in (run / "validation" / "report.html").read_text(encoding="utf-8")
    assert capsys.readouterr().err == f"{note}\n"


def test_without_any_unseen_case_there_is_no_report(
    dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, scores = Bundle(dataset, {"run": ["c0"]}), run / "validation"
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    assert start(run, bundle) is not None
    assert (scores / "report.html").is_file()
    monkeypatch.setattr(training_runs, "seen_before", lambda *_: ["c0"])
    again = command(run, bundle, ())
    again.check(resume=True, overwrite=True)
    told: list[str] = []
    assert again.run(told.append, lambda _: None) is None
    sentence = f"There is no report in {scores}: all held-out cases were trained on before."
    assert told == [f"Training 1 of 1: {run}", sentence]
    assert "Left out: c0." in capsys.readouterr().err
    for name in ("report.html", "summary.json", "cases.csv", "lesions.csv", "failures.csv"):
        assert not (scores / name).exists(), "the scores are those of earlier weights"


def test_a_fold_without_unseen_cases_keeps_no_other_fold_from_the_report(
    dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(dataset, {f"fold{fold}": [f"c{fold}"] for fold in range(3)})
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    monkeypatch.setattr(training_runs, "seen_before", lambda cases, *_: ["c1"] if "c1" in str(cases) else [])
    scores = start(run, bundle, range(3))
    assert scores is not None
    assert [record["case"] for record in scores.records] == ["c0", "c2"]
    assert [note.partition(".")[0] for note in notes_of(run)] == ["Left out: c1"]


@pytest.mark.parametrize("folds", [pytest.param((), marks=pytest.mark.slow), (0, 1, 2)])
def test_the_report_says_that_post_processing_was_tuned_on_its_cases(
    folds: Sequence[int], dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"fold{fold}" for fold in folds] or ["run"]
    bundle = Bundle(dataset, {name: [f"c{number}"] for number, name in enumerate(names)})
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    start(run, bundle, folds)
    assert notes_of(run) == []
    tuned = (run / "fold1" if folds else run) / "models" / "postprocessing.json"
    tuned.touch()
    start(run, bundle, folds)
    assert notes_of(run) == [
        f"The post-processing ({tuned}) was tuned on these very cases: score others before you report what it gains."
    ]


@pytest.mark.parametrize("folds", [pytest.param((), marks=pytest.mark.slow), (0, 1, 2)])
def test_the_report_says_that_its_cases_chose_the_weights(
    folds: Sequence[int],
    dataset: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [f"fold{fold}" for fold in folds] or ["run"]
    bundle = Bundle(dataset, {name: [f"c{number}"] for number, name in enumerate(names)}, keep="best")
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    start(run, bundle, folds)
    said = "were chosen by the scores of these very cases: score others before you report any."
    models = [str(run / ("" if name == "run" else name) / "models" / "model.pt") for name in names]
    assert notes_of(run) == [f"The weights ({', '.join(models)}) {said}"]
    assert f"The weights ({', '.join(models)}) {said}" in (run / "validation" / "report.html").read_text("utf-8")
    assert capsys.readouterr().err == "".join(f"The weights ({model}) {said}\n" for model in models)


@pytest.mark.parametrize(
    ("keep", "keys", "is_chosen"),
    [
        ("best", {"epochs": 4, "val_interval": 4}, True),
        ("best", {"epochs": 4, "val_interval": 5}, False),  # no epoch is validated
        ("last", {"epochs": 4, "val_interval": 1}, False),
    ],
)
def test_cases_choose_the_weights_only_where_the_best_ones_are_kept(
    keep: str, keys: Mapping[str, Any], is_chosen: bool
) -> None:
    items = [{"case": name, "image": f"{name}.nii", "label": f"{name}_label.nii", "more": 1} for name in "ab"]
    cases: Any = SimpleNamespace(validation=items, training=[*items[:1], {"case": "c"}])
    settings: Any = SimpleNamespace(validates=True, **keys)
    held_out = [{"case": "b", "image": "b.nii", "label": "b_label.nii"}]
    expected = {"held_out": held_out, "left_out": ["a"], "trained_on": [], "chose_weights": is_chosen}
    assert held_out_facts(cases, settings, ["a"], keep) == expected
    assert held_out_facts(cases, settings, [], keep)["trained_on"] == ["a"]
    settings.validates = False
    assert held_out_facts(cases, settings, [], keep)["held_out"] == []


def test_settings_of_an_earlier_version_that_do_not_tell_the_fraction_hold_cases_out() -> None:
    items = [{"case": name, "image": f"{name}.nii", "label": f"{name}_label.nii"} for name in "ab"]
    cases: Any = SimpleNamespace(validation=items, training=[{"case": "c"}])
    settings = Settings(epochs=4, val_interval=2, folds=None)
    assert settings.validates
    assert held_out_facts(cases, settings, [], "last")["held_out"] == items
    assert not Settings(val_fraction=0, folds=None).validates
    assert Settings(val_fraction=0, folds=2).validates


def test_scores_that_are_removed_without_others_in_their_place_are_told(
    dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle(dataset, {"run": ["c0", "c1"]})
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    for held_out, is_told in ((["c0", "c1"], False), (["c0"], False), ([], True), ([], False)):
        bundle.held = {"run": held_out}
        again = command(run, bundle, ())
        again.check(resume=True, overwrite=True)
        again.run(lambda _: None, lambda _: None)
        scores = run / "validation"
        line = f"Removed, because they were of earlier weights or masks: the scores in {scores}\n"
        assert capsys.readouterr().err == (line if is_told else "")
        assert (scores / "report.html").is_file() is bool(held_out)


def test_held_out_masks_that_a_config_saves_elsewhere_are_missed(
    dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(dataset, {"run": ["c0", "c1"]}, elsewhere="mine")
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    masks, told = run / "validation" / "masks", [""]
    message = (
        f"Expected {run / 'configs' / 'inference.json'} to write {masks / 'c0.nii.gz'} (and 1 more file), but its run "
        "ended without doing so: write what `output_dir`, `mask_suffix`, `mask_format` and `save_probabilities` ask "
        "for, as the inference.json that `monai-iou init` copies does."
    )
    with pytest.raises(OutputError) as caught:
        start(run, bundle, (), told)
    assert str(caught.value) == message
    assert told[-1] == f"Not all masks of {run} could be made. {message}"
    state = RunState.read(run)
    assert state is not None
    assert state.done == ["trained"]


def test_scores_of_cases_that_were_trained_on_are_not_said_to_be_held_out(
    dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle(dataset, {"run": ["c0", "c1"]}, trained_on=["c0", "c1"])
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    write_csv(run / "epochs.csv", ("epoch", "val_mean_iou"), [{"epoch": 1, "val_mean_iou": "0.5000"}])
    told: list[str] = []
    start(run, bundle, (), told)
    note = (
        f"Not held out: c0, c1. All cases are of one patient, and the model in {run} was trained on them: score other "
        "patients."
    )
    assert notes_of(run) == [note]
    assert capsys.readouterr().err == f"{note}\n"
    assert told[-1] == "Scoring the 2 cases that were trained and validated on"
    assert note in (run / "validation" / "report.html").read_text(encoding="utf-8")
    page = (run / "summary.html").read_text(encoding="utf-8")
    assert f'<p class="warning">{note}</p>' in page
    assert "Means over the 2 cases that this training trained and validated on, on" in page
    assert "Scores of the validation cases" in page
    assert "eld-out" not in page
    assert "this training held out" not in page


def test_a_fold_s_page_says_what_its_own_cases_chose(dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(dataset, {f"fold{fold}": [f"c{fold}"] for fold in range(3)})
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    for fold in range(3):
        (run / f"fold{fold}").mkdir()
        write_csv(run / f"fold{fold}" / "epochs.csv", ("epoch",), [{"epoch": 1}])
    start(run, bundle, range(3))
    tuned = run / "fold1" / "models" / "postprocessing.json"
    tuned.touch()
    start(run, bundle, range(3))
    for fold in range(3):
        page = (run / f"fold{fold}" / "summary.html").read_text(encoding="utf-8")
        assert "Means over the 1 case that this training held out, on" in page
        assert ("was tuned on these very cases" in page) == (fold == 1)


@pytest.mark.parametrize("folds", [pytest.param((), marks=pytest.mark.slow), (0, 1, 2)])
def test_a_page_counts_the_cases_of_its_means_and_names_those_that_failed(
    folds: Sequence[int], dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {f"fold{fold}": [f"c{fold}"] for fold in folds} or {"run": ["c0", "c1"]}
    bundle = Bundle(dataset, held, broken={"c0"})
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    folders = [run / f"fold{fold}" for fold in folds] or [run]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        write_csv(folder / "epochs.csv", ("epoch",), [{"epoch": 1}])
    scores = start(run, bundle, folds)
    assert scores is not None
    (failure,) = scores.failures
    page, *others = (html.unescape((folder / "summary.html").read_text(encoding="utf-8")) for folder in folders)
    counted = "1 case" if folds else "2 cases"
    assert f"Means over the {counted} that this training held out, on" in page
    assert f"<strong>1 of {counted[0]} cases could not be evaluated</strong>" in page
    assert f"<li>c0: {failure['reason']}</li>" in page
    for other in others:
        assert "Means over the 1 case that this training held out, on" in other
        assert "could not be evaluated" not in other


def test_the_other_folds_go_on_where_the_masks_of_one_fail(
    dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle(dataset, {f"fold{fold}": [f"c{fold}"] for fold in range(3)}, broken={"c0"})
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    scores = start(run, bundle, range(3))
    assert scores is not None
    assert bundle.trained == ["fold0", "fold1", "fold2"]
    assert [record["case"] for record in scores.records] == ["c1", "c2"]
    assert [row["case"] for row in read_csv(run / "validation" / "failures.csv")] == ["c0"]
    assert notes_of(run) == [f"Not all masks of {run / 'fold0'} could be made. {FAILED}"]
    assert capsys.readouterr().err == f"{FAILED}\n"
    with pytest.raises(click.ClickException, match="all 3 held-out cases to be scored, but 1 could not be"):
        train_command._tell_results(command(run, bundle, range(3)), scores)

    bundle.broken.clear()
    again = command(run, bundle, range(3))
    again.check(resume=False, overwrite=False)
    told: list[str] = []
    scores = again.run(told.append, lambda _: None)
    assert scores is not None
    assert (scores.failures, len(scores.records), notes_of(run)) == ([], 3, [])
    done = [f"Done before: {run / f'fold{fold}'}" for fold in (1, 2)]
    assert told[:3] == [f"Training 1 of 3: {run / 'fold0'}", *done]
    assert bundle.trained == ["fold0", "fold1", "fold2"], "none again"
    assert again.is_finished


def test_a_mask_that_does_not_fit_into_memory_is_answered_with_keys_of_the_training(
    dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remedy = failures._remedy(SimpleNamespace(state=SimpleNamespace()))
    assert "and `inferer#device` to cpu" in remedy, "of inference"
    monkeypatch.setitem(globals(), "FAILED", f"Expected memory, but it is full: {remedy}.")
    bundle = Bundle(dataset, {"run": ["c0", "c1"]}, broken={"c0"})
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    start(run, bundle)
    for told in (*notes_of(run), capsys.readouterr().err):
        assert "set `sw_batch_size` to 1 and `validate#inferer#device` to cpu, which" in told


def test_the_report_names_an_image_without_a_mask_as_the_user_gave_the_folder(
    dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dataset.parent)
    reason = "Expected a finite network output for `{}/imagesTr/c0.nii.gz`, but got NaN: train again."
    monkeypatch.setitem(globals(), "FAILED", reason.format(dataset))
    bundle = Bundle(Path(dataset.name), {"run": ["c0", "c1"]}, broken={"c0"})
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    start(Path(run.name), bundle)
    assert notes_of(run) == [f"Not all masks of {run.name} could be made. {reason.format('data')}"]


def test_a_mask_of_earlier_weights_is_not_scored_in_the_place_of_one_that_fails(
    dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(dataset, {"run": ["c0", "c1"]}, broken={"c0"})
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    save(run / "validation" / "masks" / "c0.nii.gz", make_case(0)[1])
    scores = start(run, bundle)
    assert scores is not None
    assert [record["case"] for record in scores.records] == ["c1"]
    assert [row["case"] for row in scores.failures] == ["c0"]
    assert not command(run, bundle, ()).is_finished


def test_without_any_mask_the_command_ends_with_the_reason(
    dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(dataset, {"run": ["c0"]}, broken={"c0"})
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    (run / "validation").mkdir(parents=True)
    (run / "validation" / "report.html").write_text("of earlier weights")
    with pytest.raises(OutputError) as caught:
        start(run, bundle)
    assert str(caught.value) == FAILED
    assert not (run / "validation" / "report.html").exists()


def test_a_fold_of_its_own_whose_masks_fail_is_to_be_started_again(
    dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(dataset, {f"fold{fold}": [f"c{fold}"] for fold in range(3)}, broken={"c0"})
    monkeypatch.setattr(training_runs, "run_configs", bundle)
    told: list[str] = []
    for fold in (1, 2):
        assert start(run, bundle, [fold], told) is None
    with pytest.raises(OutputError, match="a finite network output for c0"):
        start(run, bundle, [0], told)
    assert told[-1] == (
        "Not scored yet: the report follows when fold 0 has its masks: start the command of fold 0 again unless it is "
        "running."
    )
    bundle.broken.clear()
    scores = start(run, bundle, [0], told)
    assert scores is not None
    assert len(scores.records) == 3
    state = RunState.read(run / "fold0")
    assert state is not None
    assert state.done == ["trained", "predicted"]
