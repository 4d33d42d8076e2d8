"""Draw the pictures of docs/losses.md from the losses themselves: `python docs/plots.py [--output FOLDER]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from monai_iou import (
    AffinityLoss,
    FocalIoULoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoULoss,
    LogIoULoss,
    WeightedCrossEntropyLoss,
    class_weights,
)
from monai_iou.components import component_regions
from monai_iou.losses.attention import dilate
from monai_iou.losses.label_pooling import pool_labels

SIDE = 64**3
plots: dict[str, Callable[[], None]] = {}


def plot(function: Callable[[], None]) -> Callable[[], None]:
    """Register a plot under its function's name, the file's name."""
    plots[function.__name__] = function
    return function


def panels(count: int, height: float = 2.9) -> list[Axes]:
    """Return `count` axes side by side."""
    return list(plt.subplots(1, count, figsize=(3.6 * count, height), layout="constrained", squeeze=False)[1][0])


def label(axes: Axes, title: str, x: str, y: str, *, legend: bool = True) -> None:
    """Name what an axes shows."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize="small")


def lesion(size: int, total: int = 4096) -> Tensor:
    """Return a label map (1, 1, total) whose first `size` voxels are foreground."""
    return (torch.arange(total) < size).float().reshape(1, 1, -1)


def values(loss: Any, inputs: list[Tensor], target: Tensor) -> list[float]:
    """Return the loss of each input."""
    return [float(loss(item, target)) for item in inputs]


def overlaps(size: int = 100) -> tuple[np.ndarray, list[Tensor]]:
    """Return hard predictions that find 0 to all voxels of a lesion, and their IoU."""
    found = np.arange(1, size + 1)
    return found / size, [lesion(int(count)) for count in found]


@plot
def exponents() -> None:
    """Draw the log and focal variants over the IoU."""
    iou, found = overlaps()
    first, second, third = panels(3)
    for gamma in (0.3, 1.0, 2.0):
        first.plot(iou, values(LogIoULoss(gamma=gamma), found, lesion(100)), label=f"gamma = {gamma}")
    for gamma in (0.5, 1.0, 2.0, 4.0):
        second.plot(iou, values(FocalIoULoss(gamma=gamma), found, lesion(100)), label=f"gamma = {gamma}")
    for gamma in (0.5, 0.75, 1.0, 2.0):
        third.plot(iou, values(FocalTverskyLoss(gamma=gamma), found, lesion(100)), label=f"gamma = {gamma}")
    label(first, "LogIoULoss", "IoU", "loss")
    label(second, "FocalIoULoss", "IoU", "loss")
    label(third, "FocalTverskyLoss, missed voxels", "IoU", "loss")


@plot
def tversky() -> None:
    """Draw what a missed and what an invented voxel cost."""
    missed, invented = panels(2)
    counts = range(0, 100, 2)
    for alpha, beta in ((0.3, 0.7), (0.5, 0.5), (1.0, 1.0), (0.7, 0.3)):
        loss = FocalTverskyLoss(alpha=alpha, beta=beta, gamma=1.0)
        name = f"alpha = {alpha}, beta = {beta}"
        missed.plot(counts, values(loss, [lesion(100 - n) for n in counts], lesion(100)), label=name)
        invented.plot(counts, values(loss, [lesion(100 + n) for n in counts], lesion(100)), label=name)
    label(missed, "a lesion of 100 voxels, some missed", "missed voxels", "loss")
    label(invented, "the same lesion, over-segmented", "false positive voxels", "loss")


@plot
def power_and_soft_labels() -> None:
    """Draw the power forms, and where the loss of a soft label is least."""
    first, second = panels(2)
    p = torch.linspace(0.01, 1, 60)
    for power in (1.0, 1.5, 2.0):
        inputs = [lesion(100) * value + (1 - lesion(100)) * 0.01 for value in p]
        first.plot(p, values(IoULoss(power=power), inputs, lesion(100)), label=f"power = {power}")
    for name, loss in (
        ("product", IoULoss()),
        ("soft_label", IoULoss(soft_label=True)),
        ("power 2", IoULoss(power=2.0)),
    ):
        second.plot(p, values(loss, [lesion(100) * value for value in p], lesion(100) * 0.6), label=name)
    second.axvline(0.6, color="black", linewidth=0.8)
    label(first, "hard label, background at p = 0.01", "p on the lesion", "IoULoss")
    label(second, "label of 0.6", "p on the lesion", "IoULoss")


@plot
def smoothing() -> None:
    """Draw the loss of a half-found lesion over its size."""
    (axes,) = panels(1)
    sizes = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    for smooth in (1e-5, 1.0, 10.0, 100.0):
        loss = IoULoss(smooth_nr=smooth, smooth_dr=smooth)
        axes.semilogx(sizes, [float(loss(lesion(n // 2), lesion(n))) for n in sizes], label=f"smooth = {smooth:g}")
    label(axes, "half of a lesion is found", "lesion, voxels", "IoULoss")


@plot
def absent_classes() -> None:
    """Draw value and gradient of an absent class under the three rules."""
    value, slope, blob = panels(3)
    levels = np.logspace(-8, -0.01, 50)
    for empty in ("smooth", "skip", "suppress"):
        loss = IoULoss(sigmoid=True, empty=empty)
        found, uniform, confident = [], [], []
        for p in levels:
            background = torch.full((1, 1, SIDE), float(p), dtype=torch.float64).logit()
            spotted = background.clone()
            spotted[..., :500] = 3.0
            gradients = []
            for logits in (background, spotted):
                logits.requires_grad_()
                result = loss(logits, torch.zeros(1, 1, SIDE))
                gradients.append(torch.autograd.grad(result, logits)[0][0, 0, 0].item())
                found.append(result.item()) if logits is background else None
            uniform.append(gradients[0])
            confident.append(gradients[1])
        value.semilogx(levels, found, label=empty)
        slope.loglog(levels, np.maximum(uniform, 1e-20), label=empty)
        blob.loglog(levels, np.maximum(confident, 1e-20), label=empty)
    label(value, "p everywhere, nothing to find", "p", "IoULoss")
    label(slope, "its gradient by a logit", "p", "gradient")
    label(blob, "gradient on 500 voxels at p = 0.95", "p elsewhere", "gradient")
    slope.set_ylim(1e-18, 1e-3)
    blob.set_ylim(1e-18, 1e-3)


@plot
def generalized() -> None:
    """Draw how hard each voxel of a class is pulled, over the class's volume."""
    (axes,) = panels(1)
    sizes = [8, 32, 128, 512, 2048]
    for w_type in ("square", "simple", "uniform"):
        pulls = []
        for size in sizes:
            labels = torch.zeros(1, 1, 16384, dtype=torch.long)
            labels[..., :2048], labels[..., 4096 : 4096 + size] = 1, 2
            logits = torch.zeros(1, 3, 16384, requires_grad=True)
            loss = GeneralizedIoULoss(w_type=w_type, softmax=True, include_background=False)
            gradient = torch.autograd.grad(loss(logits, labels), logits)[0]
            pulls.append(float(gradient[0, 2, 4096].abs() / gradient[0, 1, 0].abs()))
        axes.loglog(sizes, pulls, "o-", label=w_type)
    label(axes, "beside a class of 2048 voxels", "volume of the class", "gradient, relative")


@plot
def cross_entropy() -> None:
    """Draw focal exponent and label smoothing."""
    focal, smoothed = panels(2)
    p = torch.linspace(0.01, 0.99, 80)
    inputs = [torch.full((1, 1, 1), float(value)).logit() for value in p]
    for gamma in (0.0, 1.0, 2.0, 5.0):
        loss = WeightedCrossEntropyLoss(gamma=gamma)
        focal.plot(p, values(loss, inputs, torch.ones(1, 1, 1)), label=f"gamma = {gamma:g}")
    for smoothing in (0.0, 0.1, 0.3):
        loss = WeightedCrossEntropyLoss(label_smoothing=smoothing)
        smoothed.plot(p, values(loss, inputs, torch.ones(1, 1, 1)), label=f"label_smoothing = {smoothing}")
    label(focal, "WeightedCrossEntropyLoss", "p of the true class", "loss")
    label(smoothed, "WeightedCrossEntropyLoss", "p of the true class", "loss")


@plot
def weights() -> None:
    """Draw the weight of a rare class over its volume."""
    (axes,) = panels(1)
    sizes = np.logspace(1, 6, 40)
    for method, beta in (("inverse", 0.0), ("median", 0.0), ("effective", 0.999), ("effective", 0.9999)):
        ratios = []
        for size in sizes:
            result = class_weights([2e6, 1e5, size], method, beta)
            ratios.append(float(result[2] / result[1]))
        axes.loglog(sizes, ratios, label=method + (f", beta = {beta}" if beta else ""), linestyle="--" if beta else "-")
    label(axes, "beside a class of 10^5 voxels", "voxels of the class", "weight, relative")


@plot
def downsampling() -> None:
    """Draw what is left of a lesion at coarser scales."""
    share, *pictures = panels(4)
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(200, 1, 32, 32, 32, dtype=torch.uint8)
    for volume, (x, y, z) in zip(labels, torch.randint(0, 30, (200, 3), generator=generator).tolist(), strict=True):
        volume[0, x : x + 3, y : y + 3, z : z + 3] = 1
    for mode in ("area", "max", "nearest"):
        kept = [
            float((pool_labels(labels, [32 // factor] * 3, 2, mode)[:, -1].flatten(1).amax(1) > 0).float().mean())
            for factor in (1, 2, 4, 8)
        ]
        share.plot(["1", "1/2", "1/4", "1/8"], kept, "o-", label=mode)
    label(share, "lesions of 3x3x3 voxels", "scale", "lesions still in the label")
    for axes, mode in zip(pictures, ("area", "max", "nearest"), strict=True):
        plane = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
        plane[..., 5:8, 4:7] = plane[..., 20:28, 10:22] = plane[..., 9:12, 26:29] = 1
        axes.imshow(
            pool_labels(plane, [8, 8], 2, mode)[0, -1].numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, 32, 32, 0)
        )
        axes.contour(np.arange(32) + 0.5, np.arange(32) + 0.5, plane[0, 0].numpy(), [0.5], colors="red", linewidths=1)
        axes.set_title(f"{mode} at 1/4")
        axes.axis("off")


@plot
def instances() -> None:
    """Draw regions, and what missing the small lesion costs."""
    voronoi, blob, cost = panels(3)
    mask = np.zeros((60, 60), dtype=bool)
    mask[8:28, 6:26] = mask[40:44, 15:19] = mask[30:38, 44:52] = mask[5:8, 50:53] = True
    regions, _ = component_regions(mask, "voronoi")
    voronoi.imshow(regions, cmap="tab10", vmin=0, vmax=9, alpha=0.6)
    voronoi.contour(mask, [0.5], colors="black", linewidths=1)
    others = np.where(component_regions(mask, "blob")[0] > 1, np.nan, 1.0)
    blob.imshow(others, cmap="tab10", vmin=0, vmax=9, alpha=0.6)
    blob.contour(mask, [0.5], colors="black", linewidths=1)
    for axes, title in ((voronoi, 'regions="voronoi"'), (blob, 'regions="blob", of one component')):
        axes.set_title(title)
        axes.axis("off")
    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    curves: dict[str, list[float]] = {"global": [], "instance": []}
    for size in sizes:
        labels = lesion(512, 2048)
        labels[..., 1500 : 1500 + size] = 1
        loss = InstanceIoULoss()
        loss(lesion(512, 2048), labels)
        for name, term in loss.last_terms.items():
            curves[name].append(float(term))
    for name, curve in curves.items():
        cost.semilogx(sizes, curve, label=f"{name} term")
    label(cost, "a lesion of 512 voxels found, one missed", "missed lesion, voxels", "loss")


@plot
def context() -> None:
    """Draw the bands of context, and their pooled forms."""
    axes = panels(4)
    mask = torch.zeros(1, 1, 20, 60, dtype=torch.bool)
    mask[..., 9:11, 26:32] = True
    for place, width in zip(axes, (0.0, 5.0, 10.0), strict=False):
        place.imshow(dilate(mask, width, (3.0, 1.0))[0, 0].numpy(), cmap="gray", extent=(0, 60, 60, 0))
        place.set_title(f"context_mm = {width:g}")
    band = dilate(mask, 5.0, (3.0, 1.0)).float()
    axes[3].imshow(
        pool_labels(band, [5, 15], 1, "area")[0, 0].numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, 60, 60, 0)
    )
    axes[3].set_title("5 mm, for a map at 1/4")
    for place in axes:
        place.contour(
            np.arange(60) + 0.5, 3 * np.arange(20) + 1.5, mask[0, 0].numpy(), [0.5], colors="red", linewidths=1
        )
        place.axis("off")


@plot
def affinity() -> None:
    """Draw the true affinity of a small grid, and the loss of a prediction that approaches it."""
    grid, matrix, curve = panels(3)
    labels = torch.zeros(1, 1, 6, 6, dtype=torch.long)
    labels[..., 1:3, 1:4], labels[..., 4, 3:5] = 1, 2
    same = (labels.flatten(1).unsqueeze(2) == labels.flatten(1).unsqueeze(1)).float()
    grid.imshow(labels[0, 0].numpy(), cmap="viridis")
    matrix.imshow(same[0].numpy(), cmap="gray")
    for axes, title in ((grid, "labels of 36 positions"), (matrix, "their affinity, 36 x 36")):
        axes.set_title(title)
        axes.axis("off")
    steps = torch.linspace(0, 0.98, 40)
    inputs = [0.5 + step * (same - 0.5) for step in steps]
    curve.plot(steps, values(AffinityLoss(lambda_global=0), inputs, labels), label="cross-entropy")
    curve.plot(steps, values(AffinityLoss(lambda_unary=0), inputs, labels), label="precision, recall, specificity")
    label(curve, "AffinityLoss", "from p = 0.5 to the truth", "loss")


def main() -> None:
    """Draw every plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in plots.items():
        draw()
        # Without the version, so that the same plot is the same file.
        plt.savefig(folder / f"{name}.png", dpi=80, metadata={"Software": None})
        plt.close()


if __name__ == "__main__":
    main()
