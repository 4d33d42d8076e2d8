"""Handlers in real ignite engines, with MONAI's MetricsSaver."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from monai.handlers import MetricsSaver, from_engine
from monai.networks.utils import one_hot

from monai_iou.handlers import IoUHandler
from monai_iou.metrics import IoUMetric

IMAGES = torch.randint(0, 3, (4, 2, 1, 6, 6, 4), generator=torch.Generator().manual_seed(3))


def batches(as_list: bool = True) -> list:
    if as_list:
        return [[{"pred": p, "label": r} for p, r in IMAGES[i : i + 2]] for i in (0, 2)]
    return [{"pred": IMAGES[i : i + 2, 0], "label": IMAGES[i : i + 2, 1]} for i in (0, 2)]


def evaluator(handler, name: str) -> Engine:
    engine = Engine(lambda _engine, batch: batch)
    handler.attach(engine, name)
    return engine


@pytest.mark.parametrize("as_list", [True, False])
def test_iou_handler_gives_the_metrics_value(as_list):
    metric = IoUMetric(False, num_classes=3)
    metric(IMAGES[:, 0], IMAGES[:, 1])
    handler = IoUHandler(False, num_classes=3, output_transform=from_engine(["pred", "label"]))
    engine = evaluator(handler, "val_iou")
    state = engine.run(batches(as_list))
    assert state.metrics["val_iou"] == pytest.approx(metric.aggregate().item())
    torch.testing.assert_close(state.metric_details["val_iou"], metric.get_buffer())
    assert engine.run(batches(as_list)).metrics["val_iou"] == pytest.approx(metric.aggregate().item())


def test_every_argument_reaches_the_metric():
    def transform(output):
        return one_hot(output[0]["pred"], 3), one_hot(output[0]["label"], 3)

    handler = IoUHandler(
        include_background=False,
        reduction="mean_batch",
        ignore_empty=True,
        num_classes=3,
        ignore_index=2,
        output_transform=transform,
        save_details=False,
    )
    metric = handler.metric_fn
    assert isinstance(metric, IoUMetric)
    assert (metric.include_background, metric.reduction, metric.ignore_empty) == (False, "mean_batch", True)
    assert (metric.num_classes, metric.ignore_index, handler.save_details) == (3, 2, False)


def test_metrics_saver_writes_one_row_per_image(tmp_path):
    engine = evaluator(IoUHandler(num_classes=3, output_transform=from_engine(["pred", "label"])), "iou")

    def names(batch):
        return [{"filename_or_obj": f"case{index}.nii.gz"} for index, _ in enumerate(batch)]

    MetricsSaver(str(tmp_path), metric_details="*", batch_transform=names, summary_ops="*").attach(engine)
    state = engine.run(batches())
    with Path(tmp_path / "iou_raw.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["filename", "class0", "class1", "class2", "mean"]
    assert [row[0] for row in rows[1:]] == ["case0.nii.gz", "case1.nii.gz"] * 2
    written = torch.tensor([[float(value) for value in row[1:4]] for row in rows[1:]])
    torch.testing.assert_close(written, state.metric_details["iou"], atol=1e-4, rtol=0)
    assert (tmp_path / "iou_summary.csv").exists()
