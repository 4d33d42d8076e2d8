"""Voxel sizes as arguments: one for all images or one per image, in every kind of sequence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import list_data_collate
from torch.utils.data import default_collate

from monai_iou import ContextAttentionLoss, InstanceIoULoss, IoUMetric
from monai_iou.metrics import BoundaryIoUMetric, LesionIoUMetric
from monai_iou.spacing import image_spacings, spacing_tuple

SIZES = [[1.0, 1.0, 1.0], [2.0, 1.0, 0.5]]
KINDS: list[Callable[[Any], Any]] = [
    list,
    tuple,
    np.array,
    torch.tensor,
    lambda sizes: [np.array(size) for size in sizes],
    lambda sizes: [torch.tensor(size) for size in sizes],
    lambda sizes: np.array(sizes, dtype=np.float32),
]


@pytest.mark.parametrize("kind", KINDS)
def test_one_size_per_image(kind: Callable[[Any], Any]) -> None:
    assert image_spacings(None, None, kind(SIZES), 2, 3) == [tuple(size) for size in SIZES]
    message = "Expected `spacing` to be one voxel size for each of 3 images, but got 2: "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        image_spacings(None, None, kind(SIZES), 3, 3)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda size: [np.float32(s) for s in size]])
def test_one_size_for_all_images(kind: Callable[[Any], Any]) -> None:
    assert image_spacings(None, None, kind([2.0, 1.0, 0.5]), 2, 3) == [(2.0, 1.0, 0.5)] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        np.ones((2, 3)),
        torch.ones(2, 3),
        [[1, 1, 1], [1, 1, 1]],
        "1 mm",
        ["a", "b", "c"],
        [1, [2], 3],
        [1, 2],
        [1, 0, 1],
    ],
)
def test_what_is_no_voxel_size_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)^Expected `spacing` to be 3 positive numbers in mm, but got .*: give"):
        spacing_tuple(wrong, 3)
    if np.ndim(wrong if isinstance(wrong, (np.ndarray, torch.Tensor)) else wrong[0]) == 0:
        with pytest.raises(ValueError, match=r"^Expected `spacing` to be 3 positive numbers in mm"):
            image_spacings(None, None, wrong, 2, 3)


@pytest.mark.parametrize("count", [1, 2, 4, 5])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_what_torch_collates_is_one_tensor_per_axis(count: int, dims: int) -> None:
    sizes = [tuple(1.0 + image + 0.25 * axis for axis in range(dims)) for image in range(count)]
    collated = default_collate(sizes)
    assert [len(axis) for axis in collated] == [count] * dims
    if count == dims > 1:
        message = f"one voxel size for each of {count} images, but got {count} tensors of {count} numbers, which could"
        for given in (collated, [torch.tensor(size) for size in sizes]):
            with pytest.raises(ValueError, match=f"^Expected `spacing` to be {message}") as caught:
                image_spacings(None, None, given, count, dims)
            remedy = f": give one tensor ({count}, {dims}), of images and axes, such as torch.stack(sizes)."
            assert str(caught.value).endswith(remedy)
        assert image_spacings(None, None, torch.stack(collated, 1), count, dims) == sizes
        return
    assert image_spacings(None, None, collated, count, dims) == sizes
    assert image_spacings(None, None, [torch.tensor(size) for size in sizes], count, dims) == sizes


def test_both_readings_of_as_many_tensors_as_axes_may_agree() -> None:
    rows = [[0.5, 0.5, 0.5]] * 3
    assert image_spacings(None, None, default_collate(rows), 3, 3) == [(0.5, 0.5, 0.5)] * 3
    assert image_spacings(None, None, [torch.ones(1)] * 3, 3, 3) == [(1.0, 1.0, 1.0)] * 3


@pytest.mark.parametrize("count", [2, 3])
def test_metrics_and_losses_read_a_collated_spacing(count: int) -> None:
    shape = (count, 1, 8, 8, 8)
    masks, other = ((torch.rand(shape, generator=torch.Generator().manual_seed(n)) > 0.4).float() for n in (0, 1))
    sizes = [(1.0, 1.0, 2.0 + image) for image in range(count)]
    calls: list[Callable[[Any], Any]] = [
        lambda spacing: BoundaryIoUMetric(width=1.0)(masks, other, spacing=spacing),
        lambda spacing: LesionIoUMetric(score="cc_iou", connectivity=6)(masks, other, spacing=spacing),
        lambda spacing: InstanceIoULoss(sigmoid=True, spacing=spacing)(4 * masks - 2, other),
        lambda spacing: ContextAttentionLoss(context_mm=1.5, spacing=spacing)([masks], other),
    ]
    for call in calls:
        if count == 3:
            with pytest.raises(ValueError, match="which could be one per image or one per axis"):
                call(default_collate(sizes))
        else:
            torch.testing.assert_close(call(default_collate(sizes)), call(sizes))


def test_metrics_and_losses_take_arrays() -> None:
    masks = (torch.rand(2, 1, 6, 6, 6, generator=torch.manual_seed(0)) > 0.5).float()
    other = (torch.rand(2, 1, 6, 6, 6, generator=torch.manual_seed(1)) > 0.5).float()
    metric = BoundaryIoUMetric(width=1.0, distance="euclidean")
    found = [metric(masks, other, spacing=size) for size in (SIZES, np.array(SIZES))]
    torch.testing.assert_close(found[0], found[1])
    losses = [InstanceIoULoss(sigmoid=True, spacing=size)(masks, other) for size in (SIZES, np.array(SIZES))]
    torch.testing.assert_close(losses[0], losses[1])


def affine_of(size: tuple[float, ...]) -> torch.Tensor:
    """An affine of voxels of this size, whose axes are not those of the scanner."""
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return torch.block_diag(turn @ torch.diag(torch.tensor(size, dtype=torch.float64)), torch.ones(1, 1))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_axis_has_the_size_that_its_affine_states(dims: int) -> None:
    size, shape = (4.0, 1.0, 2.0), (5, 6, 7)[:dims]
    image = MetaTensor(torch.zeros(shape), affine=affine_of(size))
    with_channel = MetaTensor(torch.zeros(1, *shape), affine=affine_of(size))
    batch = list_data_collate([{"label": with_channel}] * 2)["label"]
    single: list[tuple[Any, int]] = [
        (image[None, None], 1),
        (image.unsqueeze(0).unsqueeze(0), 1),
        (with_channel[None], 1),
        ([with_channel], 1),
        (batch, 2),
        (batch.argmax(1, keepdim=True), 2),
        (batch[:0], 0),
        (batch.split(1)[1], 1),  # both affines are alike
    ]
    for label, count in single:
        for pair in ((None, label), (label, None)):
            found = image_spacings(*pair, None, count, dims)
            assert np.array(found) == pytest.approx(np.array([size[:dims]] * count))


def test_affines_of_other_images_are_refused_where_distances_matter() -> None:
    labels = (torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.9).float()
    sizes = [(1.0, 1.0, 1.0), (4.0, 1.0, 1.0)]
    images = [MetaTensor(label, affine=affine_of(size)) for label, size in zip(labels, sizes, strict=True)]
    batch, one = (list_data_collate([{"label": image} for image in part])["label"] for part in (images, images[:1]))
    wrong = [batch.split(1)[0], batch.split(1)[1], batch.chunk(2)[1], torch.cat([one, one]), one.repeat(2, 1, 1, 1, 1)]
    for label in [*wrong, one.expand(2, -1, -1, -1, -1)]:
        count, given = len(label), label.as_tensor()
        text = (
            f"Expected one affine for each image of a MetaTensor ({count}), but got {3 - count}, as MONAI does not "
            "update the affines when a batch is split, joined or repeated: give `spacing`, or collate the images again."
        )
        calls: list[Callable[[Any, Any, Any], Any]] = [
            lambda given, label, spacing: BoundaryIoUMetric(width=1.0)(given, label, spacing),
            lambda given, label, spacing: LesionIoUMetric()(given, label, spacing),
            lambda given, label, spacing: InstanceIoULoss(sigmoid=True, spacing=spacing)(given, label),
            lambda given, label, spacing: ContextAttentionLoss(3.0, spacing=spacing)([given], label),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
                call(given, label, None)
            torch.testing.assert_close(call(given, label, sizes[:count]), call(given, given, sizes[:count]))
        assert IoUMetric()(given, label).tolist() == [[1.0]] * count
        blob = InstanceIoULoss(sigmoid=True, regions="blob")
        torch.testing.assert_close(blob(given, label), blob(given, given))
    for index in range(2):  # a slice keeps its own
        loss = ContextAttentionLoss(3.0)([labels[:1]], batch[index : index + 1])
        expected = ContextAttentionLoss(3.0, spacing=sizes[index])([labels[:1]], labels[index : index + 1])
        torch.testing.assert_close(loss, expected)


def test_an_affine_of_too_few_axes_is_refused() -> None:
    label = list_data_collate([MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.eye(3))])
    text = (
        "Expected the affine of an image of 3 dimensions to have 4 rows and columns or more, but got the shape (3, 3)"
        ": give `spacing`, or the image an affine of its own."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        image_spacings(None, label, None, 1, 3)
