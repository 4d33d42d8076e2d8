"""Random shapes, dtypes, options and values, NaN and infinities among them, for every loss, kernel and metric."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from loss_cases import CASES, Case
from torch import Tensor

from monai_iou import BoundaryIoUMetric, IoUMetric, LesionIoUMetric, use_kernel, voxel_sums
from monai_iou.voxels import compiled

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:single channel prediction")]

EXAMPLES = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
SPOILERS = (float("nan"), float("inf"), float("-inf"))
KERNELS = ("reference", "tiled", *(["compiled"] if compiled.is_available() else []))
LIMITS = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Draw logits, a label map, and options that every loss takes."""
    channels = draw(st.integers(1, 5))
    space = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0, 80.0]))
    logits = torch.randn((draw(st.integers(1, 3)), channels, *space), generator=generator) * scale
    logits = logits.to(draw(st.sampled_from(sorted(LIMITS, key=str))))
    shape = (len(logits), 1, *space)
    if draw(st.booleans()):  # one value everywhere: absent classes
        labels = torch.full(shape, draw(st.integers(0, max(channels - 1, 1))))
    else:
        labels = torch.randint(0, max(channels, 2), shape, generator=generator)
    options: dict[str, Any] = {"softmax" if channels > 1 and draw(st.booleans()) else "sigmoid": True}
    if draw(st.booleans()):
        options["ignore_index"] = 255
        labels = torch.where(torch.rand(shape, generator=generator) < 0.3, 255, labels)
    return logits, labels, options


def values(case: Case, options: dict[str, Any], logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    loss = case(**options)(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def smallest_term(case: Case, options: dict[str, Any], logits: Tensor, labels: Tensor) -> float:
    """Return the least loss of an image and class."""
    with use_kernel("reference"):
        return float(case(**options, reduction="none")(logits, labels).min())


def spoiled(logits: Tensor, labels: Tensor, value: float, seed: int) -> Tensor | None:
    """Put a value at one voxel that is not ignored; None where all are."""
    rows = (labels != 255).nonzero()
    if len(rows) == 0:
        return None
    place = rows[seed % len(rows)].tolist()
    place[1] = seed % logits.shape[1]
    logits = logits.clone()
    logits[tuple(place)] = value
    return logits


STEEP = 1.0  # a root this steep is of a nearly perfect score, where rounding decides its slope


@every_loss
@EXAMPLES
@given(drawn=inputs(), kernel=st.sampled_from(KERNELS[:2]))
def test_every_kernel_gives_what_the_reference_gives_in_double_precision(case: Case, drawn: Any, kernel: str) -> None:
    logits, labels, options = drawn
    with use_kernel("reference"):
        true, slope = values(case, options, logits.double(), labels)
    with use_kernel(kernel):
        value, gradient = values(case, options, logits, labels)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert not value.requires_grad
    limit = LIMITS[logits.dtype] if case.exact else max(LIMITS[logits.dtype], 2e-3)
    # A root has an infinite slope at a perfect score, so that a rounding error there appears as its root.
    power = min(1.0, getattr(case(softmax=True), "gamma", 1.0)) if case.region else 1.0
    limit_of_value = max(limit, (4 * torch.finfo(torch.float32).eps) ** power)
    torch.testing.assert_close(value.double(), true, atol=limit_of_value, rtol=limit)
    # Sorted errors that are equal but for rounding have several subgradients.
    has_one_gradient = case.options.get("bins", 0) is not None
    largest = max(float(slope.abs().max()), 1e-3)
    if case.exact and has_one_gradient and (power == 1.0 or largest < STEEP):
        if power < 1 and smallest_term(case, options, logits.double(), labels) <= 10 * limit_of_value:
            return  # rounding decides the slope of a class whose score is nearly perfect
        allowed = 5 * limit if power == 1.0 else 0.1  # of a score that is nearly perfect, a root has few digits
        assert float((gradient.double() - slope).abs().max()) <= allowed * largest


@every_loss
@EXAMPLES
@given(drawn=inputs(), seed=st.integers(0, 10**6), kernel=st.sampled_from(KERNELS[:2]))
def test_nan_in_is_nan_out(case: Case, drawn: Any, seed: int, kernel: str) -> None:
    logits, labels, options = drawn
    wrong = spoiled(logits, labels, float("nan"), seed)
    if wrong is None:
        return
    with use_kernel(kernel):
        assert case(**options)(wrong, labels).isnan()


@every_loss
@EXAMPLES
@given(drawn=inputs(), seed=st.integers(0, 10**6), value=st.sampled_from(SPOILERS), kernel=st.sampled_from(KERNELS[:2]))
def test_what_is_ignored_may_be_anything(case: Case, drawn: Any, seed: int, value: float, kernel: str) -> None:
    logits, labels, options = drawn
    options = {**options, "ignore_index": 255}
    wrong = logits.clone()
    hidden = labels.clone()
    hidden.view(-1)[seed % hidden.numel()] = 255
    wrong[(hidden == 255).expand_as(wrong)] = value
    with use_kernel(kernel):
        expected, slope = values(case, options, logits, hidden)
        found, gradient = values(case, options, wrong, hidden)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, slope)


@EXAMPLES
@given(drawn=inputs(), seed=st.integers(0, 10**6))
def test_a_class_that_cannot_be_costs_nothing(drawn: Any, seed: int) -> None:
    """A logit of -inf is a probability of 0: as with a very small one, in every loss of sums."""
    logits, labels, options = drawn
    if logits.shape[1] < 2 or "softmax" not in options:
        return
    channel = seed % logits.shape[1]
    labels = torch.where(labels == channel, (channel + 1) % logits.shape[1], labels)
    logits = logits.float().clamp(-20, 20)
    impossible, tiny = logits.clone(), logits.clone()
    impossible[:, channel], tiny[:, channel] = float("-inf"), -200.0
    for name in ("iou", "cross_entropy", "focal", "iou_ce", "focal_tversky"):
        for kernel in KERNELS[:2]:
            with use_kernel(kernel):
                found, gradient = values(CASES[name], options, impossible, labels)
                expected, slope = values(CASES[name], options, tiny, labels)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(gradient, slope)


@pytest.mark.skipif("compiled" not in KERNELS, reason="needs a C++ compiler")
@settings(EXAMPLES, max_examples=25)
@given(seed=st.integers(0, 2**31), spoiler=st.sampled_from([None, *SPOILERS]), power=st.sampled_from([1.0, 2.0]))
def test_the_compiled_kernel_too(seed: int, spoiler: float | None, power: float) -> None:
    """One shape and class count: each other one would be compiled for half a minute."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((1, 3, 20, 20, 20), generator=generator) * 5
    labels = torch.randint(0, 3, (1, 1, 20, 20, 20), generator=generator)
    if spoiler is not None:
        logits.view(-1)[seed % logits.numel()] = spoiler
    with use_kernel("reference"):
        expected = voxel_sums(logits.double(), labels, power=power)
    with use_kernel("compiled"):
        found = voxel_sums(logits, labels, power=power)
    for name in ("intersection", "prediction", "target", "cross_entropy"):
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(expected, name), rtol=1e-4, atol=1e-3, equal_nan=True
        )


@pytest.mark.parametrize("make", [IoUMetric, LesionIoUMetric, BoundaryIoUMetric])
@EXAMPLES
@given(seed=st.integers(0, 2**31), sides=st.lists(st.integers(1, 5), min_size=2, max_size=3), classes=st.integers(2, 4))
def test_metrics_lie_between_0_and_1_or_are_undefined(make: Any, seed: int, sides: list[int], classes: int) -> None:
    generator = np.random.default_rng(seed)
    maps = [torch.from_numpy(generator.integers(0, classes, (1, 1, *sides))) for _ in range(2)]
    metric = make(num_classes=classes)
    found = metric(*maps)
    assert bool(((found >= 0) & (found <= 1) | found.isnan()).all())
    same = make(num_classes=classes)(maps[0], maps[0])
    assert bool(((same == 1) | same.isnan()).all())


@pytest.mark.parametrize("make", [IoUMetric, LesionIoUMetric, BoundaryIoUMetric])
@pytest.mark.parametrize("value", SPOILERS)
@pytest.mark.parametrize("which", [0, 1])
def test_metrics_never_score_what_is_not_finite(make: Any, value: float, which: int) -> None:
    maps = [torch.zeros((1, 1, 4, 4, 4)), torch.zeros((1, 1, 4, 4, 4))]
    maps[which][0, 0, 1, 2, 3] = value
    try:
        found = make(num_classes=2)(*maps)
    except ValueError as error:
        assert str(error).startswith("Expected")  # noqa: PT017
    else:
        assert found.isnan().all()
