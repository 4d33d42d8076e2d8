"""IoU over thresholds, average precision and calibration: against direct computation, MONAI and torchmetrics."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import monai.metrics
import numpy as np
import pytest
import torch
from gloo_ranks import join_group, leave_group, run_ranks
from monai.networks.utils import one_hot
from places import DOCS

from monai_iou import CalibrationMetric, ThresholdIoUMetric
from monai_iou.voxels.probability_bins import probability_histograms

NAN = math.nan
M = 100


def images(seed: int, classes: int = 3, count: int = 3, shape: tuple[int, ...] = (9, 8, 7)) -> tuple[torch.Tensor, ...]:
    """Logits that know a little of the labels, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count, 1, *shape), generator=generator)
    logits = 2 * torch.randn((count, classes, *shape), generator=generator) + 1.5 * one_hot(labels, classes)
    return logits, labels


def direct_curve(p: torch.Tensor, y: torch.Tensor, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and Dice of each threshold, voxels compared one threshold at a time, in float64."""
    p, y = p.double().flatten().numpy(), y.bool().flatten().numpy()
    iou, dice = [], []
    for t in thresholds:
        found = p >= t
        both, either = (found & y).sum(), (found | y).sum()
        iou.append(both / either if either else NAN)
        dice.append(2 * both / (found.sum() + y.sum()) if either else NAN)
    return np.array(iou), np.array(dice)


@pytest.mark.parametrize("shape", [(60,), (9, 8), (5, 6, 4)])
def test_on_the_nodes_every_threshold_is_exact(shape):
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randint(0, M + 1, (3, 2, *shape), generator=generator)
    labels = (torch.rand(nodes.shape, generator=generator) < nodes / M).long()
    labels[2, 1] = 0
    metric = ThresholdIoUMetric(include_background=True, resolution=M, threshold=0.3)
    scores = metric(nodes / M, labels)
    curves = metric.curves()
    assert curves.thresholds.tolist() == pytest.approx([k / M for k in range(M + 1)])
    for c in range(2):
        rows = [direct_curve(nodes[i, c], labels[i, c], np.arange(M + 1)) for i in range(3)]
        for got, column in ((curves.iou, 0), (curves.dice, 1)):
            expected = np.nanmean(np.stack([row[column] for row in rows]), axis=0)
            assert got[c].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
        assert scores[:, c].tolist() == pytest.approx([row[0][30] for row in rows], rel=1e-6)
        pooled = direct_curve(nodes[:, c], labels[:, c], np.arange(M + 1))[0]
        assert curves.pooled_iou[c].tolist() == pytest.approx(pooled.tolist(), rel=1e-6)
        assert curves.best_iou[c] == curves.iou[c].max()
        assert curves.iou[c, round(float(curves.best_threshold[c]) * M)] == curves.best_iou[c]


def test_the_best_threshold_is_the_direct_ones_to_one_node():
    logits, labels = images(1, classes=2, shape=(30, 30))
    p = logits.softmax(1)[:, 1]
    metric = ThresholdIoUMetric(resolution=1000)
    metric(p[:, None], labels)
    rounded = (np.arange(1001) - 0.5) / 1000  # a probability counts at the nearest node
    direct = np.nanmean([direct_curve(p[i], labels[i], rounded)[0] for i in range(3)], axis=0)
    curves = metric.curves()
    assert curves.iou[0].numpy() == pytest.approx(direct, abs=2e-3)  # a voxel in float32 may cross an edge
    best = float(curves.best_threshold[0])
    fine = np.unique(np.concatenate([[0.0], p.flatten().double().numpy()]))  # every threshold that matters
    every = np.nanmean([direct_curve(p[i], labels[i], fine)[0] for i in range(3)], axis=0)
    assert every[np.abs(fine - best) <= 1 / 1000].max() == pytest.approx(every.max(), abs=2e-3)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
def test_logits_labels_and_maps_are_read_alike(activation):
    logits, labels = images(2)
    p = {"softmax": logits.softmax(1), "sigmoid": logits.sigmoid(), None: logits.softmax(1)}[activation]
    given = p if activation is None else logits
    expected = ThresholdIoUMetric(threshold=0.4)(p, labels)
    assert expected.shape == (3, 2)
    maps = one_hot(labels, 3)
    for pair in ((given, labels), (given, maps), ([*given], [*maps.bool()]), (given.double(), labels.float())):
        metric = ThresholdIoUMetric(threshold=0.4, activation=activation)
        torch.testing.assert_close(metric(*pair), expected, atol=2e-3, rtol=0)
        assert len(metric) == 3


def test_ignored_voxels_have_no_effect():
    logits, labels = images(3)
    hidden = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    masked = labels.masked_fill(hidden, 255)
    for metric_type in (ThresholdIoUMetric, CalibrationMetric):
        results = []
        for noise in (0.0, 9.0):
            metric = metric_type(activation="softmax", ignore_index=255)
            metric(logits + noise * hidden * torch.randn(logits.shape), masked)
            results.append(metric.get_rows())
        torch.testing.assert_close(*results)
    counts = probability_histograms(logits, masked, ignore_index=255).counts
    assert int(counts[:, 0].sum()) == int((~hidden).sum())
    p = logits.softmax(1)
    for metric_type in (ThresholdIoUMetric, CalibrationMetric):
        expected = metric_type(ignore_index=255)(p, masked)
        for value in (-5.0, 7.0, math.inf, math.nan):
            torch.testing.assert_close(metric_type(ignore_index=255)(torch.where(hidden, value, p), masked), expected)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_torchmetrics(seed):
    classification = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = images(seed, classes=2, count=2, shape=(20, 20))
    p = (logits.softmax(1)[:, 1:] * M).round() / M
    metric = ThresholdIoUMetric(resolution=M)
    metric(p, labels)
    expected = classification.binary_average_precision(p.flatten(), labels.flatten(), thresholds=None)
    assert float(metric.curves().average_precision[0]) == pytest.approx(float(expected), abs=1e-6)
    exact = logits.softmax(1)[:, 1:]
    fine = ThresholdIoUMetric(resolution=4000)
    fine(exact, labels)
    expected = classification.binary_average_precision(exact.flatten(), labels.flatten(), thresholds=None)
    assert float(fine.curves().average_precision[0]) == pytest.approx(float(expected), abs=2e-3)


def direct_calibration(p: torch.Tensor, y: torch.Tensor, bins: int) -> tuple[float, float, float]:
    p, y = p.double().flatten().numpy(), y.double().flatten().numpy()
    place = np.minimum((p * bins).astype(int), bins - 1)
    gaps, weights = [], []
    for b in range(bins):
        own = place == b
        if own.any():
            gaps.append(abs(p[own].mean() - y[own].mean()))
            weights.append(own.sum())
    return float(np.average(gaps, weights=weights)), float(np.mean(gaps)), max(gaps)


@pytest.mark.parametrize("bins", [7, 10, 20])
def test_calibration_equals_direct_computation(bins):
    logits, labels = images(4, shape=(24, 25, 10))
    p = logits.softmax(1)
    maps = one_hot(labels, 3)
    for column, kind in enumerate(("expected", "average", "maximum")):
        got = CalibrationMetric(num_bins=bins, kind=kind)(p, labels)
        direct = [[direct_calibration(p[i, c], maps[i, c], bins)[column] for c in (1, 2)] for i in range(3)]
        tolerance = 1e-3 if kind == "expected" else 5e-3
        torch.testing.assert_close(got, torch.tensor(direct, dtype=torch.float32), atol=tolerance, rtol=0)
    metric = CalibrationMetric(num_bins=bins)
    metric(p, labels)
    pooled = [direct_calibration(p[:, c], maps[:, c], bins) for c in (1, 2)]
    for summary, direct in zip(metric.summary(), pooled, strict=True):
        assert (summary["ece"], summary["ace"], summary["mce"]) == pytest.approx(direct, abs=5e-3)
        assert summary["ece"] == pytest.approx(direct[0], abs=1e-3)


@pytest.mark.skipif(not hasattr(monai.metrics, "CalibrationErrorMetric"), reason="MONAI below 1.6 has none")
@pytest.mark.parametrize("kind", ["expected", "average", "maximum"])
def test_calibration_equals_monai(kind):
    logits, labels = images(5, shape=(24, 25, 10))
    p, maps = logits.softmax(1), one_hot(labels, 3)
    theirs = monai.metrics.CalibrationErrorMetric(
        num_bins=20, include_background=False, calibration_reduction=kind, metric_reduction="none"
    )
    theirs(p, maps)
    got = CalibrationMetric(kind=kind)(p, maps)
    torch.testing.assert_close(got, theirs.aggregate(), atol=1e-3 if kind == "expected" else 5e-3, rtol=0)


def direct_precision(p: torch.Tensor, y: torch.Tensor) -> float:
    """Average precision by sorting: equal probabilities are found together."""
    values, places = p.double().flatten().unique(return_inverse=True)
    hits = torch.zeros(len(values), dtype=torch.float64).index_add_(0, places, y.double().flatten()).flip(0)
    found = torch.bincount(places, minlength=len(values)).flip(0)
    return float((hits * hits.cumsum(0) / found.cumsum(0)).sum() / hits.sum())


@pytest.mark.parametrize("resolution", [10, 200, 4000])
def test_a_constant_map_scores_the_prevalence(resolution):
    """Halfway between two nodes too, where rounding up the errors of both sides would tell them apart."""
    y = (torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.1).long()
    share = y.double().mean().item()
    halves = [(k + 0.5) / resolution for k in range(0, resolution, max(1, resolution // 20))]
    for p in [k / 64 for k in range(65)] + halves + [1 / 3, 0.4975, 1e-7, 1 - 1e-7]:
        metric = ThresholdIoUMetric(resolution=resolution)
        metric(torch.full(y.shape, p), y)
        curves = metric.curves()
        for got in (curves.best_iou, curves.average_precision, curves.pooled_iou.amax(1)):
            assert got.item() == pytest.approx(share, rel=1e-6), p


@pytest.mark.parametrize("seed", range(3))
def test_ties_of_votes_are_found_together(seed):
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(1, 1, 12, 12, 12, generator=generator) < 0.1).long()
    votes = [torch.rand(y.shape, generator=generator) < 0.08 + 0.3 * y for _ in range(16)]
    share = torch.stack(votes).float().mean(0)
    for resolution in (16, 200, 4000):
        metric = ThresholdIoUMetric(resolution=resolution)
        metric(share, y)
        curves = metric.curves()
        assert curves.average_precision.item() == pytest.approx(direct_precision(share, y), rel=1e-6)
        assert curves.best_iou.item() == pytest.approx(direct_curve(share, y, np.arange(17) / 16)[0].max(), rel=1e-6)


@pytest.mark.parametrize("resolution", [200, 4000])
def test_probabilities_in_half_precision_are_rounded_by_their_value_alone(resolution):
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn((1, 1, 24, 24, 24), generator=generator) - 2
    y = (torch.rand(logits.shape, generator=generator) < (0.6 * logits).sigmoid()).long()
    p = logits.sigmoid().bfloat16().float()
    nodes = (p.double() * resolution + 0.5).floor()
    counts = probability_histograms(p, y, activation=None, resolution=resolution).counts[0, 0]
    for side in range(2):
        direct = np.bincount(nodes[y == side].long().numpy(), minlength=resolution + 1)
        assert counts[side].tolist() == direct.tolist()
    metric = ThresholdIoUMetric(resolution=resolution)
    metric(p, y)
    assert metric.curves().average_precision.item() == pytest.approx(direct_precision(nodes, y), rel=1e-6)


def test_votes_of_an_ensemble_stay_in_their_bins():
    """Probabilities that lie on the edges of bins: both sides of a label must fall into the same."""
    votes = torch.arange(6).repeat(50) / 5
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(votes.shape, generator=generator) < votes).long()
    metric = CalibrationMetric(num_bins=10)
    got = metric(votes[None, None], labels[None, None])
    direct = sum(abs(float(labels[votes == v].float().mean()) - float(v)) / 6 for v in votes.unique())
    assert got.item() == pytest.approx(direct, abs=1e-6)
    diagram = metric.reliability()
    assert diagram.counts.sum() == 300
    assert diagram.edges.tolist() == pytest.approx([k / 10 for k in range(11)])
    assert diagram.confidence[0, [0, 2, 4, 6, 8, 9]].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1], abs=1e-6)
    assert diagram.confidence[0, 1].isnan()


def test_calls_add_up():
    logits, labels = images(6, count=4)
    for metric_type in (ThresholdIoUMetric, CalibrationMetric):
        whole, parts = metric_type(activation="softmax"), metric_type(activation="softmax")
        whole(logits, labels)
        for i in range(4):
            parts([logits[i]], [labels[i]])
        torch.testing.assert_close(parts.get_rows(), whole.get_rows())
        torch.testing.assert_close(parts.aggregate(), whole.aggregate())
        whole.reset()
        whole(logits[:1], labels[:1])
        assert len(whole) == 1


@pytest.mark.parametrize("metric_type", [ThresholdIoUMetric, CalibrationMetric])
def test_a_machine_without_images_adds_nothing(metric_type):
    logits, labels = images(6)
    metric = metric_type(activation="softmax")
    counts = probability_histograms(logits, labels, resolution=metric.resolution).counts
    metric.add_histograms(counts[:0])
    assert metric.get_rows() is None
    assert metric.aggregate().isnan().all()
    metric.add_histograms(counts)
    expected = metric.aggregate()
    metric.add_histograms(counts[:0])
    assert len(metric) == len(counts)
    torch.testing.assert_close(metric.aggregate(), expected)


def test_classes_that_were_not_annotated_and_absent_ones():
    logits, labels = images(7)
    labelled = torch.tensor([[True, True, False], [True, True, True], [True, False, True]])
    for metric_type in (ThresholdIoUMetric, CalibrationMetric):
        metric = metric_type(activation="softmax", reduction="mean_batch")
        full = metric(logits, labels)
        metric.reset()
        got = metric(logits, labels, labelled=labelled)
        torch.testing.assert_close(got, full.masked_fill(~labelled[:, 1:], NAN), equal_nan=True)
        torch.testing.assert_close(metric.aggregate(), got.nanmean(0))
    curves = ThresholdIoUMetric(activation="softmax")
    curves(logits, labels, labelled=labelled)
    alone = ThresholdIoUMetric(activation="softmax")
    alone(logits[:2], labels[:2])
    torch.testing.assert_close(curves.curves().iou[0], alone.curves().iou[0])
    torch.testing.assert_close(curves.curves().average_precision[0], alone.curves().average_precision[0])
    empty = ThresholdIoUMetric()
    assert empty(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)).isnan().all()
    assert ThresholdIoUMetric(ignore_empty=False)(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)) == 1
    assert empty.curves().average_precision.isnan().all()


@pytest.mark.parametrize("ignore_empty", ["both", True, False])
def test_average_precision_of_an_empty_reference_is_nan_by_every_rule(ignore_empty):
    """The page of metrics names it as an exception."""
    metric = ThresholdIoUMetric(score="average_precision", ignore_empty=ignore_empty)
    assert metric(torch.tensor([[[0.9, 0.4]]]), torch.zeros(1, 1, 2)).isnan().all()
    page = " ".join((DOCS / "metrics.md").read_text(encoding="utf-8").split())
    assert "the average precision of `ThresholdIoUMetric` do not depend on it: they are NaN" in page


def test_overlapping_regions_count_all():
    regions = torch.zeros(2, 3, 8, 8)
    regions[:, 0, 1:7, 1:7] = regions[:, 1, 2:6, 2:6] = regions[:, 2, 3:5, 3:5] = 1
    for metric_type in (ThresholdIoUMetric, CalibrationMetric):
        assert metric_type()(regions * 0.9, regions).shape == (2, 3)
        assert metric_type(include_background=False)(regions * 0.9, regions).shape == (2, 2)


def score_shares(rank: int, world: int, folder: str) -> None:
    join_group(rank, world, folder)
    logits, labels = images(8, count=3)
    results = []
    for shares in ([[0, 2], [1]], [[0, 1, 2], []]):
        metrics = ThresholdIoUMetric(activation="softmax"), CalibrationMetric(activation="softmax")
        for metric in metrics:
            for index in shares[rank]:
                metric(logits[[index]], labels[[index]])
        results.append((metrics[0].curves(), metrics[1].summary(), [m.aggregate() for m in metrics]))
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()


def test_two_ranks_equal_one_process(tmp_path):
    run_ranks(score_shares, 2, 2, str(tmp_path))
    logits, labels = images(8, count=3)
    alone = ThresholdIoUMetric(activation="softmax"), CalibrationMetric(activation="softmax")
    for metric in alone:
        metric(logits, labels)
    for rank in range(2):
        for curves, summary, means in torch.load(tmp_path / f"{rank}.pt", weights_only=False):
            for name, value in vars(alone[0].curves()).items():
                torch.testing.assert_close(getattr(curves, name), value)
            assert summary == [pytest.approx(row) for row in alone[1].summary()]
            for got, metric in zip(means, alone, strict=True):
                torch.testing.assert_close(got, metric.aggregate())


LOGITS, LABELS = images(9, count=1)


@pytest.mark.parametrize("metric_type", [ThresholdIoUMetric, CalibrationMetric])
@pytest.mark.parametrize(
    ("pair", "text"),
    [
        ((LOGITS, LABELS), 'for logits set activation="softmax" or "sigmoid".'),
        ((LOGITS.softmax(1).masked_fill(LOGITS > 3, NAN), LABELS), "Expected `y_pred` to hold "),
        ((LOGITS.softmax(1), LABELS.float().masked_fill(LABELS == 1, NAN)), "Expected `y` to hold whole class numbers"),
        ((LOGITS.softmax(1), LABELS + 1), "Expected `y` to hold classes 0 to 2 (num_classes=3), but got 3"),
        ((LOGITS.softmax(1), LOGITS.softmax(1)), "Expected `y` to hold 0 and 1 in its 3 channels, but got 0."),
        (
            (LOGITS.softmax(1), LABELS[..., 1:]),
            "Expected `y` to be a label map or per-class maps for `y_pred` (3, 9, 8",
        ),
        ((LOGITS.softmax(1), [*LABELS, *LABELS]), "to hold the same number of images, at least one, but got 1 and 2"),
    ],
)
def test_refused_inputs(metric_type, pair, text):
    metric = metric_type()
    with pytest.raises(ValueError, match=re.escape(text)):
        metric(*pair)
    assert len(metric) == 0


def test_refused_arguments():
    for value in (3, 0, 1.5, True, 1 << 15):
        with pytest.raises(ValueError, match="Expected `resolution` to be an even whole number from 2 to 16384"):
            ThresholdIoUMetric(resolution=value)
    with pytest.raises(ValueError, match="`threshold` to be from 0 to 1, but got 2: give a probability, such as"):
        ThresholdIoUMetric(threshold=2)
    with pytest.raises(ValueError, match="Expected `num_bins` to be a whole number from 1 to 1000, but got 0"):
        CalibrationMetric(num_bins=0)
    with pytest.raises(
        ValueError, match="Expected `kind` to be one of 'expected', 'average', 'maximum', but got 'ece'"
    ):
        CalibrationMetric(kind="ece")
    with pytest.raises(ValueError, match="Expected `activation` to be one of"):
        CalibrationMetric(activation="tanh")
    with pytest.raises(TypeError, match=r"Expected `y_pred` to hold probabilities, but got torch.int64"):
        CalibrationMetric()(LABELS, LABELS)
    with pytest.raises(ValueError, match="Expected at least one image before the summary is read"):
        ThresholdIoUMetric().curves()


def test_names_of_histograms_that_were_counted_elsewhere():
    regions = torch.zeros(1, 3, 8, 8)
    regions[:, 0, 1:7, 1:7] = regions[:, 1, 2:6, 2:6] = regions[:, 2, 3:5, 3:5] = 1
    counts = probability_histograms(regions * 0.9, regions, activation=None, resolution=200).counts

    def named(histograms: torch.Tensor = counts, **options: Any) -> ThresholdIoUMetric:
        metric = ThresholdIoUMetric(reduction="mean_batch", **{"return_with_label": True, **options})
        metric.add_histograms(histograms)
        return metric

    assert list(named(include_background=True).aggregate()) == ["label_0", "label_1", "label_2"]
    assert list(named(include_background=False).aggregate()) == ["label_1", "label_2", "label_3"]
    assert list(named(activation="softmax").aggregate()) == ["label_1", "label_2", "label_3"]
    assert list(named(return_with_label=["whole", "core", "rim"]).aggregate()) == ["whole", "core", "rim"]
    assert list(named(counts[:, :1]).aggregate()) == ["label_1"]  # as of a single map
    unknown = named()
    message = (
        "Expected `include_background` to be True or False for the names of histograms that were counted elsewhere, "
        "but got None: say whether the first of them is that of class 0, or name the classes."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        unknown.aggregate()
    assert unknown.aggregate("mean").shape == (1,)
    unknown(regions * 0.9, regions)  # an image tells
    assert list(unknown.aggregate()) == ["label_0", "label_1", "label_2"]
