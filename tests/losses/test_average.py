"""Averages over images and classes: mIoU-I and mIoU-C of Wang et al. as losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_iou import FocalIoULoss, FocalTverskyLoss, GeneralizedIoULoss, IoUCELoss, IoULoss, LogIoULoss


def case() -> tuple[Tensor, Tensor]:
    """Return probabilities and labels of images that hold different classes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 6, 7, generator=generator)
    labels = torch.randint(0, 5, (4, 1, 6, 7), generator=generator)
    for image, keep in enumerate(((0, 1), (0, 2, 3), (0, 1, 2, 3, 4), (0,))):
        labels[image] = torch.where(torch.isin(labels[image], torch.tensor(keep)), labels[image], 0)
    return logits.double(), labels


def slow(logits: Tensor, labels: Tensor, average: str) -> float:
    """Count by loops: 1 - IoU of the classes that an image holds, averaged as the paper says."""
    p = logits.softmax(1)
    terms: dict[tuple[int, int], float] = {}
    for image in range(len(p)):
        for index in range(p.shape[1]):
            y = (labels[image, 0] == index).double()
            if y.any():
                overlap = (p[image, index] * y).sum()
                terms[image, index] = 1 - (overlap / (p[image, index].sum() + y.sum() - overlap)).item()
    if average == "pairs":
        return sum(terms.values()) / len(terms)
    rows: dict[int, list[float]] = {}
    for (image, index), term in terms.items():
        rows.setdefault(image if average == "images" else index, []).append(term)
    return sum(sum(row) / len(row) for row in rows.values()) / len(rows)


@pytest.mark.parametrize("average", ["pairs", "images", "classes"])
def test_the_average_is_the_papers(average: str) -> None:
    logits, labels = case()
    loss = IoULoss(softmax=True, empty="skip", average=average, smooth_nr=0, smooth_dr=0)
    assert loss(logits, labels).item() == pytest.approx(slow(logits, labels, average), rel=1e-9)


def wave() -> tuple[Tensor, Tensor]:
    """Return logits and labels by a formula, so that no generator can change them; images hold different classes."""
    place = torch.arange(4 * 5 * 6 * 7, dtype=torch.float64).reshape(4, 5, 6, 7)
    labels = torch.arange(4 * 6 * 7).reshape(4, 1, 6, 7) * 5 // 3 % 5
    for image, keep in enumerate(((0, 1), (0, 2, 3), (0, 1, 2, 3, 4), (0,))):
        labels[image] = torch.where(torch.isin(labels[image], torch.tensor(keep)), labels[image], 0)
    return 3 * torch.sin(place * place / 7), labels


@pytest.mark.parametrize(
    ("average", "value", "slopes"),
    [
        ("images", 0.8452312568240717, (2.004636548922718e-4, 1.006102760342323e-5, 1.2041646524343133e-2)),
        ("classes", 0.8425051929737947, (2.5336028968400053e-4, 4.340328691683915e-6, 1.3223535117243035e-2)),
    ],
)
def test_the_authors_own_code_gives_the_same(average: str, value: float, slopes: tuple[float, ...]) -> None:
    """Values of JDTLoss(mIoUD=0, mIoUI=1) and (mIoUD=0, mIoUC=1), github.com/zifuwanggg/JDTLosses at 68ce8ac."""
    logits, labels = wave()
    leaf = logits.clone().requires_grad_()
    loss = IoULoss(softmax=True, empty="skip", average=average, smooth_nr=1e-3, smooth_dr=1e-3)(leaf, labels)
    (found,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == pytest.approx(value, rel=1e-9)
    assert (found[0, 1, 2, 3].item(), found[1, 2, 0, 0].item(), found.norm().item()) == pytest.approx(slopes, rel=1e-6)


def test_the_three_differ_and_agree_where_every_class_is_everywhere() -> None:
    logits, labels = case()
    values = [IoULoss(softmax=True, empty="skip", average=a)(logits, labels) for a in ("pairs", "images", "classes")]
    assert len({round(value.item(), 6) for value in values}) == 3
    full = torch.arange(42).remainder(5).view(1, 1, 6, 7).expand(4, 1, 6, 7)
    for make in (IoULoss, LogIoULoss, FocalIoULoss, FocalTverskyLoss, GeneralizedIoULoss, IoUCELoss):
        plain = make(softmax=True, empty="skip")(logits, full)
        for average in ("images", "classes"):
            torch.testing.assert_close(make(softmax=True, empty="skip", average=average)(logits, full), plain)


def test_what_no_image_holds_leaves_the_mean() -> None:
    logits, labels = case()
    nothing = torch.zeros_like(labels)
    leaf = logits.clone().requires_grad_()
    for average in ("images", "classes"):
        loss = IoULoss(softmax=True, include_background=False, empty="skip", average=average)
        value = loss(leaf, nothing)
        assert value == 0
        (gradient,) = torch.autograd.grad(value, leaf)
        assert not gradient.any()
        # the last image holds the background alone: it is no image of the mean
        found, without = loss(logits, labels), loss(logits[:3], labels[:3])
        torch.testing.assert_close(found, without)


def test_wrong_averages_are_explained() -> None:
    with pytest.raises(ValueError, match=r"`average` to be one of 'pairs', 'images', 'classes', but got 'macro'"):
        IoULoss(average="macro")
    message = r"^Expected `reduction` to be 'mean' with average='images', but got 'sum': `average` says how a mean is "
    with pytest.raises(ValueError, match=message):
        IoULoss(average="images", reduction="sum")
