"""Before a training: whose folder it is, one copy and one plan for all jobs, and a plan that is the one asked for."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked_runs import finish, fork
from layouts import nnunet_splits, plain_pair

from monai_iou.bundle_files import bundle_path, copy_bundle
from monai_iou.datasets.cases import DatasetError
from monai_iou.files import OutputError, write_json
from monai_iou.locks import folder_lock
from monai_iou.workflow.config_errors import ConfigError
from monai_iou.workflow.inference_keys import keys_for_inference
from monai_iou.workflow.log_file import log_file, open_log
from monai_iou.workflow.loss_override import with_whole_loss
from monai_iou.workflow.replacement import replaced
from monai_iou.workflow.run_preparation import _check_start, is_run, plan_request, prepared
from monai_iou.workflow.training_runs import PLAN, Training, TrainingRun

OPTIONS: dict[str, Any] = {"minutes": None, "memory_gb": None, "device": "auto"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_pair(tmp_path_factory.mktemp("dataset") / "data")


def run_of(folder: Path, dataset: Path, folds: int | None = None, fold: int | None = None) -> TrainingRun:
    asked = {"dataset": str(dataset), "keys": {}}
    numbers = [None] if folds is None else range(folds) if fold is None else [fold]
    folders = [folder if number is None else folder / f"fold{number}" for number in numbers]
    return TrainingRun(folder, dataset, tuple(Training(each, (), {}, asked) for each in folders), folds)


def make_started(training: Training) -> None:
    (training.folder / "models").mkdir(parents=True)
    (training.folder / "models" / "last_epoch.pt").touch()
    training.state.write()


class Planner:
    """Writes plans that hold what was asked, and counts them."""

    def __init__(self, run: TrainingRun, **options: Any) -> None:
        self.run, self.asked, self.plans, self.told = run, plan_request(run, {**OPTIONS, **options}), 0, list[str]()
        self.more: dict[str, Any] = {}

    def prepare(self, **how: Any) -> int:
        """Prepare the run as a command does, and return how often that planned."""
        before = self.plans
        with prepared(self.run, self.asked, self._plan, self.told.append, **how):
            assert (self.run.folder / PLAN).is_file()
        return self.plans - before

    def _plan(self, path: Path) -> None:
        write_json(path, {**self.more, "plan_report": {"asked": self.asked, "device": self.asked["device"] or "cpu"}})
        self.plans += 1


def test_a_plan_is_made_again_for_other_options_until_a_training_follows_it(dataset: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", dataset)
    assert Planner(run).prepare() == 1
    assert Planner(run).prepare() == 0
    other = run_of(tmp_path / "run", plain_pair(tmp_path / "other"))
    for planner in (
        Planner(run, memory_gb=4.0), Planner(run, minutes=60.0), Planner(run, device="cpu"), Planner(other),
        Planner(run_of(tmp_path / "run", dataset, folds=2)),
    ):  # fmt: skip
        assert planner.prepare() == 1
        assert planner.prepare() == 0
    assert Planner(run, minutes=60.0).prepare() == 1
    make_started(run.trainings[0])
    assert Planner(run, minutes=60.0).prepare() == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"minutes": 120.0}, "minutes for each training 120.0 instead of 60.0: leave the option out"),
        ({"memory_gb": 4.0}, "memory_gb 4.0 instead of None: leave the option out"),
        ({"minutes": 1.0, "memory_gb": 4.0}, "1.0 instead of 60.0; memory_gb 4.0 instead of None: leave"),
    ],
)
def test_a_plan_that_a_training_follows_is_not_changed(
    dataset: Path, tmp_path: Path, change: dict[str, float], told: str
) -> None:
    run = run_of(tmp_path / "run", dataset)
    Planner(run, minutes=60.0).prepare()
    make_started(run.trainings[0])
    before = (run.folder / PLAN).read_bytes()
    for resume in (True, False):
        with pytest.raises(OutputError, match=told):
            Planner(run, **{"minutes": 60.0, **change}).prepare(resume=resume)
    assert (run.folder / PLAN).read_bytes() == before
    for options in ({}, {"device": "cpu"}):
        assert Planner(run, **options).prepare(resume=True) == 0


def test_a_plan_that_is_made_again_for_a_training_that_has_begun_must_be_the_same(
    dataset: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", dataset)
    (training,) = run.trainings
    configs = (run.folder / "configs" / "train.json", run.folder / PLAN)
    run = replace(run, trainings=(replace(training, configs=configs),))
    planner = Planner(run)
    planner.prepare()
    make_started(run.trainings[0])
    state = run.trainings[0].state
    state.request = run.trainings[0].asked
    state.write()
    for again in ("the same", "another"):
        (run.folder / PLAN).unlink()
        if again == "the same":
            assert planner.prepare() == 1
        else:
            planner.more = {"batch_size": 3}
            with pytest.raises(OutputError, match=r"it has one \(plan\.json has batch_size 3\): continue it with"):
                planner.prepare()
            assert planner.prepare(resume=True) == 0


def test_folds_of_other_commands_follow_the_first_plan(dataset: Path, tmp_path: Path) -> None:
    first, second = (run_of(tmp_path / "run", dataset, folds=2, fold=fold) for fold in (0, 1))
    assert Planner(first, minutes=10.0).prepare() == 1
    make_started(first.trainings[0])
    assert Planner(second).prepare() == 0
    assert Planner(second, minutes=10.0).prepare() == 0
    with pytest.raises(OutputError, match=r"minutes for each training 20\.0 instead of 10\.0"):
        Planner(second, minutes=20.0).prepare()
    with pytest.raises(OutputError, match="but got 3 folds instead of 2 folds: leave"):
        Planner(run_of(tmp_path / "run", dataset, folds=3)).prepare()
    # A job that has no checkpoint yet follows the plan as well.
    (first.trainings[0].folder / "models" / "last_epoch.pt").unlink()
    with (
        folder_lock(first.trainings[0].folder, "training"),
        pytest.raises(OutputError, match=r"20\.0 instead of 10\.0"),
    ):
        Planner(second, minutes=20.0).prepare()
    assert Planner(second, minutes=20.0).prepare() == 1


def test_overwriting_plans_again_unless_others_follow_the_plan(dataset: Path, tmp_path: Path) -> None:
    whole = run_of(tmp_path / "run", dataset, folds=2)
    Planner(whole, minutes=20.0).prepare()
    for training in whole.trainings:
        make_started(training)
    one = run_of(tmp_path / "run", dataset, folds=2, fold=1)
    assert Planner(one).prepare(overwrite=True) == 0
    with pytest.raises(
        OutputError,
        match=r"minutes for each training 1\.0 instead of 10\.0.*replace all folds with --overwrite without --fold,",
    ):
        Planner(one, minutes=1.0).prepare(overwrite=True)
    again = Planner(whole, minutes=2.0)
    with prepared(whole, again.asked, again._plan, print, overwrite=True):
        make_started(whole.trainings[0])
    assert again.plans == 1
    assert json.loads((whole.folder / PLAN).read_text())["plan_report"]["asked"]["minutes"] == 1.0


def test_a_training_does_not_start_from_the_model_that_it_replaces(dataset: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", dataset)
    Planner(run).prepare()
    make_started(run.trainings[0])
    (run.folder / "models" / "model.pt").touch()

    def from_model(start: str | None) -> TrainingRun:
        return replace(run, trainings=(replace(run.trainings[0], keys={"start_from": start}),))

    for start in (str(run.folder), str(run.folder / "models" / "model.pt")):
        with pytest.raises(OutputError) as caught:
            Planner(from_model(start)).prepare(overwrite=True)
        assert str(caught.value) == (
            f"Expected `start_from` to be outside of what --overwrite replaces, but got {start}: choose another folder "
            "with --output, or copy that model, with its model.json, and start from the copy."
        )
    assert run.trainings[0].has_started
    other = tmp_path / "other.pt"
    other.touch()
    for start in ("null", None, str(other)):
        Planner(from_model(start)).prepare(overwrite=True)


def test_a_model_beside_what_is_replaced_may_be_started_from_and_a_config_counts_too(
    dataset: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", dataset)
    Planner(run).prepare()
    make_started(run.trainings[0])
    kept, config = run.folder / "kept.pt", tmp_path / "own.json"
    for file in (kept, run.folder / "models" / "model.pt"):
        file.touch()
    shipped = run.folder / "configs" / "train.json"

    def start_of(in_config: str | Path, **keys: Any) -> None:
        config.write_text(json.dumps({"start_from": str(in_config)}), encoding="utf-8")
        _check_start(replace(run, trainings=(replace(run.trainings[0], configs=(shipped, config), keys=keys),)))

    for start in (kept, "$@bundle_root", "null"):
        start_of(start)
        start_of(run.folder, start_from=str(start) if start != "$@bundle_root" else None)
    with pytest.raises(OutputError, match="to be outside of what --overwrite replaces, but got"):
        start_of(run.folder)
    with pytest.raises(OutputError, match="to be outside of what --overwrite replaces, but got"):
        start_of(kept, start_from=str(run.folder / "models"))


def test_what_a_refusal_advises_has_not_been_done_already(dataset: Path, tmp_path: Path) -> None:
    whole = run_of(tmp_path / "run", dataset, folds=3)
    Planner(whole).prepare()
    for training in whole.trainings:
        make_started(training)
    fewer, single = (Planner(run_of(tmp_path / "run", dataset, folds)) for folds in (2, None))
    with pytest.raises(OutputError, match=r"got 2 folds instead of 3 folds: .* replace all trainings there with --ov"):
        fewer.prepare()
    with pytest.raises(OutputError, match=f"remove the other trainings in {whole.folder}, or choose another folder"):
        fewer.prepare(overwrite=True)
    with pytest.raises(OutputError, match="got a single training instead of 3 folds"):
        single.prepare()
    assert whole.any_started


HOW: tuple[dict[str, Any], ...] = ({}, {"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True})
ONE_KIND = "to hold either a single training or the folds of a cross-validation, but got"
ELSEWHERE = "or choose another folder with --output."


@pytest.mark.parametrize("plan", [None, {"epochs": 7}])
def test_a_single_training_and_folds_do_not_share_a_folder(
    plan: dict[str, int] | None, dataset: Path, tmp_path: Path
) -> None:
    """Either would replace the report of the other; whose plan they follow makes no difference."""
    single, folds = run_of(tmp_path / "single", dataset), run_of(tmp_path / "folds", dataset, folds=2)
    job = run_of(single.folder, dataset, folds=2, fold=1)
    for run in (single, folds):
        Planner(run).prepare()
        for training in run.trainings:
            make_started(training)
        if plan is not None:
            write_json(run.folder / PLAN, plan)
    before = content(tmp_path)
    for how in HOW:
        with pytest.raises(OutputError) as caught:
            Planner(run_of(folds.folder, dataset)).prepare(**how)
        assert str(caught.value) == (
            f"Expected {folds.folder} {ONE_KIND} a single training instead of 2 folds: give --folds 2 as before, "
            f"{ELSEWHERE}"
        )
        for asked in (run_of(single.folder, dataset, folds=2), job):
            with pytest.raises(OutputError) as caught:
                Planner(asked).prepare(**how)
            assert str(caught.value) == (
                f"Expected {single.folder} {ONE_KIND} 2 folds instead of a single training: leave --folds out, "
                f"{ELSEWHERE}"
            )
    assert content(tmp_path) == before
    make_started(job.trainings[0])  # as an earlier version let it happen
    for asked in (single, job, run_of(single.folder, dataset, folds=2)):
        for how in HOW:
            with pytest.raises(OutputError) as caught:
                Planner(asked).prepare(**how)
            assert str(caught.value) == (
                f"Expected {single.folder} {ONE_KIND} both: move one of them, together with "
                f"{single.folder / 'validation'}, to another place, {ELSEWHERE}"
            )


def test_the_number_of_folds_that_is_asked_for_again_is_the_one_that_was_given(dataset: Path, tmp_path: Path) -> None:
    job = run_of(tmp_path / "run", dataset, folds=5, fold=1)
    Planner(job).prepare()
    job.trainings[0].state.request["folds"] = 5
    make_started(job.trainings[0])
    with pytest.raises(OutputError, match="a single training instead of 5 folds: give --folds 5 as before, or choose"):
        Planner(run_of(job.folder, dataset)).prepare(resume=True)


def test_another_number_of_folds_is_refused_with_resume_too_where_other_trainings_are(
    dataset: Path, tmp_path: Path
) -> None:
    whole = run_of(tmp_path / "run", dataset, folds=3)
    Planner(whole).prepare()
    make_started(whole.trainings[0])
    assert Planner(run_of(whole.folder, dataset, folds=2)).prepare(resume=True) == 0, "no other has started"
    make_started(whole.trainings[2])
    with pytest.raises(OutputError) as caught:
        Planner(run_of(whole.folder, dataset, folds=2)).prepare(resume=True)
    assert str(caught.value) == (
        f"Expected the plan {whole.folder / PLAN}, which a training there follows, to be what is asked for, but got "
        "2 folds instead of 3 folds: leave --folds at 3, replace all trainings there with --overwrite, or choose "
        "another folder with --output."
    )
    with pytest.raises(OutputError, match="got 2 folds instead of 3 folds: leave --folds at 3, replace all folds with"):
        Planner(run_of(whole.folder, dataset, folds=2, fold=1)).prepare(resume=True)
    assert Planner(whole).prepare(resume=True) == 0


def test_a_fold_is_not_trained_on_other_cases_than_the_plan_was_made_for(tmp_path: Path) -> None:
    data = plain_pair(tmp_path / "data")
    first, second = (run_of(tmp_path / "run", data, folds=2, fold=fold) for fold in (0, 1))
    whole = run_of(tmp_path / "run", data, folds=2)

    def add(name: str, earlier: str) -> None:
        for kind in ("images", "labels"):
            shutil.copy(data / kind / f"{earlier}.nii.gz", data / kind / f"{name}.nii.gz")

    count = len(list((data / "images").iterdir()))
    assert Planner(first).prepare() == 1
    add("c8", "c0")
    assert Planner(first).prepare() == 1, "no training follows the plan yet"
    make_started(first.trainings[0])
    add("c9", "c0")
    assert Planner(first).prepare() == 0, "of a training that goes on, the bundle compares the data"
    remedies = ((second, "folds with --overwrite without --fold"), (whole, "trainings there with --overwrite"))
    for run, remedy in remedies:
        with pytest.raises(OutputError) as caught:
            Planner(run).prepare()
        assert str(caught.value) == (
            f"Expected the plan {run.folder / PLAN}, which a training there follows, to be what is asked for, but got "
            f"{count + 2} labelled cases instead of {count + 1}: restore the earlier cases, use this dataset "
            f"nevertheless with --resume, replace all {remedy}, or choose another folder with --output."
        )
        assert Planner(run).prepare(resume=True) == 0
    with pytest.raises(OutputError) as caught:
        Planner(whole, minutes=30.0).prepare()
    assert "nevertheless with --resume" not in str(caught.value), "that is refused as well"
    with pytest.raises(OutputError, match="but got minutes for each training"):
        Planner(whole, minutes=30.0).prepare(resume=True)
    with pytest.raises(OutputError, match=f"got {count + 2} labelled cases instead of {count + 1}: restore the"):
        Planner(second).prepare(overwrite=True)
    for kind in ("images", "labels"):
        (data / kind / "c8.nii.gz").unlink()
    with pytest.raises(OutputError, match="but got labelled cases of other names: restore the earlier cases"):
        Planner(second).prepare()
    plan = json.loads((first.folder / PLAN).read_text())
    del plan["plan_report"]["asked"]["cases"]
    write_json(first.folder / PLAN, plan)
    assert Planner(second).prepare() == 0, "of an earlier version"


def test_a_job_recovers_the_whole_run_whose_replacement_was_killed(dataset: Path, tmp_path: Path) -> None:
    whole = run_of(tmp_path / "run", dataset, folds=2)
    Planner(whole).prepare()
    for training in whole.trainings:
        make_started(training)
    killed = replaced(whole)
    killed.__enter__()
    assert not whole.any_started
    assert Planner(run_of(tmp_path / "run", dataset, folds=2, fold=1)).prepare() == 0, "the plan is back as well"
    assert all(training.has_started for training in whole.trainings)


def test_a_plan_of_the_users_own_is_kept_and_said_to_be(dataset: Path, tmp_path: Path) -> None:
    run = run_of(copy_bundle(tmp_path / "run"), dataset)
    write_json(run.folder / PLAN, {"plan_report": {}, "epochs": 7})
    quiet, told = Planner(run), Planner(run, minutes=5.0, memory_gb=2.0)
    assert (quiet.prepare(), told.prepare(), quiet.told) == (0, 0, [])
    assert told.told == [
        f"Note: {run.folder / PLAN} was made by another command and is kept, without regard to --minutes and "
        "--memory-gb."
    ]
    assert json.loads((run.folder / PLAN).read_text())["epochs"] == 7


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_refused_and_left_as_it_was(dataset: Path, tmp_path: Path, overwrite: bool) -> None:
    mine = tmp_path / "mine"
    for name in ("models/model.pth", "pictures/cat.png", "log.txt", "configs/train.json"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text('{"imports": ["of another bundle"]}')
    before = content(mine)
    assert not is_run(mine)
    with pytest.raises(ValueError, match="to be a new or empty folder"):
        Planner(run_of(mine, dataset)).prepare(overwrite=overwrite)
    assert content(mine) == before


def test_the_dataset_is_never_the_run_folder(tmp_path: Path) -> None:
    data = plain_pair(tmp_path / "data")
    (data / "validation").mkdir()
    (data / "validation" / "scan.nii.gz").write_bytes(b"mine")
    before = content(data)
    for folder in (data, data / "validation"):
        with pytest.raises(OutputError, match="to be apart from the dataset"):
            Planner(run_of(folder, data)).prepare(overwrite=True)
    assert content(data) == before


def test_a_dataset_that_cannot_be_used_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset\.json to exist"):
        Planner(run_of(tmp_path / "run", tmp_path / "nothing")).prepare()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_in_the_place_of_a_fold_is_named(kind: str, dataset: Path, tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path / "run")
    (folder / "fold1").touch() if kind == "file" else (folder / "fold1").symlink_to("nowhere")
    with pytest.raises(OutputError) as caught:
        Planner(run_of(folder, dataset, folds=2)).prepare()
    assert str(caught.value) == (
        f"Expected `--output` to be a folder that can be written, but got `{folder / 'fold1'}` (File exists): choose "
        "another folder."
    )


def test_an_existing_folder_is_filled(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    before = run.stat().st_ino
    monkeypatch.chdir(run)
    assert Planner(run_of(Path(), dataset)).prepare() == 1
    assert is_run(Path.cwd()), "the shell's folder is still the run's"
    assert run.stat().st_ino == before


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_jobs_that_start_together_copy_and_plan_once(dataset: Path, tmp_path: Path) -> None:
    run, plans = tmp_path / "run", tmp_path / "plans"

    def job(fold: int) -> Callable[[], None]:
        def start() -> None:
            planner = Planner(run_of(run, dataset, folds=4, fold=fold))

            def plan(path: Path) -> None:
                time.sleep(0.5)
                with plans.open("a") as stream:
                    stream.write(f"{os.getpid()}\n")
                planner._plan(path)

            with prepared(planner.run, planner.asked, plan, print):
                assert is_run(run)
                time.sleep(0.5)

        return start

    children = [fork(job(fold), tmp_path / "log") for fold in range(4)]
    assert [finish(child) for child in children] == [0] * 4, (tmp_path / "log").read_text()
    assert len(plans.read_text().splitlines()) == 1
    assert "planning by process" in (tmp_path / "log").read_text()
    assert list(run.rglob(".monai_iou*")) == []


def test_two_commands_for_the_same_trainings_do_not_run_together(dataset: Path, tmp_path: Path) -> None:
    whole = run_of(tmp_path / "run", dataset, folds=2)
    first, second = (run_of(tmp_path / "run", dataset, folds=2, fold=fold) for fold in (0, 1))
    one = Planner(first)
    with prepared(first, one.asked, one._plan, print):
        for planner in (Planner(first), Planner(whole)):
            with pytest.raises(OutputError, match="fold0` to be used by one run at a time"):
                planner.prepare()
        Planner(second).prepare()
    all_folds = Planner(whole)
    with prepared(whole, all_folds.asked, all_folds._plan, print):
        for planner in (Planner(first), Planner(replace(whole, folds=None))):
            with pytest.raises(OutputError, match="to be used by one run at a time"):
                planner.prepare()


OTHER_IMAGES = {"_target_": "ScaleIntensityd", "keys": "image"}
OTHER_LABELS = {"_target_": "CastToTyped", "keys": ["label"], "dtype": "$torch.uint8"}


def transforms_of_before() -> list[dict[str, Any]]:
    """As a run has them that an earlier version began."""
    former = {"monai_iou.transforms.ResampleSpacingd": "Spacingd"}
    return [{**each, "_target_": former.get(each["_target_"], each["_target_"])} for each in shipped_transforms()]


def shipped_transforms() -> list[dict[str, Any]]:
    train = json.loads((bundle_path() / "configs" / "train.json").read_text(encoding="utf-8"))["train"]
    return list(train["deterministic_transforms"])


@pytest.mark.parametrize(
    ("config", "keys", "differs"),
    [
        ({"train#deterministic_transforms#6": OTHER_IMAGES}, {}, True),
        ({"+train": {"deterministic_transforms": [OTHER_IMAGES]}}, {}, True),
        ({"train#deterministic_transforms": "$[]"}, {}, True),
        ({"validate#preprocessing#transforms": "$@train#deterministic_transforms + [@mine]"}, {}, True),
        ({"validate#preprocessing": "@train#preprocessing"}, {}, True),
        ({}, {"train#preprocessing#transforms": [OTHER_IMAGES]}, True),
        ({"train#preprocessing": {"transforms": "$[@mine] + @train#random_transforms"}}, {}, True),
        ({"train#preprocessing#transforms": [*shipped_transforms(), OTHER_IMAGES]}, {}, False),
        ({"validate#preprocessing#transforms": shipped_transforms()[:-1]}, {}, False),
        ({"train#preprocessing#transforms": "$@train::deterministic_transforms + [@mine]"}, {}, False),
        ({"validate#preprocessing#transforms": "$@train#deterministic_transforms[:-1]"}, {}, False),
        ({"train#deterministic_transforms": transforms_of_before()}, {}, False),
        ({"train#preprocessing#transforms": transforms_of_before()}, {}, False),
        ({}, {"train::deterministic_transforms::5::mode": ["nearest", "nearest"]}, True),
        ({"train#deterministic_transforms#9": OTHER_LABELS, "sw_batch_size": 1}, {"epochs": 2}, False),
        (
            {"train#random_transforms#1": OTHER_IMAGES},
            {"train#no#such": 1, "train#deterministic_transforms#99": 1},
            False,
        ),
    ],
)
def test_images_that_only_the_training_prepares_in_another_way_are_refused(
    config: dict[str, Any], keys: dict[str, Any], differs: bool, dataset: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(config))
    run = run_of(tmp_path / "run", dataset)
    inference = run.folder / "configs" / "inference.json"
    configs = (inference.with_name("train.json"), run.folder / PLAN, mine)
    run = replace(run, trainings=(replace(run.trainings[0], configs=configs, keys=keys),))
    if differs:
        with pytest.raises(OutputError) as caught:
            Planner(run).prepare()
        assert str(caught.value).startswith(f"Expected `preprocessing` in {inference} to be changed as well, because")
        assert not (run.folder / PLAN).exists()
        content = json.loads(inference.read_text())
        content["preprocessing"]["_desc_"] = "as it is shipped, although the training differs"
        inference.write_text(json.dumps(content))
    assert Planner(run).prepare() == 1, "the same command goes on once inference says what it does"


def test_images_that_an_edited_train_config_prepares_in_another_way_are_refused(dataset: Path, tmp_path: Path) -> None:
    run = run_of(copy_bundle(tmp_path / "run"), dataset)
    train = run.folder / "configs" / "train.json"
    run = replace(run, trainings=(replace(run.trainings[0], configs=(train, run.folder / PLAN)),))
    content = json.loads(train.read_text(encoding="utf-8"))
    (number,) = (n for n, each in enumerate(shipped_transforms()) if "NormalizeModalitiesd" in each["_target_"])
    content["train"]["deterministic_transforms"][number] = OTHER_IMAGES
    train.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(OutputError, match="because `train#deterministic_transforms` of the training was changed, but"):
        Planner(run).prepare()


def test_folds_that_hold_out_a_case_twice_are_refused_before_the_first_is_trained(tmp_path: Path) -> None:
    """One report could not join them; a fold by itself, as its own job trains it, is right."""
    data = nnunet_splits(tmp_path / "data")
    held = [["c0", "c1"], ["c1", "c2"]]
    splits = [{"train": [name for name in ("c0", "c1", "c2") if name not in val], "val": val} for val in held]
    (data / "splits_final.json").write_text(json.dumps(splits))
    run = run_of(tmp_path / "run", data, folds=2)
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(DatasetError) as caught:
            Planner(run).prepare(**how)
        assert str(caught.value) == (
            f"Expected {data}/splits_final.json to hold out each case once, as one report joins all folds, but got c1 "
            "in folds 0 and 1: correct the file, or train its folds one by one with --fold."
        )
    assert not run.folder.exists()
    assert Planner(run_of(tmp_path / "one", data, folds=2, fold=1)).prepare() == 1
    assert Planner(run_of(tmp_path / "single", data)).prepare() == 1
    assert Planner(run_of(tmp_path / "ours", data, folds=3)).prepare() == 1, "of another number of folds"
    (data / "splits_final.json").write_text(json.dumps([splits[0], {**splits[1], "val": ["c2"]}]))
    assert Planner(run).prepare() == 1


@pytest.mark.parametrize("name", ["train.json", "plan.json", "inference.json", "metadata.json"])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"monai_iou": 1', "it cannot be read (Expecting ',' delimiter: line 1 column 16 (char 15))"),
        ('["monai_iou"]', "it holds no object, {...}"),
        ('\ufeff{"monai_iou": 1}', "it begins with a byte-order mark"),
    ],
)
def test_a_damaged_config_of_the_run_is_named(name: str, text: str, why: str, dataset: Path, tmp_path: Path) -> None:
    run = run_of(copy_bundle(tmp_path / "run"), dataset)
    path = run.folder / "configs" / name
    path.write_text(text, encoding="utf-8")
    what = "metadata" if name == "metadata.json" else "keys"
    remedy = "save it without the mark" if "mark" in why else "correct it"
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError) as caught:
            Planner(run).prepare(**how)
        assert str(caught.value) == (
            f"Expected {path} to be a JSON file of the bundle's {what} in UTF-8, but {why}: {remedy}."
        )


def test_what_reads_the_configs_later_names_a_damaged_one_too(tmp_path: Path) -> None:
    configs = [tmp_path / name for name in ("train.json", "plan.json", "mine.json")]
    for path in configs:
        path.write_text("{}")
    readers: list[Callable[[], object]] = [
        lambda: keys_for_inference(configs, {}),
        lambda: with_whole_loss({"loss::_target_": "IoULoss"}, configs),
    ]
    for read in readers:
        read()
    configs[2].write_text("[]")
    for read in readers:
        with pytest.raises(ConfigError, match=rf"^Expected {configs[2]} to be a JSON file of the bundle's keys in UTF"):
            read()


def test_a_reference_of_inference_to_no_key_is_found_before_the_plan_and_the_training(
    dataset: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", dataset)
    path = copy_bundle(run.folder) / "configs" / "inference.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["postprocessing"]["transforms"][3]["settings"] = "@lesion_threshold_mm3"
    write_json(path, config)
    planner = Planner(run)
    with pytest.raises(ConfigError, match=r"^Expected `@lesion_threshold_mm3` in `postprocessing#transforms#3#settin"):
        planner.prepare()
    assert not planner.plans
    write_json(path, {**config, "lesion_threshold_mm3": 4.0})
    assert planner.prepare() == 1


def test_the_log_of_a_training_ends_with_the_command(dataset: Path, tmp_path: Path) -> None:
    planner = Planner(run_of(tmp_path / "run", dataset))
    with prepared(planner.run, planner.asked, planner._plan, planner.told.append):
        open_log(tmp_path)
    assert log_file() is None
