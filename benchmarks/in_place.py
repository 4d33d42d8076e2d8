"""Time of the passes of `voxels/in_place.py` beside the tiled kernel's general path and MONAI's form of the same loss.

    python -m benchmarks.in_place                    # 2 and 5 classes at 96^3
    python -m benchmarks.in_place --size 14x64 --turns 9

The three take turns, so that a busy machine is busy for all of them; medians of one run are compared. "in place" is
what `tiled` does where Numba's loops do not apply, and "general" what it does for a specification that the file does
not cover: the same formulas with temporaries of their own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor, nn

from monai_iou import IoUCELoss, IoULoss, WeightedCrossEntropyLoss
from monai_iou.voxels import in_place, numba_pass

SIZES = ["2x96", "5x96"]
NAMES = ("IoU", "IoU + CE", "CE")


class PlainCrossEntropy(nn.Module):
    """torch's cross-entropy, which MONAI's compounds call."""

    def __init__(self, sigmoid: bool = False) -> None:
        super().__init__()
        self.loss = nn.BCEWithLogitsLoss() if sigmoid else nn.CrossEntropyLoss()
        self.sigmoid = sigmoid

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the mean over voxels."""
        if not self.sigmoid:
            return torch.as_tensor(self.loss(input, target[:, 0]))
        maps = target if input.shape[1] == 1 else nn.functional.one_hot(target[:, 0], input.shape[1]).movedim(-1, 1)
        return torch.as_tensor(self.loss(input, maps.to(input)))


def pair(name: str, classes: int, activation: str) -> tuple[nn.Module, nn.Module]:
    """Return our loss and MONAI's or torch's."""
    act = {activation: True}
    theirs = {"jaccard": True, "to_onehot_y": classes > 1, **act}
    if name == "IoU":
        return IoULoss(**act), DiceLoss(**theirs)
    if name == "IoU + CE":
        return IoUCELoss(**act), DiceCELoss(**theirs)
    return WeightedCrossEntropyLoss(sigmoid=activation == "sigmoid"), PlainCrossEntropy(activation == "sigmoid")


def seconds(loss: nn.Module, logits: Tensor, labels: Tensor) -> float:
    """Return the seconds of one forward and backward."""
    logits.grad = None
    start = time.perf_counter()
    loss(logits, labels).backward()
    return time.perf_counter() - start


def row(name: str, classes: int, side: int, activation: str, turns: int) -> str:
    """Measure one loss and return its line of the table."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((1, classes, *[side] * 3), generator=generator).requires_grad_()
    labels = torch.randint(0, max(2, classes), (1, 1, *[side] * 3), generator=generator)
    ours, theirs = pair(name, classes, activation)
    times: dict[str, list[float]] = {"in place": [], "general": [], "monai": []}
    for turn in range(turns + 1):
        with mock.patch.object(numba_pass, "covers", return_value=False):
            taken = {"in place": seconds(ours, logits, labels)}
            with mock.patch.object(in_place, "covers", return_value=False):
                taken["general"] = seconds(ours, logits, labels)
        taken["monai"] = seconds(theirs, logits, labels)
        for kind, value in taken.items() if turn else ():  # the first turn warms up
            times[kind].append(value)
    fast, general, monai = (statistics.median(values) * 1e3 for values in times.values())
    return (
        f"| {name} | {activation} | {classes}x{side}^3 | {fast:.1f} | {general:.1f} | {monai:.1f} | "
        f"{general / fast:.2f} | {monai / fast:.2f} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="CLASSESxSIDE such as 5x96; may be repeated")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ms, and how many times as fast in place is\n")
    print("| loss | activation | logits | in place | general | MONAI, torch | x general | x MONAI, torch |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for size in options.size or SIZES:
        classes, side = (int(part) for part in size.split("x"))
        for activation in ("softmax", "sigmoid") if classes > 1 else ("sigmoid",):
            for name in NAMES:
                print(row(name, classes, side, activation, options.turns), flush=True)


if __name__ == "__main__":
    main()
