"""The bundle when something goes wrong: killed, resumed, two ranks, data that cannot be used."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import bundle_command, causes, overrides, run_command
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.transforms import Randomizable, Transform

from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.workflow import settings
from monai_iou.workflow.checkpoint_files import last_epoch, write_atomically
from monai_iou.workflow.data import BundleCases
from monai_iou.workflow.dataloader import BufferedLoader
from monai_iou.workflow.models import check_models
from monai_iou.workflow.optimization import is_better
from monai_iou.workflow.settings import Settings, is_true


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of four training and two test volumes."""
    return write_phantom_dataset(tmp_path_factory.mktemp("data"), training=4, evaluation=2, shape=(32, 32, 24))


def test_resume_continues_epoch_optimizer_schedule_and_best_score(bundle: Path, data: Path) -> None:
    run_workflow(bundle, ["train"], overrides(bundle, data))
    first = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    resumed = run_workflow(bundle, ["train"], overrides(bundle, data, epochs=4, resume=True, val_interval=5))
    second = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    steps = [state["optimizer"]["state"][0]["step"].item() for state in (first, second)]
    assert (first["epoch"], second["epoch"]) == (2, 4)
    assert steps[1] == 2 * steps[0]
    assert second["lr_scheduler"]["last_epoch"] == 2 * first["lr_scheduler"]["last_epoch"]
    # No validation ran after the first run, so the best score can only come from its checkpoint.
    assert second["best_metric"] == first["best_metric"]
    assert second["best_metric_epoch"] == first["best_metric_epoch"] > 0
    assert resumed.trainer.state.epoch == 4


@pytest.mark.slow
def test_a_longer_run_goes_on_along_its_own_learning_rate(bundle: Path, data: Path) -> None:
    run_workflow(bundle, ["train"], overrides(bundle, data))
    first = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    assert first["optimizer"]["param_groups"][0]["lr"] == 0
    changes = {"epochs": 4, "resume": True, "learning_rate": 0.01}
    resumed = run_workflow(bundle, ["train"], overrides(bundle, data, **changes))
    optimizer = resumed.parser.get_parsed_content("optimizer")
    assert optimizer.param_groups[0]["lr"] == 0
    second = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    assert any(not torch.equal(second["model"][name], value) for name, value in first["model"].items())

    rates = []
    halfway = ConfigWorkflow(
        config_file=str(bundle / "configs" / "train.json"),
        workflow_type="train",
        **overrides(bundle, data, **{**changes, "epochs": 8}),
    )
    halfway.initialize()
    trainer, optimizer = (halfway.parser.get_parsed_content(name) for name in ("train#trainer", "optimizer"))
    trainer.add_event_handler(
        Events.ITERATION_STARTED, lambda engine: rates.append((engine.state.iteration, optimizer.param_groups[0]["lr"]))
    )
    halfway.run()
    total = 8 * trainer.state.epoch_length
    assert rates[0][0] == total // 2 + 1
    assert rates == [(step, pytest.approx(0.01 * (1 - (step - 1) / total) ** 0.9)) for step, _ in rates]


def test_a_fold_is_validated_and_tuned_on_without_a_fraction(bundle: Path, data: Path) -> None:
    """`folds` holds cases out instead of `val_fraction`, whatever that is."""
    given = overrides(bundle, data, epochs=1, val_fraction=0, folds=2, tune_postprocessing=True)
    workflow = run_workflow(bundle, ["train"], given)
    assert len(workflow.parser.get_parsed_content("cases").validation) == 2
    state = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    assert state["best_metric_epoch"] == 1
    assert (bundle / "models" / "postprocessing.json").is_file()


def test_resume_without_a_checkpoint_starts_from_the_beginning(bundle: Path, data: Path) -> None:
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=1, resume=True))
    assert last_epoch(bundle / "models" / "last_epoch.pt") == 1


def test_resume_with_another_network_says_so(bundle: Path, data: Path) -> None:
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=1))
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], overrides(bundle, data, resume=True, base_channels=8))
    assert "last_epoch.pt to hold the network that this run trains" in str(causes(caught.value))


def test_without_validation_the_final_weights_are_the_model(bundle: Path, data: Path) -> None:
    run_workflow(bundle, ["train"], overrides(bundle, data, val_fraction=0))
    model = torch.load(bundle / "models" / "model.pt", weights_only=True)
    last = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)["model"]
    assert all(torch.equal(model[name], last[name]) for name in last)


@pytest.mark.slow
def test_killed_in_an_epoch_it_continues_after_the_last_whole_one(
    bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = bundle / "models" / "last_epoch.pt"
    command = bundle_command(bundle, ["train"], overrides(bundle, data, epochs=100000, val_interval=3))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 600  # the cores may be shared
        while last_epoch(last) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.03)  # somewhere inside an epoch, or inside a save: an epoch takes about as long
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    epoch = last_epoch(last)  # loads: whatever was being written, the file is whole
    assert epoch >= 3
    assert torch.load(bundle / "models" / "model.pt", weights_only=True)
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=epoch + 2, resume=True))
    shown = capsys.readouterr().out
    assert re.search(rf"last_epoch.pt after epoch {epoch}[;.]", shown)
    assert re.findall(r"epoch (\d+)/", shown) == [str(epoch + 1), str(epoch + 2)]
    assert last_epoch(last) == epoch + 2


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last_epoch.pt"
    write_atomically({"epoch": 1}, path)
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        write_atomically({"epoch": 2, "bad": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("current", "best", "expected"),
    [(0.5, 0.4, True), (0.4, 0.5, False), (0.5, math.nan, True), (math.nan, 0.5, False), (math.nan, math.nan, False)],
)
def test_a_score_of_nothing_is_never_the_best(current: float, best: float, expected: bool) -> None:
    assert is_better(current, best) is expected


# Registered first, so that it runs last; only in the ranks, and where the system names threads.
NAME_THREADS = """
import atexit, os
from pathlib import Path

def name_threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    names = [name for name in names if "gloo" in name or "nccl" in name]
    os.write(1, f"threads at the end: {names}\\n".encode())  # at once: the other rank writes to the same pipe

if "RANK" in os.environ:
    atexit.register(name_threads)
"""


@pytest.mark.slow
@pytest.mark.parametrize("val_fraction", [pytest.param(0.3, id="two cases"), pytest.param(0.1, id="one case")])
def test_two_ranks_run_the_multi_gpu_config_as_it_is(
    bundle: Path, data: Path, val_fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NAME_THREADS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    settings = overrides(bundle, data, val_fraction=val_fraction, case_repeats=2)
    done = run_command(bundle_command(bundle, ["train", "multi_gpu_train"], settings, *launcher))
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert done.stdout.count("epoch 2/2 ") == 1, f"rank 0 alone reports: {said}"
    assert done.stdout.count("threads at the end: []") == 2, f"a thread of the group could abort a rank: {said}"
    models = bundle / "models"
    trained = {0.3: 2, 0.1: 3}[val_fraction]
    steps = torch.load(models / "last_epoch.pt", weights_only=True)["epoch_length"]
    assert steps == math.ceil(2 * trained / 2) // 2, "the ranks share twice the cases, in batches of two"
    assert sorted(path.name for path in models.iterdir()) == ["last_epoch.pt", "model.json", "model.pt"]
    assert not any(name.startswith("module.") for name in torch.load(models / "model.pt", weights_only=True))
    writers = {path.name.split(".")[-2] for path in (bundle / "eval" / "tensorboard").iterdir()}
    assert len(writers) == 1, "one process writes"
    # A run on one process takes up what two ranks left.
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=3, resume=True))
    assert last_epoch(models / "last_epoch.pt") == 3


def test_with_fewer_validation_cases_than_ranks_each_scores_all(
    bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    files = [bundle / "configs" / f"{name}.json" for name in ("train", "multi_gpu_train")]
    parser = ConfigParser(ConfigParser.load_config_files(files))
    parser.update(overrides(bundle, data))
    assert len(parser.get_parsed_content("validate#dataset")) == 2
    assert parser.get_parsed_content("validate#sampler") is None
    assert len(parser.get_parsed_content("validate#dataloader")) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("case_repeats", 0),
        ("case_repeats", 1.5),
        ("batch_size", 0),
        ("val_interval", 0),
        ("num_samples", 1.5),
        ("num_workers", -1),
    ]
    + [("learning_rate", value) for value in ("abc", 0, math.nan, True)],
)
def test_numbers_that_no_run_can_have(name: str, value: object, bundle: Path, data: Path) -> None:
    expected = f"Expected `{name}` to be (a|an) .*, but got {value!r}: leave --{name} out for the default"
    with pytest.raises(ValueError, match=expected):
        Settings(**{name: value})
    for configs in (["train"], ["train", "multi_gpu_train"]):
        with pytest.raises(RuntimeError) as caught:
            run_workflow(bundle, configs, overrides(bundle, data, **{name: value}))
        assert re.search(expected, str(causes(caught.value)))
    assert not (bundle / "models").exists()


@pytest.mark.parametrize(
    ("name", "words", "wrong", "right"),
    [
        ("val_fraction", "a number from 0 to less than 1", (-0.1, 1, "null"), (0, 0.5)),
        (
            "sw_overlap",
            "a number from 0 to less than 1, or one for each axis",
            (1.5, 1, [0.5, 1], [], "a"),
            (0, [0.5, 0]),
        ),
        ("sw_batch_size", "an integer of at least 1", (0, 1.5, None), (1,)),
        *((name, "an integer of at least 0", (-1, 0.5, "abc"), (0, 7)) for name in ("seed", "split_seed", "pictures")),
        ("cache_workers", "an integer of at least 0", (-1, "null"), (0, 2)),
        *((name, "a number from 0 to 1", (-0.1, 2, "x"), (0, 1, 0.5)) for name in settings.SHARES),
        *((name, "a number of at least 0", (-1, math.inf, "x"), (0, 2.5)) for name in settings.NOT_NEGATIVE),
    ],
)
def test_numbers_that_would_end_a_run_late_or_by_another_name(
    name: str, words: str, wrong: tuple[object, ...], right: tuple[object, ...]
) -> None:
    for value in wrong:
        with pytest.raises(ValueError, match=r"^Expected") as caught:
            Settings(**{name: value})
        expected = f"Expected `{name}` to be {words}, but got {value!r}: leave --{name} out for the default."
        assert str(caught.value) == expected
    for value in right:
        assert getattr(Settings(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("configs", "keys"),
    [
        (["train"], {"sw_overlap": 1.5}),
        (["train", "evaluate"], {"sw_batch_size": 0}),
        (["inference"], {"sw_overlap": -1}),
    ],
    ids=str,
)
def test_numbers_of_the_windows_are_checked_before_any_work(
    configs: list[str], keys: dict[str, Any], bundle: Path, data: Path
) -> None:
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, configs, overrides(bundle, data, load_pretrain=False, **keys))
    assert f"Expected `{next(iter(keys))}` to be" in str(causes(caught.value))
    assert not (bundle / "models").exists()
    assert not (bundle / "predictions").exists()


def test_a_probability_of_flips_above_one_is_refused_before_the_first_step(bundle: Path, data: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], overrides(bundle, data, flip_prob=3))
    expected = "Expected `flip_prob` to be a number from 0 to 1, but got 3: leave --flip_prob out for the default."
    assert expected in str(causes(caught.value))
    assert not (bundle / "models" / "last_epoch.pt").exists()


def test_the_command_ends_with_one_sentence(tmp_path: Path, bundle: Path) -> None:
    done = run_command(bundle_command(bundle, ["train"], {"dataset_dir": str(tmp_path / "nowhere")}))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"monai_iou: Expected {tmp_path}/nowhere/dataset.json")
    assert list(tmp_path.iterdir()) == [bundle]
    assert not list((bundle / "models").glob("*.pt"))


@pytest.mark.parametrize("configs", [["train"], ["train", "evaluate"]])
def test_bad_files_are_found_before_anything_is_written(tmp_path: Path, bundle: Path, configs: list[str]) -> None:
    folder = write_phantom_dataset(tmp_path / "dataset", training=2, evaluation=1, shape=(24, 24, 16))
    for part in ("labelsTr", "labelsTs"):
        path = max((folder / part).iterdir())
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, configs, overrides(bundle, folder, load_pretrain=False))
    found = [cause for cause in causes(caught.value) if isinstance(cause, DatasetError)]
    assert "labelsT" in str(found)
    assert not (bundle / "models").exists()
    assert not (bundle / "eval").exists()


@pytest.mark.slow
def test_the_command_without_a_model_ends_with_one_sentence(bundle: Path, data: Path) -> None:
    done = run_command(bundle_command(bundle, ["inference"], {"bundle_root": str(bundle), "dataset_dir": str(data)}))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "model.pt, but there is no such file: train first or set `ckpt_dir`." in done.stderr


def test_evaluation_without_a_model_says_what_to_do(bundle: Path, data: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["inference"], {"bundle_root": str(bundle), "dataset_dir": str(data)})
    assert "model.pt, but there is no such file: train first or set `ckpt_dir`." in str(causes(caught.value))


def test_weights_without_their_plan_are_refused(bundle: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    places = overrides(bundle, data)
    cases, saved = BundleCases(str(data)), bundle / "models" / "model.json"
    assert cases.plan([24, 24, 16], saved=str(saved), prefer_saved=True).modalities == ("CT",)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert BundleCases(str(bundle)).plan([24, 24, 16], saved=str(saved), prefer_saved=True).modalities == ("unknown",)
    assert f"There is no {saved}: the network is planned for one channel and one label." in caplog.text
    run_workflow(bundle, ["train"], {**places, "epochs": 1})
    saved.unlink()
    for configs in (["inference"], ["train", "evaluate"]):
        with pytest.raises(RuntimeError) as caught:
            run_workflow(bundle, configs, places)
        assert f"Expected {saved} beside model.pt" in str(causes(caught.value))
    assert not (bundle / "predictions").exists()


def test_inference_with_another_network_than_training_says_so(bundle: Path, data: Path) -> None:
    network = {"network_def#num_res_units": 1}
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=1, **network))
    for configs in (["inference"], ["train", "evaluate"]):
        with pytest.raises(RuntimeError) as caught:
            run_workflow(bundle, configs, overrides(bundle, data, **{"network_def#num_res_units": 2}))
        assert "Expected `network_def` to be that with which the model was trained" in str(causes(caught.value))
    run_workflow(bundle, ["inference"], overrides(bundle, data, **network))
    run_workflow(bundle, ["inference"], overrides(bundle, data))
    plan = json.loads((bundle / "models" / "model.json").read_text())
    del plan["network"]["definition"]  # as of a model of another program
    (bundle / "models" / "model.json").write_text(json.dumps(plan))
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["inference"], overrides(bundle, data))
    assert "to hold the weights of `network_def`, but they do not fit" in str(causes(caught.value))
    (bundle / "models" / "model.json").write_text(json.dumps({**plan, "network": {}}))
    (bundle / "models" / "model.pt").write_bytes(b"not weights")
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["inference"], overrides(bundle, data, **network))
    assert "model.pt to be a trained model, but it cannot be read" in str(causes(caught.value))


@pytest.mark.parametrize("content", [b"", b"a", b"\x80\x02K\x01.", b"PK\x03\x04", "list", "number"])
def test_a_model_that_cannot_be_read_gives_one_sentence(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save([1] if content == "list" else {"model": 1}, path)
    with pytest.raises(DatasetError, match="to be a trained model, but it cannot be read: copy it again"):
        check_models([str(path)], torch.nn.Linear(1, 1))


@pytest.mark.parametrize("switch", [{"load_pretrain": "false"}, {"handlers#0#_disabled_": True}])
def test_an_untrained_network_runs_when_asked_for(bundle: Path, data: Path, switch: dict[str, Any]) -> None:
    places = {"bundle_root": str(bundle), "dataset_dir": str(data), "patch_size": [24, 24, 16], "pixdim": "null"}
    run_workflow(bundle, ["inference"], {**places, **switch})
    assert len(list((bundle / "predictions").iterdir())) == 2


@pytest.mark.parametrize(("value", "expected"), [(True, True), ("true", True), ("false", False), (False, False)])
def test_switches_as_the_command_line_gives_them(value: object, expected: bool) -> None:
    assert is_true(value, "amp") is expected


@pytest.mark.parametrize("value", ["true", "false"])
def test_mixed_precision_is_what_the_command_line_says(value: str, bundle: Path, data: Path) -> None:
    for name, engines in (("train", ["train#trainer", "validate#evaluator"]), ("inference", ["evaluator"])):
        parser = ConfigParser(ConfigParser.load_config_file(bundle / "configs" / f"{name}.json"))
        parser.update({**overrides(bundle, data), "amp": value, "load_pretrain": False, "device": "cpu"})
        for engine in engines:
            assert parser.get_parsed_content(engine).amp is (value == "true")


def test_a_switch_that_is_neither() -> None:
    with pytest.raises(ValueError, match="Expected `amp` to be true or false, but got 'maybe'"):
        is_true("maybe", "amp")


def test_inference_takes_a_plain_folder(tmp_path: Path, data: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"to hold images to segment, but .* or DICOM series: name one that holds some\."
    ):
        _ = BundleCases(str(tmp_path)).inference
    (tmp_path / "a.nii.gz").symlink_to(data / "imagesTs" / "phantom_04.nii.gz")
    assert [item["case"] for item in BundleCases(str(tmp_path)).inference] == ["a"]
    (tmp_path / "a.nii").touch()
    with pytest.raises(DatasetError, match=r"a\.nii and .*a\.nii\.gz are both called a: rename one"):
        _ = BundleCases(str(tmp_path)).inference


@pytest.mark.parametrize("damage", ["truncated", "channels"])
def test_inference_checks_every_image_before_the_first(damage: str, tmp_path: Path, bundle: Path, data: Path) -> None:
    for path in (data / "imagesTs").iterdir():
        (tmp_path / "images" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    last = max((tmp_path / "images").iterdir())
    if damage == "truncated":
        last.write_bytes(last.read_bytes()[:-9])
        expected = f"Expected `{last}` to be a readable volume, but got the end of the file before"
    else:
        nib.save(nib.Nifti1Image(np.ones((8, 8, 8, 2), np.float32), np.eye(4)), last)
        expected = f"Expected {last} to be a 3D image (unknown), as the trained model says, but got shape 8x8x8x2"
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["inference"], overrides(bundle, tmp_path / "images", load_pretrain=False))
    assert expected in str(causes(caught.value))
    assert not (bundle / "predictions").exists()


def test_evaluation_falls_back_to_the_validation_split(tmp_path: Path, data: Path) -> None:
    content = json.loads((data / "dataset.json").read_text())
    del content["test_labelled"]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (tmp_path / part).symlink_to(data / part)
    cases = BundleCases(str(tmp_path), val_fraction=0.25)
    assert cases.evaluation == cases.validation
    assert len(cases.evaluation) == 1
    assert len(cases.training) == 3


def test_evaluation_on_the_held_out_cases_of_a_fold(data: Path) -> None:
    cases = BundleCases(str(data), folds=4, fold=2)
    plan = cases.plan([16, 16, 16])
    assert plan.trained == tuple(item["case"] for item in cases.training)
    assert cases.evaluation_on("validation", [plan]) == cases.validation != cases.evaluation
    for which in (None, "null", "test_labelled"):
        assert cases.evaluation_on(which, [plan]) == cases.evaluation
    with pytest.raises(ValueError, match='Expected `evaluate_on` to be "test_labelled", "validation" or null, but got'):
        cases.evaluation_on("test", [plan])


@pytest.mark.parametrize("other", [{"folds": 4, "fold": 1}, {"val_fraction": 0.5}, {"val_fraction": 0}])
def test_cases_that_a_model_was_trained_on_are_not_its_validation(data: Path, other: dict[str, Any]) -> None:
    cases = BundleCases(str(data), folds=4, fold=2)
    own, trained = cases.plan([16, 16, 16]), BundleCases(str(data), **other).plan([16, 16, 16])
    held_out = cases.validation[0]["case"]
    if held_out not in trained.trained:
        assert cases.evaluation_on("validation", [trained]) == cases.validation
        return
    message = f"but it was trained on {held_out}, by the same image or the same patient: give `val_fraction`, `split_se"
    for plans in ([trained], [own, trained]):
        with pytest.raises(DatasetError, match=message):
            cases.evaluation_on("validation", plans)
    elsewhere = replace(trained, trained=("a case of another dataset",), trained_images=("another image",))
    assert cases.evaluation_on("validation", [elsewhere]) == cases.validation


def test_evaluation_of_cases_that_are_not_there(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DatasetError, match="Expected cases that are held out, but `val_fraction` is 0: score"):
        BundleCases(str(data), val_fraction=0).evaluation_on("validation", [])
    content = json.loads((data / "dataset.json").read_text())
    del content["test_labelled"]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (tmp_path / part).symlink_to(data / part)
    with pytest.raises(DatasetError, match=r"dataset.json to have `test_labelled` cases, but it has none: add them"):
        BundleCases(str(tmp_path)).evaluation_on("test_labelled", [])


class FailAtSecondStep(Randomizable, Transform):
    """Raise what a full GPU raises, once a few patches were cut."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def __call__(self, item: Any) -> Any:
        self.calls += 1
        if self.calls > 4:
            raise self.error
        return item


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_loaders_thread_ends_the_training(workers: int, bundle: Path, data: Path) -> None:
    fail = FailAtSecondStep(RuntimeError("this transform is broken"))
    settings = overrides(bundle, data, val_fraction=0, epochs=3, num_workers=workers)
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], {**settings, "train#random_transforms#11": fail})
    assert "this transform is broken" in str(causes(caught.value))
    assert not (bundle / "models" / "model.pt").exists()


def test_full_gpu_memory_in_the_loaders_thread_names_the_keys(bundle: Path, data: Path) -> None:
    fail = FailAtSecondStep(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    settings = overrides(bundle, data, val_fraction=0, epochs=3)
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], {**settings, "train#random_transforms#11": fail})
    assert "`patch_size`" in str(causes(caught.value))


def test_a_failed_check_in_the_loaders_thread_ends_the_program() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise SystemExit(1)

    class Items(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return batches()

    loader = iter(BufferedLoader(Items(), batch_size=1))
    assert next(loader).tolist() == [1]
    with pytest.raises(SystemExit):
        next(loader)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("batch_size", 2.0, "an integer of at least 1"),
        ("epochs", 1.0, "an integer of at least 1"),
        ("seed", 0.0, "an integer of at least 0"),
        ("spatial_dims", 2.0, "null or 2 or 3"),
    ],
)
def test_integers_given_as_floats_are_refused(name: str, value: float, words: str) -> None:
    with pytest.raises(ValueError, match=r"^Expected") as caught:
        Settings(**{name: value})
    expected = f"Expected `{name}` to be {words}, but got {value!r}: write --{name} {int(value)}."
    assert str(caught.value) == expected
    assert getattr(Settings(**{name: np.int64(value)}), name) == value
    with pytest.raises(ValueError, match="but got True"):
        Settings(**{name: True})


def test_patches_of_neither_kind_are_refused_by_the_names_of_their_keys(bundle: Path, data: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], overrides(bundle, data, positive_crops=0, negative_crops=0.0))
    expected = (
        "Expected `positive_crops` or `negative_crops` to be above 0, but got 0 for both: give the ratio of the two "
        "kinds of patches, such as --positive_crops 2 --negative_crops 1."
    )
    assert expected in [str(cause) for cause in causes(caught.value)]
    assert not (bundle / "models").exists()
    assert Settings(positive_crops=0, negative_crops=1).positive_crops == 0


def test_a_patch_of_one_voxel_is_refused_before_the_first_step(bundle: Path, data: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], overrides(bundle, data, patch_size=[1, 1, 1]))
    assert "Expected `patch_size` to leave at least two voxels at the network's coarsest" in str(causes(caught.value))
    run_workflow(bundle, ["train"], overrides(bundle, data, patch_size=[2, 1, 1], epochs=1, val_fraction=0))


@pytest.mark.slow
def test_a_patch_of_two_voxels_is_validated(bundle: Path, data: Path) -> None:
    # Validation has tens of thousands of windows of two voxels.
    run_workflow(bundle, ["train"], overrides(bundle, data, patch_size=[2, 1, 1], epochs=1, sw_batch_size=2048))


@pytest.mark.parametrize("epochs", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_resuming_a_complete_training_says_that_nothing_is_left(
    epochs: int, bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_workflow(bundle, ["train"], overrides(bundle, data, val_fraction=0))
    assert "Nothing is left" not in capsys.readouterr().out
    run_workflow(bundle, ["train"], overrides(bundle, data, val_fraction=0, epochs=epochs, resume=True))
    expected = f"Nothing is left to train, as `epochs` is {epochs} and 2 are done: a larger --epochs continues."
    assert capsys.readouterr().out.count(expected) == 1
    run_workflow(bundle, ["train"], overrides(bundle, data, val_fraction=0, epochs=3, resume=True))
    assert "Nothing is left" not in capsys.readouterr().out
