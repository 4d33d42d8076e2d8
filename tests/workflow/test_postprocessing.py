"""Thresholds and smallest components: tuned on the validation cases, applied to masks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import causes, check_masks, overrides
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from monai_iou.datasets.cases import DatasetError
from monai_iou.demo import run_workflow
from monai_iou.files import OutputError
from monai_iou.locks import folder_lock
from monai_iou.metrics.iou import IoUMetric
from monai_iou.workflow.failures import TrainingError
from monai_iou.workflow.postprocessing import (
    LabelsFromProbabilitiesd,
    Postprocessing,
    compact_prediction,
    load_postprocessing,
    tune,
    tune_postprocessing,
    without_small,
)

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]


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
    with (
        folder_lock(tmp_path, "training"),  # of other weights, which this setting would not fit
        pytest.raises(OutputError, match="to be used by one run at a time"),
    ):
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


def test_a_file_that_the_user_names_is_there(tmp_path: Path) -> None:
    models = [str(tmp_path / "fold0" / "model.pt"), str(tmp_path / "fold1" / "model.pt")]
    for path in (tmp_path / "fold0" / "postprocessing.json", None, "null"):
        assert load_postprocessing(path and str(path), 2, models) == Postprocessing()
    for path in (tmp_path / "fold1" / "postprocessing.json", tmp_path / "typo.json"):
        with pytest.raises(DatasetError) as caught:
            load_postprocessing(str(path), 2, models)
        assert str(caught.value) == (
            f"Expected `postprocessing_file` to be a file that training tuned, but there is no file {path}: correct "
            "the path, or write --postprocessing_file null for no post-processing."
        )


@pytest.mark.parametrize("config", ["evaluate", "inference"])
def test_both_configs_refuse_a_file_that_is_not_there(config: str, bundle: Path, tmp_path: Path) -> None:
    files = [bundle / "configs" / f"{name}.json" for name in (["train"] if config == "evaluate" else []) + [config]]
    parser = ConfigParser(ConfigParser.load_config_files([str(path) for path in files]))
    parser.update({"bundle_root": str(bundle), "dataset_dir": str(tmp_path / "none")})
    key = "validate#postprocessing" if config == "evaluate" else "postprocessing"
    place = next(i for i, each in enumerate(parser[f"{key}#transforms"]) if "LabelsFromProb" in each["_target_"])
    assert parser.get_parsed_content(f"{key}#transforms#{place}").settings == Postprocessing()
    parser.update({"postprocessing_file": str(tmp_path / "typo.json")})
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content(f"{key}#transforms#{place}")
    assert "there is no file" in str(causes(caught.value))
