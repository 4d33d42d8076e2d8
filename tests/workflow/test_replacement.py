"""`--overwrite`: what is replaced, what is not, and that nothing is lost if no new training comes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from layouts import plain_pair
from light_import import LIGHT_IMPORT

from monai_iou.cli import main
from monai_iou.commands import train as train_command
from monai_iou.datasets.cases import DatasetError
from monai_iou.files import OutputError, write_json
from monai_iou.workflow import replacement
from monai_iou.workflow.metadata import describe_model
from monai_iou.workflow.replacement import ASIDE, recover, replaced
from monai_iou.workflow.run_state import RunState
from monai_iou.workflow.starting_weights import model_file
from monai_iou.workflow.trained_models import find_models
from monai_iou.workflow.training_runs import PLAN, SCORES, Training, TrainingRun

WRITTEN = ("models/model.pt", "models/last_epoch.pt", "tensorboard/events", "pictures/c0.png", "config.json", "log.txt",
           "epochs.csv", "epochs_unreadable.csv", "progress.png", "summary.html")  # fmt: skip
REPORT = '{"plan_report": {"asked": {}}}'  # of a plan that the command made
KEPT = ("configs/train.json", "notes.txt", "fold0_old/models/model.pt")


def fill(folder: Path, names: tuple[str, ...], text: str = "old") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def run_of(folder: Path, folds: int | None = None, fold: int | None = None) -> TrainingRun:
    numbers = [None] if folds is None else range(folds) if fold is None else [fold]
    folders = [folder if number is None else folder / f"fold{number}" for number in numbers]
    return TrainingRun(folder, Path("d"), tuple(Training(each, (), {}, {"keys": {}}) for each in folders), folds)


def finished(folder: Path, folds: int | None = None) -> TrainingRun:
    """A run that is complete; training K held out cK."""
    run = run_of(folder, folds)
    for number, training in enumerate(run.trainings):
        fill(training.folder, WRITTEN)
        item = {"case": f"c{number}", "image": "i", "label": "l"}
        RunState(training.folder, {"keys": {}}, ["trained", "predicted"], {"held_out": [item]}).write()
        fill(run.masks, (f"c{number}.nii.gz",))
    fill(folder, (PLAN,), REPORT)
    fill(folder, (*KEPT, f"{SCORES}/report.html", f"{SCORES}/finished/c0.json"))
    return run_of(folder, folds)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("folds", [None, 3])
def test_a_whole_run_is_replaced_once_it_has_a_checkpoint(folds: int | None, tmp_path: Path) -> None:
    run = finished(tmp_path, folds)
    assert all(training.has_started for training in run.trainings)
    with replaced(run):
        assert not run.any_started
        shown = {name for name in content(tmp_path) if ASIDE not in name}
        assert shown == set(KEPT)
        fill(run.trainings[0].folder, ("models/last_epoch.pt", "run.json"), "new")
    new = Path(run.trainings[0].folder.relative_to(tmp_path))
    assert content(tmp_path) == {
        **dict.fromkeys(KEPT, "old"),
        **{str(new / name): "new" for name in ("models/last_epoch.pt", "run.json")},
    }


@pytest.mark.parametrize("done", [[], ["trained"]])
def test_a_model_alone_is_a_training_if_it_is_complete(done: list[str], tmp_path: Path) -> None:
    """A first checkpoint that broke off left one, in earlier versions; handlers of the user's own may write no more."""
    run = finished(tmp_path)
    before = content(tmp_path)
    with replaced(run):
        fill(tmp_path, ("models/model.pt",), "new")
        RunState(tmp_path, {"keys": {}}, done).write()
    assert content(tmp_path).get("models/model.pt") == ("new" if done else "old")
    assert (content(tmp_path) == before) is (not done)


@pytest.mark.parametrize("folds", [None, 3])
def test_without_a_new_checkpoint_everything_comes_back(folds: int | None, tmp_path: Path) -> None:
    run = finished(tmp_path, folds)
    before = content(tmp_path)
    log = run.trainings[0].folder / "log.txt"
    with replaced(run):
        fill(run.trainings[0].folder, ("log.txt", "run.json", "tensorboard/new", "models/.partial"), "new")
        fill(tmp_path, (PLAN,), f"{REPORT} ")
    assert content(tmp_path) == {**before, str(log.relative_to(tmp_path)): "oldnew"}, "the log tells why"


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("plan", ['{"plan_report": {}, "epochs": 7}', '{"epochs": 7}', "no JSON"])
def test_a_plan_of_the_users_own_is_kept(started: bool, plan: str, tmp_path: Path) -> None:
    run = finished(tmp_path)
    fill(tmp_path, (PLAN,), plan)
    with replaced(run):
        assert (tmp_path / PLAN).read_text() == plan
        fill(tmp_path, ("models/last_epoch.pt",) if started else (), "new")
    assert (tmp_path / PLAN).read_text() == plan


def test_a_run_that_was_killed_meanwhile_is_recovered(tmp_path: Path) -> None:
    run = finished(tmp_path)
    before = content(tmp_path)
    killed = replaced(run)
    killed.__enter__()
    assert not run.any_started
    recover(run_of(tmp_path))
    assert content(tmp_path) == before
    killed = replaced(run)
    killed.__enter__()
    fill(tmp_path, ("models/last_epoch.pt",), "new")
    recover(run_of(tmp_path))
    assert content(tmp_path)["models/last_epoch.pt"] == "new"
    assert not (tmp_path / ASIDE).exists()


def test_a_fold_that_was_killed_is_recovered_by_the_command_for_all(tmp_path: Path) -> None:
    whole, one = finished(tmp_path, 3), run_of(tmp_path, 3, 1)
    before = content(tmp_path)
    killed = replaced(one)
    killed.__enter__()
    recover(whole)
    assert content(tmp_path) == before


class Killed(BaseException):
    """Stands for SIGKILL: the test goes on as the next command would."""


def fail_after(count: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the renames into the folder of what is set aside fail after the first ones; later renames work again."""
    rename, left = Path.rename, [None] * count

    def fail(self: Path, target: Path) -> Path:
        if ASIDE in str(target):
            if not left:
                raise error
            left.pop()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)


@pytest.mark.parametrize("count", [0, 1, 9, 12, 28])
@pytest.mark.parametrize("fold", [None, 1])
def test_results_that_cannot_be_set_aside_stay(
    count: int, fold: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tmp_path, 3)
    run = run_of(tmp_path, 3, fold)
    before = content(tmp_path)
    fail_after(min(count, 11) if fold else count, OSError(18, "Invalid cross-device link"), monkeypatch)
    with pytest.raises(OutputError, match="'Invalid cross-device link', and everything is where it was"), replaced(run):
        raise AssertionError
    assert content(tmp_path) == before
    recover(run)
    assert content(tmp_path) == before
    assert list(tmp_path.rglob(ASIDE)) == []


@pytest.mark.parametrize("count", [1, 9, 12, 28])
@pytest.mark.parametrize("by", [None, 2])
def test_a_command_that_was_killed_while_it_set_results_aside_loses_none(
    count: int, by: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path, 3)
    before = content(tmp_path)
    with monkeypatch.context() as patch:
        fail_after(count, Killed(), patch)
        patch.setattr(replacement, "_recover", lambda *_: None)
        with pytest.raises(Killed), replaced(run):
            raise AssertionError
    assert content(tmp_path) != before
    recover(run_of(tmp_path, 3, by))
    assert content(tmp_path) == before
    assert not (tmp_path / ASIDE).exists()


@pytest.mark.parametrize("count", range(5))
def test_a_command_that_was_killed_while_it_put_results_back_loses_none(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path, 3)
    before = content(tmp_path)
    killed = replaced(run)
    killed.__enter__()
    rename, left = Path.rename, [None] * count

    def fail(self: Path, target: Path) -> Path:
        if not left:
            raise Killed
        left.pop()
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(Killed):
            recover(run)
    recover(run_of(tmp_path, 3))
    assert content(tmp_path) == before


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("next_command", [(3, 1), (2, None), (None, None)])
def test_any_next_command_recovers_a_whole_run_that_was_killed(
    started: bool, next_command: tuple[int | None, int | None], tmp_path: Path
) -> None:
    run = finished(tmp_path, 3)
    before = content(tmp_path)
    killed = replaced(run)
    killed.__enter__()
    if started:
        fill(run.trainings[2].folder, ("models/last_epoch.pt",), "new")
    recover(run_of(tmp_path, *next_command))
    assert not (tmp_path / ASIDE).exists()
    expected = {**dict.fromkeys(KEPT, "old"), "fold2/models/last_epoch.pt": "new"} if started else before
    assert content(tmp_path) == expected


def test_a_removal_that_was_killed_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path, 3)
    killed = replaced(run)
    killed.__enter__()
    fill(run.trainings[0].folder, ("models/last_epoch.pt",), "new")
    remove, left = replacement._remove, [None]

    def fail(path: Path) -> None:
        if not left:
            raise Killed
        left.pop()
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(replacement, "_remove", fail)
        with pytest.raises(Killed):
            recover(run)
    recover(run_of(tmp_path, 3))
    assert content(tmp_path) == {**dict.fromkeys(KEPT, "old"), "fold0/models/last_epoch.pt": "new"}


def test_what_could_not_be_put_back_is_neither_removed_nor_replaced(tmp_path: Path) -> None:
    run = finished(tmp_path)
    fill(tmp_path, (f"{ASIDE}/models/model.pt",), "older")
    before = content(tmp_path)
    recover(run)
    with pytest.raises(OutputError, match=f"Expected .*{ASIDE} not to exist"), replaced(run):
        raise AssertionError
    assert content(tmp_path) == before


def test_a_fold_takes_only_its_own_masks_with_it(tmp_path: Path) -> None:
    finished(tmp_path, 3)
    before = content(tmp_path)
    one = run_of(tmp_path, 3, 1)
    own = {name for name in before if name.startswith("fold1/")}
    scores = {f"{SCORES}/masks/c1.nii.gz", f"{SCORES}/report.html", f"{SCORES}/finished/c0.json"}
    with replaced(one):
        assert {name for name in content(tmp_path) if ASIDE not in name} == before.keys() - own - scores
    assert content(tmp_path) == before
    with replaced(one):
        fill(one.trainings[0].folder, ("models/last_epoch.pt",), "new")
    assert content(tmp_path).keys() == before.keys() - own - scores | {"fold1/models/last_epoch.pt"}
    others = [RunState.read(tmp_path / f"fold{fold}") for fold in (0, 2)]
    assert all(state is not None and "predicted" in state.done for state in others)


@pytest.mark.parametrize("name", ["models", "validation"])
def test_a_link_to_a_folder_is_not_replaced_by_a_folder(name: str, tmp_path: Path) -> None:
    """As of models on a larger disk."""
    run = finished(tmp_path / "run")
    elsewhere = (tmp_path / "run" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "run" / name).symlink_to("../elsewhere")
    before = content(tmp_path)
    with pytest.raises(OutputError) as caught, replaced(run):
        raise AssertionError
    assert str(caught.value) == (
        f"Expected {tmp_path / 'run' / name} to be a folder that --overwrite can replace, but got a link to "
        "../elsewhere: move that folder to the place of the link, or choose another folder with --output, such as one "
        "on the disk to which the link leads."
    )
    assert content(tmp_path) == before
    assert (tmp_path / "run" / name).is_symlink()
    (tmp_path / "run" / name).unlink()
    elsewhere.rename(tmp_path / "run" / name)
    with replaced(run_of(tmp_path / "run")):
        fill(tmp_path / "run", ("models/last_epoch.pt",), "new")
    assert not (tmp_path / "run" / ASIDE).exists()


@pytest.mark.parametrize("folds", [None, 3])
def test_commands_that_need_a_model_say_where_an_interrupted_replacement_has_put_it(
    folds: int | None, tmp_path: Path
) -> None:
    run, root = finished(tmp_path / "run", folds), tmp_path / "run"
    aside = root / ASIDE
    killed = replaced(run)
    killed.__enter__()
    fill(root, ("configs/metadata.json",), "{}")
    end = (
        f"--overwrite has set the earlier results aside in {aside}, and is running or was interrupted: if it was "
        "interrupted, the same `monai-iou train` command without --overwrite puts them back."
    )
    named = "a trained model (models/model.pt, or fold0/models/model.pt)"
    wanted = [run.trainings[0].folder / "models" / "model.pt", run.trainings[0].folder, root]
    for path in wanted:
        with pytest.raises(DatasetError) as caught:
            model_file(str(path))
        assert str(caught.value) == f"Expected `start_from` to be a trained model, but {end}"
    for path in wanted[1:]:
        with pytest.raises(DatasetError) as caught:
            find_models(path)
        assert str(caught.value) == f"Expected {path} to hold {named}, but {end}"
    with pytest.raises(ValueError, match="Expected") as refused:
        describe_model(root)
    assert str(refused.value) == f"Expected `{root / 'models' / 'model.json'}` to be there, but {end}"
    recover(run_of(root, folds))
    if folds is None:
        assert model_file(str(root)).is_file()
    assert find_models(root).files


def test_a_fold_that_is_asked_for_is_said_to_be_set_aside(tmp_path: Path) -> None:
    finished(tmp_path, 3)
    killed = replaced(run_of(tmp_path, 3, 1))
    killed.__enter__()
    assert len(find_models(tmp_path).files) == 2
    with pytest.raises(DatasetError) as caught:
        find_models(tmp_path, "0,1")
    assert str(caught.value) == (
        f"Expected {tmp_path} to hold a model of fold 1, but --overwrite has set the earlier results aside in "
        f"{tmp_path / 'fold1' / ASIDE}, and is running or was interrupted: if it was interrupted, the same `monai-iou "
        "train` command without --overwrite puts them back."
    )


def test_a_dangling_link_in_the_place_of_what_is_set_aside_is_named(tmp_path: Path) -> None:
    run = finished(tmp_path)
    (tmp_path / ASIDE).symlink_to("nowhere")
    with pytest.raises(OutputError, match=f"Expected .*{ASIDE} not to exist"), replaced(run):
        raise AssertionError


def test_models_that_another_command_trains_are_not_replaced(tmp_path: Path) -> None:
    run = finished(tmp_path)
    before = content(tmp_path)
    code = f"""
{LIGHT_IMPORT}
import sys
from pathlib import Path
from monai_iou.locks import folder_lock
with folder_lock(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "models")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"training by process {other.pid} on"), replaced(run):
            pass
        assert other.stdin is not None
        other.stdin.close()
    assert content(tmp_path) == before


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return plain_pair(tmp_path / "data")


@pytest.fixture
def run(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three folds that a command has trained, by trainings that do nothing but hold out a case."""

    def train(self: Training) -> None:
        if self.is_done("trained"):
            return
        fill(self.folder, ("models/model.pt",), "new")
        case = f"c{self.folder.name[-1]}"
        held = [{"case": case, **{kind: str(dataset / f"{kind}s" / f"{case}.nii.gz") for kind in ("image", "label")}}]
        self.state.finish("trained", held_out=held, labels=[1, 2, 3])

    def predict(self: Training, masks: Path) -> None:
        if self.is_predicted(masks):
            return
        (item,) = self.state.facts["held_out"]
        masks.mkdir(parents=True, exist_ok=True)
        (masks / f"{item['case']}.nii.gz").write_bytes(Path(item["label"]).read_bytes())
        self.state.finish("predicted")

    def plan(_: Path, path: Path, *options: object) -> None:
        write_json(path, {"plan_report": {"asked": options[-1], "device": "cpu"}})

    monkeypatch.setattr(Training, "train", train)
    monkeypatch.setattr(Training, "predict", predict)
    monkeypatch.setattr(train_command, "write_plan", plan)
    assert main(["train", str(dataset), "--output", str(tmp_path / "run"), "--folds", "3"]) == 0
    return tmp_path / "run"


def ious(run: Path) -> dict[str, str]:
    lines = (run / SCORES / "cases.csv").read_text().splitlines()[1:]
    return {line.split(",")[0]: line.split(",")[2] for line in lines}


def test_a_fold_that_is_trained_again_is_scored_beside_the_others(
    run: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perfect = {f"c{case}": "1.0" for case in range(3)}
    assert ious(run) == perfect
    command = ["train", str(dataset), "--output", str(run), "--folds", "3"]
    assert main([*command, "--fold", "0", "--overwrite"]) == 0
    assert ious(run) == perfect
    assert "Failed" not in capsys.readouterr().err


def test_masks_that_are_lost_are_made_again_and_never_scored_as_missing(
    run: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(dataset), "--output", str(run), "--folds", "3"]
    for case in ("c1", "c2"):
        (run / SCORES / "masks" / f"{case}.nii.gz").unlink()
    capsys.readouterr()
    assert main([*command, "--fold", "2"]) == 0
    assert (
        "report follows when fold 1 has its masks: start the command of fold 1 again unless it is running."
        in capsys.readouterr().out
    )
    assert main(command) == 0
    assert ious(run) == {f"c{case}": "1.0" for case in range(3)}


def test_a_case_that_cannot_be_scored_ends_the_command_with_one(
    run: Path, dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_another_grid(self: Training, masks: Path) -> None:
        nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)), masks / f"c{self.folder.name[-1]}.nii.gz")
        self.state.finish("predicted")

    monkeypatch.setattr(Training, "predict", write_another_grid)
    assert main(["train", str(dataset), "--output", str(run), "--folds", "3", "--fold", "0", "--overwrite"]) == 1
    error = capsys.readouterr().err
    message = f"Expected all 3 held-out cases to be scored, but 1 could not be: see the reasons in {run / SCORES}"
    assert message in " ".join(error.split())


@pytest.mark.parametrize("fault", ["dataset", "plan", "training"])
def test_a_finished_run_outlives_a_replacement_that_fails(
    fault: str, run: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        message = "Expected more memory, but got less: buy some."
        raise ValueError(message)

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    if fault == "dataset":
        (dataset / "labels" / "c1.nii.gz").unlink()
    elif fault == "plan":
        monkeypatch.setattr(train_command, "write_plan", fail)
    else:
        monkeypatch.setattr(Training, "train", fail)
    assert main(["train", str(dataset), "--output", str(run), "--folds", "3", "--overwrite"]) == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("started", [False, True])
def test_the_command_that_goes_on_does_not_overwrite(
    started: bool, run: Path, dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Training) -> None:
        fill(self.folder, ("models/last_epoch.pt",) if started else (), "new")
        raise SystemExit(143)

    monkeypatch.setattr(Training, "train", stop)
    words = ["train", str(dataset), "--output", str(run), "--folds", "3", "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["monai-iou", *words])
    with pytest.raises(SystemExit):
        main(words)
    command = f"monai-iou train {dataset} --output {run} --folds 3"
    told = capsys.readouterr().err
    if started:
        assert f"Stopped. To continue, run the same command again: {command}\n" in told
    else:
        words = "Stopped before the first checkpoint: any earlier results have been restored. To replace them, run: "
        assert f"{words}{command} --overwrite\n" in told
    assert (run / "fold2" / "models" / "model.pt").exists() is not started, "that is so"
