"""Kills at random moments: nothing is damaged, nothing is lost but the time since the last epoch, nothing differs."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import overrides
from forked_runs import finish, fork, kill_after, kill_at_random

from monai_iou.bundle_files import copy_bundle
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.files import TEMPORARY_PREFIX
from monai_iou.workflow.checkpoint_files import check_content, last_epoch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*os.fork:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("data"), training=4, evaluation=4, shape=(32, 32, 24))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A bundle trained without a break, and how long that took."""
    folder = tmp_path_factory.mktemp("trained")
    bundle = copy_bundle(folder / "bundle")
    start = time.monotonic()
    assert finish(fork(lambda: run_workflow(bundle, ["train"], settings(bundle, data)), folder / "log.txt")) == 0
    return bundle, time.monotonic() - start


def settings(bundle: Path, data: Path, **changes: Any) -> dict[str, Any]:
    return overrides(
        bundle, data, **{"epochs": 40, "batch_size": 1, "val_fraction": 0.25, "val_interval": 2, **changes}
    )


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]


def test_twenty_kills_of_a_training(trained: tuple[Path, float], data: Path, tmp_path: Path) -> None:
    (unbroken, seconds), bundle = trained, copy_bundle(tmp_path / "bundle")
    models, epochs = bundle / "models", [0]
    given = settings(bundle, data, resume=True, overwrite=False)

    def check() -> None:
        for path in models.glob("*.pt"):
            check_content(path)
            assert torch.load(path, weights_only=True)
        epochs.append(last_epoch(models / "last_epoch.pt"))
        assert epochs[-1] >= epochs[-2], "an epoch was lost"
        if (models / "model.pt").is_file():
            assert (models / "model.json").is_file()

    # Together the twenty parts are about as long as the whole.
    kill_at_random(lambda: run_workflow(bundle, ["train"], given), tmp_path / "log.txt", 20, 0.12 * seconds, check)
    assert finish(fork(lambda: run_workflow(bundle, ["train"], given), tmp_path / "log.txt")) == 0
    assert left_over(models) == [], "the next run removes what a killed one left"
    states = [torch.load(each / "models" / "last_epoch.pt", weights_only=True) for each in (unbroken, bundle)]
    assert [state["epoch"] for state in states] == [40, 40]
    assert all(torch.equal(states[0]["model"][name], value) for name, value in states[1]["model"].items())
    best = [torch.load(each / "models" / "model.pt", weights_only=True) for each in (unbroken, bundle)]
    assert all(torch.equal(best[0][name], value) for name, value in best[1].items())


def test_ten_kills_of_an_evaluation(trained: tuple[Path, float], data: Path, tmp_path: Path) -> None:
    bundle, _ = trained
    scores, seconds = [], 0.0
    for name in ("unbroken", "killed"):
        given = settings(bundle, data, output_dir=str(tmp_path / name))

        def run(given: dict[str, Any] = given) -> None:
            run_workflow(bundle, ["train", "evaluate"], given)

        start = time.monotonic()
        if name == "killed":
            kill_at_random(run, tmp_path / "log.txt", 10, seconds, lambda: None, seed=1)
        assert finish(fork(run, tmp_path / "log.txt")) == 0
        seconds = time.monotonic() - start
        with (tmp_path / name / "test_mean_iou_raw.csv").open(newline="") as stream:
            scores.append([(Path(row["filename"]).name, row["mean"]) for row in csv.DictReader(stream)])
        assert left_over(tmp_path / name) == []
    assert scores[0] == scores[1]
    assert len(scores[0]) == 4


def test_ten_kills_of_an_inference(trained: tuple[Path, float], data: Path, tmp_path: Path) -> None:
    bundle, _ = trained
    out = tmp_path / "masks"
    given = {"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(out)}

    def run() -> None:
        run_workflow(bundle, ["inference"], given)

    start = time.monotonic()
    assert finish(fork(run, tmp_path / "log.txt")) == 0
    seconds = time.monotonic() - start
    expected = {path.name: np.asanyarray(nib.load(path).dataobj) for path in out.iterdir()}
    assert len(expected) == 4
    for path in out.iterdir():
        path.unlink()

    def check() -> None:
        for path in out.glob("*.nii.gz"):
            if not path.name.startswith("."):
                np.testing.assert_array_equal(np.asanyarray(nib.load(path).dataobj), expected[path.name])

    kill_at_random(run, tmp_path / "log.txt", 10, seconds, check, seed=2)
    assert finish(fork(run, tmp_path / "log.txt")) == 0
    check()
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)


def test_a_killed_worker_ends_the_training_in_a_sentence(data: Path, tmp_path: Path) -> None:
    bundle, log = copy_bundle(tmp_path / "bundle"), tmp_path / "log.txt"
    given = settings(bundle, data, epochs=100000, val_interval=100000, num_workers=1)
    child = fork(lambda: run_workflow(bundle, ["train"], given), log)
    deadline = time.monotonic() + 600
    while last_epoch(bundle / "models" / "last_epoch.pt") < 2:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    children = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert kill_after(child, 60) == 1, "it ends by itself"
    assert "Expected the run to fit into memory, but it ran out of it" in log.read_text()
