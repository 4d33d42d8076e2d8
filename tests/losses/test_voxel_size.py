"""The voxel size of a label reaches the cells of an InstanceIoULoss: with `labelled`, and at every scale."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import list_data_collate
from monai.losses import DiceLoss
from torch import Tensor

from monai_iou import CompoundLoss, InstanceIoULoss, IoUCELoss, MultiScaleLoss
from monai_iou.losses.label_pooling import pool_labels

SIZES = [(1.0, 1.0, 6.0), (2.0, 1.0, 1.0)]  # in mm, of the images of the batch
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(2, 2, 12, 12, 12, generator=GENERATOR)
LOGITS[:, 1] -= 3  # so that what is predicted falls into components
COARSE = torch.randn(2, 2, 6, 6, 12, generator=GENERATOR)  # voxels of 2 x 2 x 6 and 4 x 2 x 1 mm
SCALED = [(2.0, 2.0, 6.0), (4.0, 2.0, 1.0)]
ALL = torch.ones(2, 2, dtype=torch.bool)


def labels() -> Tensor:
    label = torch.zeros(2, 1, 12, 12, 12)
    label[:, 0, 2:4, 2:4, 2:4] = label[:, 0, 8:11, 8:11, 2] = label[:, 0, 3, 9, 10] = 1
    return label


def with_sizes(label: Tensor) -> Tensor:
    affines = [torch.diag(torch.tensor([*size, 1.0])) for size in SIZES]
    batch: Tensor = list_data_collate(
        [MetaTensor(image.clone(), affine=affine) for image, affine in zip(label, affines, strict=True)]
    )
    return batch


def one_hot(label: Tensor) -> Tensor:
    return torch.cat([1 - label, label], 1)


@pytest.mark.parametrize("cells", ["reference", "prediction", "both"])
@pytest.mark.parametrize("maps", [False, True])
def test_labelled_leaves_the_voxel_size_of_a_metatensor(maps: bool, cells: str) -> None:
    label = one_hot(labels()) if maps else labels()
    for activation in ("softmax", "sigmoid"):
        options: dict[str, Any] = {activation: True, "cells": cells}
        expected = InstanceIoULoss(spacing=SIZES, **options)(LOGITS, label)
        loss = InstanceIoULoss(**options)
        assert loss(LOGITS, label) != expected
        for pairs in (None, ALL):
            torch.testing.assert_close(loss(LOGITS, with_sizes(label), pairs), expected)
            multi = MultiScaleLoss(loss)
            torch.testing.assert_close(multi([LOGITS], with_sizes(label), pairs), expected)


@pytest.mark.parametrize("downsample", ["area", "max", "nearest"])
@pytest.mark.parametrize("pairs", [None, ALL])
def test_coarse_voxels_are_larger(downsample: str, pairs: Tensor | None) -> None:
    label = labels()
    coarse = pool_labels(label, (6, 6, 12), 2, downsample)
    options: dict[str, Any] = {"softmax": True, "soft_label": downsample == "area"}
    expected = InstanceIoULoss(spacing=SCALED, **options)(COARSE, coarse)
    of_one_size = InstanceIoULoss(spacing=SCALED[0], **options)(COARSE, coarse)
    without_size = InstanceIoULoss(spacing=(2.0, 2.0, 1.0), **options)(COARSE, coarse)
    assert len({expected.item(), of_one_size.item(), without_size.item()}) == 3

    def found(target: Tensor, **own: Any) -> Tensor:
        instance = InstanceIoULoss(softmax=True, **own)
        multi = MultiScaleLoss(instance, weights=[0.0, 1.0], downsample=downsample)
        value: Tensor = multi([LOGITS, COARSE], target, pairs)
        assert instance.spacing == own.get("spacing")
        assert multi.soft_loss.spacing == own.get("spacing")
        return value

    torch.testing.assert_close(found(with_sizes(label)), expected)
    if downsample == "area":  # "max" lets maps overlap
        torch.testing.assert_close(found(with_sizes(one_hot(label))), expected)
    torch.testing.assert_close(found(label, spacing=SIZES), expected)
    torch.testing.assert_close(found(label, spacing=SIZES[0]), of_one_size)
    torch.testing.assert_close(found(label, spacing=1.0), without_size)
    torch.testing.assert_close(found(label), without_size)


def test_an_instance_loss_inside_a_compound_too() -> None:
    instance, others = InstanceIoULoss(softmax=True), IoUCELoss(softmax=True)
    multi = MultiScaleLoss(CompoundLoss([others, instance]), weights=[0.0, 1.0], downsample="max")
    coarse = pool_labels(labels(), (6, 6, 12), 2, "max")
    expected = others(COARSE, coarse) + InstanceIoULoss(softmax=True, spacing=SCALED)(COARSE, coarse)
    torch.testing.assert_close(multi([LOGITS, COARSE], with_sizes(labels())), expected)


def test_the_voxel_size_is_put_back_after_an_error() -> None:
    some = ALL.clone()
    some[0, 1] = False
    instance = InstanceIoULoss(softmax=True, spacing=SIZES[0], global_loss=DiceLoss(softmax=True))
    with pytest.raises(ValueError, match="with DiceLoss, which cannot leave classes out"):
        MultiScaleLoss(instance, weights=[0.0, 1.0], downsample="max")([LOGITS, COARSE], labels(), some)
    assert instance.spacing == SIZES[0]


def test_a_batch_without_images() -> None:
    multi = MultiScaleLoss(InstanceIoULoss(softmax=True, spacing=SIZES[0]))
    for pairs in (None, ALL[:0]):
        assert multi([LOGITS[:0], COARSE[:0]], labels()[:0], pairs) == 0


def test_a_loss_at_work_in_two_threads_keeps_both_voxel_sizes() -> None:
    instance = InstanceIoULoss(softmax=True)
    multi = MultiScaleLoss(instance, weights=[0.0, 1.0], downsample="max")
    expected = multi([LOGITS, COARSE], with_sizes(labels()))
    inside, outside = threading.Barrier(2, timeout=60), []

    class Waits(InstanceIoULoss):
        def forward(self, *arguments: Any) -> Tensor:
            inside.wait()  # until the other thread is in its coarse scale as well, or in the loss itself
            return super().forward(*arguments)

    waiting = MultiScaleLoss(Waits(softmax=True), weights=[0.0, 1.0], downsample="max")
    fine = instance(LOGITS, with_sizes(labels()))
    work = [
        lambda: waiting([LOGITS, COARSE], with_sizes(labels())),
        lambda: waiting([LOGITS, COARSE], with_sizes(labels())),
        lambda: waiting.loss(LOGITS, with_sizes(labels())),
        lambda: waiting([LOGITS, COARSE], with_sizes(labels())),
    ]
    for pair in (work[:2], work[2:]):
        with ThreadPoolExecutor(2) as threads:
            outside += [task.result() for task in [threads.submit(each) for each in pair]]
    for value, right in zip(outside, [expected, expected, fine, expected], strict=True):
        torch.testing.assert_close(value, right)
    assert waiting.loss.spacing is None
