"""Values of targets: every dtype reads alike, marks do not wrap round, wrong values are named."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_iou import IoULoss, LovaszSoftmaxLoss, use_kernel, voxel_sums
from monai_iou.voxels.inputs import in_regions
from monai_iou.voxels.label_errors import label_error, map_error

LOGITS = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[[0, 0, 0, 1, 1, 1, 1, 1]]])
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_dtype_reads_alike(dtype: torch.dtype, channels: int) -> None:
    loss = IoULoss(sigmoid=channels == 1, softmax=channels == 2)
    assert torch.equal(loss(LOGITS[:, :channels], LABELS.to(dtype)), loss(LOGITS[:, :channels], LABELS))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64])
@pytest.mark.parametrize("ignore_index", [-1, -100, 255, 256, 257])
def test_an_absent_mark_ignores_nothing(dtype: torch.dtype, ignore_index: int) -> None:
    marked = IoULoss(softmax=True, ignore_index=ignore_index)(LOGITS, LABELS.to(dtype))
    assert torch.equal(marked, IoULoss(softmax=True)(LOGITS, LABELS))


@pytest.mark.parametrize(("value", "ignore_index"), [(255, -1), (156, -100), (254, None), (2, 255)])
def test_a_value_that_is_not_the_mark_is_named(value: int, ignore_index: int | None) -> None:
    labels = LABELS.clone()
    labels[0, 0, 3] = value
    for target in (labels, labels.to(torch.uint8)):
        with pytest.raises(ValueError, match=f"labels 0 to 1 of an input with 2 channels, but got {value}: "):
            IoULoss(softmax=True, ignore_index=ignore_index)(LOGITS, target)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (float("nan"), "got nan: replace it"),
        (float("inf"), "got inf: replace it"),
        (0.5, r"got 0.5: give a soft target one channel per class, shape \(B, 2, \*S\)"),
        (7.0, "got 7: map the labels to consecutive classes"),
    ],
)
def test_a_float_that_is_no_label_is_named(value: float, found: str) -> None:
    labels = LABELS.float()
    labels[0, 0, 0] = value
    with pytest.raises(ValueError, match=found):
        IoULoss(softmax=True)(LOGITS, labels)


def test_the_mark_of_a_single_map_is_not_blamed() -> None:
    target = torch.tensor([[[255, 0, 0, 1, 1, 0, 2, 0]]])
    with pytest.raises(ValueError, match="values between 0 and 1 for an input with one channel, but got 2: "):
        IoULoss(sigmoid=True, ignore_index=255)(LOGITS[:, :1], target)


def test_numpy_numbers_are_numbers() -> None:
    loss = IoULoss(softmax=True, ignore_index=np.int64(1), smooth_nr=np.float32(1))  # type: ignore[arg-type]
    assert loss.ignore_index == 1


def test_one_channel_takes_a_sigmoid_when_softmax_is_asked_for() -> None:
    with pytest.warns(UserWarning, match="single channel prediction, `softmax=True` ignored"):
        value = IoULoss(softmax=True)(LOGITS[:, :1], LABELS)
    assert torch.equal(value, IoULoss(sigmoid=True)(LOGITS[:, :1], LABELS))


@pytest.mark.parametrize("per_class", [False, True])
def test_nan_at_ignored_voxels_does_not_reach_another_activation(per_class: bool) -> None:
    def softmax(logits: Tensor) -> Tensor:
        return logits.softmax(1)

    logits, labels = LOGITS.clone(), LABELS.clone()
    logits[..., 0] = float("nan")
    labels[..., 0] = 255
    target = torch.cat([labels == 0, labels == 1], 1).float() if per_class else labels
    logits.requires_grad_()
    value = IoULoss(other_act=softmax, ignore_index=255)(logits, target)
    value.backward()
    assert logits.grad is not None
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[..., 0].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_the_message_names_a_value_that_counts(dtype: torch.dtype) -> None:
    labels, mask = torch.tensor([[[255, 0, 7, 1]]], dtype=dtype), torch.tensor([[[0, 1, 1, 1]]])
    logits = torch.zeros(1, 2, 4)
    for kernel in ("reference", "tiled"):
        with use_kernel(kernel), pytest.raises(ValueError, match=r"labels 0 to 1 .* but got 7: "):
            voxel_sums(logits, labels, mask=mask)
        regions = torch.tensor([[[-1, 0, 0, 1]]])
        with use_kernel(kernel), pytest.raises(ValueError, match=r"labels 0 to 1 .* but got 7: "):
            voxel_sums(logits, labels, groups=regions, num_groups=2)


def test_the_message_of_maps_names_a_value_that_counts() -> None:
    maps = torch.tensor([[[9.0, 0, 7, 1], [0.0, 1, 0, 0]]])
    with pytest.raises(ValueError, match=r"between 0 and 1, but got 7\.0: "):
        voxel_sums(torch.zeros(1, 2, 4), maps, activation="sigmoid", mask=torch.tensor([[[0, 1, 1, 1]]]))
    one = torch.tensor([[[255.0, 7, 1]]])
    with pytest.raises(ValueError, match=r"between 0 and 1 for an input with one channel, but got 7\.0: "):
        LovaszSoftmaxLoss(sigmoid=True, ignore_index=255)(torch.zeros(1, 1, 3), one)


def test_an_overwritten_target_has_an_error_of_its_own() -> None:
    for error in (label_error(torch.zeros(1, 1, 4, dtype=torch.long), 2, None), map_error(torch.zeros(1, 2, 4))):
        assert re.fullmatch(
            r"Expected `target` of an earlier call to hold .*, but got another value, which has been overwritten "
            r"since: check the labels before they are passed, or give every call a tensor of its own\.",
            str(error),
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_regions_and_masks_of_every_unsigned_dtype(dtype: torch.dtype) -> None:
    regions = torch.tensor([[[0, 0, 2, 2, 1, 1, 0, 2]]])
    expected = voxel_sums(LOGITS, LABELS, groups=regions, mask=regions).rows
    for count in (None, 3):
        found = voxel_sums(LOGITS, LABELS, groups=regions.to(dtype), num_groups=count, mask=regions.to(dtype))
        assert torch.equal(found.rows, expected)


@pytest.mark.parametrize("count", [None, 130, 200, 300])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_number_of_regions_beyond_their_dtype(channels: int, dtype: torch.dtype, count: int | None) -> None:
    """128 regions and voxels in none, -1: torch would let 128 wrap round in a comparison, and clamps to no 129."""
    regions = torch.arange(-1, 128).repeat_interleave(2).view(1, 1, -1)
    logits = torch.randn(1, channels, regions.numel(), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(regions.numel()).view(1, 1, -1) % 2
    expected = voxel_sums(logits, labels, groups=regions, num_groups=count)
    found = voxel_sums(logits, labels, groups=regions.to(dtype), num_groups=count)
    assert torch.equal(found.rows, expected.rows)
    assert found.count[0, 0, :128].eq(2).all()


@pytest.mark.parametrize("regions", [1, 255, 256, 257, 70_000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64])
def test_which_voxels_of_a_gpu_are_in_a_region(
    dtype: torch.dtype, regions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU and torch.compile do not look first whether all numbers are in range."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    limits = torch.iinfo(dtype)
    values = [value for value in (-1, 0, 1, 127, 128, 254, 255, 256) if limits.min <= value <= limits.max]
    numbers, inside = in_regions(torch.tensor([[values]], dtype=dtype), regions)
    assert inside is not None
    assert numbers.dtype == dtype
    assert inside.tolist() == [[0 <= value < regions for value in values]]
    assert numbers.tolist() == [[[min(max(value, 0), regions - 1) for value in values]]]
