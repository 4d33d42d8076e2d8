"""Lovasz without sorting against sorting, and a loss by lesions against the plain one: `python -m benchmarks.lesions`.

Volumes of 128^3 with lesions of some voxels. The two of a pair take turns, forward and backward; the factors are
medians over the turns, by the time that passed and by the CPU time of this process. The regions of `InstanceIoULoss`
are in its target, as `ComponentRegionsd` puts them there once for each case.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.pairs import Loss, measure
from monai_iou import ComponentRegionsd, InstanceIoULoss, IoUCELoss, IoULoss, LovaszSoftmaxLoss

LESIONS = 20
DIAMETER = 6  # voxels


def lesions(side: int) -> Tensor:
    """Return a label map (1, 1, side, side, side) with cubes as lesions."""
    label = torch.zeros(1, 1, side, side, side, dtype=torch.long)
    corners = torch.randint(0, side - DIAMETER, (LESIONS, 3), generator=torch.Generator().manual_seed(0))
    for x, y, z in corners.tolist():
        label[..., x : x + DIAMETER, y : y + DIAMETER, z : z + DIAMETER] = 1
    return label


def with_regions(label: Tensor, **options: Any) -> Tensor:
    """Return a label map with the regions of its lesions, as a training has them."""
    regions: Tensor = ComponentRegionsd("label", **options)({"label": label[0]})["label"]
    return regions.unsqueeze(0)


def factors(slower: Loss, faster: Loss, logits: Tensor, label: Tensor, turns: int) -> str:
    """Return how many times as long the first takes, as cells of the table."""
    wall, processor = zip(*measure(faster, slower, logits, label, turns), strict=True)
    return f"{statistics.median(wall):.2f} | {min(wall):.2f}, {max(wall):.2f} | {statistics.median(processor):.2f}"


def pairs(side: int) -> dict[str, tuple[Loss, Loss, Tensor, Tensor]]:
    """Return pairs of losses, the slower one first, with their logits and labels."""
    one, two, five = (torch.randn(1, classes, *[side] * 3).requires_grad_() for classes in (1, 2, 5))
    label, softmax = lesions(side), {"softmax": True}
    several = label.clone()
    several[..., side // 2 :] *= 4
    cells, cells_of_five = with_regions(label), with_regions(several, num_classes=5)

    def by_lesions(target: Tensor, **options: Any) -> Loss:
        loss = InstanceIoULoss(**options)
        return lambda logits, _: loss(logits, target)

    return {
        "LovaszSoftmaxLoss, two classes: sorting / bins": (
            LovaszSoftmaxLoss(**softmax, bins=None),
            LovaszSoftmaxLoss(**softmax),
            two,
            label,
        ),
        "InstanceIoULoss / IoULoss, two classes": (by_lesions(cells, **softmax), IoULoss(**softmax), two, label),
        "InstanceIoULoss / IoULoss, one channel": (
            by_lesions(cells, sigmoid=True),
            IoULoss(sigmoid=True),
            one,
            label.float(),
        ),
        "InstanceIoULoss of IoUCELoss / IoUCELoss, two classes": (
            by_lesions(cells, term=IoUCELoss(**softmax), **softmax),
            IoUCELoss(**softmax),
            two,
            label,
        ),
        "InstanceIoULoss / IoULoss, five classes": (
            by_lesions(cells_of_five, **softmax),
            IoULoss(**softmax),
            five,
            several,
        ),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n")
    print(f"| {options.side}^3 | factor | smallest and largest | by CPU time |\n| --- | --- | --- | --- |")
    for name, (slower, faster, logits, label) in pairs(options.side).items():
        print(f"| {name} | {factors(slower, faster, logits, label, options.turns)} |", flush=True)


if __name__ == "__main__":
    main()
