"""Cases that lack classes: from the batch to the loss, and losses that do not fit a dataset's labels."""

from __future__ import annotations

import re
from typing import Any

import monai.losses
import pytest
import torch
from torch import nn

from monai_iou import GeneralizedIoULoss, InstanceIoULoss, IoUCELoss, IoULoss
from monai_iou.datasets.cases import DatasetError
from monai_iou.planning.plan import Plan
from monai_iou.workflow.labelled import BatchPreparation, PartlyLabelledLoss
from monai_iou.workflow.variants import build_loss

NAMES = {0: "background", 1: "liver", 2: "spleen"}


def plan(**changes: Any) -> Plan:
    return Plan(("CT",), NAMES, (1.0,) * 3, (16,) * 3, (8, 16), ((2, 2, 2),), ({"kind": "zscore"},), **changes)


def test_what_a_batch_says_reaches_the_loss() -> None:
    loss = IoUCELoss(softmax=True)
    wrapped = build_loss(loss, plan(partly_labelled=True))
    assert isinstance(wrapped, PartlyLabelledLoss)
    logits, label = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 1, 4, 4, 4))
    labelled = torch.tensor([[True, False, True], [True, True, True]])
    image, target = BatchPreparation(wrapped)({"image": logits, "label": label, "labelled": labelled})
    expected = loss(logits, label, labelled)
    assert float(wrapped(image, target)) == float(expected) != float(loss(logits, label))
    assert set(wrapped.last_terms) == {"iou", "cross_entropy"}
    BatchPreparation(wrapped)({"image": logits, "label": label})
    assert float(wrapped(image, target)) == float(loss(logits, label)), "a batch that says nothing lacks nothing"


@pytest.mark.parametrize("options", [{}, {"deep_supervision": True}, {"instance": True}])
def test_every_variant_is_told(options: dict[str, Any]) -> None:
    wrapped = build_loss(IoUCELoss(softmax=True), plan(partly_labelled=True), **options)
    logits = torch.randn(1, 3, 8, 8, 8, requires_grad=True)
    label = torch.zeros(1, 1, 8, 8, 8)
    label[..., :3] = 2
    labelled = torch.tensor([[True, False, True]])
    image, target = BatchPreparation(wrapped)({"image": logits, "label": label, "labelled": labelled})
    value = wrapped(image, target)
    swapped = torch.stack([logits[:, 1], logits[:, 0], logits[:, 2]], 1)
    torch.testing.assert_close(wrapped(swapped, target), value), "the class that is lacking is a part of the background"


def test_a_loss_that_cannot_leave_classes_out_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"leaves out classes which a case lacks, .* got DiceLoss: take one of"):
        build_loss(monai.losses.DiceLoss(softmax=True), plan(partly_labelled=True))


REGIONS: dict[str, Any] = {"regions": {"both": (1, 2), "spleen": (2,)}, "regions_order": (1, 2)}


@pytest.mark.parametrize(
    ("loss", "changes", "words"),
    [
        (IoULoss(softmax=True), REGIONS, "sigmoid=True for regions that overlap, but got softmax=True in IoULoss"),
        (IoUCELoss(softmax=True), REGIONS, "softmax=True in IoUCELoss"),
        (IoULoss(softmax=True), {"ignore": 9}, "ignore_index=3, the number of the value 9"),
        (nn.MSELoss(), {"ignore": 9}, "got None in MSELoss"),
        (IoULoss(softmax=True, ignore_index=9), {"ignore": 9}, "got 9 in IoULoss"),
        *(
            (loss, {}, f"got sigmoid=True and include_background=False in {type(loss).__name__}: write")
            for loss in (
                IoULoss(sigmoid=True, include_background=False),
                InstanceIoULoss(sigmoid=True, include_background=False),
                monai.losses.DiceLoss(sigmoid=True, include_background=False, to_onehot_y=True),
            )
        ),
    ],
)
def test_a_loss_that_contradicts_the_labels_is_refused(loss: nn.Module, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        build_loss(loss, plan(**changes))
    assert re.fullmatch(r"Expected .+, but .+: .+\.", str(caught.value)), str(caught.value)


def test_fitting_losses_are_taken_as_they_are() -> None:
    loss = GeneralizedIoULoss(sigmoid=True, ignore_index=3)
    assert build_loss(loss, plan(ignore=9, **REGIONS)) is loss
    dice = monai.losses.DiceLoss(sigmoid=True)
    assert build_loss(dice, plan(**REGIONS)) is dice
    # the background of classes that exclude each other is trained by one term at least
    for whole in (
        IoULoss(sigmoid=True),
        IoULoss(softmax=True, include_background=False),
        IoUCELoss(sigmoid=True, include_background=False),
        monai.losses.DiceCELoss(sigmoid=True, include_background=False, to_onehot_y=True),
    ):
        assert build_loss(whole, plan()) is whole
        logits = torch.randn(1, 3, 6, 6, 6, requires_grad=True)
        whole(logits, torch.randint(0, 3, (1, 1, 6, 6, 6))).backward()
        assert logits.grad is not None
        assert logits.grad[:, 0].abs().sum() > 0


def test_instances_of_regions_ignore_and_overlap() -> None:
    loss = build_loss(IoUCELoss(sigmoid=True, ignore_index=3), plan(ignore=9, **REGIONS), instance=True)
    target = torch.zeros(1, 3, 8, 8, 8)
    target[:, 0] = 1
    target[:, 0, :3], target[:, 1, :3], target[:, 2, :1] = 0, 1, 1
    target[:, :, 6:] = 0  # ignored
    logits = torch.randn(1, 3, 8, 8, 8, requires_grad=True)
    value = loss(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    assert float(gradient[:, :, 6:].abs().max()) == 0
    assert float(gradient[:, 1:, :6].abs().min()) > 0
