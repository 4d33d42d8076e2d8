"""Data and models that several of the bundle's tests share, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundle_runs import overrides

from monai_iou.bundle_files import copy_bundle
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of four training and three test volumes."""
    return write_phantom_dataset(tmp_path_factory.mktemp("data"), training=4, evaluation=3, shape=(32, 32, 24))


@pytest.fixture(scope="session")
def folds(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with two trained models, `fold0` and `fold1`."""
    bundle = copy_bundle(tmp_path_factory.mktemp("folds") / "bundle")
    for fold in (0, 1):
        places = {"ckpt_dir": str(bundle / f"fold{fold}"), "pixdim": [1.0, 1.0, 1.5]}
        run_workflow(bundle, ["train"], overrides(bundle, data, folds=2, fold=fold, seed=fold, epochs=8, **places))
    return bundle
