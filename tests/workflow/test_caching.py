"""Prepared volumes on disk: the same patches, shared by processes and threads."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import bundle_command, overrides
from monai.bundle import ConfigWorkflow
from monai.data.meta_tensor import MetaTensor
from monai.transforms import Compose, Lambdad, Randomizable, Transform

from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.transforms import LesionIndicesd, RandCropByLesionsd
from monai_iou.workflow import versions
from monai_iou.workflow.caching import cached_dataset

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]


def loader(bundle: Path, data: Path, **changes: Any) -> Any:
    workflow = ConfigWorkflow(
        config_file=str(bundle / "configs" / "train.json"), workflow_type="train", **overrides(bundle, data, **changes)
    )
    workflow.initialize()
    return workflow.parser


def test_volumes_on_disk_give_the_patches_of_volumes_in_memory(bundle: Path, data: Path, tmp_path: Path) -> None:
    batches = []
    for changes in ({}, {"cache_dir": str(tmp_path / "cache")}, {"cache_dir": str(tmp_path / "cache")}):
        parser = loader(bundle, data, **changes)
        dataset, transform = (parser.get_parsed_content(f"train#{name}") for name in ("dataset", "preprocessing"))
        transform.set_random_state(seed=3)
        batches.append([item for index in range(len(dataset)) for item in dataset[index]])
    for other in batches[1:]:
        for expected, found in zip(batches[0], other, strict=True):
            assert expected.keys() == found.keys()
            assert expected["case"] == found["case"]
            assert torch.equal(expected["image"], found["image"])
            assert torch.equal(expected["label"], found["label"])


def test_no_volume_in_memory_is_copied_or_changed(bundle: Path, data: Path) -> None:
    parser = loader(bundle, data, augmentation=1.0, instance=True)
    dataset, transform = (parser.get_parsed_content(f"train#{name}") for name in ("dataset", "preprocessing"))
    assert not dataset.copy_cache
    before = copy.deepcopy(dataset._cache)
    patches = []
    for copied in (False, True):
        dataset.copy_cache = copied
        transform.set_random_state(seed=3)
        patches.append([item for _ in range(5) for index in range(len(dataset)) for item in dataset[index]])
    for found, expected in zip(*patches, strict=True):
        assert torch.equal(found["image"], expected["image"])
        assert torch.equal(found["label"], expected["label"])
    for now, then in zip(dataset._cache, before, strict=True):
        assert now.keys() == then.keys()
        for key in ("image", "label"):
            assert torch.equal(now[key], then[key])


def places(value: Any) -> set[tuple[str, int]]:
    """Where the memory of all tensors, arrays and containers in an item is."""
    found = set()
    if isinstance(value, torch.Tensor):
        found.add(("tensor", value.untyped_storage().data_ptr()))
        inner: Iterable[Any] = value.meta.values() if isinstance(value, MetaTensor) else ()
    elif isinstance(value, np.ndarray):
        found.add(("array", value.__array_interface__["data"][0]))
        inner = ()
    elif isinstance(value, (dict, list)):
        found.add(("container", id(value)))
        inner = value.values() if isinstance(value, dict) else value
    else:
        inner = ()
    return found.union(*map(places, inner))


@pytest.mark.parametrize("side", [4, 6], ids=["a part", "the whole volume"])
def test_patches_of_a_volume_that_is_not_copied_share_no_memory_with_it(side: int) -> None:
    """So that no transform behind the crop can change the cache, whatever it changes in place."""
    meta = {"spatial_shape": np.array([6, 6, 6]), "notes": [1, {"a": [2]}], "original_affine": np.eye(4)}
    image = MetaTensor(torch.ones(1, 6, 6, 6), affine=torch.eye(4), meta=meta)
    item = {"image": image, "label": torch.ones(1, 6, 6, 6), "raw": np.ones((1, 6, 6, 6)), "more": {"x": np.ones(3)}}
    crop = RandCropByLesionsd(["image", "label", "raw"], "label", (side,) * 3, num_samples=2)
    dataset: Any = cached_dataset([item], Compose([LesionIndicesd("label"), crop]))
    assert not dataset.copy_cache
    kept = places(dataset._cache[0])
    assert len(kept) > 8
    first, second = (places(patch) for patch in dataset[0])
    assert not kept & first
    assert not kept & second
    assert not first & second


class Darker(Randomizable, Transform):
    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        data["image"] -= 1
        return data


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_volume_is_copied_for_other_random_transforms(first: bool, lazy: bool) -> None:
    crop = RandCropByLesionsd(["image", "label"], "label", (4, 4, 4), lazy=lazy)
    transform = Compose([Darker(), crop] if first else [crop, Darker()])
    item = {"image": torch.ones(1, 6, 6, 6), "label": torch.ones(1, 6, 6, 6)}
    dataset: Any = cached_dataset([item], transform)
    assert dataset.copy_cache == (first or lazy)
    for _ in range(3):
        (patch,) = dataset[0]
        assert (patch["image"] == 0).all()
    for compose in (Compose([crop], lazy=True), Compose([])):
        other: Any = cached_dataset([item], compose)
        assert other.copy_cache


def test_a_cache_notices_changed_files_and_settings_but_not_another_run(
    bundle: Path, data: Path, tmp_path: Path
) -> None:
    images = write_phantom_dataset(tmp_path / "images", training=2, evaluation=1, shape=(32, 32, 24))
    cache = tmp_path / "cache"

    def files(**changes: Any) -> set[str]:
        dataset = loader(bundle, images, val_fraction=0, cache_dir=str(cache), **changes).get_parsed_content(
            "train#dataset"
        )
        for index in range(len(dataset)):
            dataset[index]
        return {path.name for path in cache.iterdir()}

    first = files()
    assert len(first) == 2
    assert files() == first
    assert len(files(pixdim=[2.0, 2.0, 2.0])) == 4
    assert len(files(flip_prob=0.1)) == 4, "random transforms are not kept"
    changed = next((images / "imagesTr").iterdir())
    os.utime(changed, (1, 1))
    assert len(files()) == 5


@pytest.mark.parametrize("package", ["monai-iou", "monai", "torch"])
def test_another_version_prepares_the_volumes_again(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count() -> int:
        cached_dataset([{"index": 1}], Compose([Together(threading.Barrier(1))]), cache_dir=str(tmp_path))[0]
        return len(list(tmp_path.iterdir()))

    assert (count(), count()) == (1, 1)
    installed = versions.version_of
    monkeypatch.setattr(versions, "version_of", lambda name: "99.0" if name == package else installed(name))
    assert (count(), count()) == (2, 2)


def test_folds_and_networks_share_what_they_prepare_alike(bundle: Path, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def prepared(**changes: Any) -> set[str]:
        """The names of the files that a training reads."""
        given = {"folds": 4, "fold": 0, "cache_dir": str(cache), "pixdim": [1.0, 1.0, 1.5], "num_samples": 1}
        parser = loader(bundle, mri, **{**given, **changes})
        before = {path: path.stat().st_mtime_ns for path in cache.glob("*.pt")}
        for name in ("train", "validate"):
            dataset = parser.get_parsed_content(f"{name}#dataset")
            for index in range(len(dataset)):
                dataset[index]
        assert {path: path.stat().st_mtime_ns for path in before} == before
        return {path.name for path in cache.glob("*.pt")} - {path.name for path in before}

    mri = shutil.copytree(data, tmp_path / "mri")  # intensities of CT are those of the fold's training cases
    description = json.loads((mri / "dataset.json").read_text())
    (mri / "dataset.json").write_text(json.dumps({**description, "modality": {"0": "MRI"}}))
    assert len(prepared()) == 4, "three are trained on and one is validated on"
    assert len(prepared(fold=1)) == 2, "the case that was validated on, and the one that is now"
    assert prepared(network="segresnet", deep_supervision=True) == set()
    assert prepared(base_channels=8, seed=5, learning_rate=0.01) == set()
    for changes in ({"pixdim": [1.0, 1.0, 2.0]}, {"patch_size": [64, 64, 64]}):
        assert len(prepared(**changes)) == 4
    description["labels"] = {"0": "background", "1": "lesion", "2": "other"}
    (mri / "dataset.json").write_text(json.dumps({**description, "modality": {"0": "MRI"}}))
    assert len(prepared()) == 4, "the labels mean something else"


@pytest.mark.slow
def test_two_processes_share_a_cache(bundle: Path, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for seed in ("1", "2"):
        command = bundle_command(bundle, ["train"], overrides(bundle, data, epochs=1, cache_dir=str(cache)))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": seed}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
        assert len(list(cache.iterdir())) == 4, "two trained on and two validated on"


class Together(Transform):
    """Give a volume that no other thread gives, once all threads are here: their writes begin at the same time."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        self.barrier.wait(timeout=60)
        return {**item, "volume": torch.full((200_000,), float(item["index"]))}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a barrier cannot be pickled, and says nothing of the volume

    def __deepcopy__(self, memo: dict[int, Any]) -> Together:
        return self


def test_threads_that_prepare_the_same_volume_at_once_share_a_cache(tmp_path: Path) -> None:
    count, threads = 8, 4
    items = [{"index": index} for index in range(count)]
    barrier = threading.Barrier(threads)
    datasets = [cached_dataset(items, Compose([Together(barrier)]), cache_dir=str(tmp_path)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        for index in range(count):
            # A thread that still finds no file waits for the others; one that comes late would find it.
            for path in tmp_path.iterdir():
                path.unlink()
            for found in pool.map(lambda dataset: dataset[index], datasets):  # noqa: B023
                assert (found["volume"] == index).all()
            (stored,) = tmp_path.iterdir()
            assert (torch.load(stored, weights_only=True)["volume"] == index).all()


def test_a_file_that_another_process_holds_open_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path, target: Path) -> None:  # as on Windows; the other process stored it before
        torch.save({}, target)
        raise PermissionError

    dataset = cached_dataset([{"index": 3}], Compose([Together(threading.Barrier(1))]), cache_dir=str(tmp_path))
    monkeypatch.setattr(Path, "replace", refused)
    assert dataset[0]["volume"][0] == 3
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]
    for path in tmp_path.iterdir():
        path.unlink()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(PermissionError))
    with pytest.raises(PermissionError):
        dataset[0]
    assert not list(tmp_path.iterdir())


def test_a_transform_that_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected `cache_dir` to be used with transforms that can be pickled"):
        cached_dataset([{"image": "a"}], Compose([Lambdad("image", lambda x: x)]), cache_dir=str(tmp_path))
