"""Time and peak extra memory of every loss beside its peers: `python -m benchmarks.losses [--quick] [--device cuda]`.

Peers and ours take turns, so that a busy machine is busy for all of them; medians are compared within one run. Peak
extra memory is the largest sum of bytes that the allocator handed out and had not got back, gradient included: from the
profiler's record of every allocation on a CPU, in a run with one thread, because it sees one (each further thread adds
its own temporaries), and the caching allocator's own peak on CUDA. The floor is what a copy needs for the bytes that
cannot be spared: logits read twice, gradient written once.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import monai
import torch
from monai.losses import DiceCELoss, DiceLoss, GeneralizedDiceLoss, TverskyLoss
from torch import Tensor, nn

import monai_iou
from monai_iou import IoUCELoss, IoUFocalLoss, IoULoss, WeightedCrossEntropyLoss, use_kernel
from monai_iou.voxels import compiled

QUICK = [(5, 64), (14, 64)]
FULL = [(1, 128), (2, 128), (5, 64), (5, 128), (5, 192), (14, 96), (40, 64), (118, 64)]
Maker = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Row:
    """One loss at one size; times in seconds, memory in multiples of the logits."""

    name: str
    classes: int
    side: int
    dtype: str
    forward: float
    backward: float
    peak: float


def peers(classes: int) -> dict[str, nn.Module]:
    """Return MONAI's losses."""
    act = _act(classes)
    return {
        "monai DiceLoss(jaccard)": DiceLoss(jaccard=True, **act),
        "monai DiceLoss(jaccard, soft_label)": DiceLoss(jaccard=True, soft_label=True, **act),
        "monai DiceCELoss(jaccard)": DiceCELoss(jaccard=True, **act),
        "monai GeneralizedDiceLoss": GeneralizedDiceLoss(**act),
        "monai TverskyLoss": TverskyLoss(**act),
    }


def ours(classes: int) -> dict[str, nn.Module]:
    """Return the losses of this library that exist, by name."""
    act: dict[str, bool] = {"sigmoid": True} if classes == 1 else {"softmax": True}
    losses: dict[str, nn.Module] = {
        "IoULoss": IoULoss(**act),
        "IoULoss(soft_label)": IoULoss(soft_label=True, **act),
        "IoUCELoss": IoUCELoss(**act),
        "IoUFocalLoss": IoUFocalLoss(**act),
        "WeightedCrossEntropyLoss": WeightedCrossEntropyLoss(sigmoid=classes == 1),
    }
    for name in ("LogIoULoss", "FocalTverskyLoss", "GeneralizedIoULoss", "LovaszSoftmaxLoss"):
        if hasattr(monai_iou, name):
            losses[name] = getattr(monai_iou, name)(**act)
    if hasattr(monai_iou, "LovaszSoftmaxLoss") and classes > 1:
        losses["LovaszSoftmaxLoss(bins=None), sorting"] = monai_iou.LovaszSoftmaxLoss(bins=None, **act)
    return losses


def candidates(classes: int, device: str, dtype: torch.dtype, quick: bool) -> dict[str, tuple[nn.Module, str]]:
    """Return every loss to measure with the kernel to use."""
    chosen = {name: (loss, "auto") for name, loss in peers(classes).items()}
    kernels = ["tiled"]
    if device == "cuda":
        kernels.append("triton")
    elif compiled.is_available() and classes <= compiled.MOST_CLASSES:
        kernels.append("compiled")
    for name, loss in ours(classes).items():
        several = kernels if name in ("IoULoss", "IoUCELoss") else kernels[:1] if device == "cpu" else kernels[-1:]
        chosen |= {f"{name}, {kernel}": (loss, kernel) for kernel in several}
    if not quick:
        chosen["monai DiceLoss(jaccard), torch.compile"] = (
            torch.compile(DiceLoss(jaccard=True, **_act(classes))),
            "auto",
        )
    return chosen


def _act(classes: int) -> dict[str, bool]:
    return {"sigmoid": True} if classes == 1 else {"softmax": True, "to_onehot_y": True}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(loss: nn.Module, kernel: str, logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return seconds of forward and of backward."""
    device = logits.device.type
    logits.grad = None
    with nullcontext() if kernel == "auto" else use_kernel(kernel):
        _wait(device)
        start = time.perf_counter()
        value = loss(logits, labels)
        _wait(device)
        middle = time.perf_counter()
        value.backward()
        _wait(device)
    return middle - start, time.perf_counter() - middle


def peak_memory(loss: nn.Module, kernel: str, logits: Tensor, labels: Tensor) -> float:
    """Return the peak of bytes allocated beyond the inputs, in multiples of the logits."""
    logits.grad = None
    if logits.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        timed(loss, kernel, logits, labels)
        return (torch.cuda.max_memory_allocated() - before) / logits.nbytes
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timed(loss, kernel, logits, labels)
    logits.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        timed(loss, kernel, logits, labels)
    torch.set_num_threads(threads)
    held = peak = 0
    for record in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if record.name() == "[memory]":
            held += record.nbytes()
            peak = max(peak, held)
    return peak / logits.nbytes


def floor(logits: Tensor) -> float:
    """Return the seconds that reading the logits twice and writing the gradient once takes a copy."""
    out = torch.empty_like(logits)
    times = []
    for _ in range(7):
        _wait(logits.device.type)
        start = time.perf_counter()
        out.copy_(logits.detach())
        _wait(logits.device.type)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 3 / 2  # a copy moves two volumes, the loss three


def measure(classes: int, side: int, device: str, dtype: torch.dtype, quick: bool) -> list[Row]:
    """Measure all losses at one size, taking turns."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, classes, side, side, side)
    logits = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.randint(0, max(classes, 2), (1, 1, side, side, side), generator=generator).to(device)
    labels = labels.float() if classes == 1 else labels
    losses = candidates(classes, device, dtype, quick)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    for turn in range(4 if quick else 10):
        for name, (loss, kernel) in losses.items():
            taken = timed(loss.to(device), kernel, logits, labels)
            if turn:  # the first call compiles and warms up
                times[name].append(taken)
    kind = str(dtype).removeprefix("torch.")
    rows = [Row("floor (a copy's speed)", classes, side, kind, floor(logits), 0.0, 1.0)]
    for name, (loss, kernel) in losses.items():
        forward, backward = (statistics.median(part) for part in zip(*times[name], strict=True))
        rows.append(Row(name, classes, side, kind, forward, backward, peak_memory(loss, kernel, logits, labels)))
    return rows


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table, with the ratio to MONAI's form of the same loss."""
    lines = ["| loss | classes | side | dtype | forward ms | backward ms | both ms | x faster | peak |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    base = {row.name: row.forward + row.backward for row in rows}
    for row in rows:
        both = row.forward + row.backward
        peer = base[
            "monai DiceCELoss(jaccard)" if "CE" in row.name or "Focal" in row.name else "monai DiceLoss(jaccard)"
        ]
        lines.append(
            f"| {row.name} | {row.classes} | {row.side}^3 | {row.dtype} | {row.forward * 1e3:.1f} | "
            f"{row.backward * 1e3:.1f} | {both * 1e3:.1f} | {peer / both:.2f} | {row.peak:.2f} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Draw forward plus backward times, one panel a size."""
    from matplotlib.figure import Figure

    sizes = sorted({(row.classes, row.side, row.dtype) for row in rows})
    figure = Figure(figsize=(9, 4 * len(sizes)), layout="constrained")
    for axis, size in zip(figure.subplots(len(sizes), 1, squeeze=False)[:, 0], sizes, strict=True):
        part = [row for row in rows if (row.classes, row.side, row.dtype) == size][::-1]
        names = [row.name for row in part]
        axis.barh(names, [row.forward * 1e3 for row in part], label="forward")
        axis.barh(
            names, [row.backward * 1e3 for row in part], left=[row.forward * 1e3 for row in part], label="backward"
        )
        axis.set(title=f"{size[0]} classes, {size[1]}^3, {size[2]}", xlabel="ms")
        axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small sizes, few repeats")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", action="append", help="CLASSESxSIDE such as 5x128; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder for losses.json and .png")
    options = parser.parse_args()
    sizes = [tuple(int(part) for part in size.split("x")) for size in options.size or []]
    sizes = sizes or (QUICK if options.quick else FULL)
    dtypes = [torch.float32] if options.quick else [torch.float32, torch.bfloat16]
    where = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.processor() or platform.machine()}"
    )
    print(f"torch {torch.__version__}, MONAI {monai.__version__}, {where}, {torch.get_num_threads()} threads\n")
    rows: list[Row] = []
    for dtype in dtypes:
        for classes, side in sizes:
            part = measure(classes, side, options.device, dtype, options.quick)
            print(table(part), end="\n\n", flush=True)
            rows += part
    options.output.mkdir(parents=True, exist_ok=True)
    facts = {
        "torch": torch.__version__,
        "monai": monai.__version__,
        "device": where,
        "rows": [asdict(row) for row in rows],
    }
    (options.output / "losses.json").write_text(json.dumps(facts, indent=1) + "\n")
    plot(rows, options.output / "losses.png")


if __name__ == "__main__":
    main()
