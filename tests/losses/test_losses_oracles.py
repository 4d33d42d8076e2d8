"""Every loss against MONAI's, torch's or a slow loop written from the paper, and the text of every error."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceFocalLoss, DiceLoss, FocalLoss, TverskyLoss
from torch import Tensor

from monai_iou import (
    FocalIoULoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    LogIoULoss,
    LogTverskyLoss,
    WeightedCrossEntropyLoss,
)
from monai_iou.losses.base import RegionLoss

SHAPE = (2, 3, 6, 5, 4)
close = {"rtol": 1e-5, "atol": 1e-5}


def pair(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * 2
    return logits, torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), generator=generator)


def one_hot(labels: Tensor) -> Tensor:
    return (labels == torch.arange(3).reshape(1, 3, 1, 1, 1)).float()


VARIANTS = [
    {},
    {"include_background": False},
    {"batch": True},
    {"squared_pred": True},
    {"soft_label": True},
    {"squared_pred": True, "soft_label": True},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"reduction": "none", "batch": True},
    {"weight": [0.2, 1.0, 3.0]},
    {"weight": [1.0, 3.0], "include_background": False, "batch": True},
    {"ignore_index": 2},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_iou_is_monai_jaccard(options: dict[str, Any], activation: str) -> None:
    logits, labels = pair()
    options = {**options, activation: True, "to_onehot_y": True}
    # MONAI doubles intersection and union, so its smoothing of 1 is one half here.
    theirs = DiceLoss(jaccard=True, smooth_nr=1.0, smooth_dr=1.0, **options)
    ours = IoULoss(smooth_nr=0.5, smooth_dr=0.5, **options)
    torch.testing.assert_close(ours(logits, labels), theirs(logits, labels), **close)


def test_iou_gradient_is_monai_jaccards() -> None:
    logits, labels = pair()
    slopes = []
    for loss in (IoULoss(softmax=True), DiceLoss(jaccard=True, softmax=True, to_onehot_y=True)):
        x = logits.clone().requires_grad_()
        slopes.append(torch.autograd.grad(loss(x, labels), x)[0])
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"include_background": False}, {"batch": True}, {"reduction": "sum"}], ids=str)
def test_tversky_is_monais(options: dict[str, Any]) -> None:
    logits, labels = pair()
    theirs = TverskyLoss(softmax=True, to_onehot_y=True, alpha=0.3, beta=0.7, **options)
    ours = FocalTverskyLoss(alpha=0.3, beta=0.7, gamma=1.0, softmax=True, **options)
    torch.testing.assert_close(ours(logits, labels), theirs(logits, labels), **close)


def test_iou_ce_is_monais_dice_ce() -> None:
    logits, labels = pair()
    theirs = DiceCELoss(
        softmax=True, to_onehot_y=True, jaccard=True, lambda_dice=0.7, lambda_ce=1.3, weight=torch.tensor([0.5, 1, 2.0])
    )
    ours = IoUCELoss(softmax=True, lambda_iou=0.7, lambda_ce=1.3, weight=[0.5, 1.0, 2.0])
    torch.testing.assert_close(ours(logits, labels), theirs(logits, labels), **close)


def test_a_sigmoid_of_several_channels_has_a_binary_cross_entropy_and_monais_not() -> None:
    logits, labels = pair()
    maps = one_hot(labels)
    smooth: dict[str, Any] = {"smooth_nr": 2e-5, "smooth_dr": 2e-5}
    iou = DiceLoss(jaccard=True, sigmoid=True, **smooth)(logits, maps)
    theirs = DiceCELoss(jaccard=True, sigmoid=True, **smooth)(logits, maps)
    torch.testing.assert_close(theirs, iou + F.cross_entropy(logits, maps))
    ours = IoUCELoss(sigmoid=True)(logits, maps)
    torch.testing.assert_close(ours, iou + F.binary_cross_entropy_with_logits(logits, maps))


TWICE: dict[str, Any] = {"smooth_nr": 2e-5, "smooth_dr": 2e-5}  # as MONAI doubles what it is added to


def test_iou_ce_of_maps_with_weights_divides_by_them_and_monais_by_the_voxels() -> None:
    logits, labels = pair()
    maps, weight = one_hot(labels), torch.tensor([0.5, 1.0, 2.0])
    iou = DiceLoss(jaccard=True, softmax=True, weight=weight, **TWICE)(logits, maps)
    theirs = DiceCELoss(jaccard=True, softmax=True, weight=weight, **TWICE)(logits, maps)
    torch.testing.assert_close(theirs, iou + F.cross_entropy(logits, maps, weight=weight))
    ours = IoUCELoss(softmax=True, weight=weight)(logits, maps)
    torch.testing.assert_close(ours, iou + F.cross_entropy(logits, labels[:, 0], weight=weight))


def test_one_channel_has_a_label_smoothing_and_monais_not() -> None:
    logits, labels = pair()
    one, maps = logits[:, :1], (labels == 1).float()
    plain = DiceCELoss(jaccard=True, sigmoid=True, **TWICE)(one, maps)
    theirs = DiceCELoss(jaccard=True, sigmoid=True, label_smoothing=0.1, **TWICE)(one, maps)
    torch.testing.assert_close(theirs, plain, rtol=0, atol=0)
    iou = DiceLoss(jaccard=True, sigmoid=True, **TWICE)(one, maps)
    ours = IoUCELoss(sigmoid=True, label_smoothing=0.1)(one, maps)
    torch.testing.assert_close(ours, iou + F.binary_cross_entropy_with_logits(one, maps * 0.9 + 0.05))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{}, {"batch": True}, {"squared_pred": True}], ids=str)
def test_iou_focal_is_monais_dice_focal_with_a_sigmoid(options: dict[str, Any], channels: int) -> None:
    logits, maps = (each[:, :channels] for each in (pair()[0], one_hot(pair()[1])))
    theirs = DiceFocalLoss(jaccard=True, sigmoid=True, gamma=1.5, lambda_dice=0.7, lambda_focal=1.3, **TWICE, **options)
    ours = IoUFocalLoss(1.5, sigmoid=True, lambda_iou=0.7, lambda_focal=1.3, **options)
    torch.testing.assert_close(ours(logits, maps), theirs(logits, maps), **close)


def test_the_focal_term_keeps_the_background_and_monais_not() -> None:
    logits, labels = pair()
    maps, options = one_hot(labels), {"sigmoid": True, "include_background": False}
    iou = DiceLoss(jaccard=True, **TWICE, **options)(logits, maps)
    theirs = DiceFocalLoss(jaccard=True, **TWICE, **options)(logits, maps)
    torch.testing.assert_close(theirs, iou + FocalLoss()(logits[:, 1:], maps[:, 1:]))
    torch.testing.assert_close(IoUFocalLoss(**options)(logits, maps), iou + FocalLoss()(logits, maps))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [0.25, 0.9])
def test_alpha_of_monais_focal_losses_is_a_pos_weight_and_a_factor(alpha: float, channels: int) -> None:
    logits, maps = (each[:, :channels] for each in (pair()[0], one_hot(pair()[1])))
    given: dict[str, Any] = {"sigmoid": True, "pos_weight": alpha / (1 - alpha)}
    ours = (1 - alpha) * WeightedCrossEntropyLoss(gamma=2.0, **given)(logits, maps)
    torch.testing.assert_close(ours, FocalLoss(alpha=alpha)(logits, maps), **close)
    theirs = DiceFocalLoss(jaccard=True, sigmoid=True, alpha=alpha, lambda_focal=1.3, **TWICE)(logits, maps)
    for compound in (
        IoUFocalLoss(lambda_focal=1.3 * (1 - alpha), **given),
        IoUCELoss(gamma=2.0, lambda_ce=1.3 * (1 - alpha), **given),
    ):
        torch.testing.assert_close(compound(logits, maps), theirs, **close)


def test_tverskys_without_reduction_differ_in_shape_only() -> None:
    logits, labels = pair()
    options: dict[str, Any] = {"softmax": True, "alpha": 0.3, "beta": 0.7, "reduction": "none"}
    theirs = TverskyLoss(to_onehot_y=True, **options)(logits, labels)
    ours = FocalTverskyLoss(gamma=1.0, **options)(logits, labels)
    assert theirs.shape == ours.shape[:2]
    torch.testing.assert_close(ours.flatten(1), theirs, **close)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_is_monais_summed_over_classes(gamma: float) -> None:
    logits, labels = pair()
    for softmax in (True, False):
        theirs = FocalLoss(gamma=gamma, use_softmax=softmax)(logits, one_hot(labels))
        ours = WeightedCrossEntropyLoss(gamma=gamma, sigmoid=not softmax)(logits, one_hot(labels))
        torch.testing.assert_close(ours, theirs * 3 if softmax else theirs, **close)


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("weight", [None, [0.1, 2.0, 0.7]])
@pytest.mark.parametrize("ignore", [-100, 1])
def test_cross_entropy_is_torchs(smoothing: float, weight: list[float] | None, ignore: int) -> None:
    logits, labels = pair()
    tensor = None if weight is None else torch.tensor(weight)
    expected = F.cross_entropy(logits, labels.squeeze(1), weight=tensor, label_smoothing=smoothing, ignore_index=ignore)
    ours = WeightedCrossEntropyLoss(weight, label_smoothing=smoothing, ignore_index=ignore)
    torch.testing.assert_close(ours(logits, labels), expected, **close)


def test_soft_cross_entropy_and_binary_cross_entropy_are_torchs() -> None:
    logits, _ = pair()
    soft = pair(1)[0].softmax(1)
    torch.testing.assert_close(WeightedCrossEntropyLoss()(logits, soft), F.cross_entropy(logits, soft), **close)
    expected = F.binary_cross_entropy_with_logits(logits, soft)
    torch.testing.assert_close(WeightedCrossEntropyLoss(sigmoid=True)(logits, soft), expected, **close)
    one = F.binary_cross_entropy_with_logits(logits[:, :1], soft[:, :1])
    torch.testing.assert_close(WeightedCrossEntropyLoss()(logits[:, :1], soft[:, :1]), one, **close)


def loop_sums(p: Tensor, y: Tensor, power: float, soft: bool) -> tuple[float, float, float]:
    """I, P and T of one image and class, voxel by voxel."""
    overlap = prediction = reference = 0.0
    for found, there in zip(p.flatten().tolist(), y.flatten().tolist(), strict=True):
        overlap += min(found, there) if soft else found * there
        prediction += found**power
        reference += there**power
    return overlap, prediction, reference


def loop_loss(name: str, p: Tensor, y: Tensor, arguments: dict[str, Any], power: float, soft: bool) -> float:
    """The mean over images (and classes) of the formulas of the papers, in float64."""
    s, values = 1e-5, []
    for image in range(len(p)):
        sums = [loop_sums(p[image, c], y[image, c], power, soft) for c in range(p.shape[1])]
        if name == "generalized":
            volumes = [t for _, _, t in sums]
            square = {"square": 2, "simple": 1, "uniform": 0}[arguments["w_type"]]
            largest = max((1 / t**square for t in volumes if t > 0), default=1.0)
            weights = [1 / t**square if t > 0 else largest for t in volumes]
            top = sum(w * i for w, (i, _, _) in zip(weights, sums, strict=True)) + s
            bottom = sum(w * (a + b - i) for w, (i, a, b) in zip(weights, sums, strict=True)) + s
            values.append(1 - top / bottom)
            continue
        for i, a, b in sums:
            iou = (i + s) / (a + b - i + s)
            if name == "log":
                values.append((-math.log(iou)) ** arguments["gamma"])
            elif name == "focal":
                values.append((1 - iou) ** arguments["gamma"])
            elif name in ("tversky", "log_tversky"):
                index = (i + s) / (i + arguments["alpha"] * (a - i) + arguments["beta"] * (b - i) + s)
                error = 1 - index if name == "tversky" else max(0.0, -math.log(index))
                values.append(error ** arguments["gamma"])
            else:
                values.append(1 - iou)
    return sum(values) / len(values)


FORMULAS: list[tuple[str, type[RegionLoss], dict[str, Any]]] = [
    ("iou", IoULoss, {}),
    ("log", LogIoULoss, {"gamma": 1.0}),
    ("log", LogIoULoss, {"gamma": 0.3}),
    ("focal", FocalIoULoss, {"gamma": 2.0}),
    ("focal", FocalIoULoss, {"gamma": 0.75}),
    ("tversky", FocalTverskyLoss, {"alpha": 0.3, "beta": 0.7, "gamma": 0.75}),
    ("log_tversky", LogTverskyLoss, {"alpha": 0.3, "beta": 0.7, "gamma": 0.5}),
    ("generalized", GeneralizedIoULoss, {"w_type": "square"}),
    ("generalized", GeneralizedIoULoss, {"w_type": "simple"}),
    ("generalized", GeneralizedIoULoss, {"w_type": "uniform"}),
]


@pytest.mark.parametrize(("name", "make", "arguments"), FORMULAS)
@pytest.mark.parametrize("form", [{}, {"power": 1.5}, {"soft_label": True}], ids=str)
@pytest.mark.parametrize("absent", [False, True])
def test_formula(
    name: str, make: type[RegionLoss], arguments: dict[str, Any], form: dict[str, Any], absent: bool
) -> None:
    logits, labels = pair()
    y = torch.softmax(pair(2)[0] * 3, 1) if form else one_hot(labels.clamp_max(1) if absent else labels)
    if form and absent:
        y[0, 2] = 0
    p = logits.softmax(1)
    expected = loop_loss(name, p.double(), y.double(), arguments, form.get("power", 1.0), bool(form.get("soft_label")))
    value = make(softmax=True, **arguments, **form)(logits, y)
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_generalized_formula_holds_for_large_classes() -> None:
    # T of half a million voxels: 1/T^2 is 4e-12, next to which smoothing of 1e-5 decides, as the formula says.
    labels = torch.zeros(1, 1, 100, 100, 100, dtype=torch.uint8)
    labels[..., :50] = 1
    p = 0.8
    probabilities = torch.where(torch.cat([labels == 0, labels == 1], 1), p, 1 - p)
    volume, s = 5e5, 1e-5
    overlap = 2 / volume**2 * p * volume
    union = 2 / volume**2 * (2 * volume - p * volume)
    for smooth in (s, 1e-12):
        value = GeneralizedIoULoss(smooth_nr=smooth, smooth_dr=smooth)(probabilities, labels)
        assert value.item() == pytest.approx(1 - (overlap + smooth) / (union + smooth), abs=1e-5)


@pytest.mark.parametrize("empty", ["skip", "suppress"])
def test_absent_classes(empty: str) -> None:
    logits, labels = pair()
    labels = labels.clamp_max(1)
    labels[1] = 0
    p, y = logits.softmax(1), one_hot(labels)
    terms, weighted = [], []
    for image in range(2):
        shares = []
        for c in range(3):
            there = bool(y[image, c].any())
            if there:
                i = (p[image, c] * y[image, c]).sum()
                shares.append(1 - (i / (p[image, c].sum() + y[image, c].sum() - i)))
            elif empty == "suppress":
                shares.append(p[image, c].square().sum() / p[image, c].sum())
        terms += shares
        i, volume = (p[image] * y[image]).flatten(1).sum(1), y[image].flatten(1).sum(1)
        w = torch.where(volume > 0, 1 / volume.square(), 0)
        u = p[image].flatten(1).sum(1) + volume - i
        whole = 1 - (w * i).sum() / (w * u).sum()
        absent = [share for c, share in enumerate(shares) if w[c] == 0] if empty == "suppress" else []
        weighted.append((whole * (w > 0).sum() + sum(absent)) / 3 if empty == "suppress" else whole)
    smooth = {"smooth_nr": 0.0, "smooth_dr": 0.0, "empty": empty, "softmax": True}
    torch.testing.assert_close(IoULoss(**smooth)(logits, labels), torch.stack(terms).mean(), **close)
    torch.testing.assert_close(GeneralizedIoULoss(**smooth)(logits, labels), torch.stack(weighted).mean(), **close)


@pytest.mark.parametrize("make", [IoULoss, LogIoULoss, FocalIoULoss, FocalTverskyLoss, GeneralizedIoULoss])
def test_skip_of_nothing_is_zero_without_gradient(make: type[RegionLoss]) -> None:
    logits = pair()[0].requires_grad_()
    loss = make(sigmoid=True, empty="skip")
    value = loss(logits, torch.zeros(SHAPE))
    (slope,) = torch.autograd.grad(value, logits)
    assert value.item() == 0
    assert (slope == 0).all()


@pytest.mark.parametrize("make", [IoULoss, LogIoULoss, FocalIoULoss, FocalTverskyLoss, GeneralizedIoULoss])
def test_suppress_pushes_confident_false_positives_down_and_has_no_cliff(make: type[RegionLoss]) -> None:
    loss = make(empty="suppress")
    p = torch.full((1, 1, 64, 64, 64), 1e-7)
    p[..., :4, :4, :4] = 0.9
    p.requires_grad_()
    value = loss(p, torch.zeros_like(p))
    (slope,) = torch.autograd.grad(value, p)
    assert slope.min() >= 0
    assert slope.max() < 1
    assert slope[..., 0, 0, 0] > 1e6 * slope[..., -1, -1, -1]
    assert loss(torch.zeros_like(p), torch.zeros_like(p)) == 0
    # "smooth" is flat here
    if make is not LogIoULoss:  # whose logarithm undoes the flatness
        (flat,) = torch.autograd.grad(make()(p, torch.zeros_like(p)), p)
        assert flat.abs().max() < 1e-4


@pytest.mark.parametrize(("p", "ours"), [(0.01, 1.5e-12), (1e-7, 1.5e-2)])
def test_the_gradients_of_an_absent_class_that_the_page_names(p: float, ours: float) -> None:
    maps = torch.full((1, 1, 64, 64, 64), p, dtype=torch.float64, requires_grad=True)
    losses = (IoULoss(), DiceLoss(jaccard=True))
    slopes = [torch.autograd.grad(loss(maps, 0 * maps.detach()), maps)[0] for loss in losses]
    assert slopes[0].max().item() == pytest.approx(ours, rel=0.05)
    assert slopes[1].max().item() == pytest.approx(ours / 2, rel=0.05)


Error = tuple[type[Exception], str]
BAD_ARGUMENTS: list[tuple[Any, dict[str, Any], Error]] = [
    (IoULoss, {"weight": [1.0, -2.0]}, (ValueError, "every `weight` to be finite and at least 0, but got -2.0")),
    (
        IoULoss,
        {"weight": [[1.0]]},
        (ValueError, "`weight` to be a number or one number per class, but got shape (1, 1)"),
    ),
    (LogIoULoss, {"gamma": 0}, (ValueError, "`gamma` to be a finite number above 0, but got 0")),
    (FocalIoULoss, {"gamma": -1.0}, (ValueError, "`gamma` to be a finite number above 0, but got -1.0")),
    (FocalIoULoss, {"gamma": float("nan")}, (ValueError, "`gamma` to be a finite number above 0, but got nan")),
    (FocalIoULoss, {"gamma": "2"}, (TypeError, "`gamma` to be a number, but got str")),
    (FocalTverskyLoss, {"gamma": 0.0}, (ValueError, "`gamma` to be a finite number above 0, but got 0.0")),
    (FocalTverskyLoss, {"alpha": -0.1}, (ValueError, "`alpha` to be a finite number at least 0, but got -0.1")),
    (FocalTverskyLoss, {"alpha": 0, "beta": 0}, (ValueError, "`alpha` or `beta` to be above 0, but got 0 for both")),
    (WeightedCrossEntropyLoss, {"gamma": -2.0}, (ValueError, "`gamma` to be a finite number at least 0, but got -2.0")),
    (WeightedCrossEntropyLoss, {"weight": [-1.0]}, (ValueError, "every `weight` to be finite and at least 0")),
    (IoUFocalLoss, {"gamma": -2.0}, (ValueError, "`gamma` to be a finite number at least 0, but got -2.0")),
    (GeneralizedIoULoss, {"w_type": "cube"}, (ValueError, "`w_type` to be one of 'square', 'simple', 'uniform'")),
    (IoULoss, {"sigmoid": True, "softmax": True}, (ValueError, "at most one of `sigmoid`, `softmax` and `other_act`")),
    (GeneralizedIoULoss, {"sigmoid": True, "softmax": True}, (ValueError, "but got sigmoid and softmax")),
    (IoULoss, {"other_act": "relu"}, (TypeError, "`other_act` to be None or callable, but got str")),
    (IoULoss, {"empty": "zero"}, (ValueError, "`empty` to be one of 'smooth', 'skip', 'suppress', but got 'zero'")),
    (IoULoss, {"reduction": "mean_batch"}, (ValueError, "`reduction` to be one of 'mean', 'sum', 'none'")),
    (IoULoss, {"power": 0.5}, (ValueError, "`power` to be at least 1, but got 0.5")),
    (IoULoss, {"smooth_nr": -1.0}, (ValueError, "`smooth_nr` to be a finite number at least 0, but got -1.0")),
    (IoULoss, {"sync_batch": True}, (ValueError, "`batch` to be True with sync_batch=True")),
    (IoULoss, {"ignore_index": 1.5}, (TypeError, "`ignore_index` to be None or an integer, but got float")),
]


@pytest.mark.parametrize(("make", "options", "error"), BAD_ARGUMENTS)
def test_bad_argument(make: Any, options: dict[str, Any], error: Error) -> None:
    with pytest.raises(error[0], match=re.escape(error[1])):
        make(**options)


EVERY = [
    IoULoss,
    LogIoULoss,
    LogTverskyLoss,
    FocalIoULoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    WeightedCrossEntropyLoss,
    IoUCELoss,
    IoUFocalLoss,
]


@pytest.mark.parametrize("make", EVERY)
def test_bad_tensors(make: Any) -> None:
    logits, labels = pair()
    loss = make(softmax=True)
    wrong_value = labels.clone()
    wrong_value[0, 0, 0, 0, 0] = 7
    with pytest.raises(ValueError, match=re.escape("the labels 0 to 2 of an input with 3 channels, but got 7: map")):
        loss(logits, wrong_value)
    with pytest.raises(ValueError, match="but got -1: map the labels"):
        loss(logits, wrong_value.clamp_max(2) - (wrong_value == 7).long() * 3)
    with pytest.raises(ValueError, match=re.escape("but got 0.5: give a soft target one channel per class")):
        loss(logits, torch.full((2, 1, 6, 5, 4), 0.5))
    with pytest.raises(ValueError, match=re.escape("but got (2, 1, 6, 5, 5)")):
        loss(logits, torch.zeros(2, 1, 6, 5, 5))
    with pytest.raises(ValueError, match=re.escape("add the channel dimension, target.unsqueeze(1)")):
        loss(logits, labels.squeeze(1))
    with pytest.raises(ValueError, match="values between 0 and 1, but got 2"):
        loss(logits, one_hot(labels) * 2)
    with pytest.raises(TypeError, match=r"`input` to be floating point, but got torch\.int64"):
        loss(labels, labels)
    with pytest.raises(ValueError, match="`weight` to hold 3 values, but got 2"):
        make(softmax=True, weight=[1.0, 2.0])(logits, labels)
    for weight in ("abc", {"lesion": 1.0}, [1.0, None]):
        with pytest.raises(TypeError, match="`weight` to be a number or one number per class, but got "):
            make(softmax=True, weight=weight)
    with pytest.raises(TypeError, match="but got a tuple of 2: wrap the loss in a MultiScaleLoss"):
        loss((logits, logits), labels)
