"""The benchmark of a training's parts, on tiny volumes: that the parts add up and nothing else is trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT

from benchmarks.part_times import BACKWARD, ELSE, PARTS, WHOLE, Clock, figures, total
from benchmarks.shares import Measured, check_same_losses, check_same_patches, epoch_figures, main, table
from monai_iou.datasets.phantoms import write_phantom_dataset

TINY = '{"patch_size": [24, 24, 16], "base_channels": 4, "full_resolution": true, "instance": true}'
CELLS = ["carried through the transforms", "in the loss", "both", "found in the crop, as a part of the loss"]


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {part: values for part, *values in lines[2:]}


def check_adds_up(rows: dict[str, list[str]], parts: list[str], whole: str, columns: range) -> None:
    for column in columns:
        values = [float(rows[part][column]) for part in parts]
        assert min(values) >= 0
        assert sum(values) == pytest.approx(float(rows[whole][column]), abs=0.06 * len(parts))


@pytest.mark.slow
def test_the_parts_of_a_training_with_cells_add_up(tmp_path: Path) -> None:
    data = write_phantom_dataset(tmp_path / "phantoms", 5, 0, (40, 40, 24))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.shares", "--data", str(data), "--keys", TINY],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("phantoms, keys ")
    assert "threads: 1; 3 epochs of 2 steps, of which 3 steps count" in done.stdout  # 4 of 5 cases, two per step

    rows = rows_of(done.stdout)
    parts = [*PARTS, ELSE]
    validation = [f"validation: {part}" for part in ("network", "postprocessing and metrics", ELSE)]
    made = "cells: regions, made once"
    assert list(rows) == [
        *parts,
        WHOLE,
        *validation,
        f"validation: {WHOLE}",
        *(f"cells: {part}" for part in CELLS),
        made,
    ]
    check_adds_up(rows, parts, WHOLE, range(6))
    check_adds_up(rows, validation, f"validation: {WHOLE}", range(2))
    assert [rows[WHOLE][column] for column in (1, 3, 5)] == ["100.0"] * 3
    assert all(float(rows[part][2]) > 0 for part in parts)
    carried, lost, both = (float(rows[f"cells: {part}"][2]) for part in CELLS[:3])
    assert carried + lost == pytest.approx(both, abs=0.11)
    assert rows[f"cells: {CELLS[3]}"][2] == "0.0"  # the label brings its regions
    assert float(rows[made][0].removesuffix(" a volume")) >= 0


def test_each_moment_belongs_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(np.arange(20.0) ** 2)
    monkeypatch.setattr(Clock, "_now", staticmethod(lambda: np.array([next(moments)] * 2)))
    clock = Clock()
    inner = clock.timed("inner", lambda: clock.to("changed"))
    clock.timed("outer", inner)()
    spent = clock.taken()
    assert {part: pair.tolist() for part, pair in spent.items()} == {
        ELSE: [1 + 11] * 2,
        "outer": [3 + 9] * 2,
        "inner": [5] * 2,
        "changed": [7] * 2,
    }
    assert total(spent).tolist() == [36, 36]  # of the first moment to the last
    assert total(clock.taken()).tolist() == [49 - 36] * 2


def test_a_failed_action_ends_its_part() -> None:
    clock = Clock()
    with pytest.raises(StopIteration):
        clock.timed("part", iter(()).__next__)()
    clock.taken()
    assert set(clock.taken()) == {ELSE}


def test_an_epoch_is_its_mean_steps_and_what_is_beside_them() -> None:
    steps = [{BACKWARD: np.array([seconds, 2 * seconds]), ELSE: np.array([1.0, 1.0])} for seconds in (1.0, 2.0, 6.0)]
    measured = Measured(10, steps, [np.array([seconds, 0.0]) for seconds in (3.0, 4.0, 9.0)])
    step, epoch = figures(steps, PARTS), epoch_figures(measured)
    assert (step[BACKWARD].tolist(), step[ELSE].tolist(), step[WHOLE].tolist()) == ([2, 4], [1, 1], [3, 5])
    assert (epoch[BACKWARD][0], epoch[ELSE][0], epoch[WHOLE][0]) == (30, 14, 44)
    rows = rows_of(table(measured))
    assert rows[BACKWARD] == ["30.00", "68.2", "2000.0", "66.7", "4000.0", "80.0"]
    assert rows[WHOLE] == ["44.00", "100.0", "3000.0", "100.0", "5000.0", "100.0"]
    assert list(rows) == [*PARTS, ELSE, WHOLE], "no validation and no cells"


def test_another_training_than_the_bundles_is_not_reported() -> None:
    check_same_losses([1.0, 0.5, 0.4], [1.0, 0.5], 0)
    check_same_losses([1.0, 0.50001], [1.0, 0.5], 1e-4)
    for measured in ([1.0, 0.50001], [1.0], []):
        with pytest.raises(RuntimeError, match="Expected the measured training to have the bundle's losses"):
            check_same_losses(measured, [1.0, 0.5], 0)
    with pytest.raises(RuntimeError, match=r"losses, \[2\.0\], but got \[1\.0\]"):
        check_same_losses([1.0], [2.0], 1e-4)


def test_other_patches_are_not_compared() -> None:
    image, label = torch.rand(1, 1, 4), torch.tensor([[[0, 1, 1, 0]]], dtype=torch.uint8)
    with_regions = torch.cat([label.int(), torch.full((1, 1, 4), 2)], 1)
    check_same_patches((image, with_regions), (image, label))
    for other in ((image + 1, label), (image, 1 - label)):
        with pytest.raises(RuntimeError, match="Expected the same patches"):
            check_same_patches((image, with_regions), other)


def test_wrong_arguments_end_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--turns", "0"], ["--data", str(tmp_path)], ["--keys", '{"epochs": 2, "device": "cuda"}']):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "--keys must leave to this command what it sets itself: device, epochs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--keys", "[1]"])
    assert "--keys must be a JSON object, but is [1]" in capsys.readouterr().err
