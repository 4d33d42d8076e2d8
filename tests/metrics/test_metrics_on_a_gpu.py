"""Metrics of tensors on a GPU: the values of a CPU, and no operation of tensors on two devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from monai_iou import (
    boundary_iou,
    fine_grained_iou,
    iou_counts,
    iou_from_counts,
    lesion_scores,
    overlap_scores,
    surface_scores,
)
from monai_iou.metrics import (
    BoundaryIoUMetric,
    CalibrationMetric,
    IoUMetric,
    LesionIoUMetric,
    ThresholdIoUMetric,
)
from tests.support.pretend_apple import APPLE, PretendedApple
from tests.support.pretend_gpu import GPU, OnPretendGpu, pretended_gpu

GENERATOR = torch.Generator().manual_seed(0)
REFERENCE = (torch.rand(2, 1, 14, 12, 10, generator=GENERATOR) > 0.9).long()
PREDICTION = ((torch.rand(REFERENCE.shape, generator=GENERATOR) > 0.95) | (REFERENCE > 0)).long()
PROBABILITIES = torch.rand(2, 2, 14, 12, 10, generator=GENERATOR).softmax(1)


def channels(labels: Tensor) -> Tensor:
    return torch.cat([1 - labels, labels], 1)


CASES = pytest.mark.parametrize(
    ("make", "prediction", "reference"),
    [
        (lambda: IoUMetric(num_classes=2), PREDICTION, REFERENCE),
        (lambda: IoUMetric(include_background=False), channels(PREDICTION), channels(REFERENCE)),
        (lambda: IoUMetric(num_classes=2, ignore_index=1), PREDICTION, REFERENCE),
        (lambda: BoundaryIoUMetric(num_classes=2), PREDICTION, REFERENCE),
        (lambda: LesionIoUMetric(num_classes=2), PREDICTION, REFERENCE),
        (CalibrationMetric, PROBABILITIES, REFERENCE),
        (ThresholdIoUMetric, PROBABILITIES, REFERENCE),
    ],
    ids=["iou", "iou channels", "iou ignored", "boundary", "lesion", "calibration", "thresholds"],
)


@CASES
def test_metrics(make: Callable[[], Any], prediction: Tensor, reference: Tensor) -> None:
    on_cpu = make()
    on_cpu(prediction, reference)
    with pretended_gpu():
        on_gpu = make()
        on_gpu(prediction.cuda(), reference.cuda())
        found = on_gpu.aggregate()
        assert isinstance(found, OnPretendGpu)
        assert found.device == GPU
        assert torch.equal(found.held, on_cpu.aggregate())


@pytest.mark.parametrize("many", [list, tuple, torch.stack], ids=lambda many: many.__name__)
def test_what_was_annotated_is_on_the_gpu_too(many: Callable[[list[Tensor]], Any]) -> None:
    """A loader that keeps images apart gives a row for each of them, as MONAI's engines do."""
    rows = [torch.tensor([True, True]), torch.tensor([True, False])]
    on_cpu, on_gpu = IoUMetric(num_classes=2), IoUMetric(num_classes=2)
    expected = on_cpu(PREDICTION, REFERENCE, labelled=torch.stack(rows))
    assert expected.isnan().tolist() == [[False, False], [False, True]]
    torch.testing.assert_close(on_cpu(PREDICTION, REFERENCE, labelled=many(rows)), expected, equal_nan=True)
    with pretended_gpu():
        given = many([row.cuda() for row in rows])
        found = on_gpu(PREDICTION.cuda(), REFERENCE.cuda(), labelled=given)
        assert isinstance(found, OnPretendGpu)
    torch.testing.assert_close(found.held, expected, rtol=0, atol=0, equal_nan=True)


@CASES
def test_metrics_on_a_gpu_without_float64(make: Callable[[], Any], prediction: Tensor, reference: Tensor) -> None:
    on_cpu, on_gpu = make(), make()
    expected = on_cpu(prediction, reference)
    with PretendedApple():
        assert prediction.device == APPLE
        found = on_gpu(prediction, reference)
        mean, rows = on_gpu.aggregate(), on_gpu.get_rows()
    assert rows.dtype == torch.float64
    torch.testing.assert_close(rows, on_cpu.get_rows(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mean, on_cpu.aggregate(), rtol=0, atol=0, equal_nan=True)


def summaries() -> list[str]:
    metrics = [IoUMetric(num_classes=2), LesionIoUMetric(num_classes=2)]
    for metric in metrics:
        metric(PREDICTION, REFERENCE)
    return [repr(metric.summary()) for metric in metrics]


def test_summaries_and_counts_on_a_gpu_without_float64() -> None:
    expected = summaries()
    counts = iou_counts(PREDICTION[0, 0], REFERENCE[0, 0], 2)
    iou = iou_from_counts(*counts)
    means = fine_grained_iou(counts.intersection[None], counts.union[None])
    with PretendedApple():
        assert counts.union.device == APPLE
        assert summaries() == expected
        found = iou_from_counts(*counts)
        assert fine_grained_iou(counts.intersection[None], counts.union[None]) == pytest.approx(means, rel=1e-6)
    torch.testing.assert_close(found, iou, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "score", [boundary_iou, lesion_scores, overlap_scores, surface_scores], ids=lambda score: score.__name__
)
def test_scores_of_two_masks(score: Callable[..., Any]) -> None:
    masks = PREDICTION[0, 0] > 0, REFERENCE[0, 0] > 0
    expected = score(*masks)
    with pretended_gpu() as waits:
        there = [mask.cuda() for mask in masks]
        waits.clear()
        assert repr(score(*there)) == repr(expected)
        assert sum(waits.values()) == 2, "each mask is copied to the CPU once"
