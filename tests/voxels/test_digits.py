"""Digits that a pass over one or two classes could lose, with the loops of Numba and with torch's operations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_run import run

from monai_iou import IoUCELoss, LogIoULoss, use_kernel, voxel_sums
from monai_iou.voxels import numba_pass, tiled
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.passes import flatten_voxels
from monai_iou.voxels.reference import compute_sums as reference_sums
from monai_iou.voxels.spec import PassSpec


@pytest.fixture(autouse=True, params=["loops", "operations"])
def loops_or_operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The pass that users have, and that of machines on which Numba does not work."""
    if request.param == "operations":
        monkeypatch.setattr(numba_pass, "covers", lambda *_: False)
    return str(request.param)


def case(spec: PassSpec, kind: str, dtype: torch.dtype, voxels: int) -> Voxels:
    """Random voxels, soft targets with one channel."""
    generator = torch.Generator().manual_seed(voxels)
    classes = 1 if spec.activation == "sigmoid" else 2
    logits = (torch.randn(2, classes, voxels, generator=generator, dtype=torch.float64) * 3).to(dtype)
    labels = torch.randint(0, 2, (2, 1, voxels), generator=generator)
    mask = torch.rand(2, 1, voxels, generator=generator) > 0.4 if kind == "ignored" else None
    target = labels.float() if kind == "float labels" else labels
    return flatten_voxels(logits, torch.rand(2, 1, voxels) if classes == 1 else target, None, mask)


@pytest.mark.parametrize("lesion", [0, 1])
@pytest.mark.parametrize("spec", [PassSpec(cross_entropy=True), PassSpec(power=2), PassSpec(confidence=True)], ids=str)
def test_a_small_class_keeps_its_digits_whichever_it_is(spec: PassSpec, lesion: int) -> None:
    """Eight voxels among two million, found in part, against nearly certain voxels of the other class."""
    generator = torch.Generator().manual_seed(0)
    margin = -12 - torch.rand(1 << 21, generator=generator)
    labels = torch.full((1, 1, 1 << 21), 1 - lesion)
    labels[..., 5:13] = lesion
    margin[5:13] = torch.linspace(-3, 3, 8)
    logits = torch.zeros(1, 2, 1 << 21)
    logits[0, lesion] = margin
    voxels = flatten_voxels(logits, labels, None)
    exact = reference_sums(replace(voxels, logits=logits.double()), spec)
    torch.testing.assert_close(tiled.compute_sums(voxels, spec), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [2, -1, 200, 2**40])
def test_labels_that_are_not_classes_are_found(value: int) -> None:
    labels = torch.ones(1, 1, 40, dtype=torch.long)
    labels[..., 7] = value
    with pytest.raises(ValueError, match=f"{value}"):
        voxel_sums(torch.randn(1, 2, 40), labels)
    with pytest.raises(ValueError, match=r"0\.5"):
        voxel_sums(torch.randn(1, 2, 40), torch.where(labels == value, 0.5, 1.0))


def test_hard_soft_labels_are_a_product_for_any_number_of_classes() -> None:
    for classes in (2, 4):
        voxels = flatten_voxels(torch.randn(1, classes, 60).double(), torch.randint(0, classes, (1, 1, 60)), None)
        spec = PassSpec("softmax", "min_max")
        for found, exact in zip(run(tiled.compute_sums, voxels, spec), run(reference_sums, voxels, spec), strict=True):
            torch.testing.assert_close(found, exact)


def test_loss_and_gradient_agree_with_a_wide_layout() -> None:
    """Channels-last logits are read and written where they are."""
    whole = torch.randn(2, 2, 6, 5, 4)
    labels = torch.randint(0, 2, (2, 1, 6, 5, 4))
    plain = whole.clone().requires_grad_()
    wide = whole.to(memory_format=torch.channels_last_3d).requires_grad_()
    for logits in (plain, wide):
        IoUCELoss(softmax=True)(logits, labels).backward()
    torch.testing.assert_close(wide.grad, plain.grad)


@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize("soft_label", [False, True])
def test_an_absent_class_leaves_the_gradient_its_digits(foreground: bool, soft_label: bool) -> None:
    """Its intersection has the slope 1 / smoothing in LogIoULoss, which no voxel must feel, not even by rounding."""
    logits = torch.randn(1, 2, 1000, generator=torch.Generator().manual_seed(0))
    labels = torch.full((1, 1, 1000), int(foreground))
    target = torch.cat([1 - labels, labels], 1).float() if soft_label else labels
    gradients = []
    for kernel, dtype in (("reference", torch.float64), ("tiled", torch.float32)):
        leaf = logits.to(dtype).requires_grad_()
        with use_kernel(kernel):
            LogIoULoss(softmax=True, soft_label=soft_label)(leaf, target.to(dtype) if soft_label else target).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-9)


def test_a_nearly_absent_background_leaves_the_gradient_its_digits() -> None:
    logits = torch.zeros(1, 2, 500)
    logits[0, 1] = torch.linspace(13, 16, 500)
    labels = torch.ones(1, 1, 500, dtype=torch.long)
    gradients = []
    for kernel, dtype in (("reference", torch.float64), ("tiled", torch.float32)):
        leaf = logits.to(dtype).requires_grad_()
        with use_kernel(kernel):
            LogIoULoss(softmax=True)(leaf, labels).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("regions", ["one", "two in turn"])
@pytest.mark.parametrize("options", [{}, {"power": 1.5}, {"overlap": "min_max"}], ids=str)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
def test_many_equal_voxels_of_a_region_keep_their_digits(
    activation: str | None, options: dict[str, Any], regions: str
) -> None:
    """As an untrained network gives them: of numbers that are added one after the other, the last would be cut off."""
    logits = torch.zeros(1, 2, 1 << 18)
    logits[:, 1] = -5
    inputs = logits if activation else logits.softmax(1)
    labels = (torch.arange(1 << 18) % 1000 == 0).long()[None, None]
    groups = torch.arange(1 << 18)[None, None] % (1 if regions == "one" else 2)
    with use_kernel("reference"):
        exact = voxel_sums(inputs.double(), labels, groups=groups, activation=activation, **options)
    found = voxel_sums(inputs, labels, groups=groups, activation=activation, **options)
    for name in ("intersection", "prediction", "target", "cross_entropy", "count"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("voxels", [150_001, 1 << 19])
def test_sums_and_gradient_are_the_same_to_the_last_bit_for_any_number_of_threads(
    dtype: torch.dtype, voxels: int
) -> None:
    """Whether torch splits the operations, or threads share the tiles."""
    specs = [PassSpec("sigmoid"), PassSpec("sigmoid", "min_max"), PassSpec(cross_entropy=True), PassSpec(power=2)]
    allowed = torch.get_num_threads()
    for spec, kind in zip(specs, ("clean", "clean", "ignored", "float labels"), strict=True):
        read, found = case(spec, kind, dtype, voxels), []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            try:
                found.append(run(tiled.compute_sums, read, spec))
            finally:
                torch.set_num_threads(allowed)
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, -4.6, 0.3])
@pytest.mark.parametrize("channels", [1, 2])
def test_equal_voxels_keep_their_digits(channels: int, value: float) -> None:
    """What is added to a large sum is rounded alike each time, if one after another is added."""
    count = 1 << 19
    logits = torch.zeros(1, channels, count)
    logits[:, -1] = value
    for label in (0, 1):
        target = torch.full((1, 1, count), label, dtype=torch.uint8 if channels == 2 else torch.float32)
        for power in (1.0, 2.0):
            sums = voxel_sums(logits, target, power=power, cross_entropy=True)
            one = voxel_sums(logits[..., :1].double(), target[..., :1], power=power, cross_entropy=True)
            torch.testing.assert_close(sums.rows.double(), one.rows * count, rtol=1e-6, atol=0)
    if channels == 1:
        soft = torch.full((1, 1, count), 0.3)
        found, one = (
            voxel_sums(part, soft[..., : part.shape[2]].to(part), power=2.0)
            for part in (logits, logits[..., :1].double())
        )
        torch.testing.assert_close(found.rows.double(), one.rows * count, rtol=1e-6, atol=0)
