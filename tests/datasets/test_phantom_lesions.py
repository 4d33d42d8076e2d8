"""Phantoms with lesions of chosen sizes: the share of the voxels that is asked for, one large among many small."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import cc3d
import nibabel as nib
import numpy as np
import pytest

from monai_iou.cli import main
from monai_iou.datasets.phantoms import make_phantom, write_phantom_dataset
from monai_iou.files import OutputError

SHAPE = (48, 48, 32)


@pytest.mark.parametrize(("lesions", "foreground"), [("few", 0.02), ("few", 0.0005), ("unequal", 0.01)])
def test_lesions_are_scaled_to_the_foreground_asked_for(lesions, foreground: float) -> None:
    label = make_phantom(0, SHAPE, lesions=lesions, foreground=foreground).label
    # A lesion of a few voxels grows by several at once.
    assert label.mean() == pytest.approx(foreground, rel=0.2)


def test_scaling_changes_the_size_and_the_same_seed_gives_the_same_volume() -> None:
    plain, *scaled = make_phantom(3, SHAPE), *(make_phantom(3, SHAPE, foreground=0.03) for _ in range(2))
    np.testing.assert_array_equal(scaled[0].label, scaled[1].label)
    np.testing.assert_array_equal(scaled[0].image, scaled[1].image)
    assert scaled[0].label.sum() > 2 * plain.label.sum()


def test_unequal_lesions_are_one_large_and_many_small() -> None:
    counts = cc3d.statistics(cc3d.connected_components(make_phantom(0, lesions="unequal").label))["voxel_counts"][1:]
    small = np.sort(counts)[:-1]
    assert len(small) >= 12
    assert small.max() < 60
    assert counts.max() > 20 * np.median(small)


def test_the_lesions_are_brighter_than_muscle() -> None:
    phantom = make_phantom(1, SHAPE, lesions="unequal", foreground=0.01)
    assert phantom.image[phantom.label == 1].mean() > 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lesions": "many"}, "Expected `lesions` to be one of 'few', 'unequal', but got 'many': choose one."),
        (
            {"foreground": 0.2},
            "Expected `foreground` to be a share of the voxels above 0 and at most 0.05, but got 0.2: "
            "choose a smaller share, because larger lesions do not fit into the body, or None to keep the diameters.",
        ),
        ({"foreground": float("nan")}, "but got nan: choose a smaller share"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(tmp_path: Path, options, message: str) -> None:
    for make in (lambda: make_phantom(0, SHAPE, **options), lambda: write_phantom_dataset(tmp_path / "x", **options)):
        with pytest.raises(ValueError, match=r"Expected") as caught:
            make()
        assert message in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_a_dataset_says_which_lesions_it_has(tmp_path: Path) -> None:
    write_phantom_dataset(tmp_path, 1, 1, (40, 40, 24), lesions="unequal", foreground=0.003)
    content = json.loads((tmp_path / "dataset.json").read_text())
    assert content["description"] == (
        "CT-like volumes with one lesion of 22 to 28 mm and 15 to 25 of 3 to 6 mm, scaled to 0.3 % of the voxels, "
        "among vessels as bright"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training": 0}, "Expected `training` to be a number of cases of at least 1, but got 0: give 1 or more."),
        (
            {"evaluation": -1},
            "Expected `evaluation` to be a number of cases of at least 0, but got -1: give 0 or more.",
        ),
        (
            {"shape": (16, 16, 2)},
            "Expected `shape` to be three numbers of at least 4 voxels, but got (16, 16, 2): give at least 4 along "
            "each of three axes.",
        ),
    ],
)
def test_datasets_that_cannot_be_written(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write_phantom_dataset(tmp_path / "data", **given)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("file", ["imagesTr/phantom_00.nii.gz", "dataset.json"])
def test_a_disk_that_fills_up_is_one_sentence_with_the_file(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data" / file

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if file.endswith(".json"):
        monkeypatch.setattr(json, "dumps", lambda *_, **__: monkeypatch.setattr(os, "fsync", full) or "")
    else:
        monkeypatch.setattr(nib, "save", full)
    message = (
        f"Expected to write `{path}`, but got the error 'No space left on device': free space or choose another folder."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        write_phantom_dataset(tmp_path / "data", 1, 0, SHAPE)
    assert not list(path.parent.glob(".*"))
    assert not path.exists()


def test_of_the_demo_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nib, "save", full)
    assert main(["demo", f"--output={tmp_path / 'demo'}"]) == 1
    path = tmp_path / "demo" / "dataset" / "imagesTr" / "phantom_00.nii.gz"
    assert capsys.readouterr().err == (
        f"Error: Expected to write `{path}`, but got the error 'No space left on device': free space or choose another "
        "folder.\n"
    )
