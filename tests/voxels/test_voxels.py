"""Properties of voxel_sums: additivity, what takes part, small lesions, half precision, errors, memory."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monai_iou import IoULoss, VoxelSums, use_kernel, voxel_sums
from monai_iou.voxels.compact_labels import compact_labels


def volume(seed: int = 0, images: int = 2, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, 4, 5, 3, generator=generator)
    return logits, torch.randint(0, classes, (images, 1, 4, 5, 3), generator=generator)


def assert_same(found: VoxelSums, expected: VoxelSums) -> None:
    torch.testing.assert_close(found.rows, expected.rows)


@given(seed=st.integers(0, 1000), classes=st.integers(2, 6))
@settings(deadline=None, max_examples=15)
def test_sums_add_over_images_parts_masks_and_regions(seed: int, classes: int) -> None:
    logits, labels = volume(seed, 2, classes)
    whole = voxel_sums(logits, labels)
    assert_same(voxel_sums(logits[:, :, :1], labels[:, :, :1]) + voxel_sums(logits[:, :, 1:], labels[:, :, 1:]), whole)
    assert_same(voxel_sums(logits[:1], labels[:1]) + voxel_sums(logits[1:], labels[1:]), whole.over_batch())
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    assert_same(voxel_sums(logits.flatten(2)[..., order], labels.flatten(2)[..., order]), whole)
    groups = torch.randint(0, 4, labels.shape, generator=torch.Generator().manual_seed(seed))
    regions = voxel_sums(logits, labels, groups=groups, num_groups=4)
    assert_same(regions.over_groups(), whole)
    for region in range(4):
        part = voxel_sums(logits, labels, mask=groups == region)
        torch.testing.assert_close(regions.rows[..., region], part.rows)
    maps = torch.nn.functional.one_hot(labels[:, 0], classes).movedim(-1, 1)
    assert_same(voxel_sums(logits, maps), whole)


def test_a_mask_equals_removing_voxels() -> None:
    logits, labels = volume(images=1)
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4)) > 0.4
    kept = mask[0, 0]
    expected = voxel_sums(logits[:, :, kept], labels[:, :, kept])
    assert_same(voxel_sums(logits, labels, mask=mask), expected)
    assert_same(voxel_sums(logits, torch.where(mask, labels, -100), ignore_index=-100), expected)


@pytest.mark.parametrize("kernel", ["reference", "tiled"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_ignored_voxels_have_no_effect_whatever_they_hold(kernel: str, bad: float) -> None:
    logits, labels = volume()
    labels[:, :, 0] = 255
    wrong = logits.clone()
    wrong[:, :, 0] = bad
    results = []
    for values in (logits, wrong):
        leaf = values.clone().requires_grad_()
        with use_kernel(kernel):
            sums = voxel_sums(leaf, labels, ignore_index=255).rows
        (gradient,) = torch.autograd.grad(sums.square().sum(), leaf)
        assert not gradient[:, :, 0].any()
        results.append((sums.detach(), gradient))
    torch.testing.assert_close(*results)


def test_all_voxels_ignored_give_zero_sums_and_gradient() -> None:
    logits, labels = volume()
    logits.requires_grad_()
    sums = voxel_sums(logits, torch.full_like(labels, 255), ignore_index=255).rows
    assert not sums.any()
    (gradient,) = torch.autograd.grad(sums.sum(), logits)
    assert not gradient.any()


def test_eight_voxels_in_a_large_volume_keep_their_digits() -> None:
    side = 256
    labels = torch.zeros(1, 1, side, side, side, dtype=torch.uint8)
    labels[..., 100:102, 7:9, 200:202] = 1
    logits = torch.stack((torch.full((side,) * 3, 4.0), torch.full((side,) * 3, -4.0)))[None]
    logits[0, 1, 100:102, 7:9, 200:202] = 3.7
    sums = voxel_sums(logits, labels)
    outside, inside = torch.tensor([8.0, 0.3], dtype=torch.float64).neg().sigmoid()
    background = side**3 - 8
    expected = background * outside + 8 * inside
    assert sums.target.tolist() == [[background, 8]]
    torch.testing.assert_close(sums.intersection[0, 1].double(), 8 * inside, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.prediction[0, 1].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_volumes_are_finite(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 2, 128, 128, 128, generator=torch.Generator().manual_seed(0)).mul_(10).to(dtype)
    labels = torch.zeros(1, 1, 128, 128, 128, dtype=torch.uint8)
    logits.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = IoULoss(softmax=True)(logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_backward_keeps_little_more_than_the_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 14, 96, 96, 96, requires_grad=True)
    labels = torch.randint(0, 14, (1, 1, 96, 96, 96)).to(dtype)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        IoULoss(softmax=True)(logits, labels)
    assert logits.nbytes < sum(kept.values()) <= 1.10 * logits.nbytes


def test_double_backward_works_by_the_reference_and_says_so_elsewhere() -> None:
    logits, labels = volume()
    for kernel in ("reference", "tiled"):
        leaf = logits.double().requires_grad_()
        with use_kernel(kernel):
            loss = IoULoss(softmax=True)(leaf, labels)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        if kernel == "reference":
            gradient.square().sum().backward()
            assert leaf.grad is not None
            assert leaf.grad.any()
        else:
            with pytest.raises(RuntimeError, match=r"^Expected one derivative .* `with monai_iou.use_kernel"):
                gradient.square().sum().backward()


@pytest.mark.parametrize("kernel", ["tiled", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_missing_second_derivative_does_not_pass_for_zero(kernel: str) -> None:
    leaf = torch.randn(1, 2, 128, 64).requires_grad_()
    with use_kernel(kernel):
        sums = voxel_sums(leaf, torch.zeros(1, 1, 128, 64))
    (gradient,) = torch.autograd.grad(sums.intersection.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^Expected one derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    ("kernel", "channels"),
    [("tiled", 1), ("tiled", 2), ("tiled", 3), pytest.param("compiled", 3, marks=pytest.mark.slow)],
)
def test_nor_does_it_where_the_derivative_is_asked_for_by_the_input_alone(kernel: str, channels: int) -> None:
    leaf = torch.randn(1, channels, 128, 64).requires_grad_()
    labels = torch.randint(0, 2, (1, 1, 128, 64))
    with use_kernel(kernel):
        loss = IoULoss(sigmoid=channels == 1, softmax=channels > 1)(leaf, labels)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    penalty = gradient.square().sum() + leaf.square().sum()
    with pytest.raises(RuntimeError, match=r"^Expected one derivative"):
        torch.autograd.grad(penalty, leaf)


INTEGRAL = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", INTEGRAL)
def test_every_label_dtype(dtype: torch.dtype) -> None:
    logits, labels = volume()
    assert_same(voxel_sums(logits, labels.to(dtype)), voxel_sums(logits, labels))
    two = labels.clamp_max(1)
    assert_same(voxel_sums(logits[:, :2], two.bool()), voxel_sums(logits[:, :2], two.to(dtype)))
    wrong = labels.clone()
    wrong[1, 0, 2, 2, 2] = 7
    with pytest.raises(ValueError, match=r"^Expected `target` to hold the labels 0 to 2 .* but got 7: map the labels"):
        voxel_sums(logits, wrong.to(dtype))


@pytest.mark.parametrize("value", [-1, 3, 254, 255, 256, 2**32, 2**32 + 1])
def test_wrong_labels_are_named_also_where_a_byte_would_wrap(value: int) -> None:
    logits, labels = volume()
    labels[0, 0, 1, 1, 1] = value
    for ignore_index in (None, 2):
        with pytest.raises(ValueError, match=rf"but got {value}: map the labels to consecutive classes"):
            voxel_sums(logits, labels, ignore_index=ignore_index)
    assert voxel_sums(logits, labels, ignore_index=value).count[0, 0] == 59


def test_soft_targets_in_one_channel_are_an_error_that_says_what_to_do() -> None:
    logits, labels = volume()
    soft = labels.float()
    soft[0, 0, 0, 0, 0] = 0.25
    message = (
        r"^Expected `target` to hold the labels 0 to 2 of an input with 3 channels, but got 0\.25: "
        r"give a soft target one channel per class, shape \(B, 3, \*S\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        voxel_sums(logits, soft)
    with pytest.raises(
        ValueError, match=r"^Expected `target` to hold per-class values between 0 and 1, but got 2\.0: "
    ):
        voxel_sums(logits, torch.full_like(logits, 2.0))


def test_many_classes_have_labels_of_two_bytes() -> None:
    labels = torch.arange(300)[None]
    compact, has_ignored = compact_labels(labels, 300, 299, None)
    assert (compact.dtype, has_ignored, compact[0, 298].item(), compact[0, 299].item()) == (torch.int16, True, 298, -1)
    sums = voxel_sums(torch.zeros(1, 300, 300), labels[None], ignore_index=299)
    assert sums.target.sum() == 299


def test_torch_compile_of_a_model_with_its_loss() -> None:
    torch.manual_seed(0)
    model = torch.nn.Conv3d(1, 3, 1)
    image, labels = torch.randn(2, 1, 4, 5, 3), volume()[1]
    loss = IoULoss(softmax=True, ignore_index=2)
    expected = loss(model(image), labels)
    compiled = torch.compile(lambda image, labels: loss(model(image), labels), backend="aot_eager", fullgraph=True)
    found = compiled(image, labels)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize("kernel", ["reference", "tiled"])
@pytest.mark.parametrize("margin", [9.0, 14.0, 20.0, 40.0])
def test_cross_entropy_of_confident_voxels_keeps_its_digits(kernel: str, margin: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (1, 1, 4096), generator=generator)
    logits = torch.randn(1, 3, 4096, generator=generator).scatter_add_(1, labels, torch.full((1, 1, 4096), margin))
    own = logits.double().gather(1, labels)
    others = torch.where(torch.arange(3)[:, None] == labels, -torch.inf, logits.double() - own)
    expected = others.exp().sum(1).log1p()  # -ln p = ln(1 + sum of the others' exp)
    with use_kernel(kernel):
        found = voxel_sums(logits, labels).cross_entropy.double().sum()
    torch.testing.assert_close(found, expected.sum(), rtol=1e-6, atol=0)


def test_sums_of_other_shapes_are_not_added() -> None:
    """torch would count the one image once for each of the others."""
    logits, labels = torch.randn(3, 2, 8, 8), torch.randint(0, 2, (3, 1, 8, 8))
    first, last = voxel_sums(logits[:2], labels[:2]), voxel_sums(logits[2:], labels[2:])
    message = "images, classes and regions, shape (2, 2), but got (1, 2): add over the images first, by `over_batch()`."
    with pytest.raises(ValueError, match=re.escape(message)):
        first + last
    assert (first.over_batch() + last.over_batch()).count.sum() == voxel_sums(logits, labels).count.sum()


@pytest.mark.parametrize(
    ("number", "kind", "problem"),
    [
        (-3, ValueError, "to be at least 1, but got -3"),
        (0, ValueError, "to be at least 1, but got 0"),
        ("2", TypeError, "to be an integer, but got str"),
        (2.0, TypeError, "to be an integer, but got float"),
    ],
)
def test_a_number_of_regions_is_one(number: Any, kind: type[Exception], problem: str) -> None:
    logits, labels = torch.randn(1, 2, 6), torch.randint(0, 2, (1, 1, 6))
    groups = torch.arange(6).view(1, 1, 6) // 2
    text = f"Expected `num_groups` {problem}: give the number of regions, or leave it out."
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        voxel_sums(logits, labels, groups=groups, num_groups=number)
    assert voxel_sums(logits, labels, groups=groups, num_groups=np.int64(3)).count.tolist() == [[[2, 2, 2]] * 2]
