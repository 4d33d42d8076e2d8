"""Random voxels by which a kernel is compared with the reference: a few, of the kind of the input that comes next.

What Triton compiles depends on which steps in memory are 1 and which are multiples of 16. So a sample lies in memory as
the input does, and has as many voxels beyond a multiple of 16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monai_iou.voxels.activations import probabilities
from monai_iou.voxels.compact_labels import IGNORED, fits
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.spec import PassSpec

_LEAST_VOXELS = 3 * 1024 + 272  # more than a program reads and no multiple of it, but of `_UNIT`
_UNIT = 16  # bytes and numbers that Triton knows multiples of
_IMAGES = 2  # so that the way from one to the next is checked
_REGIONS = 5
_KINK = 1e-3  # from a probability, within which no soft target lies where the derivative jumps there
_AWAY = 0.02  # which way such a target goes
_DRAWN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # random numbers, wherever they go


def layout(voxels: Voxels) -> tuple[int, ...]:
    """Return what a compiled form depends on: steps in memory that are 1, or multiples of 16, and others (0)."""
    parts = voxels.logits, voxels.labels, voxels.maps, voxels.valid, voxels.groups
    steps = [step for part in parts if part is not None for step in part.stride()]
    return tuple(1 if step == 1 else 0 if step % _UNIT else _UNIT for step in (voxels.logits.shape[2], *steps))


def sample_of(voxels: Voxels, spec: PassSpec) -> Voxels:
    """Return a few random voxels of the kind of `voxels`, on its device."""
    generator = torch.Generator("cpu").manual_seed(0)
    logits, classes, count = voxels.logits, voxels.logits.shape[1], _LEAST_VOXELS + voxels.logits.shape[2] % _UNIT
    values = torch.randn(_IMAGES, classes, count, generator=generator, **_DRAWN) * 3
    values = (values.sigmoid() * 0.98 + 0.01 if spec.activation is None else values).to(logits.dtype)
    labels = maps = valid = None
    if voxels.labels is not None:
        labels = _laid_out(_labels(voxels, count, generator), voxels.labels)
    else:
        assert voxels.maps is not None
        drawn = torch.rand(_IMAGES, classes, count, generator=generator, **_DRAWN)
        soft = voxels.maps.dtype.is_floating_point
        maps = (drawn if soft else drawn > 0.5).to(voxels.maps.dtype)
        maps = _laid_out(_off_the_kink(maps, values, spec) if soft else maps, voxels.maps)
    if voxels.valid is not None:
        valid = _laid_out(torch.rand(_IMAGES, count, generator=generator, **_DRAWN) > 0.2, voxels.valid)
    groups, regions = _groups(voxels, count, generator)
    values = _laid_out(values, logits)
    return replace(voxels, logits=values, labels=labels, maps=maps, valid=valid, groups=groups, regions=regions)


def _laid_out(part: Tensor, like: Tensor) -> Tensor:
    """Return a part whose dimensions lie in memory in the order of those of `like`, on its device."""
    order = sorted(range(like.ndim), key=lambda dim: (like.stride()[dim] == 0, like.stride()[dim]), reverse=True)
    places = [order.index(dim) for dim in range(like.ndim)]
    step = min((s for s, n in zip(like.stride(), like.shape, strict=True) if s and n > 1), default=1)
    dense = part.to(like.device).permute(order).contiguous()
    apart = dense if step == 1 else dense.unsqueeze(-1).repeat_interleave(step, -1)[..., 0]
    return apart.permute(places)


def _off_the_kink(maps: Tensor, values: Tensor, spec: PassSpec) -> Tensor:
    """Return maps none of which is next to its probability if the derivative jumps there: rounding decides the side."""
    if spec.overlap != "min_max":
        return maps
    distance = (maps.double() - probabilities(values.double(), spec).value).abs()
    return torch.where(distance < _KINK, torch.where(maps < 0.5, maps + _AWAY, maps - _AWAY), maps)


def _groups(voxels: Voxels, count: int, generator: torch.Generator) -> tuple[Tensor | None, int]:
    """Return random regions, most of them contiguous, some voxels in none where that can be, and how many there are."""
    if voxels.groups is None:
        return None, 1
    dtype, shape = voxels.groups.dtype, (_IMAGES, voxels.groups.shape[1], count)
    numbers = (torch.arange(count, device="cpu") * _REGIONS // count).expand(shape).clone()
    numbers[..., ::3] = torch.randint(0, _REGIONS, numbers[..., ::3].shape, generator=generator, device="cpu")
    if voxels.as_given:
        numbers[..., ::7] = -1 if dtype.is_signed else _REGIONS
    return _laid_out(numbers.to(dtype), voxels.groups), _REGIONS


def _labels(voxels: Voxels, count: int, generator: torch.Generator) -> Tensor:
    """Return random class numbers, some of them ignored where that happens, one of them wrong where it can be."""
    assert voxels.labels is not None
    classes = voxels.logits.shape[1]
    labels = torch.randint(0, classes, (_IMAGES, count), generator=generator, device="cpu").to(voxels.labels.dtype)
    if voxels.as_given:
        if fits(labels.dtype, classes):
            labels[:, 1] = classes
        if voxels.ignore_index is not None and fits(labels.dtype, voxels.ignore_index):
            labels[:, ::5] = voxels.ignore_index
    elif voxels.has_ignored:
        labels[:, ::5] = IGNORED[labels.dtype]
    return labels
