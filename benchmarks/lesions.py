"""Lovasz without sorting against sorting, and a loss by lesions against the plain one: `python -m benchmarks.lesions`.

Two classes at 128^3 with lesions of some voxels. The two of a pair take turns, forward and backward; the factors are
medians over the turns, by the time that passed and by the CPU time of this process. The regions of `InstanceIoULoss`
are in its target, as `ComponentRegionsd` puts them there once for each case.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.pairs import Loss, measure
from monai_iou import ComponentRegionsd, InstanceIoULoss, IoULoss, LovaszSoftmaxLoss

LESIONS = 20
DIAMETER = 6  # voxels


def lesions(side: int) -> Tensor:
    """Return a label map (1, 1, side, side, side) with cubes as lesions."""
    label = torch.zeros(1, 1, side, side, side, dtype=torch.long)
    corners = torch.randint(0, side - DIAMETER, (LESIONS, 3), generator=torch.Generator().manual_seed(0))
    for x, y, z in corners.tolist():
        label[..., x : x + DIAMETER, y : y + DIAMETER, z : z + DIAMETER] = 1
    return label


def factors(slower: Loss, faster: Loss, logits: Tensor, label: Tensor, turns: int) -> str:
    """Return how many times as long the first takes, as cells of the table."""
    wall, processor = zip(*measure(faster, slower, logits, label, turns), strict=True)
    return f"{statistics.median(wall):.2f} | {min(wall):.2f}, {max(wall):.2f} | {statistics.median(processor):.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    logits = torch.randn(1, 2, *[options.side] * 3).requires_grad_()
    label = lesions(options.side)
    cells = ComponentRegionsd("label")({"label": label[0]})["label"].unsqueeze(0)
    plain, region = IoULoss(softmax=True), InstanceIoULoss(softmax=True)
    pairs: dict[str, tuple[Loss, Loss]] = {
        "LovaszSoftmaxLoss: sorting / bins": (
            LovaszSoftmaxLoss(softmax=True, bins=None),
            LovaszSoftmaxLoss(softmax=True),
        ),
        "InstanceIoULoss / IoULoss": (lambda x, _: region(x, cells), plain),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| 1x2x128^3 | factor | smallest and largest | by CPU time |\n| --- | --- | --- | --- |".replace(
            "128", str(options.side)
        )
    )
    for name, (slower, faster) in pairs.items():
        print(f"| {name} | {factors(slower, faster, logits, label, options.turns)} |", flush=True)


if __name__ == "__main__":
    main()
