"""Compound losses: the terms' shapes, types and weights, and the arguments that the variants share."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from monai_iou import (
    CompoundLoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    WeightedCrossEntropyLoss,
)


def test_terms_of_different_shapes_are_refused() -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    for options in ({"batch": True}, {"include_background": False}):
        for make in (IoUCELoss, IoUFocalLoss):
            with pytest.raises(ValueError, match="`reduction` to be 'mean' or 'sum' with batch=True or"):
                make(softmax=True, reduction="none", **options)
    shares = IoUCELoss(softmax=True, reduction="none")
    parts = IoULoss(softmax=True, reduction="none"), WeightedCrossEntropyLoss(reduction="none")
    torch.testing.assert_close(shares(logits, labels), parts[0](logits, labels) + parts[1](logits, labels))
    mixed = CompoundLoss([IoULoss(softmax=True, reduction="none"), WeightedCrossEntropyLoss()])
    expected = re.escape("terms of one shape, but got (2, 3, 1, 1) of iou, () of weighted_cross_entropy: take")
    with pytest.raises(ValueError, match=expected):
        mixed(logits, labels)


def test_a_compound_of_other_losses_leaves_the_checks_to_them() -> None:
    loss = CompoundLoss([nn.MSELoss(), nn.L1Loss()])
    assert loss(torch.ones(3), torch.zeros(3)) == 2
