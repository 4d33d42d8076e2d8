"""Small runs of the bundle for its tests: overrides, subprocess commands, and a dataset made once."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest

SMALL: dict[str, Any] = {
    "epochs": 2,
    "val_interval": 1,
    "val_fraction": 0.3,
    "patch_size": [24, 24, 16],
    "base_channels": 4,
    "batch_size": 2,
    "num_samples": 1,
    "overwrite": True,
    "pictures": 0,
}


def overrides(bundle: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Return what makes a run of `bundle` on `data` small, with changes."""
    return {"bundle_root": str(bundle), "dataset_dir": str(data), **SMALL, **changes}


def causes(error: BaseException) -> list[BaseException]:
    """Return an error and what it was raised from: MONAI wraps what a config's expression raises."""
    return [error] if error.__cause__ is None else [error, *causes(error.__cause__)]


def bundle_command(bundle: Path, configs: list[str], overrides: dict[str, Any], *before: str) -> list[str]:
    """Return the command line of `python -m monai.bundle run`."""
    files = str([str(bundle / "configs" / f"{name}.json") for name in configs])
    command = [*(before or (sys.executable, "-m")), "monai.bundle", "run", "--config_file", files]
    for name, value in overrides.items():
        command += [f"--{name}", str(value)]
    return command


def run_command(command: list[str], timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run it with one thread per process, so that a busy machine does not stall it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def check_masks(folder: Path, data: Path) -> None:
    """Check that evaluation's scores in `folder` are those of the masks beside them."""
    rows = score_rows(folder / "test_mean_iou_raw.csv")
    assert len(rows) == 3
    for file, row in rows.items():
        predicted = nib.load(folder / "masks" / file).get_fdata() > 0
        true = nib.load(data / "labelsTs" / file).get_fdata() > 0
        expected = (predicted & true).sum() / (predicted | true).sum()
        assert float(row["lesion"]) == pytest.approx(expected, abs=6e-5)


def score_rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    named = {Path(row["filename"]).name: row for row in rows}
    assert len(named) == len(rows), "every case once"
    return named
