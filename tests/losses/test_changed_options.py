"""Options and weights that are changed after a loss was made act as if the loss had been made with them."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable
from typing import Any

import monai.losses
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from monai_iou import (
    CompoundLoss,
    FocalTverskyLoss,
    InstanceIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    LovaszSoftmaxLoss,
    MultiScaleLoss,
    WeightedCrossEntropyLoss,
)

Made = Callable[[], nn.Module]


def logits(side: int = 8) -> Tensor:
    return torch.randn(2, 3, side, side, side, generator=torch.Generator().manual_seed(side))


def labels() -> Tensor:
    """Class 2 is absent."""
    found = torch.zeros(2, 1, 8, 8, 8, dtype=torch.long)
    found[0, :, 1:4, 2:5, 2:5] = found[1, :, 5:7, :3, 3:8] = 1
    return found


def results(loss: nn.Module, *, scales: bool = False) -> tuple[Tensor, ...]:
    outputs = [logits().requires_grad_(), logits(4).requires_grad_()][: 1 + scales]
    value = loss(outputs if scales else outputs[0], labels())
    return value.detach(), *torch.autograd.grad(value, outputs)


def check_same(changed: nn.Module, made: nn.Module, *, scales: bool = False, traced: bool = False) -> None:
    expected = results(made, scales=scales)
    for loss in (changed, copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        torch.testing.assert_close(results(loss, scales=scales), expected, rtol=0, atol=0)
    if traced:
        torch.compiler.reset()
        compiled = torch.compile(changed, backend="eager", fullgraph=True)
        torch.testing.assert_close(results(compiled, scales=scales), expected)


OPTIONS: list[tuple[str, Any]] = [
    ("empty", "suppress"),
    ("empty", "skip"),
    ("power", 2.0),
    ("power", 1.5),
    ("squared_pred", True),
    ("soft_label", True),
    ("include_background", False),
    ("batch", True),
    ("smooth_nr", 3.0),
]


@pytest.mark.parametrize(("name", "value"), OPTIONS)
@pytest.mark.parametrize("made_of", ["IoULoss", "IoUCELoss", "InstanceIoULoss"])
def test_an_option_of_a_region_loss(made_of: str, name: str, value: Any) -> None:
    if made_of == "IoULoss":
        changed: nn.Module = IoULoss(softmax=True)
        region, made = changed, IoULoss(softmax=True, **{name: value})
    elif made_of == "IoUCELoss":
        changed = compound = IoUCELoss(softmax=True)
        region, made = compound.losses[0], IoUCELoss(softmax=True, **{name: value})
    else:
        options: dict[str, Any] = {"softmax": True, "cells": "prediction"}
        changed = instance = InstanceIoULoss(**options)
        region, made = instance.region_loss, InstanceIoULoss(**options, **{name: value})
    results(changed)  # a call in between must leave nothing behind
    setattr(region, name, value)
    assert getattr(region, name) == value
    check_same(changed, made, traced=made_of == "IoULoss")


def test_squared_pred_and_power_are_one_option() -> None:
    loss = IoULoss(squared_pred=True)
    assert (loss.power, loss.squared_pred) == (2, True)
    loss.squared_pred = False
    assert (loss.power, loss.squared_pred) == (1, False)
    loss.power = 1.5
    loss.squared_pred = False
    assert loss.power == 1.5
    message = (
        "Expected `power` to be left at 1 with squared_pred=True, but got 1.5: set `power` alone, because "
        "squared_pred=True means power=2."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loss.squared_pred = True


@pytest.mark.parametrize(("name", "value"), [("empty", "none"), ("power", 0.5), ("power", "2")])
def test_a_wrong_option_is_refused_as_in_the_constructor(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as made:
        IoULoss(softmax=True, **{name: value})
    loss = IoULoss(softmax=True)
    setattr(loss, name, value)
    with pytest.raises(made.type, match=f"^{re.escape(str(made.value))}$"):
        loss(logits(), labels())


FACTORS: list[tuple[type[IoUCELoss], str]] = [
    (IoUCELoss, "lambda_iou"),
    (IoUCELoss, "lambda_ce"),
    (IoUFocalLoss, "lambda_iou"),
    (IoUFocalLoss, "lambda_focal"),
]


@pytest.mark.parametrize(("kind", "name"), FACTORS)
def test_a_factor(kind: type[IoUCELoss], name: str) -> None:
    made: Any = kind(softmax=True, **{name: 0.1})
    assert getattr(made, name) == 0.1
    changed, multi = kind(softmax=True), MultiScaleLoss(kind(softmax=True))
    weights = changed.weights
    for loss in (changed, multi.loss):
        results(multi, scales=True)
        setattr(loss, name, 0.1)
    assert weights is changed.weights
    assert weights == made.weights
    check_same(changed, made, traced=name == "lambda_ce")
    check_same(multi, MultiScaleLoss(made), scales=True)
    for wrong in (-1.0, float("nan"), "1"):
        with pytest.raises((TypeError, ValueError)) as refused:
            kind(**{name: wrong})
        with pytest.raises(refused.type, match=f"^{re.escape(str(refused.value))}$"):
            setattr(changed, name, wrong)
    assert getattr(changed, name) == 0.1


@pytest.mark.parametrize("kind", [IoUCELoss, IoUFocalLoss])
def test_the_reduction_of_both_terms(kind: type[IoUCELoss]) -> None:
    made, changed = kind(softmax=True, reduction="sum"), kind(softmax=True)
    assert (made.reduction, changed.reduction) == ("sum", "mean")
    changed.reduction = "sum"
    check_same(changed, made)
    changed.losses[0].batch = True
    with pytest.raises(ValueError, match="Expected `reduction` to be 'mean' or 'sum' with batch=True or include_backg"):
        changed.reduction = "none"
    with pytest.raises(ValueError, match="Expected `reduction` to be one of 'mean', 'sum', 'none', but got 'max'"):
        changed.reduction = "max"
    assert changed.reduction == "sum"


def class_weights(loss: Any) -> None:
    loss.losses[1].class_weight.copy_(torch.tensor([5.0, 1, 1]))


WEIGHTED = {"softmax": True, "weight": [1.0, 1, 1]}
MONAI: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
CHANGES: dict[str, tuple[Made, Callable[[Any], Any], Made]] = {
    "gamma": (
        lambda: FocalTverskyLoss(softmax=True),
        lambda loss: setattr(loss, "gamma", 2.0),
        lambda: FocalTverskyLoss(softmax=True, gamma=2.0),
    ),
    "class weights": (
        lambda: IoUCELoss(**WEIGHTED),
        class_weights,
        lambda: CompoundLoss([IoULoss(softmax=True), WeightedCrossEntropyLoss([5, 1, 1])]),
    ),
    "other class weights": (
        lambda: IoULoss(**WEIGHTED),
        lambda loss: setattr(loss, "class_weight", torch.tensor([5.0, 1, 1])),
        lambda: IoULoss(softmax=True, weight=[5, 1, 1]),
    ),
    "list of weights": (
        lambda: IoUCELoss(softmax=True),
        lambda loss: setattr(loss, "weights", [1.0, 0.1]),
        lambda: IoUCELoss(softmax=True, lambda_ce=0.1),
    ),
    "empty": (
        lambda: IoUCELoss(softmax=True),
        lambda loss: setattr(loss.losses[0], "empty", "suppress"),
        lambda: IoUCELoss(softmax=True, empty="suppress"),
    ),
    "a power without soft labels": (
        lambda: IoULoss(softmax=True),
        lambda loss: setattr(loss, "power", 1.5),
        lambda: IoULoss(softmax=True, power=1.5),
    ),
    "another activation": (
        lambda: IoULoss(other_act=torch.sigmoid),
        lambda loss: setattr(loss, "other_act", torch.special.expit),
        lambda: IoULoss(other_act=torch.special.expit),
    ),
    "ignored voxels": (
        lambda: IoUCELoss(softmax=True),
        lambda loss: [setattr(term, "ignore_index", 1) for term in loss.losses],
        lambda: IoUCELoss(softmax=True, ignore_index=1),
    ),
    "factor of MONAI's": (
        lambda: monai.losses.DiceCELoss(**MONAI),
        lambda loss: setattr(loss, "lambda_ce", 0.1),
        lambda: monai.losses.DiceCELoss(**MONAI, lambda_ce=0.1),
    ),
    "another term": (
        lambda: CompoundLoss([IoULoss(softmax=True), WeightedCrossEntropyLoss()]),
        lambda loss: loss.losses.__setitem__(1, FocalTverskyLoss(softmax=True)),
        lambda: CompoundLoss([IoULoss(softmax=True), FocalTverskyLoss(softmax=True)]),
    ),
}


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_loss_reaches_every_scale(name: str, moved: bool) -> None:
    make, change, make_changed = CHANGES[name]
    multi = MultiScaleLoss(make())
    before = results(multi, scales=True)
    if moved:
        multi = multi.double().float()  # which makes other tensors of the buffers
    with torch.no_grad():
        change(multi.loss)
    expected = MultiScaleLoss(make_changed())
    found = results(multi, scales=True)
    torch.testing.assert_close(found, results(expected, scales=True), rtol=1e-6, atol=1e-8)
    assert not torch.equal(found[2], before[2]) or name == "another activation"
    assert multi.ignore_index == expected.ignore_index


@pytest.mark.parametrize(
    "name", ["gamma", *(pytest.param(n, marks=pytest.mark.slow) for n in ("class weights", "list of weights", "empty"))]
)
def test_a_change_reaches_every_scale_of_a_compiled_loss(name: str) -> None:
    make, change, make_changed = CHANGES[name]
    multi = MultiScaleLoss(make())
    torch.compiler.reset()
    compiled = torch.compile(multi, backend="eager", fullgraph=True)
    results(compiled, scales=True)
    change(multi.loss)
    torch.testing.assert_close(results(compiled, scales=True), results(MultiScaleLoss(make_changed()), scales=True))


def test_a_compiled_loss_inside_follows_too() -> None:
    torch.compiler.reset()
    inner = IoUCELoss(softmax=True)
    multi = MultiScaleLoss(torch.compile(inner, backend="eager"))
    torch.testing.assert_close(
        results(multi, scales=True), results(MultiScaleLoss(IoUCELoss(softmax=True)), scales=True)
    )
    inner.lambda_ce = inner.losses[0].smooth_nr = 0.5
    made = MultiScaleLoss(IoUCELoss(softmax=True, lambda_ce=0.5, smooth_nr=0.5))
    torch.testing.assert_close(results(multi, scales=True), results(made, scales=True))


def test_another_way_of_downsampling() -> None:
    multi = MultiScaleLoss(IoUCELoss(softmax=True), downsample="max")
    for downsample in ("area", "nearest", "area"):
        multi.downsample = downsample
        made = MultiScaleLoss(IoUCELoss(softmax=True), downsample=downsample)
        torch.testing.assert_close(results(multi, scales=True), results(made, scales=True))
    multi.downsample, multi.loss = "max", LovaszSoftmaxLoss(softmax=True)
    made = MultiScaleLoss(LovaszSoftmaxLoss(softmax=True), downsample="max")
    torch.testing.assert_close(results(multi, scales=True), results(made, scales=True))


def test_threads_that_share_a_loss() -> None:
    """The loss itself never has the form for fractions, not even during a call at a coarse scale."""
    loss = IoULoss(softmax=True)
    multi = MultiScaleLoss(loss)
    expected, coarse = results(loss)[0], results(multi, scales=True)[0]
    values: list[tuple[Tensor, Tensor]] = []

    def work() -> None:
        for _ in range(10):
            values.append((results(loss)[0], results(multi, scales=True)[0]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(values) == 40
    assert all(torch.equal(fine, expected) and torch.equal(both, coarse) for fine, both in values)


def test_both_copies_of_a_checkpoint_are_loaded() -> None:
    """Earlier versions held the weights twice, and only those of the loss itself could be changed."""
    multi = MultiScaleLoss(IoUCELoss(**WEIGHTED))
    state = multi.state_dict()
    names = ["losses.0.class_weight", "losses.1.class_weight"]
    assert list(state) == [f"{part}.{name}" for part in ("loss", "soft_loss") for name in names]
    earlier = {key: torch.tensor([5.0, 1, 1]) if key.startswith("loss.") else value for key, value in state.items()}
    for around in (multi, nn.Sequential(multi)):
        prefix = "" if around is multi else "0."
        around.load_state_dict({prefix + key: value for key, value in earlier.items()})
        made = MultiScaleLoss(IoUCELoss(softmax=True, weight=[5, 1, 1]))
        torch.testing.assert_close(results(multi, scales=True), results(made, scales=True))


class Own(nn.Module):
    """A loss of the user's own, which remembers earlier calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.inner = IoULoss(softmax=True, weight=[1, 1, 1])
        self.history: list[float] = []
        self.factor = 1.0
        self.register_buffer("mean", torch.ones(()))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        value: Tensor = self.factor * self.scale * self.inner(input, target)
        self.history.append(value.item())
        self.mean = 0.5 * self.mean + value.detach()
        return value


def test_a_loss_of_ones_own_keeps_what_it_remembers_at_each_scale_apart() -> None:
    multi = MultiScaleLoss(Own())
    assert len(list(multi.parameters())) == 2
    outputs, target = [logits(), logits(4)], labels()
    for _ in range(2):
        multi(outputs, target).backward()
    fine, coarse = multi.loss, multi.soft_loss
    assert len(fine.history) == len(coarse.history) == 2
    assert fine.history[0] == fine.history[1]
    assert fine.mean != coarse.mean
    assert fine.scale.grad != coarse.scale.grad
    fine.factor = 3.0
    multi(outputs, target)
    assert coarse.history[2] == pytest.approx(3 * coarse.history[0])
    state = {name: value + index for index, (name, value) in enumerate(multi.state_dict().items())}
    multi.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in multi.state_dict().items())


def test_tensors_that_torch_exchanges_for_a_call_come_back() -> None:
    multi = MultiScaleLoss(IoUCELoss(softmax=True, weight=[1, 1, 1]))
    outputs, target = [logits(), logits(4)], labels()
    before = multi(outputs, target)
    other = {name: torch.tensor([9.0, 1, 1]) for name, _ in multi.named_buffers(remove_duplicate=False)}
    for_call = functional_call(multi, other, (outputs, target), tie_weights=False)
    torch.testing.assert_close(for_call, MultiScaleLoss(IoUCELoss(softmax=True, weight=[9, 1, 1]))(outputs, target))
    assert multi(outputs, target) == before
    assert [value.tolist() for value in multi.state_dict().values()] == [[1, 1, 1]] * 4


@pytest.mark.parametrize("weights", [[np.float32(1), np.float32(0)], np.array([1.0, 0.0]), (1, 0)])
def test_factors_of_other_kinds_reach_every_scale(weights: Any) -> None:
    multi = MultiScaleLoss(IoUCELoss(softmax=True))
    multi.loss.weights = weights
    torch.testing.assert_close(
        results(multi, scales=True), results(MultiScaleLoss(IoUCELoss(softmax=True, lambda_ce=0)), scales=True)
    )


def test_a_change_that_the_constructor_refuses_is_refused() -> None:
    loss = IoUCELoss(softmax=True, average="images")
    with pytest.raises(ValueError, match=r"^Expected `reduction` to be 'mean' with average='images', but got 'sum'"):
        loss.reduction = "sum"
    multi = MultiScaleLoss(IoULoss(softmax=True))
    multi.loss = LovaszSoftmaxLoss()
    with pytest.raises(ValueError, match='use downsample="max"'):
        multi([logits(), logits(4)], labels())


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize(
    "kind", [nn.Parameter, lambda values: values.requires_grad_().exp(), lambda v: [*nn.Parameter(v)]]
)
def test_weights_that_require_a_gradient_are_refused(name: str, kind: Callable[[Tensor], Any]) -> None:
    message = f"Expected `{name}` to be constant, but got a tensor that requires a gradient: pass {name}.detach()."
    losses: list[Any] = [WeightedCrossEntropyLoss, IoUCELoss]
    for loss in losses if name == "pos_weight" else [*losses, IoULoss, LovaszSoftmaxLoss]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            loss(**{name: kind(torch.ones(3))})
        loss(**{name: torch.ones(3)})
