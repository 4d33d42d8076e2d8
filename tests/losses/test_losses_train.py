"""The benchmark that trains the bundle with every loss, on tiny volumes."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from monai_iou.datasets.phantoms import write_phantom_dataset

TINY = ["--patch", "24", "24", "16", "--base-channels", "4"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("data") / "phantoms", 6, 2, (48, 48, 32))


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.losses_train", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.slow
def test_every_loss_trains_by_one_override_and_falls(dataset: Path, tmp_path: Path) -> None:
    done = run(["--data", str(dataset), "--epochs", "12", "--output", str(tmp_path), *TINY])
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "losses_train.json").read_text())
    results = {result["name"]: result for result in report["results"]}
    asked = {
        "ce",
        "weighted_ce",
        "iou",
        "iou_ce",
        "lovasz_ce",
        "generalized_iou",
        "instance",
        "multi_scale",
        "attention",
    }
    assert asked <= set(results)
    assert report["weights_of_weighted_ce"][0] < 0.1 < 1.9 < report["weights_of_weighted_ce"][1]
    for name, result in results.items():
        assert result["fell"], name
        assert result["iterations"] == 12 * 3
        assert len(result["cases"]) == 2
        assert f"| {name} | " in done.stdout
        # one override: the loss, or a config behind train.json
        configs = result["command"].count(".json")
        assert ("--loss" in result["command"]) == (configs == 1)
        assert configs == (2 if name in ("instance", "multi_scale", "attention") else 1)


@pytest.mark.slow
def test_the_recorded_command_trains_alike(dataset: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(dataset), "--epochs", "2", "--output", str(tmp_path), "--only", "lovasz_ce", *TINY]
    run(arguments)
    report = json.loads((tmp_path / "losses_train.json").read_text())
    model = tmp_path / "lovasz_ce" / "models" / "model.pt"
    assert model.is_file()
    shutil.rmtree(model.parent)  # a finished training is not replaced
    words = shlex.split(report["results"][0]["command"])
    assert words[0] == "python"
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert model.is_file()


def test_wrong_arguments_end_with_one_sentence(tmp_path: Path) -> None:
    from benchmarks.losses_train import main

    for arguments in (["--data", str(tmp_path)], ["--data", str(tmp_path), "--epochs", "1"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
