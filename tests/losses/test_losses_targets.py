"""Every loss on targets of every form and dtype: one channel, multi-label maps, bool to uint64, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import CASES, Case, gradient, one_hot, over, pair
from monai.data.meta_tensor import MetaTensor
from torch import Tensor, nn

from monai_iou import AffinityLoss, InstanceIoULoss, IoULoss, LovaszHingeLoss, MultiScaleLoss, voxel_sums


def hinge(**options: Any) -> nn.Module:
    return LovaszHingeLoss(**{name: value for name, value in options.items() if name != "sigmoid"})


def multi_scale(**options: Any) -> nn.Module:
    return MultiScaleLoss(IoULoss(**options))


SEVERAL = {**CASES, "multi_scale": Case(multi_scale)}
ONE = {**SEVERAL, "hinge": Case(hinge, bounded=False), "hinge_sorted": Case(hinge, {"bins": None}, bounded=False)}
DTYPES = [torch.bool, torch.int8, torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16]


def one_channel() -> tuple[Tensor, Tensor]:
    logits, labels = pair((2, 1, 5, 4, 3))
    labels[..., 1:3, 1:3, 1:2] = 1
    return logits, labels


@over(SEVERAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_label_maps_of_every_dtype(case: Case, dtype: torch.dtype) -> None:
    logits, labels = pair()
    if dtype == torch.bool:
        logits, labels = logits[:, :2], labels.clamp_max(1)
    loss = case(softmax=True)
    torch.testing.assert_close(loss(logits, labels.to(dtype)), loss(logits, labels))


@over(ONE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_maps_of_every_dtype(case: Case, dtype: torch.dtype) -> None:
    logits, labels = one_channel()
    loss = case(sigmoid=True)
    torch.testing.assert_close(loss(logits, labels.to(dtype)), loss(logits, labels))


@over(SEVERAL)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint16, torch.uint64, torch.float32])
def test_multi_label_maps(case: Case, dtype: torch.dtype) -> None:
    logits, labels = pair()
    maps = (one_hot(labels, 3) + one_hot(labels.flip(2), 3)).clamp_max(1)  # overlapping
    loss = case(sigmoid=True)
    value = loss(logits, maps.to(dtype))
    torch.testing.assert_close(value, loss(logits, maps))
    torch.testing.assert_close(loss(logits.flip(1), maps.flip(1).to(dtype)), value)  # no channel is special
    nothing = torch.zeros_like(maps).to(dtype)
    assert loss(logits, nothing).isfinite()
    assert gradient(loss, logits, nothing).isfinite().all()


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in ONE.items()])
def test_autocast_changes_nothing(case: Case) -> None:
    logits, labels = one_channel()
    loss = case(sigmoid=True)
    with torch.autocast("cpu", torch.bfloat16):
        value, half = loss(logits, labels), loss(logits.bfloat16(), labels)
        slope = gradient(loss, logits, labels)
    assert value.dtype == half.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits, labels))
    torch.testing.assert_close(half, loss(logits.bfloat16().float(), labels))
    torch.testing.assert_close(slope, gradient(loss, logits, labels))


@over(ONE)
def test_one_channel_keeps_the_promises(case: Case) -> None:
    logits, labels = one_channel()
    loss, before = case(sigmoid=True), (logits.clone(), labels.clone())
    value = loss(MetaTensor(logits), MetaTensor(labels))
    assert type(value) is Tensor
    assert gradient(loss, logits, labels).abs().sum() > 0
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])
    ignoring = case(sigmoid=True, ignore_index=255)
    torch.testing.assert_close(ignoring(logits, labels), value)
    assert (gradient(ignoring, logits, torch.full_like(labels, 255)) == 0).all()


@over(SEVERAL)
def test_a_target_on_another_device_is_named(case: Case) -> None:
    logits, labels = pair()
    with pytest.raises(ValueError, match=r"^Expected `target` on cpu, the device of") as raised:
        case(softmax=True)(logits, labels.to("meta"))
    assert str(raised.value).endswith("of `input`, but got meta: move it with target.to(input.device).")


@pytest.mark.parametrize("name", ["mask", "groups"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_mask_and_regions_on_another_device_are_named(name: str, channels: int) -> None:
    logits, labels = pair()
    side = torch.zeros(len(labels), channels if name == "groups" else 1, *labels.shape[2:], dtype=torch.long)
    with pytest.raises(
        ValueError, match=rf"^Expected `{name}` on cpu, the device of `input`, but got meta: move it with"
    ):
        voxel_sums(logits, labels, **{name: side.to("meta")})  # type: ignore[arg-type]


def test_an_affinity_and_its_labels_on_two_devices_are_named() -> None:
    with pytest.raises(ValueError, match=r"^Expected `target` on cpu, the device of `input`, but got meta: "):
        AffinityLoss(size=[2, 2])(torch.rand(1, 4, 4), torch.zeros(1, 1, 4, 4, device="meta"))


@over({**SEVERAL, "instance": Case(InstanceIoULoss)})
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_labels_from_inference_mode(case: Case, dtype: torch.dtype, channels: int) -> None:
    """Cached ones, for instance; torch saves no such tensor for a backward pass."""
    logits, labels = pair() if channels == 3 else one_channel()
    loss = case(**{"softmax" if channels == 3 else "sigmoid": True})
    expected = gradient(loss, logits, labels)
    with torch.inference_mode():
        made = labels.to(dtype).clone()
    assert made.is_inference()
    torch.testing.assert_close(gradient(loss, logits, made), expected)


@over({**SEVERAL, "instance": Case(InstanceIoULoss)})
def test_labels_that_require_a_gradient(case: Case) -> None:
    """Float labels that came out of another network."""
    logits, labels = pair()
    loss = case(softmax=True)
    value = loss(logits, labels.to(logits.dtype).requires_grad_())
    torch.testing.assert_close(value, loss(logits, labels))
