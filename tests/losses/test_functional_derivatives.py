"""torch.func's derivatives: those of autograd, also where a logit is exactly 0, whatever the kernel chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_iou import GeneralizedIoULoss, IoUCELoss, IoULoss, LovaszSoftmaxLoss, WeightedCrossEntropyLoss, use_kernel

LOSSES = {
    "iou": (IoULoss(softmax=True), True),
    "iou_ce": (IoUCELoss(softmax=True), True),
    "generalized": (GeneralizedIoULoss(softmax=True), True),
    "iou_sigmoid": (IoULoss(sigmoid=True), False),
    "iou_ce_sigmoid": (IoUCELoss(sigmoid=True), False),
    "ce_sigmoid": (WeightedCrossEntropyLoss(sigmoid=True), False),
    "focal_sigmoid": (WeightedCrossEntropyLoss(sigmoid=True, gamma=2.0), False),
    "lovasz_sorted": (LovaszSoftmaxLoss(bins=None, softmax=True), True),
}


def case(zeros: bool, softmax: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 3, 2, generator=generator, dtype=torch.float64)
    if zeros:
        logits[0, :, 0] = 0.0
    labels = torch.randint(0, 2, (1, 1, 3, 2), generator=generator)
    maps = torch.cat([1 - labels, labels], 1).double()
    return logits, labels if softmax else maps, torch.randn(logits.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("zeros", [False, True], ids=["any logits", "some are 0"])
@pytest.mark.parametrize("name", LOSSES)
def test_jvp_is_the_slope_along_the_direction(name: str, zeros: bool) -> None:
    loss, softmax = LOSSES[name]
    logits, target, direction = case(zeros, softmax)
    with use_kernel("reference"):
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, target), leaf)
        value, slope = torch.func.jvp(lambda x: loss(x, target), (logits,), (direction,))
        torch.testing.assert_close(value, loss(logits, target))
    torch.testing.assert_close(slope, (gradient * direction).sum())


@pytest.mark.parametrize("name", LOSSES)
def test_jacrev_is_the_gradient(name: str) -> None:
    loss, softmax = LOSSES[name]
    logits, target, _ = case(False, softmax)
    with use_kernel("reference"):
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, target), leaf)
        torch.testing.assert_close(torch.func.jacrev(lambda x: loss(x, target))(logits), gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_the_hessian_is_that_of_autograd(name: str) -> None:
    loss, softmax = LOSSES[name]
    logits, target, _ = case(False, softmax)
    with use_kernel("reference"):
        expected = torch.autograd.functional.hessian(lambda x: loss(x, target), logits)
        torch.testing.assert_close(torch.func.hessian(lambda x: loss(x, target))(logits), expected)


@pytest.mark.parametrize("kernel", ["auto", "tiled"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_kernel_has_to_be_chosen(name: str, kernel: str) -> None:
    loss, softmax = LOSSES[name]
    logits, target, direction = case(False, softmax)
    leaf = logits.clone().requires_grad_()
    with use_kernel(kernel):
        (gradient,) = torch.autograd.grad(loss(leaf, target), leaf)
        torch.testing.assert_close(torch.func.grad(lambda x: loss(x, target))(logits), gradient)
        _, slope = torch.func.jvp(lambda x: loss(x, target), (logits,), (direction,))
        torch.testing.assert_close(slope, (gradient * direction).sum())
        half = torch.func.grad(lambda x: loss(x, target))(logits.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", ["auto", "tiled"])
def test_the_derivative_of_a_step_by_the_parameters_of_a_network(kernel: str) -> None:
    """The other tensors of a transformed function are wrapped too, and their losses are still those of autograd."""
    torch.manual_seed(0)
    network, loss = torch.nn.Conv1d(1, 2, 3, padding=1), IoUCELoss(softmax=True)
    image, labels = torch.randn(2, 1, 8), torch.randint(0, 2, (2, 1, 8))
    parameters = {name: each.detach() for name, each in network.named_parameters()}
    with use_kernel(kernel):
        expected = torch.autograd.grad(loss(network(image), labels), list(network.parameters()))
        found = torch.func.grad(lambda p: loss(torch.func.functional_call(network, p, (image,)), labels))(parameters)
    torch.testing.assert_close(list(found.values()), list(expected))


TIES = [[0.0, 0.0, 0.0], [1.0, 1.0, -2.0], [-1.0, 2.0, 2.0], [0.5, 0.0, -torch.inf]]


@pytest.mark.parametrize("logits", TIES, ids=str)
@pytest.mark.parametrize("label", [0, 1])
def test_derivatives_of_equal_logits_are_those_of_torch(logits: list[float], label: int) -> None:
    """The largest logits are equal at the start of a training from weights of 0, for instance."""
    x, target = torch.tensor(logits, dtype=torch.float64).reshape(1, 3, 1), torch.tensor([[label]])
    ours, theirs = (lambda x: WeightedCrossEntropyLoss()(x, target[:, None])), (lambda x: F.cross_entropy(x, target))
    with use_kernel("reference"):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-14, atol=0)
        for derivative in (torch.func.jacrev, torch.func.hessian):
            torch.testing.assert_close(derivative(ours)(x), derivative(theirs)(x))
        hessian = torch.autograd.functional.hessian(ours, x)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(theirs, x))


def test_the_gradient_of_a_confident_voxel_keeps_its_digits() -> None:
    """1 - p of the largest logit, which rounding would make 0 in 1 - 1 / (1 + rest)."""
    x = torch.tensor([20.0, 0.0, -3.0]).reshape(1, 3, 1)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        with use_kernel("reference"):
            gradients += torch.autograd.grad(WeightedCrossEntropyLoss()(leaf, torch.tensor([[[0]]])), leaf)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=0)
