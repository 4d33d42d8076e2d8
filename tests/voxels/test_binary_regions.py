"""Two classes by region on a CPU: the specification's sums and gradient from a histogram of cells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from monai_iou import InstanceIoULoss, use_kernel
from monai_iou.voxels import binary_regions, tiled
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.passes import flatten_voxels
from monai_iou.voxels.reference import compute_sums as reference_sums
from monai_iou.voxels.self_check import Kernel
from monai_iou.voxels.spec import PassSpec

REGIONS = 5
SPEC = PassSpec()


def case(labels: torch.dtype, groups: torch.dtype, dtype: torch.dtype = torch.float64, run: int = 1) -> Voxels:
    """Three images with two empty regions; the others go on for `run` voxels at least."""
    generator = torch.Generator().manual_seed(run)
    shape = (3, 1, 5, 13 * run)
    logits = torch.randn(3, 2, 5, 13 * run, generator=generator, dtype=torch.float64) * 4
    target = torch.randint(0, 2, shape, generator=generator).to(labels)
    regions = torch.randint(0, REGIONS, (3, 1, 5, 13), generator=generator).repeat_interleave(run, -1).to(groups)
    return flatten_voxels(logits.to(dtype), target, None, None, regions, REGIONS + 2)


def run(kernel: Kernel, voxels: Voxels, repeat: int = 1) -> tuple[Tensor, Tensor]:
    leaf = voxels.logits.detach().requires_grad_()
    rows = kernel(replace(voxels, logits=leaf), SPEC)
    pull = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(rows)
    for turn in range(repeat):
        (gradient,) = torch.autograd.grad(rows, leaf, pull, retain_graph=turn + 1 < repeat)
    return rows.detach().double(), gradient.double()


def exact(voxels: Voxels) -> tuple[Tensor, Tensor]:
    return run(reference_sums, replace(voxels, logits=voxels.logits.double()))


@pytest.mark.parametrize("groups", [torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("labels", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize(("run_length", "size"), [(1, 11), (40, 301), (40, 1 << 17)])
def test_sums_and_gradients_are_the_specification(
    labels: torch.dtype, groups: torch.dtype, run_length: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the length of the runs of a region, and wherever the tiles cut them."""
    monkeypatch.setattr(binary_regions, "_SIZE", size)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        voxels = case(labels, groups, dtype, run_length)
        assert binary_regions.covers(voxels, SPEC)
        torch.testing.assert_close(run(tiled.compute_sums, voxels), exact(voxels), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(run(tiled.compute_sums, voxels, 3), exact(voxels), rtol=tolerance, atol=tolerance)


def test_long_runs_are_summed_as_runs_and_short_ones_are_not() -> None:
    for run_length, by_runs in ((1, False), (40, True)):
        voxels = case(torch.int64, torch.int32, run=run_length)
        assert voxels.labels is not None
        assert voxels.groups is not None
        inside, groups = voxels.labels[0].bool(), voxels.groups[0, 0]
        p = voxels.logits[0].softmax(0)[1]
        sums = binary_regions._run_sums(p, inside, groups, voxels.regions)
        assert (sums is not None) == by_runs


def test_a_region_of_one_label_has_nothing_of_the_other() -> None:
    labels = (torch.arange(4000) >= 1500).long().view(1, 1, -1)
    logits = torch.randn(1, 2, 4000, generator=torch.Generator().manual_seed(0))
    voxels = flatten_voxels(logits, labels, None, None, labels + 1, 3)
    sums = tiled.compute_sums(voxels, SPEC)
    torch.testing.assert_close(sums, reference_sums(replace(voxels, logits=logits.double()), SPEC), rtol=1e-5, atol=0)


def test_a_few_voxels_beside_large_lesions_keep_their_digits() -> None:
    """The background's share of a region that a lesion all but fills is no difference of float32 sums."""
    labels = torch.ones(1, 1, 1 << 18, dtype=torch.long)
    labels[..., 1000:1003] = 0
    logits = torch.zeros(1, 2, 1 << 18)
    logits[0, 1] = 8 + torch.rand(1 << 18, generator=torch.Generator().manual_seed(0))
    logits[0, 1, 1000:1003] = torch.tensor([-2.0, 0.0, 2.0])
    voxels = flatten_voxels(logits, labels, None, None, torch.zeros_like(labels), 1)
    expected = reference_sums(replace(voxels, logits=logits.double()), SPEC)
    torch.testing.assert_close(tiled.compute_sums(voxels, SPEC), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("lesion", [0, 1])
def test_a_small_class_keeps_its_digits_whichever_it_is(lesion: int) -> None:
    """Eight voxels in each of two regions, found in part, against nearly certain voxels of the other class."""
    margin = -12 - torch.rand(1 << 20, generator=torch.Generator().manual_seed(0))
    labels = torch.full((1, 1, 1 << 20), 1 - lesion)
    groups = (torch.arange(1 << 20) >= 1 << 19).long().view(1, 1, -1)
    for start in (5, 1 << 19):
        labels[..., start : start + 8] = lesion
        margin[start : start + 8] = torch.linspace(-3, 3, 8)
    logits = torch.zeros(1, 2, 1 << 20)
    logits[0, lesion] = margin
    voxels = flatten_voxels(logits, labels, None, None, groups, 2)
    assert binary_regions.covers(voxels, SPEC)
    expected = reference_sums(replace(voxels, logits=logits.double()), SPEC)
    torch.testing.assert_close(tiled.compute_sums(voxels, SPEC), expected, rtol=1e-5, atol=0)


def test_other_labels_and_logits_take_the_general_path() -> None:
    plain = case(torch.int64, torch.int32)
    infinite = plain.logits.clone()
    infinite[0, 1, 3] = torch.inf
    assert binary_regions.compute_sums(replace(plain, logits=infinite)) is None
    for value in (-1, 2, 255):
        assert plain.labels is not None
        labels = plain.labels.clone()
        labels[1, 7] = value
        assert binary_regions.compute_sums(replace(plain, labels=labels)) is None
    assert not binary_regions.covers(plain, replace(SPEC, cross_entropy=True))
    assert not binary_regions.covers(replace(plain, groups=None, regions=1), SPEC)
    outside = torch.full((3, 1, 5, 13), -1)
    ignored = flatten_voxels(plain.logits.view(3, 2, 5, 13), torch.ones(3, 1, 5, 13).long(), None, None, outside, 2)
    assert not tiled.compute_sums(ignored, SPEC).any(), "a voxel of no region counts nowhere"


def test_a_loss_by_lesions_and_its_gradient_are_those_of_the_reference() -> None:
    logits = torch.randn(2, 2, 9, 10, 11)
    labels = torch.zeros(2, 1, 9, 10, 11, dtype=torch.long)
    labels[:, :, 1:3, 2:4, 2:5] = labels[:, :, 6:8, 5:9, 7:9] = labels[1, :, 1:2, 8:9, 8:9] = 1
    found = []
    for kernel in ("reference", "tiled"):
        leaf = logits.clone().requires_grad_()
        with use_kernel(kernel):
            value = InstanceIoULoss(softmax=True)(leaf, labels)
        found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(found[1], found[0])
