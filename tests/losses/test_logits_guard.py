"""A loss without an activation says once that its input looks like logits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from monai_iou import (
    AttentionSupervisionLoss,
    CompoundLoss,
    ContextAttentionLoss,
    FocalIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoULoss,
    MultiScaleLoss,
    WeightedCrossEntropyLoss,
)
from monai_iou.losses import pass_loss

MESSAGE = (
    r"^Expected `input` to hold probabilities between 0 and 1, because no activation is set, but got -?[0-9.]+: "
    r"these look like logits, so set softmax=True or sigmoid=True\.$"
)
LOGITS = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (2, 1, 6, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_loss, "_has_warned", False)


@pytest.mark.parametrize("make", [IoULoss, FocalIoULoss, IoUCELoss, InstanceIoULoss])
def test_logits_are_named_once_per_process(make: Any) -> None:
    with pytest.warns(UserWarning, match=MESSAGE):
        make()(LOGITS, LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()(LOGITS, LABELS)


IN_ANOTHER: dict[str, Any] = {
    "compound": lambda compound: compound,
    "scales": MultiScaleLoss,
    "attention": lambda compound: AttentionSupervisionLoss(compound, ContextAttentionLoss()),
    "instances": lambda compound: InstanceIoULoss(softmax=True, global_loss=compound),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", IN_ANOTHER)
def test_every_term_of_a_compound_looks(name: str, last: bool) -> None:
    """The cross-entropy takes logits by default, and the IoU loss beside it took them for probabilities."""
    terms = [IoULoss(to_onehot_y=True), WeightedCrossEntropyLoss()]
    loss = IN_ANOTHER[name](CompoundLoss(terms[::-1] if last else terms))
    with pytest.warns(UserWarning, match=MESSAGE):
        loss(LOGITS, LABELS)


@pytest.mark.filterwarnings("error")
def test_probabilities_activations_and_ignored_voxels_are_silent() -> None:
    IoULoss()(LOGITS.softmax(1), LABELS)
    IoULoss()(LOGITS.softmax(1).half(), LABELS)
    IoULoss(softmax=True)(LOGITS, LABELS)
    IoULoss(sigmoid=True)(LOGITS, LABELS)
    IoULoss(other_act=torch.sigmoid)(LOGITS, LABELS)
    spoilt = torch.where(LABELS == 2, LOGITS * 100, LOGITS.softmax(1))
    IoULoss(ignore_index=2)(spoilt, LABELS)
    assert not pass_loss._has_warned


def test_a_loss_looks_at_its_first_input_only(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    look = pass_loss.warn_of_logits
    monkeypatch.setattr(pass_loss, "warn_of_logits", lambda *inputs: looks.append(1) or look(*inputs))
    loss = IoULoss()
    for _ in range(3):
        loss(LOGITS.softmax(1), LABELS)
    assert len(looks) == 1


def test_torch_compile_does_not_look() -> None:
    compiled = torch.compile(IoULoss(), backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(LOGITS, LABELS)
