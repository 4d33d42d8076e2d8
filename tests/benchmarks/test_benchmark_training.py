"""The benchmark of the bundle's training, on tiny volumes: what it writes, never how fast it was."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import ROOT

from benchmarks.training import PLAIN, bare_loop, check_same_work, main, take_turns
from monai_iou.bundle_files import bundle_path
from monai_iou.datasets.phantoms import write_phantom_dataset

TINY = ["--epochs", "3", "--steps", "2", "--patch", "24", "24", "16", "--batch-size", "2", "--base-channels", "4"]
TINY += ["--full-resolution"]


@pytest.mark.slow
def test_report_has_every_turn_and_what_it_depends_on(tmp_path: Path) -> None:
    data = write_phantom_dataset(tmp_path / "phantoms", 5, 0, (40, 40, 24))
    output = tmp_path / "output"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training", *TINY]
    done = subprocess.run(
        [*command, "--data", str(data), "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    report = json.loads((output / "training.json").read_text())
    assert (report["data"], report["cases"], report["shapes"]) == ("phantoms", 5, [[40, 40, 24]])
    assert (report["batch"], report["classes"], report["threads"]) == ([4, 1, 24, 24, 16], 2, 1)
    assert (report["channels"][0], report["strides"][0]) == (4, [1, 1, 1])
    assert {"torch", "monai", "monai_iou", "python", "device", "cpus", "parameters", "amp"} <= set(report)

    # 4 of 5 cases are trained on, two per step.
    assert [(row["name"], len(row["seconds"]), row["steps"]) for row in report["epochs"]] == [
        ("bundle", 3, 2),
        ("plain", 3, 2),
    ]
    assert [(row["name"], len(row["seconds"])) for row in report["steps"]] == [("trainer", 5), ("bare loop", 5)]
    for row in report["epochs"] + report["steps"]:
        assert min(row["seconds"]) > 0
        assert row["median"] == statistics.median(row["seconds"][row["left_out"] :])
    bundle, plain = report["epochs"]
    assert report["epoch_ratio"] == {"plain": plain["median"] / bundle["median"]}
    assert report["step_ratio"] == report["steps"][0]["median"] / report["steps"][1]["median"]

    for line in ("| bundle | ", "| plain | ", "| trainer | ", "| bare loop | ", "- threads: 1"):
        assert f"\n{line}" in done.stdout
    said = (output / "training.log").read_text()
    assert said.count("epoch 3/3") == 2, "both trainings ran to their end"
    assert "Traceback" not in said


def test_the_plain_training_overrides_keys_that_the_bundle_has() -> None:
    config = json.loads((bundle_path() / "configs" / "train.json").read_text())
    for name, value in PLAIN.items():
        part = config
        for key in name.split("#"):
            part = part[key]
        assert part != value


def test_turns_change_their_order() -> None:
    called: list[str] = []
    seconds = take_turns({name: lambda name=name: called.append(name) for name in "ab"}, 3)
    assert "".join(called) == "abbaab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_loops_that_do_other_work_are_not_compared() -> None:
    check_same_work({"trainer": [1.0, 0.5], "bare loop": [1.0, 0.7]})
    with pytest.raises(RuntimeError, match=r"start with one loss, but got 1\.0 and 1\.1"):
        check_same_work({"trainer": [1.0], "bare loop": [1.1]})


def test_the_bare_loop_computes_in_the_type_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, autocast's own type is another one than the bundle's."""
    asked: list[tuple[bool, torch.dtype | None]] = []

    class Autocast(torch.autocast):
        def __init__(self, device: str, dtype: torch.dtype | None = None, enabled: bool = True) -> None:
            asked.append((enabled, dtype))
            super().__init__(device, dtype, enabled)

    monkeypatch.setattr(torch, "autocast", Autocast)
    network = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    parts = {"net": network, "training_loss": torch.nn.MSELoss(), "optimizer": optimizer}
    parser = SimpleNamespace(get_parsed_content=parts.__getitem__)
    batches, cpu = [[torch.ones(1, 2), torch.ones(1, 1)]], torch.device("cpu")
    for amp in (True, False):
        next(bare_loop(parser, batches, amp=amp, dtype=torch.bfloat16, device=cpu))
    assert asked == [(True, torch.bfloat16), (False, torch.bfloat16)]


def test_wrong_arguments_end_before_any_work(tmp_path: Path) -> None:
    for arguments in (["--epochs", "1"], ["--steps", "0"], ["--data", str(tmp_path)]):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--output", str(tmp_path / "output")])
        assert stop.value.code == 2
    assert not (tmp_path / "output").exists()
