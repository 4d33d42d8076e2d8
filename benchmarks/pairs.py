"""Each loss against MONAI's form of the same loss, in turns: `python -m benchmarks.pairs [1x128 2x128] [--turns 11]`.

A turn calls the peer and then ours, forward and backward. Both ratios are medians over the turns, ours taking one: of
the time that passed, and of the CPU time of this process, which does not count what other processes do. Run it with
OMP_NUM_THREADS=1 for the CPU time of one thread. Peak memory, ours and the peer's, is in multiples of the logits, with
one thread, as `benchmarks.losses` measures it; that command has all the losses. A second thread adds its temporaries.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import monai
import torch
from monai.losses import DiceCELoss, DiceFocalLoss, DiceLoss
from torch import Tensor

from benchmarks.losses import peak_memory
from monai_iou import IoUCELoss, IoUFocalLoss, IoULoss

WARM_UP = 2
Loss = Callable[[Tensor, Tensor], Tensor]


def pairs(classes: int) -> dict[str, tuple[Loss, Loss]]:
    """Return our losses, each with its peer."""
    act = {"sigmoid": True} if classes == 1 else {"softmax": True}
    peer = {**act, "jaccard": True, "to_onehot_y": classes > 1}
    return {
        "IoULoss": (IoULoss(**act), DiceLoss(**peer)),
        "IoUCELoss": (IoUCELoss(**act), DiceCELoss(**peer)),
        "IoULoss(soft_label=True)": (IoULoss(soft_label=True, **act), DiceLoss(soft_label=True, **peer)),
        "IoUFocalLoss": (IoUFocalLoss(**act), DiceFocalLoss(**peer)),
        "IoULoss(squared_pred=True)": (IoULoss(squared_pred=True, **act), DiceLoss(squared_pred=True, **peer)),
    }


def seconds(loss: Loss, logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the time that passed and the CPU time of forward and backward."""
    logits.grad = None
    wall, processor = time.perf_counter(), time.process_time()
    loss(logits, labels).backward()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(ours: Loss, peer: Loss, logits: Tensor, labels: Tensor, turns: int) -> list[tuple[float, float]]:
    """Return, for each turn, how many times as fast as its peer our loss is: by time passed, and by CPU time."""
    ratios = []
    for turn in range(turns + WARM_UP):
        theirs, own = seconds(peer, logits, labels), seconds(ours, logits, labels)
        if turn >= WARM_UP:
            ratios.append((theirs[0] / own[0], theirs[1] / own[1]))
    return ratios


def sample(classes: int, side: int) -> tuple[Tensor, Tensor]:
    """Return random logits (1, C, side, side, side) and labels, as MONAI takes them: float for one channel."""
    logits = torch.randn(1, classes, side, side, side).requires_grad_()
    labels = torch.randint(0, max(classes, 2), (1, 1, side, side, side))
    return logits, labels.float() if classes == 1 else labels


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row for each loss and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["1x128", "2x128", "5x128"], help="classes x side of the volume")
    parser.add_argument("--turns", type=int, default=11)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    versions = f"torch {torch.__version__}, MONAI {monai.__version__}, Python {platform.python_version()}"
    busy = f"{options.turns} turns, load {os.getloadavg()[0]:.1f}"
    print(f"{versions}, float32, {torch.get_num_threads()} threads, {busy}\n")
    print("| logits | loss | x MONAI | smallest and largest | x MONAI by CPU time | peak memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in options.sizes:
        classes, side = (int(part) for part in size.split("x"))
        logits, labels = sample(classes, side)
        for name, (ours, peer) in pairs(classes).items():
            own_peak, peer_peak = (peak_memory(loss, "auto", logits, labels) for loss in (ours, peer))
            wall, processor = zip(*measure(ours, peer, logits, labels, options.turns), strict=True)
            print(
                f"| 1x{classes}x{side}^3 | {name} | {statistics.median(wall):.2f} | {min(wall):.2f}, {max(wall):.2f} | "
                f"{statistics.median(processor):.2f} | "
                f"{own_peak:.2f} / {peer_peak:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
