"""Choose the bins of the Lovasz losses: error of the value, direction of the gradient and time for each number.

    python -m benchmarks.lovasz_bins              # minutes
    python -m benchmarks.lovasz_bins --bins 512 1024 2048 4096 --seeds 2 --skip-speed      # the table of docs/lovasz.md

Accuracy: two classes at 128^3, a ball of 20, 100 or 1000 voxels, predictions of several kinds, several seeds; the worst
of all is shown. "plain" is the same number of even bins read as a table, without the finer cells and the interpolation.
Speed and memory: 14 classes at 96^3, forward and backward, against the sort; memory is the growth of the peak resident
set in a fresh process.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_iou.losses.lovasz import LovaszSoftmaxLoss

SIDE = 128
KINDS = ("blurred", "shrunk", "confident", "initial", "random")


def lesion(volume: int) -> tuple[Tensor, Tensor]:
    """Return a ball of so many voxels as a label map, and the distances from its centre."""
    axis = torch.arange(float(SIDE))
    distance = ((axis[:, None, None] - 60.3) ** 2 + (axis[:, None] - 71.2) ** 2 + (axis - 50.6) ** 2).sqrt()
    return (distance <= distance.flatten().kthvalue(volume).values)[None, None], distance


def logits_of(kind: str, volume: int, distance: Tensor, seed: int) -> Tensor:
    """Return two-class logits: blurred and noisy as after some training, near 0 as before it, or random."""
    noise = torch.randn(1, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    radius = (3 * volume / 12.566) ** (1 / 3)
    smooth = F.avg_pool3d(noise, 3, 1, 1)[0, 0]
    foreground = {
        "blurred": (radius + 0.7 - distance).clamp_min(-6) * 1.2 + 3 * smooth,
        "shrunk": (radius - 1.0 - distance).clamp_min(-4) * 0.8 + 4.5 * smooth,
        "confident": (radius + 1.5 - distance).clamp_min(-8) * 2 + 3 * smooth,
        "initial": 0.1 * noise[0, 0],
        "random": 2**0.5 * noise[0, 0],
    }[kind]
    return torch.stack([torch.zeros_like(foreground), foreground]).unsqueeze(0).requires_grad_()


def value_and_gradient(loss: LovaszSoftmaxLoss, logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Return the loss and its gradient by the logits, flat and in float64."""
    value = loss(logits, labels)
    return value.item(), torch.autograd.grad(value, logits)[0].flatten().double()


def plain_gradient(logits: Tensor, labels: Tensor, bins: int) -> Tensor:
    """Return the gradient of the mean over both classes from even bins, each read as a whole."""
    p = logits.detach().softmax(1)[0, 1].flatten()
    inside = labels.flatten()
    slope = torch.zeros_like(p, dtype=torch.float64)
    for of_class in (inside, ~inside):  # both classes have the same errors
        error = torch.where(inside, 1 - p, p)
        cell = (bins * (1 - error) + 0.5).long()
        f, b = (torch.bincount(cell[part], minlength=bins + 1).double() for part in (of_class, ~of_class))
        before_f, before_b = f.cumsum(0) - f / 2, b.cumsum(0) - b / 2
        union = of_class.sum() + before_b
        table = torch.stack([(of_class.sum() - before_f) / union**2, 1 / union])
        slope += torch.where(of_class, table[1][cell], table[0][cell]) / 2
    slope = torch.where(inside, -slope, slope) * (p * (1 - p))
    return torch.stack([-slope, slope]).flatten()


def accuracy(bins: list[int], seeds: int) -> dict[int, dict[str, float]]:
    """Return the worst figures of each number of bins."""
    rows = {k: {"value": 0.0, "plain": 0.0, **dict.fromkeys(KINDS, 0.0)} for k in bins}
    for volume in (20, 100, 1000):
        labels, distance = lesion(volume)
        for kind in KINDS:
            for seed in range(seeds):
                logits = logits_of(kind, volume, distance, seed)
                value, exact = value_and_gradient(LovaszSoftmaxLoss(bins=None, softmax=True), logits, labels)
                for k, row in rows.items():
                    found, slope = value_and_gradient(LovaszSoftmaxLoss(bins=k, softmax=True), logits, labels)
                    row["value"] = max(row["value"], abs(found - value) * 2 * k)
                    row[kind] = max(row[kind], 1 - F.cosine_similarity(slope, exact, 0).item())
                    plain = plain_gradient(logits, labels, k)
                    row["plain"] = max(row["plain"], 1 - F.cosine_similarity(plain, exact, 0).item())
    return rows


def speed(bins: int | None, repeats: int) -> tuple[float, float]:
    """Return seconds (median) of forward and backward, and the growth of the peak memory in logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 14, 96, 96, 96, generator=generator).requires_grad_()
    labels = torch.randint(0, 14, (1, 1, 96, 96, 96), generator=generator, dtype=torch.uint8)
    loss = LovaszSoftmaxLoss(bins=bins, softmax=True)
    small = torch.randn(1, 14, 8, 8, 8).requires_grad_()
    loss(small, labels[..., :8, :8, :8]).backward()  # so that libraries are loaded before memory is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, growth = [], 0.0
    for repeat in range(repeats):
        start = time.perf_counter()
        loss(logits, labels).backward()
        times.append(time.perf_counter() - start)
        logits.grad = None
        if repeat == 0:
            growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return sorted(times)[len(times) // 2], growth / (4 * logits.numel())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bins", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument(
        "--speed-of", type=int, help="bins of one speed measurement, 0 to sort; used by this script itself"
    )
    options = parser.parse_args()
    if options.speed_of is not None:
        print(*speed(options.speed_of or None, options.repeats))
        return
    rows = accuracy(options.bins, options.seeds)
    figures = {}
    for k in [] if options.skip_speed else [*options.bins, 0]:
        command = [
            sys.executable,
            "-m",
            "benchmarks.lovasz_bins",
            "--speed-of",
            str(k),
            "--repeats",
            str(options.repeats),
        ]
        seconds, memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        figures[k] = f" {float(seconds):.3f} | {float(memory):.2f} |"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; 1 - cosine of the gradients, worst case")
    print("| bins | value error x 2 bins | " + " | ".join(KINDS) + " | plain table | s | x logits |")
    print("| --- " * (len(KINDS) + 5) + "|")
    for k, row in rows.items():
        cells = " | ".join(f"{row[kind]:.1e}" for kind in (*KINDS, "plain"))
        print(f"| {k} | {row['value']:.2f} | {cells} |{figures.get(k, ' - | - |')}")
    if 0 in figures:
        print("| sort | 0 | " + "0 | " * len(KINDS) + f"0 |{figures[0]}")


if __name__ == "__main__":
    main()
