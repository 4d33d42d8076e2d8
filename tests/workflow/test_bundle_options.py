"""The bundle's options: averaged weights, flipped views, a cache on disk, tuned postprocessing, ensembles, ranks."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import bundle_command, causes, overrides, run_command
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, Lambdad, Transform
from places import DOCS

from monai_iou.bundle_files import bundle_path, copy_bundle
from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.metrics.iou import IoUMetric
from monai_iou.workflow.caching import cached_dataset
from monai_iou.workflow.failures import TrainingError
from monai_iou.workflow.inferers import Ensemble, MeanProbabilityInferer
from monai_iou.workflow.models import model_files
from monai_iou.workflow.optimization import WeightAverage
from monai_iou.workflow.postprocessing import (
    LabelsFromProbabilitiesd,
    Postprocessing,
    compact_prediction,
    load_postprocessing,
    tune,
    tune_postprocessing,
    without_small,
)
from monai_iou.workflow.score_files import CaseScoresSaver
from monai_iou.workflow.settings import Settings

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of four training and three test volumes."""
    return write_phantom_dataset(tmp_path_factory.mktemp("data"), training=4, evaluation=3, shape=(32, 32, 24))


OWN_PLACES = {"bundle_root", "device", "rank", "start_epoch", "start_step", "world_size", "plan", "model_files"}


@pytest.mark.parametrize("name", ["train", "evaluate", "inference"])
def test_every_key_is_in_the_documents_table(name: str) -> None:
    content = json.loads((bundle_path() / "configs" / f"{name}.json").read_text())
    rows = [line for line in (DOCS / "bundle.md").read_text().splitlines() if line.startswith("| `")]
    documented = {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    settings = {key for key, value in content.items() if not isinstance(value, dict) and "#" not in key}
    settings -= {key for key, value in content.items() if isinstance(value, list) and key != "patch_size"}
    assert settings - OWN_PLACES - {"network"} <= documented


# -- few cases


def test_an_epoch_repeats_the_cases_and_prepares_them_once(bundle: Path, data: Path) -> None:
    workflow = ConfigWorkflow(
        config_file=str(bundle / "configs" / "train.json"), workflow_type="train",
        **overrides(bundle, data, val_fraction=0, epochs=2, case_repeats=3, batch_size=2),
    )  # fmt: skip
    workflow.initialize()
    cached = workflow.parser.get_parsed_content("train#dataset")
    workflow.run()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    assert len(cached) == 4
    assert trainer.state.epoch_length == 3 * 4 // 2
    assert trainer.state.iteration == 2 * 3 * 4 // 2
    assert trainer.optimizer.param_groups[0]["lr"] == 0, "the rate falls over all steps"


def test_an_epoch_of_another_length_is_reported_when_resuming(
    bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = overrides(bundle, data, val_fraction=0, epochs=1, case_repeats=2)
    run_workflow(bundle, ["train"], settings)
    run_workflow(bundle, ["train"], {**settings, "epochs": 2, "resume": True})
    assert "counts epochs" not in "".join(capsys.readouterr())
    run_workflow(bundle, ["train"], {**settings, "epochs": 3, "case_repeats": 1, "resume": True})
    assert "last_epoch.pt counts epochs of 4 steps, this run epochs of 2" in "".join(capsys.readouterr())


# -- which weights


@pytest.mark.parametrize("decay", [None, 0.5])
def test_the_last_weights_are_kept_on_request(decay: float | None, bundle: Path, data: Path) -> None:
    # A rate that ruins what the first epochs learned: the best validation is not the last.
    settings = overrides(bundle, data, epochs=4, learning_rate=0.05, ema_decay=decay)
    stored = {}
    for keep in ("best", "last"):
        run_workflow(bundle, ["train"], {**settings, "keep_weights": keep})
        last = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
        final = last["average"]["network"] if decay else last["model"]
        model = torch.load(bundle / "models" / "model.pt", weights_only=True)
        stored[keep] = all(torch.equal(model[name], weights) for name, weights in final.items())
        assert keep == "last" or stored[keep] == (last["best_metric_epoch"] == 4)
    assert stored["last"]
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], {**settings, "keep_weights": "first"})
    message = 'Expected `keep_weights` to be "best" or "last", but got \'first\': leave it out for "best".'
    assert message in [str(cause) for cause in causes(caught.value)]


def test_final_weights_are_written_once_and_their_best_score_is_forgotten(bundle: Path, data: Path) -> None:
    models = bundle / "models"
    settings = overrides(bundle, data, epochs=2, keep_weights="last")
    run_workflow(bundle, ["train"], settings)
    (models / "postprocessing.json").write_text(Postprocessing(0.4, (0.0,)).to_json())
    written = (models / "model.pt").stat().st_mtime_ns
    run_workflow(bundle, ["train"], {**settings, "resume": True})
    assert (models / "postprocessing.json").is_file(), "nothing was trained, so what was tuned still fits"
    assert (models / "model.pt").stat().st_mtime_ns == written
    # Best again: the best epoch of before is not the weights that are stored.
    best = {**settings, "resume": True, "epochs": 3, "keep_weights": "best"}
    run_workflow(bundle, ["train"], best)
    last = torch.load(models / "last_epoch.pt", weights_only=True)
    assert last["best_metric_epoch"] == 3
    model = torch.load(models / "model.pt", weights_only=True)
    assert all(torch.equal(model[name], weights) for name, weights in last["model"].items())
    assert not (models / "postprocessing.json").exists()


def test_resuming_on_another_split_remembers_what_was_seen(bundle: Path, data: Path) -> None:
    run_workflow(bundle, ["train"], overrides(bundle, data, folds=4, fold=0, epochs=1, keep_weights="last"))
    settings = overrides(bundle, data, folds=4, fold=1, epochs=2, keep_weights="last", resume=True)
    run_workflow(bundle, ["train"], settings)
    assert len(json.loads((bundle / "models" / "model.json").read_text())["trained"]) == 4


# -- full resolution, and scores of the held-out cases


def test_evaluation_follows_a_model_at_full_resolution_and_scores_its_own_validation(
    bundle: Path, data: Path, tmp_path: Path
) -> None:
    split = {"folds": 4, "fold": 1}
    run_workflow(
        bundle, ["train"], overrides(bundle, data, full_resolution="true", amp_dtype="bfloat16", **split)
    )  # text, as from a command line
    plan = json.loads((bundle / "models" / "model.json").read_text())
    assert plan["strides"][0] == [1, 1, 1]
    settings = overrides(bundle, data, output_dir=str(tmp_path), evaluate_on="validation")
    run_workflow(bundle, ["train", "evaluate"], {**settings, **split})
    rows = score_rows(tmp_path / "val_mean_iou_raw.csv")
    assert len(rows) == 1
    assert not {name.removesuffix(".nii.gz") for name in rows} & set(plan["trained"])
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train", "evaluate"], {**settings, "folds": 4, "fold": 2})
    assert "Expected cases that the model has not seen, but it was trained on" in str(causes(caught.value))
    masks = {"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(tmp_path / "masks")}
    run_workflow(bundle, ["inference"], masks)
    assert len(list((tmp_path / "masks").iterdir())) == 3


def test_a_mixed_precision_that_is_none(bundle: Path, data: Path) -> None:
    message = "Expected `amp_dtype` to be float16 or bfloat16, but got 'float8': write --amp_dtype bfloat16."
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], overrides(bundle, data, amp_dtype="float8"))
    assert message in str(causes(caught.value))


# -- the device


@pytest.mark.parametrize(("workers", "expected"), [(0, "cuda:0"), (2, "cpu")])
def test_patches_are_changed_on_the_gpu_unless_processes_cut_them(
    workers: int, expected: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parser = ConfigParser(ConfigParser.load_config_file(bundle_path() / "configs" / "train.json"))
    parser.update({"dataset_dir": str(data), "bundle_root": str(bundle_path()), "num_workers": workers})
    names = [item["_target_"].split(".")[-1] for item in parser.get("train#random_transforms")]
    assert names[:2] == ["RandCropByLesionsd", "EnsureTyped"], "it moves what was cut"
    mover = parser.get_parsed_content("train#random_transforms")[1]
    assert str(mover.converter.device) == expected


# -- averaged weights


def test_the_average_is_that_of_its_formula() -> None:
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    average = WeightAverage(layer, optimizer, 0.3)
    expected = layer.weight.detach().clone()
    for step in range(8):
        optimizer.zero_grad()
        layer(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    torch.testing.assert_close(average.network.weight, expected)
    assert not average.network.weight.requires_grad


def test_averaged_weights_are_validated_stored_and_resumed(bundle: Path, data: Path) -> None:
    run_workflow(bundle, ["train"], overrides(bundle, data, ema_decay=0.9))
    last = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    model = torch.load(bundle / "models" / "model.pt", weights_only=True)
    averaged = last["average"]["network"]
    assert last["best_metric_epoch"] in (1, 2)
    assert any(not torch.equal(averaged[name], value) for name, value in last["model"].items())
    if last["best_metric_epoch"] == 2:
        assert all(torch.equal(averaged[name], value) for name, value in model.items())
    resumed = run_workflow(bundle, ["train"], overrides(bundle, data, epochs=3, ema_decay=0.9, resume=True))
    average = resumed.parser.get_parsed_content("average")
    assert average.steps == 3 * last["average"]["steps"] // 2
    assert resumed.parser.get_parsed_content("validate#evaluator").network is average.network
    # the option changes nothing in evaluation: it reads the stored weights
    evaluated = run_workflow(bundle, ["train", "evaluate"], overrides(bundle, data, ema_decay=0.9))
    stored = torch.load(bundle / "models" / "model.pt", weights_only=True)
    network = evaluated.parser.get_parsed_content("validate#evaluator").network.state_dict()
    assert all(torch.equal(network[name], value) for name, value in stored.items())


@pytest.mark.parametrize("value", [0, 1, 1.5, "much", True])
def test_decays_that_no_average_can_have(value: object) -> None:
    with pytest.raises(ValueError, match="Expected `ema_decay` to be null or a number between 0 and 1, but got"):
        Settings(ema_decay=value)
    Settings(ema_decay="null")


# -- flipped views and ensembles


def networks(count: int) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [torch.nn.Conv3d(1, 3, 3, padding=1).eval() for _ in range(count)]


def test_flipped_views_are_the_mean_of_eight_windows() -> None:
    image, (network,) = torch.randn(2, 1, 7, 6, 9), networks(1)
    arguments: dict[str, Any] = {"roi_size": (4, 4, 4), "sw_batch_size": 2, "overlap": 0.5, "mode": "gaussian"}
    plain = SlidingWindowInferer(**arguments)
    expected = 0
    for axes in [(), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]:
        expected = expected + plain(image.flip(axes), network).softmax(1).flip(axes) / 8
    found = MeanProbabilityInferer(**arguments, flips=True)(image, network)
    torch.testing.assert_close(found.softmax(1), expected)
    assert torch.equal(MeanProbabilityInferer(**arguments)(image, network), plain(image, network))
    # the result does not depend on how the volume lies
    mirrored = MeanProbabilityInferer(**arguments, flips=True)(image.flip(3), network).flip(3)
    torch.testing.assert_close(mirrored, found)


def test_an_ensemble_is_the_mean_of_its_models_probabilities() -> None:
    image, members = torch.randn(1, 1, 6, 6, 6), networks(3)
    ensemble = Ensemble(members, [[{"kind": "zscore"}]] * 3)
    expected = torch.stack([member(image).softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(MeanProbabilityInferer(roi_size=(6, 6, 6))(image, ensemble).softmax(1), expected)
    torch.testing.assert_close(ensemble(image).exp(), expected)


def test_a_model_of_another_ct_window_gets_its_own_normalisation() -> None:
    first = {"kind": "ct", "lower": -200.0, "upper": 300.0, "mean": 40.0, "std": 80.0}
    second = {"kind": "ct", "lower": -150.0, "upper": 250.0, "mean": 30.0, "std": 60.0}
    numbers, members = torch.empty(1, 1, 5, 5, 5).uniform_(-200, 300), networks(2)
    given, own = ((numbers.clamp(r["lower"], r["upper"]) - r["mean"]) / r["std"] for r in (first, second))
    found = Ensemble(members, [[first], [second]])(given).exp()
    expected = (members[0](given).softmax(1) + members[1](own).softmax(1)) / 2
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="session")
def folds(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with two trained models, `fold0` and `fold1`."""
    bundle = copy_bundle(tmp_path_factory.mktemp("folds") / "bundle")
    for fold in (0, 1):
        places = {"ckpt_dir": str(bundle / f"fold{fold}"), "pixdim": [1.0, 1.0, 1.5]}
        run_workflow(bundle, ["train"], overrides(bundle, data, folds=2, fold=fold, seed=fold, epochs=8, **places))
    return bundle


def test_the_folds_masks_are_those_of_their_mean(folds: Path, data: Path, tmp_path: Path) -> None:
    places = {"bundle_root": str(folds), "dataset_dir": str(data), "output_dir": str(tmp_path / "masks")}
    models = [str(folds / "fold0"), str(folds / "fold1" / "model.pt")]
    run_workflow(folds, ["inference"], {**places, "models": models, "tta_flips": True})
    scores = run_workflow(
        folds, ["train", "evaluate"], overrides(folds, data, models=models, tta_flips=True, output_dir=str(tmp_path))
    )
    network = scores.parser.get_parsed_content("validate#evaluator").network
    assert isinstance(network, Ensemble)
    for member, path in zip(network.members, model_files(models, ""), strict=True):
        weights = torch.load(path, weights_only=True)
        state = {name.removeprefix("network."): value for name, value in member.state_dict().items()}
        assert all(torch.equal(state[name], value) for name, value in weights.items())
    check_masks(tmp_path, data)


def check_masks(folder: Path, data: Path) -> None:
    """Check that evaluation's scores in `folder` are those of the masks beside them."""
    rows = score_rows(folder / "val_mean_iou_raw.csv")
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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pixdim": [2.0, 2.0, 2.0]}, r"their `pixdim` is \(2.0, 2.0, 2.0\) and \(1.0, 1.0, 1.5\)"),
        ({"labels": {"0": "background", "2": "tumour"}}, "their `labels` is"),
        (None, "fold1/model.pt, but there is no such file"),
    ],
)
def test_models_that_do_not_belong_together(
    changes: dict[str, Any] | None, expected: str, folds: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "fold1"
    if changes is not None:
        other.mkdir()
        (other / "model.pt").write_bytes((folds / "fold1" / "model.pt").read_bytes())
        plan = json.loads((folds / "fold1" / "model.json").read_text())
        (other / "model.json").write_text(json.dumps({**plan, **changes}))
    places = {"bundle_root": str(folds), "dataset_dir": str(data), "output_dir": str(tmp_path / "masks")}
    with pytest.raises(RuntimeError) as caught:
        run_workflow(folds, ["inference"], {**places, "models": [str(folds / "fold0"), str(other)]})
    found = [str(cause) for cause in causes(caught.value) if isinstance(cause, DatasetError)]
    assert len(found) == 1
    assert re.search(expected, found[0]), found
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("value", [[], 7, [1], [""]])
def test_models_that_are_no_list(value: object) -> None:
    with pytest.raises(ValueError, match="Expected `models` to be null or a list of folders, but got"):
        model_files(value, "models")


def test_models_as_the_command_line_gives_them() -> None:
    assert model_files("['a', 'b']", "m") == ["a/model.pt", "b/model.pt"]
    assert model_files("null", "m") == ["m/model.pt"]
    assert model_files("a", "m") == ["a/model.pt"]


# -- a cache on disk


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


# -- postprocessing


def blobs(sizes: list[tuple[int, float]], true: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Cubes of (side, probability) in a row, and which of them are in the reference."""
    foreground, label = np.full((60, 8, 8), 0.01, np.float32), np.zeros((60, 8, 8), np.int64)
    for index, ((side, probability), real) in enumerate(zip(sizes, true, strict=True)):
        place = (slice(10 * index + 1, 10 * index + 1 + side), slice(1, 1 + side), slice(1, 1 + side))
        foreground[place] = probability
        label[place] = real
    return np.stack([1 - foreground, foreground]), label


def kept(cases: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(compact_prediction(torch.from_numpy(probabilities)), label) for probabilities, label in cases]


def test_tuning_keeps_a_fraction_of_the_probabilities() -> None:
    probabilities = torch.rand(2, 6, 6, 6).softmax(0)
    found = compact_prediction(probabilities)
    np.testing.assert_array_equal(found, probabilities[1].numpy())
    assert found.base is None or found.base.nbytes == found.nbytes, "a view would hold both channels"
    probabilities = torch.rand(5, 6, 6, 6).softmax(0)
    found = compact_prediction(probabilities)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, probabilities.argmax(0).numpy())


def test_tuning_that_does_not_fit_into_memory(tmp_path: Path) -> None:
    def fill(*_: Any) -> None:
        raise MemoryError

    network = torch.nn.Conv3d(1, 2, 1)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    state = SimpleNamespace(rank=0, device=torch.device("cpu"))
    evaluator = SimpleNamespace(
        state=state, network=network, inferer=fill, amp=False, amp_kwargs={}, mode=contextlib.nullcontext
    )
    item = {"image": torch.zeros(1, 4, 4, 4), "label": torch.zeros(1, 4, 4, 4)}
    with pytest.raises(TrainingError, match="fit into memory, but it ran out of it: lower `patch_size`"):
        tune_postprocessing(evaluator, [item], (1.0, 1.0, 1.0), 2, str(tmp_path))


def test_specks_are_found_and_removed() -> None:
    cases = [
        blobs([(5, 0.9), (2, 0.9), (1, 0.8)], [True, False, False]),
        blobs([(4, 0.7), (1, 0.9)], [True, False]),
    ]
    settings, before, after = tune(kept(cases), voxel_mm3=2.0, classes=2)
    assert before == pytest.approx((125 / 134 + 64 / 65) / 2)
    assert after == 1.0
    assert settings.threshold is None
    assert 8 * 2 < settings.min_size_mm3[0] <= 64 * 2
    for probabilities, label in cases:
        affine = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64))
        item = {"pred": MetaTensor(torch.from_numpy(probabilities), affine=affine)}
        found = LabelsFromProbabilitiesd("pred", settings)(item)["pred"]
        assert isinstance(found, MetaTensor)
        np.testing.assert_array_equal(found[0].numpy(), label)


def test_a_threshold_is_found_and_a_perfect_answer_is_left_alone() -> None:
    settings, before, after = tune(kept([blobs([(5, 0.3), (3, 0.4)], [True, True])]), 1.0, 2)
    assert (before, after) == (0.0, 1.0)
    assert settings.threshold is not None
    assert settings.threshold < 0.3
    assert settings.min_size_mm3 == (0.0,)
    settings, before, after = tune(kept([blobs([(5, 0.9), (1, 0.9)], [True, True])]), 1.0, 2)
    assert settings == Postprocessing(None, (0.0,))
    assert (before, after) == (1.0, 1.0)


def test_the_score_that_is_raised_is_that_of_the_metric() -> None:
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(3):
        logits = rng.normal(size=(3, 12, 12, 6))
        label = rng.integers(0, 3, (12, 12, 6)) * (rng.random((12, 12, 6)) < 0.2)
        cases.append((np.exp(logits) / np.exp(logits).sum(0), label))
    cases[0][1][cases[0][1] == 2] = 0
    settings, before, after = tune(kept(cases), 1.5, 3)
    assert len(settings.min_size_mm3) == 2
    for sizes, expected in ((Postprocessing(), before), (settings, after)):
        metric = IoUMetric(include_background=False, num_classes=3)
        for probabilities, label in cases:
            labels = probabilities.argmax(0)
            labels = without_small(labels, sizes.min_size_mm3, 1.5)
            metric(torch.from_numpy(labels)[None, None], torch.from_numpy(label)[None, None])
        assert float(metric.aggregate()) == pytest.approx(expected)
    assert after >= before


def test_what_training_tuned_is_applied_by_evaluation_and_inference(bundle: Path, data: Path, tmp_path: Path) -> None:
    models = bundle / "models"
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=8, val_interval=4, tune_postprocessing=True))
    assert (models / "postprocessing.json").is_file(), "eight epochs leave specks"
    tuned = load_postprocessing(str(models / "postprocessing.json"), 2)
    assert tuned != Postprocessing(None, (0.0,))
    for settings in (tuned, Postprocessing(0.35, (30.0,)), None):
        out = tmp_path / str(settings)
        (models / "postprocessing.json").unlink()
        if settings is not None:
            (models / "postprocessing.json").write_text(settings.to_json())
        run_workflow(bundle, ["train", "evaluate"], overrides(bundle, data, output_dir=str(out)))
        places = {"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(out / "masks")}
        run_workflow(bundle, ["inference"], places)
        check_masks(out, data)
        (models / "postprocessing.json").touch()
    # what fits other weights is not kept beside new ones
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=1))
    assert not (models / "postprocessing.json").exists()


@pytest.mark.parametrize(
    "content",
    ["{", '{"threshold": 0.5}', '{"threshold": 2, "min_size_mm3": [1]}', '{"threshold": null, "min_size_mm3": [1, 2]}'],
)
def test_a_damaged_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "postprocessing.json"
    path.write_text(content)
    with pytest.raises(DatasetError, match=r"Expected .*postprocessing.json to be what training tuned, but it "):
        load_postprocessing(str(path), 2)
    assert load_postprocessing(None, 2) == Postprocessing()


# -- evaluation on several ranks


@pytest.mark.parametrize("cases", [3, 1], ids=["uneven", "fewer cases than ranks"])
def test_two_ranks_give_the_scores_of_one_process(cases: int, folds: Path, data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "dataset.json").read_text())
    folder = tmp_path / "dataset"
    folder.mkdir()
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / part).symlink_to(data / part)
    (folder / "dataset.json").write_text(json.dumps({**content, "test_labelled": content["test_labelled"][:cases]}))
    settings = overrides(folds, folder, ckpt_dir=str(folds / "fold0"))
    run_workflow(folds, ["train", "evaluate"], {**settings, "output_dir": str(tmp_path / "one")})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    configs = ["train", "evaluate", "multi_gpu_evaluate"]
    done = run_command(bundle_command(folds, configs, {**settings, "output_dir": str(tmp_path / "two")}, *launcher))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("val_mean_iou", "val_mean_dice"):
        one, two = (score_rows(tmp_path / ranks / f"{name}_raw.csv") for ranks in ("one", "two"))
        assert one == two
        assert len(one) == cases
        summaries = [(tmp_path / ranks / f"{name}_summary.csv").read_text() for ranks in ("one", "two")]
        assert summaries[0] == summaries[1]
        assert summaries[0].splitlines()[1].startswith("lesion,")
    means = [(tmp_path / ranks / "metrics.csv").read_text().split() for ranks in ("one", "two")]
    one, two = ({name: float(value) for name, value in (line.split(",") for line in lines)} for lines in means)
    assert one == pytest.approx(two, rel=1e-6)


def test_columns_without_a_name_are_refused() -> None:
    saver = CaseScoresSaver("out", class_labels=["a,b"], metric_details="*")
    assert saver.class_labels == ["a,b"]
    with pytest.raises(ValueError, match=r"Expected `class_labels` to name the \(2,\) classes of iou"):
        saver._checked("iou", torch.zeros(3, 2))
