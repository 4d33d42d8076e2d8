"""Losses of whole volumes: the digits of a small lesion, half precision of several classes, and compiled training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loss_cases import CASES, Case, over
from torch import Tensor, nn

from monai_iou import IoUCELoss, IoULoss, use_kernel, voxel_sums
from monai_iou.voxels import compiled

SIDE = 256
needs_compiler = pytest.mark.skipif(not compiled.is_available(), reason="there is no C++ compiler")
KERNELS = ["tiled", pytest.param("compiled", marks=[needs_compiler, pytest.mark.slow])]


@pytest.fixture(scope="module")
def small_lesion() -> tuple[Tensor, Tensor]:
    """Return logits (1, 2, 256, 256, 256) with a ramp along the last axis, and a label map with 8 voxels of class 1."""
    labels = torch.zeros(1, 1, SIDE, SIDE, SIDE, dtype=torch.uint8)
    labels[..., 100:102, 7:9, 200:202] = 1
    logits = torch.zeros(1, 2, SIDE, SIDE, SIDE)
    logits[:, 1] = torch.arange(SIDE) / 128 - 9  # exact in float32
    logits[0, 1, 100:102, 7:9, 200:202] = -0.25
    return logits, labels


def expected_sums() -> dict[str, float]:
    """Sum the same voxels in float64, a column of the ramp at a time."""
    ramp = [column / 128 - 9 for column in range(SIDE)]
    copies = [SIDE * SIDE - (4 if column in (200, 201) else 0) for column in range(SIDE)]
    found = [1 / (1 + math.exp(-x)) for x in ramp]
    inside = 1 / (1 + math.exp(0.25))
    return {
        "intersection": 8 * inside,
        "prediction": math.fsum(n * p for n, p in zip(copies, found, strict=True)) + 8 * inside,
        "background": math.fsum(n * math.log1p(math.exp(x)) for n, x in zip(copies, ramp, strict=True)),
        "lesion": 8 * math.log1p(math.exp(0.25)),
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_eight_voxels_in_a_large_volume_keep_their_digits(kernel: str, small_lesion: tuple[Tensor, Tensor]) -> None:
    logits, labels = small_lesion
    expected = expected_sums()
    with use_kernel(kernel), torch.no_grad():
        sums = voxel_sums(logits, labels)
        loss = IoUCELoss(softmax=True, include_background=False)
        value = loss(logits, labels)
    found = {
        "intersection": sums.intersection[0, 1],
        "prediction": sums.prediction[0, 1],
        "background": sums.cross_entropy[0, 0],
        "lesion": sums.cross_entropy[0, 1],
    }
    for name, total in expected.items():
        assert found[name].item() == pytest.approx(total, rel=1e-5), name
    assert sums.target.tolist() == [[SIDE**3 - 8, 8]]
    iou = expected["intersection"] / (expected["prediction"] + 8 - expected["intersection"])
    entropy = (expected["background"] + expected["lesion"]) / SIDE**3
    assert loss.last_terms["cross_entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert value.item() == pytest.approx(1 - iou + entropy, rel=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradient_of_eight_voxels_in_a_large_volume_keeps_its_digits(
    kernel: str, small_lesion: tuple[Tensor, Tensor]
) -> None:
    logits, labels = small_lesion
    leaf = logits.clone().requires_grad_()
    with use_kernel(kernel):
        IoULoss(softmax=True, include_background=False, smooth_nr=0.0, smooth_dr=0.0)(leaf, labels).backward()
    assert leaf.grad is not None
    sums = expected_sums()
    union = sums["prediction"] + 8 - sums["intersection"]
    iou = sums["intersection"] / union
    for place, inside in (((0, 1, 100, 7, 200), True), ((0, 1, 0, 0, 255), False), ((0, 1, 9, 9, 0), False)):
        p = 1 / (1 + math.exp(-logits[place].item()))
        by_p = -1 / union if inside else iou / union  # dL/dp of 1 - I/U: in the lesion U does not change
        assert leaf.grad[place].item() == pytest.approx(by_p * p * (1 - p), rel=1e-4)


@pytest.fixture(scope="module", params=[64, pytest.param(128, marks=pytest.mark.slow)])
def half_volume(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """Return float16 logits of three classes, some of them large, and labels with a handful of lesions.

    The 64^3 voxels are four times as many as float16 can count.
    """
    generator = torch.Generator().manual_seed(0)
    edges = (request.param,) * 3
    logits = torch.randn(1, 3, *edges, generator=generator)
    logits[:, 0] += 3
    logits[..., :4] *= 3000  # up to 10^4
    labels = torch.zeros(1, 1, *edges, dtype=torch.uint8)
    for corner, size, label in (((30, 30, 30), 2, 1), ((5, 45, 50), 5, 1), ((50, 15, 10), 4, 2), ((2, 2, 0), 3, 2)):
        labels[(0, 0, *(slice(start, start + size) for start in corner))] = label
    return logits.half(), labels


@over(CASES)
def test_half_precision_of_several_classes(case: Case, half_volume: tuple[Tensor, Tensor]) -> None:
    logits, labels = half_volume[0].clone().requires_grad_(), half_volume[1]
    loss = case(softmax=True)
    value = loss(logits, labels)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.float16
    assert logits.grad.isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(value, loss(logits.float(), labels), rtol=1e-4, atol=1e-5)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", ["label", "maps"])
@pytest.mark.parametrize("make", [IoULoss, IoUCELoss])
def test_inductor_compiles_a_model_with_its_loss(make: type[nn.Module], form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.LeakyReLU(), nn.Conv3d(4, 3, 1))
    images, labels = torch.randn(2, 1, 8, 8, 8), torch.randint(0, 3, (2, 1, 8, 8, 8))
    target = nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1).float() if form == "maps" else labels
    loss = make(softmax=True, include_background=False, batch=True)

    def step(images: Tensor, target: Tensor) -> Tensor:
        value: Tensor = loss(model(images), target)
        return value

    results: list[tuple[Tensor, list[Tensor]]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, raised while it traces
        calls: list[Any] = [step, torch.compile(step, backend="inductor")]
        for call in calls:
            model.zero_grad()
            value = call(images, target)
            value.backward()
            results.append((value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (expected, slopes), (found, found_slopes) = results
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(found_slopes) == len(slopes) == 4
    for ours, theirs in zip(found_slopes, slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
