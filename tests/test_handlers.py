"""Handlers in real ignite engines, with MONAI's MetricsSaver."""

from __future__ import annotations

import copy
import csv
import inspect
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from gloo_ranks import join_group, leave_group, run_ranks
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import CheckpointSaver, IgniteMetricHandler, MeanDice, MeanIoUHandler, MetricsSaver, from_engine
from monai.networks.utils import one_hot
from places import DOCS

from monai_iou import CompoundLoss, InstanceIoULoss, IoUCELoss, IoULoss, MultiScaleLoss
from monai_iou.handlers import (
    BoundaryIoUHandler,
    CalibrationHandler,
    DiceHandler,
    IoUHandler,
    LesionIoUHandler,
    LossWeightSchedule,
    ThresholdIoUHandler,
)
from monai_iou.metrics import BoundaryIoUMetric, CalibrationMetric, IoUMetric, LesionIoUMetric, ThresholdIoUMetric
from monai_iou.workflow.optimization import is_better

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


@pytest.mark.parametrize(
    "handler", [IoUHandler, LesionIoUHandler, BoundaryIoUHandler, ThresholdIoUHandler, CalibrationHandler]
)
def test_positional_arguments_are_those_of_monais_handler(handler):
    ours, theirs = (list(inspect.signature(h).parameters.values()) for h in (handler, MeanIoUHandler))
    positional = [parameter.name for parameter in ours if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [parameter.name for parameter in theirs]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in ours[len(positional) :])
    made = handler(False, "sum", from_engine(["pred", "label"]), False)
    assert (made.metric_fn.reduction, made.save_details) == ("sum", False)


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


def blob_batches(spacing: tuple[float, float, float]) -> list:
    """Two batches of two images with lesions, as MetaTensors of that spacing."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand((4, 2, 1, 5, 5, 3), generator=generator) < 0.3
    maps = coarse.repeat_interleave(3, -1).repeat_interleave(3, -2).repeat_interleave(3, -3)
    maps[:, 0, :, 1:] &= torch.rand(maps[:, 0, :, 1:].shape, generator=generator) < 0.9
    affine = torch.diag(torch.tensor([*spacing, 1.0]))
    images = [{"pred": p.long(), "label": MetaTensor(r.float(), affine=affine)} for p, r in maps]
    return [images[:2], images[2:]]


@pytest.mark.parametrize(
    ("handler", "metric"),
    [
        (LesionIoUHandler, LesionIoUMetric),
        (BoundaryIoUHandler, BoundaryIoUMetric),
    ],
)
def test_handlers_read_the_spacing_of_the_label(handler, metric, tmp_path):
    spacing = (0.7, 0.7, 3.0)
    options = {"score": "cc_iou"} if metric is LesionIoUMetric else {"width": 1.0}
    data = blob_batches(spacing)
    alone = metric(**options)
    for batch in data:
        alone([i["pred"] for i in batch], [i["label"].as_tensor() for i in batch], spacing=spacing)
    engine = evaluator(handler(output_transform=from_engine(["pred", "label"]), **options), "score")
    MetricsSaver(str(tmp_path), metric_details="*", summary_ops="mean").attach(engine)
    state = engine.run(data)
    assert state.metrics["score"] == pytest.approx(alone.aggregate().item())
    torch.testing.assert_close(state.metric_details["score"], alone.get_buffer())
    # another spacing gives another score: it was read
    other = handler(output_transform=from_engine(["pred", "label"]), **options)
    assert evaluator(other, "score").run(blob_batches((1.0, 1.0, 1.0))).metrics["score"] != state.metrics["score"]
    assert (tmp_path / "score_raw.csv").exists()
    # without metadata, as in the bundle's training, it is an argument; a call of the metric may give another
    plain = [[{"pred": i["pred"], "label": i["label"].as_tensor()} for i in batch] for batch in data]
    given = handler(output_transform=from_engine(["pred", "label"]), spacing=spacing, **options)
    assert evaluator(given, "score").run(plain).metrics["score"] == state.metrics["score"]
    torch.testing.assert_close(given.metric_fn.get_buffer(), alone.get_buffer())
    first = [i["pred"] for i in data[0]], [i["label"] for i in data[0]]
    ones = metric(**options)(*first, spacing=1.0)
    torch.testing.assert_close(metric(spacing=1.0, **options)(*first), ones)
    torch.testing.assert_close(metric(spacing=spacing, **options)(*first, spacing=1.0), ones)
    with pytest.raises(ValueError, match="`spacing` to be a positive number in mm, or one for each of up to 3 axes"):
        handler(spacing=(1.0, 0.0, 1.0))


@pytest.mark.parametrize(
    ("handler", "arguments"),
    [
        (
            LesionIoUHandler,
            {
                "include_background": True,
                "reduction": "sum",
                "score": "f1",
                "threshold": 0.1,
                "connectivity": 6,
                "ignore_empty": False,
                "num_classes": 4,
                "ignore_index": 9,
                "spacing": (3.0, 1.0, 0.5),
            },
        ),
        (
            BoundaryIoUHandler,
            {
                "include_background": True,
                "reduction": "sum",
                "width": 3.0,
                "ignore_empty": True,
                "num_classes": 4,
                "ignore_index": 9,
                "spacing": (3.0, 1.0, 0.5),
            },
        ),
        (
            ThresholdIoUHandler,
            {
                "include_background": True,
                "reduction": "sum",
                "score": "iou",
                "threshold": 0.3,
                "ignore_empty": True,
                "ignore_index": 9,
                "activation": "softmax",
                "resolution": 50,
            },
        ),
        (
            CalibrationHandler,
            {
                "include_background": True,
                "reduction": "sum",
                "num_bins": 7,
                "kind": "average",
                "ignore_index": 9,
                "activation": "sigmoid",
            },
        ),
    ],
)
def test_every_argument_of_the_others_reaches_the_metric(handler, arguments):
    metric = handler(**arguments).metric_fn
    assert {name: getattr(metric, name) for name in arguments} == arguments


def probability_batches() -> list:
    """Two batches of two images, the probabilities of three classes and their label; class 2 is in none of the last."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, 3, (4, 1, 6, 6, 4), generator=generator)
    labels[3] = labels[3].clamp_max(1)
    logits = torch.randn((4, 3, 6, 6, 4), generator=generator).scatter_add(1, labels, torch.ones(labels.shape))
    items = [{"pred": p, "label": r} for p, r in zip(logits.softmax(1), labels, strict=True)]
    return [items[:2], items[2:]]


def slow_precision(probability: torch.Tensor, true: torch.Tensor, nodes: int) -> float:
    """Average precision by a loop over the thresholds, of probabilities on the nodes k / nodes."""
    recalls, precisions = [], []
    for node in range(nodes + 1):
        predicted = (probability * nodes).round() >= node
        recalls.append(float((predicted & true).sum() / true.sum()))
        precisions.append(float((predicted & true).sum() / predicted.sum().clamp_min(1)))
    steps = [recall - following for recall, following in zip(recalls, [*recalls[1:], 0.0], strict=True)]
    return sum(step * precision for step, precision in zip(steps, precisions, strict=True))


def test_average_precision_is_that_of_a_loop_over_the_thresholds() -> None:
    handler = ThresholdIoUHandler(resolution=50, output_transform=from_engine(["pred", "label"]))
    state = evaluator(handler, "precision").run(probability_batches())
    items = [item for batch in probability_batches() for item in batch]
    expected = torch.tensor([
        [slow_precision(item["pred"][number], item["label"][0] == number, 50) for number in (1, 2)] for item in items
    ])  # fmt: skip
    torch.testing.assert_close(state.metric_details["precision"], expected, equal_nan=True)
    assert expected[3].isnan().tolist() == [False, True]
    assert state.metrics["precision"] == pytest.approx(float(expected.nanmean(1).mean()))
    metric = ThresholdIoUMetric(resolution=50)
    metric([item["pred"] for item in items], [item["label"] for item in items])
    assert handler.curves is not None
    assert torch.equal(handler.curves.best_threshold, metric.curves().best_threshold)
    assert handler.curves.best_threshold.shape == (2,)
    iou = ThresholdIoUHandler(score="iou", resolution=50, output_transform=from_engine(["pred", "label"]))
    assert evaluator(iou, "iou").run(probability_batches()).metrics["iou"] == pytest.approx(float(metric.aggregate()))


def test_a_calibration_handler_gives_the_metrics_errors() -> None:
    handler, metric = CalibrationHandler(output_transform=from_engine(["pred", "label"])), CalibrationMetric()
    assert handler.diagram is None
    for batch in probability_batches():
        metric([item["pred"] for item in batch], [item["label"] for item in batch])
    engine = evaluator(handler, "ece")
    for _ in range(2):  # the second run begins anew
        state = engine.run(probability_batches())
        assert state.metrics["ece"] == pytest.approx(float(metric.aggregate()))
        torch.testing.assert_close(state.metric_details["ece"], metric.get_buffer())
        assert torch.equal(handler.diagram.counts, metric.reliability().counts)
        assert handler.errors == metric.summary()
        assert [*handler.errors[0]] == ["ece", "ace", "mce"]


def computed(images: slice) -> list[Any]:
    """What the two handlers compute and keep of some images."""
    kept: list[Any] = []
    items = [item for batch in probability_batches() for item in batch][images]
    for handler in (ThresholdIoUHandler(save_details=False), CalibrationHandler(save_details=False)):
        if items:
            handler.update(([item["pred"] for item in items], [item["label"] for item in items]))
        kept += [handler.compute(), *(vars(handler).get(name) for name in ("curves", "diagram", "errors"))]
    return kept


def compute_on_a_rank(rank: int, folder: str) -> None:
    join_group(rank, 2, folder)
    (Path(folder) / f"{rank}.txt").write_text(repr([computed(slice(0, 4 * (1 - rank))), computed(slice(0))]))
    leave_group()


def test_a_rank_without_images_computes_what_the_others_do(tmp_path: Path) -> None:
    run_ranks(compute_on_a_rank, 2, str(tmp_path))
    expected = repr([computed(slice(4)), computed(slice(0))])
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [expected] * 2


def test_an_unknown_score_of_thresholds_is_refused() -> None:
    with pytest.raises(ValueError, match="`score`") as caught:
        ThresholdIoUHandler(score="dice")
    expected = "Expected `score` to be one of 'iou', 'average_precision', but got 'dice': choose one of these."
    assert str(caught.value) == expected


RAMP = {"start": 0.2, "end": 1.0, "first_epoch": 3, "last_epoch": 7}


def weights_seen(loss: CompoundLoss, schedule: LossWeightSchedule, epochs: int, after: int = 0) -> list[list[float]]:
    """The weights at each step of a training of one step per epoch, resumed after some epochs."""
    seen: list[list[float]] = []
    trainer = Engine(lambda engine, batch: seen.append(list(loss.weights)))
    schedule.attach(trainer)
    trainer.load_state_dict({"epoch": after, "max_epochs": epochs, "epoch_length": 1})
    trainer.run([0], max_epochs=epochs)
    return seen


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ("linear", [0.2, 0.2, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0]),
        ("cosine", [0.2, 0.2, 0.2, 0.2 + 0.4 * (1 - 0.5**0.5), 0.6, 0.2 + 0.4 * (1 + 0.5**0.5), 1.0, 1.0]),
        ("constant", [0.2, 0.2, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_a_schedule_moves_the_weight_of_its_term_alone(curve: str, expected: list[float]) -> None:
    loss = IoUCELoss(softmax=True, lambda_iou=0.7)
    schedule = LossWeightSchedule(loss, {"cross_entropy": {**RAMP, "curve": curve}})
    seen = weights_seen(loss, schedule, 8)
    assert [weight for _, weight in seen] == pytest.approx(expected)
    assert {weight for weight, _ in seen} == {0.7}


def test_the_loss_uses_the_scheduled_weight() -> None:
    loss = CompoundLoss([IoULoss(softmax=True), torch.nn.CrossEntropyLoss()])
    logits, labels = torch.randn(1, 2, 4, 4, 4), torch.randint(0, 2, (1, 2, 4, 4, 4)).float()
    LossWeightSchedule(loss, {"cross_entropy": {"start": 0, "end": 3, "last_epoch": 2}})(
        Engine(lambda engine, batch: None)
    )
    assert loss(logits, labels) == pytest.approx(loss.last_terms["iou"].item())
    engine = Engine(lambda engine, batch: None)
    engine.state.epoch = 2
    LossWeightSchedule(loss, {"cross_entropy": {"start": 0, "end": 3, "last_epoch": 2}})(engine)
    value = loss(logits, labels)
    assert value == pytest.approx((loss.last_terms["iou"] + 3 * loss.last_terms["cross_entropy"]).item())


@pytest.mark.parametrize("wrap", [lambda loss: loss, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_schedule_reaches_every_scale_of_deep_supervision(wrap) -> None:
    torch.manual_seed(0)
    outputs = [torch.randn(1, 2, side, side, side) for side in (8, 4)]
    labels = torch.randint(0, 2, (1, 1, 8, 8, 8)).float()
    scheduled = wrap(MultiScaleLoss(InstanceIoULoss(softmax=True, global_loss=IoUCELoss(softmax=True))))
    LossWeightSchedule(scheduled.loss.global_loss, {"cross_entropy": {"start": 3.0, "end": 0, "last_epoch": 2}})(
        Engine(lambda engine, batch: None)
    )
    fixed = MultiScaleLoss(InstanceIoULoss(softmax=True, global_loss=IoUCELoss(softmax=True, lambda_ce=3.0)))
    assert scheduled(outputs, labels).item() == pytest.approx(fixed(outputs, labels).item())


def test_a_resumed_training_continues_with_the_weights_of_its_epoch() -> None:
    whole, first, second = (IoUCELoss(softmax=True) for _ in range(3))
    schedules = [LossWeightSchedule(loss, {"iou": RAMP, "cross_entropy": RAMP}) for loss in (whole, first, second)]
    unbroken = weights_seen(whole, schedules[0], 8)
    assert weights_seen(first, schedules[1], 5) + weights_seen(second, schedules[2], 8, after=5) == unbroken


@pytest.mark.parametrize(
    ("loss", "terms", "error", "text"),
    [
        (IoULoss(), {"iou": RAMP}, TypeError, "Expected `loss` to be a CompoundLoss, but got IoULoss: list the terms"),
        (
            IoUCELoss(),
            {"ce": RAMP},
            ValueError,
            "terms of the loss (iou, cross_entropy), but got ce: choose among these names.",
        ),
        (
            IoUCELoss(),
            {},
            ValueError,
            "terms of the loss (iou, cross_entropy), but got none: choose among these names.",
        ),
        (IoUCELoss(), {"iou": {"start": 1}}, TypeError, "schedule of 'iou' to have `start`, `end` and optionally "),
        (
            IoUCELoss(),
            {"iou": {**RAMP, "curv": "linear"}},
            TypeError,
            "first_epoch, last_epoch, curv: correct the keys.",
        ),
        (IoUCELoss(), {"iou": {**RAMP, "curve": "sine"}}, ValueError, "one of 'constant', 'linear', 'cosine', but got"),
        (IoUCELoss(), {"iou": {**RAMP, "end": -1}}, ValueError, "`end` to be a finite number at least 0, but got -1"),
        (
            IoUCELoss(),
            {"iou": {**RAMP, "last_epoch": 3}},
            ValueError,
            "1 <= `first_epoch` < `last_epoch`, but got 3 and 3",
        ),
        (IoUCELoss(), {"iou": {"start": 0, "end": 1}}, ValueError, "but got 1 and None: give the epochs between"),
        (IoUCELoss(), {"iou": {**RAMP, "first_epoch": 0}}, ValueError, "but got 0 and 7: give the epochs between"),
        (IoUCELoss(), {"iou": {**RAMP, "first_epoch": "3"}}, TypeError, "`first_epoch` to be a number, but got str:"),
        (IoUCELoss(), {"iou": {**RAMP, "first_epoch": None}}, TypeError, "`first_epoch` to be a number, but got None"),
        (IoUCELoss(), {"iou": {**RAMP, "last_epoch": "7"}}, TypeError, "`last_epoch` to be a number, but got str:"),
        (IoUCELoss(), {"iou": None}, TypeError, "schedule of 'iou' to have `start`, `end` and optionally "),
        (IoUCELoss(), ["iou"], ValueError, "terms of the loss (iou, cross_entropy), but got list: choose among these"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(loss, terms, error, text) -> None:
    with pytest.raises(error, match=re.escape(text)):
        LossWeightSchedule(loss, terms)


@pytest.mark.parametrize("ignore_empty", ["both", True, False])
def test_dice_is_over_the_cases_of_iou(ignore_empty: Any) -> None:
    from monai.metrics import DiceMetric

    torch.manual_seed(0)
    pairs = [(torch.randint(0, 3, (1, 1, 6, 6)), torch.randint(0, 3, (1, 1, 6, 6))) for _ in range(4)]
    pairs.append((torch.ones(1, 1, 6, 6).long(), torch.zeros(1, 1, 6, 6).long()))  # class 1 falsely, no 2
    engine = Engine(lambda engine, batch: batch)
    options = {"num_classes": 3, "include_background": False, "ignore_empty": ignore_empty}
    IoUHandler(**options).attach(engine, "iou")
    DiceHandler(**options).attach(engine, "dice")
    state = engine.run(pairs)
    iou, dice = state.metric_details["iou"], state.metric_details["dice"]
    assert torch.equal(iou.isnan(), dice.isnan())
    assert torch.allclose(dice, 2 * iou / (1 + iou), equal_nan=True)
    if ignore_empty is True:  # MONAI's own rule
        monai = DiceMetric(include_background=False, num_classes=3)
        expected = torch.cat([monai(*pair) for pair in pairs])
        assert torch.allclose(dice.float(), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("handler", "metric"),
    [
        (IoUHandler, IoUMetric),
        (LesionIoUHandler, LesionIoUMetric),
        (BoundaryIoUHandler, BoundaryIoUMetric),
        (ThresholdIoUHandler, ThresholdIoUMetric),
        (CalibrationHandler, CalibrationMetric),
    ],
)
def test_the_page_names_what_a_handler_does_not_take(handler, metric):
    ours, theirs = (set(inspect.signature(each).parameters) for each in (handler, metric))
    assert theirs - ours == {"get_not_nans", "return_with_label"}
    page = " ".join((DOCS / "metrics.md").read_text(encoding="utf-8").split())
    assert "the other arguments of their metric by keyword, except `get_not_nans` and `return_with_label`" in page


def test_the_page_names_the_metrics_that_leave_a_background_out():
    others = (LesionIoUMetric, BoundaryIoUMetric, ThresholdIoUMetric, CalibrationMetric)
    assert [inspect.signature(each).parameters["include_background"].default for each in others] == [None] * 4
    assert inspect.signature(IoUMetric).parameters["include_background"].default is True
    page = " ".join((DOCS / "metrics.md").read_text(encoding="utf-8").split())
    assert "The default of all other metrics (lesion, boundary, threshold and calibration) is `None`" in page


HANDLERS = [IoUHandler, DiceHandler, LesionIoUHandler, BoundaryIoUHandler, ThresholdIoUHandler, CalibrationHandler]


@pytest.mark.parametrize("one_hot_maps", [False, True])
@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), [(IoUHandler, MeanIoUHandler), (DiceHandler, MeanDice)])
def test_monais_rule_gives_the_value_of_monais_handler(ours, theirs, include_background, one_hot_maps):
    images = IMAGES.clone()
    images[1, 1][images[1, 1] == 2] = 0  # no class 2, which is predicted
    maps = torch.stack([one_hot(each, 3) for each in images])
    values = []
    for handler, options in ((ours, {"ignore_empty": True}), (theirs, {})):
        given = maps if one_hot_maps or handler is theirs else images
        options = {**options, "num_classes": 3} if given is images else options
        engine = evaluator(handler(include_background, **options), "score")
        values.append(engine.run([(each[:1], each[1:]) for each in given]).metrics["score"])
    assert values[0] == pytest.approx(values[1])


def nothing_then(scores: list[float], handler: IgniteMetricHandler, folder: Path, **options: Any) -> tuple[float, str]:
    """Validate an image with nothing to score, then one of each IoU; return the best score and the name of the file."""
    network, step = torch.nn.Conv3d(1, 1, 1), [0]

    def predict(_engine: Engine, _batch: object) -> list[dict[str, torch.Tensor]]:
        label = torch.full((1, 1, 1, 100), float(step[0] > 0))
        prediction = label.clone()
        prediction[..., round(100 * [1.0, *scores][step[0]]) :] = 0
        return [{"pred": prediction, "label": label}]

    engine = SupervisedEvaluator(
        "cpu",
        [{"image": torch.zeros(1), "label": torch.zeros(1)}],
        network,
        iteration_update=predict,
        key_val_metric={"val_score": handler},
        val_handlers=[CheckpointSaver(save_dir=str(folder), save_dict={"net": network}, save_key_metric=True)],
        **options,
    )
    for step[0] in range(len(scores) + 1):
        engine.run(step[0] + 1)
    (saved,) = (path.name for path in folder.iterdir())
    return engine.state.best_metric, saved


PAIR = {"output_transform": from_engine(["pred", "label"])}


@pytest.mark.parametrize("ignore_empty", ["both", True])
def test_a_defined_first_score_leaves_monais_choice_of_the_best_model_open(ignore_empty: Any, tmp_path: Path) -> None:
    handlers = [MeanIoUHandler(**PAIR), IoUHandler(ignore_empty=ignore_empty, undefined=0.0, **PAIR)]
    folders = [tmp_path / name for name in ("theirs", "ours")]
    theirs, ours = (nothing_then([0.25, 0.75, 0.5], *each) for each in zip(handlers, folders, strict=True))
    assert ours == theirs == (0.75, "net_key_metric=0.7500.pt")


FIRST_NAN = (
    "Expected the first value of the key metric `val_score` to be a number, but got NaN, a mean over nothing, which no "
    "later score replaces as the best of this engine and of MONAI's CheckpointSaver: pass `undefined=0.0`, "
    "its worst value, to IoUHandler."
)


@pytest.mark.parametrize("options", [{}, {"metric_cmp_fn": lambda current, best: current < best}])
def test_a_first_nan_that_stays_the_best_is_named_once(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="key metric") as caught:
        best, saved = nothing_then([0.25, 0.75], IoUHandler(**PAIR), tmp_path, **options)
    assert [str(each.message) for each in caught] == [FIRST_NAN]
    assert (math.isnan(best), saved) == (True, "net_key_metric=nan.pt")


def test_the_value_that_the_warning_names_is_the_worst_of_the_metric() -> None:
    kinds = (IoUHandler, DiceHandler, LesionIoUHandler, BoundaryIoUHandler, ThresholdIoUHandler, CalibrationHandler)
    assert [kind.worst for kind in kinds] == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    handler = CalibrationHandler(True)
    engine = SimpleNamespace(
        metric_cmp_fn=lambda current, best: current < best,
        state=SimpleNamespace(key_metric_name="ece", best_metric_epoch=-1, metrics={"ece": math.nan}),
    )
    handler.compute = lambda: math.nan  # type: ignore[method-assign]
    with (
        patch.object(IgniteMetricHandler, "completed"),
        pytest.warns(UserWarning, match=r"pass `undefined=1\.0`, its worst value, to CalibrationHandler\.$"),
    ):
        handler.completed(engine, "ece")  # type: ignore[arg-type]


def test_the_bundles_comparison_needs_no_word_about_nan(tmp_path: Path) -> None:
    best, saved = nothing_then([0.25, 0.75], IoUHandler(**PAIR), tmp_path, metric_cmp_fn=is_better)
    assert (best, saved) == (0.75, "net_key_metric=nan.pt")  # MONAI's saver compares by itself: docs/metrics.md


def undefined_batch(handler: Callable[..., IgniteMetricHandler]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of two images and two classes in which a handler scores class 0 in the first image only."""
    label = torch.zeros(2, 2, 4, 4)
    label[0, 0, :2] = 1
    if handler is CalibrationHandler:
        label[1], label[:, 1] = math.nan, math.nan  # partly labelled: an error of absent classes is defined
        return torch.full((2, 2, 4, 4), 0.5), label
    return label.clone(), label


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("undefined", [math.nan, -1.0, 0, -math.inf])
def test_undefined_stands_for_nan_in_the_metrics_alone(handler: Any, undefined: float) -> None:
    batch = undefined_batch(handler)
    by_class = handler(True, "mean_batch", undefined=undefined)
    each = handler(True, "none", undefined=undefined)
    whole = handler(True, undefined=undefined)
    engine = evaluator(by_class, "by_class")
    each.attach(engine, "each")
    whole.attach(engine, "whole")
    state = engine.run([batch])
    details = state.metric_details["by_class"]
    assert details.isnan().tolist() == [[False, True], [True, True]]
    score, value = details[0, 0].item(), torch.tensor(float(undefined))
    torch.testing.assert_close(state.metrics["by_class"], torch.stack([details[0, 0], value]), equal_nan=True)
    expected = details.where(~details.isnan(), value)
    torch.testing.assert_close(state.metrics["each"], expected, equal_nan=True)
    torch.testing.assert_close(state.metric_details["each"], details, equal_nan=True)
    assert state.metrics["whole"] == pytest.approx(score)
    nothing = evaluator(handler(True, undefined=undefined), "whole").run([tuple(part[1:] for part in batch)])
    assert nothing.metrics["whole"] == pytest.approx(undefined, nan_ok=True)
    assert isinstance(nothing.metrics["whole"], float)
    assert nothing.metric_details["whole"].isnan().all()


@pytest.mark.parametrize("handler", HANDLERS)
def test_undefined_is_a_number(handler: Any) -> None:
    with pytest.raises(TypeError, match="`undefined`") as caught:
        handler(undefined="0")
    assert str(caught.value) == "Expected `undefined` to be a number, but got str: pass an int or a float."
