"""Losses where torch is used in an unusual way: memory that lies otherwise, no gradients, one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import CASES, Case, over, pair
from monai.data.meta_tensor import MetaTensor
from torch import Tensor, nn

from monai_iou import (
    AffinityLoss,
    ContextAttentionLoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    LovaszHingeLoss,
    LovaszSoftmaxLoss,
    MultiScaleLoss,
    WeightedCrossEntropyLoss,
)


def scales(downsample: str, **options: Any) -> nn.Module:
    """MultiScaleLoss of one tensor, of which a part is the second output."""
    loss = MultiScaleLoss(IoUCELoss(**options), downsample=downsample)

    class Scales(nn.Module):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            value: Tensor = loss([input, input[..., ::2, :2, :1]], target)
            return value

    return Scales()


ALL = {**CASES, **{name: Case(scales, {"downsample": name}) for name in ("area", "max", "nearest")}}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second number": lambda values: torch.stack([values, values], -1)[..., 0],
    "channels last": lambda values: values.contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda values: values.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch last": lambda values: values.movedim(0, -1).contiguous().movedim(-1, 0),
    "a part": lambda values: nn.functional.pad(values, (1, 2, 3, 4))[..., 3:-4, 1:-2],
}


def results(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@over(ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_may_lie_anyhow(case: Case, layout: str) -> None:
    logits, labels = pair()
    lay, loss = LAYOUTS[layout], case(softmax=True)
    moved = lay(logits)
    assert layout == "a part" or not moved.is_contiguous()
    found, expected = results(loss, moved, lay(labels)), results(loss, logits, labels)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@over(ALL)
@pytest.mark.parametrize("axis", [0, -1])
def test_one_number_may_stand_for_many(case: Case, axis: int) -> None:
    logits, labels = pair()
    narrow, shape, loss = logits.narrow(axis, 0, 1), logits.shape, case(softmax=True)
    leaf = narrow.clone().requires_grad_()
    target = labels.narrow(axis, 0, 1).expand_as(labels)
    (found,) = torch.autograd.grad(loss(leaf.expand(shape), target), leaf)
    _, expected = results(loss, narrow.expand(shape).contiguous(), target.contiguous())
    torch.testing.assert_close(found, expected.sum(axis, keepdim=True), rtol=1e-5, atol=1e-6)


@over(ALL)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_value_needs_no_gradients(case: Case, mode: Callable[[], Any]) -> None:
    logits, labels = pair()
    loss = case(softmax=True)
    expected = loss(logits, labels)
    with mode():
        made = logits.clone(), labels.clone()
        assert torch.equal(loss(logits, labels), expected)
        assert torch.equal(loss(*made), expected)
    assert torch.equal(loss(*made), expected)


class OwnLoss(nn.Module):
    """A loss of the user's with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        errors: Tensor = (input.softmax(1) - target.float()) ** 2 * self.weight.view(1, 3, 1, 1, 1)
        return errors.mean()


WEIGHT = torch.tensor([1.0, 2.0, 3.0])
WEIGHTED: dict[str, Callable[[Any], nn.Module]] = {
    "iou": lambda weight: IoULoss(softmax=True, weight=weight),
    "lovasz": lambda weight: LovaszSoftmaxLoss(softmax=True, weight=weight),
    "entropy": lambda weight: WeightedCrossEntropyLoss(weight),
    "iou_ce": lambda weight: IoUCELoss(softmax=True, weight=weight),
    "without background": lambda weight: IoUCELoss(softmax=True, include_background=False, weight=weight),
    "pos_weight": lambda weight: WeightedCrossEntropyLoss(sigmoid=True, pos_weight=weight),
    "focal": lambda weight: IoUFocalLoss(sigmoid=True, pos_weight=weight),
    "scales": lambda weight: MultiScaleLoss(IoUCELoss(softmax=True, weight=weight), [1.0]),
}


@pytest.mark.parametrize("make", WEIGHTED.values(), ids=WEIGHTED.keys())
def test_a_loss_that_inference_mode_made_can_train(make: Callable[[Any], nn.Module]) -> None:
    logits, labels = pair()
    with torch.inference_mode():
        loss = make(WEIGHT.tolist())
    assert not any(buffer.is_inference() for buffer in loss.buffers())
    torch.testing.assert_close(results(loss, logits, labels), results(make(WEIGHT), logits, labels))


def test_the_copies_for_coarser_outputs_can_train_where_inference_mode_made_them() -> None:
    logits, labels = pair()
    loss = OwnLoss()
    with torch.inference_mode():
        scales = MultiScaleLoss(loss, [0.5, 0.5])
    outputs = [logits.clone().requires_grad_(), logits[..., ::2, ::2, ::2].clone().requires_grad_()]
    gradients = torch.autograd.grad(scales(outputs, labels), outputs)
    assert all(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("make", WEIGHTED.values(), ids=WEIGHTED.keys())
def test_weights_lose_their_metadata(make: Callable[[Any], nn.Module]) -> None:
    """It would cost time in every operation of the loss, and travel on into an engine's output."""
    logits, labels = pair()
    loss = make(MetaTensor(WEIGHT))
    assert {type(buffer) for buffer in loss.buffers()} == {Tensor}
    value = loss(logits, labels)
    assert type(value) is Tensor
    assert torch.equal(value, make(WEIGHT)(logits, labels))


BREAKING = {"lovasz", "lovasz_histogram", "instance", "instance_blob"}


@over({name: case for name, case in ALL.items() if name not in BREAKING})
def test_one_graph_of_torch_compile(case: Case) -> None:
    torch.compiler.reset()
    logits, labels = pair()
    loss = case(softmax=True)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, logits, labels), results(loss, logits, labels))


@pytest.mark.parametrize("downsample", ["max", "nearest"])
def test_the_loss_of_an_affinity_is_one_graph(downsample: str) -> None:
    torch.compiler.reset()
    _, labels = pair((2, 3, 6, 6))
    affinity = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0))
    loss = AffinityLoss([3, 3], downsample)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, affinity, labels), results(loss, affinity, labels))


@pytest.mark.parametrize(
    "loss",
    [
        CASES["lovasz_histogram"](softmax=True),
        CASES["lovasz"](softmax=True),
        LovaszHingeLoss(),
        ContextAttentionLoss(2.0),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_losses_that_break_the_graph_still_compile(loss: nn.Module) -> None:
    torch.compiler.reset()
    logits, labels = pair()
    if isinstance(loss, (LovaszHingeLoss, ContextAttentionLoss)):
        logits, labels = logits[:, :1].sigmoid().contiguous(), labels.clamp_max(1)
    compiled = torch.compile(loss, backend="eager")
    torch.testing.assert_close(results(compiled, logits, labels), results(loss, logits, labels))
