"""Time and peak extra memory of every loss beside its peers: `python -m benchmarks.losses [--quick] [--device cuda]`.

On CUDA, "on the GPU" is the time of the kernels alone, by torch's profiler: a training whose network keeps the GPU busy
waits for them, and not for the host, which runs ahead.

Peers and ours take turns, so that a busy machine is busy for all of them; medians are compared within one run. Peak
extra memory is the largest sum of bytes that the allocator handed out and had not got back, gradient included: from the
profiler's record of every allocation on a CPU, in a run with one thread, because it sees one (each further thread adds
its own temporaries), and the caching allocator's own peak on CUDA. The floor is what a copy needs for the bytes that
cannot be spared: logits read twice, gradient written once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import monai
import torch
from monai.losses import DiceCELoss, DiceLoss, GeneralizedDiceLoss, TverskyLoss
from torch import Tensor

import monai_iou
from monai_iou import IoUCELoss, IoUFocalLoss, IoULoss, WeightedCrossEntropyLoss, use_kernel
from monai_iou.voxels import compiled

QUICK = [(1, 5, 64), (1, 14, 64)]
FULL = [(1, 1, 128), (1, 2, 128), (1, 5, 64), (1, 5, 128), (1, 5, 192), (1, 14, 96), (1, 40, 64), (1, 118, 64)]
FULL_CUDA = [*FULL, (4, 14, 128), (1, 118, 128)]
Loss = Callable[[Tensor, Tensor], Tensor]
Size = tuple[int, int, int]
_Result = TypeVar("_Result")
PROFILED = 5  # calls
SORTING = "LovaszSoftmaxLoss(bins=None), sorting"


@dataclass(frozen=True)
class Row:
    """One loss at one size; times in seconds, memory in multiples of the logits; NaN where memory ran out.

    `device` is the time of the kernels of forward and backward on a GPU, NaN on a CPU.
    """

    name: str
    batch: int
    classes: int
    side: int
    dtype: str
    forward: float
    backward: float
    peak: float
    device: float = math.nan


def peers(classes: int) -> dict[str, Loss]:
    """Return the losses of other libraries: MONAI's, and kornia's and segmentation-models-pytorch's if installed."""
    act = _act(classes)
    found: dict[str, Loss] = {
        "monai DiceLoss(jaccard)": DiceLoss(jaccard=True, **act),
        "monai DiceLoss(jaccard, soft_label)": DiceLoss(jaccard=True, soft_label=True, **act),
        "monai DiceCELoss(jaccard)": DiceCELoss(jaccard=True, **act),
        "monai GeneralizedDiceLoss": GeneralizedDiceLoss(**act),
        "monai TverskyLoss": TverskyLoss(**act),
    }
    if classes > 1 and importlib.util.find_spec("kornia"):
        from kornia.losses import lovasz_softmax_loss, tversky_loss

        # kornia takes flat images: a volume is one of (side^2, side).
        found["kornia tversky_loss"] = lambda x, y: tversky_loss(x.flatten(2, 3), y[:, 0].flatten(1, 2), 1.0, 1.0)
        found["kornia lovasz_softmax_loss"] = lambda x, y: lovasz_softmax_loss(x.flatten(2, 3), y[:, 0].flatten(1, 2))
    if classes > 1 and importlib.util.find_spec("segmentation_models_pytorch"):
        from segmentation_models_pytorch.losses import JaccardLoss

        jaccard = JaccardLoss("multiclass")
        found["smp JaccardLoss"] = lambda x, y: jaccard(x, y[:, 0])
    return found


def ours(classes: int) -> dict[str, Loss]:
    """Return the losses of this library, by name."""
    act: dict[str, bool] = {"sigmoid": True} if classes == 1 else {"softmax": True}
    losses: dict[str, Loss] = {
        "IoULoss": IoULoss(**act),
        "IoULoss(soft_label)": IoULoss(soft_label=True, **act),
        "IoUCELoss": IoUCELoss(**act),
        "IoUFocalLoss": IoUFocalLoss(**act),
        "WeightedCrossEntropyLoss": WeightedCrossEntropyLoss(sigmoid=classes == 1),
    }
    for name in ("LogIoULoss", "FocalTverskyLoss", "GeneralizedIoULoss", "LovaszSoftmaxLoss"):
        losses[name] = getattr(monai_iou, name)(**act)
    if classes > 1:
        losses[SORTING] = monai_iou.LovaszSoftmaxLoss(bins=None, **act)
    return losses


def candidates(classes: int, device: str, quick: bool) -> dict[str, tuple[Loss, str]]:
    """Return every loss to measure with the kernel to use."""
    chosen = {name: (loss, "auto") for name, loss in peers(classes).items()}
    kernels = ["tiled"]
    if device == "cuda":
        kernels.append("triton")
    elif compiled.is_available() and classes <= compiled.MAX_CLASSES:
        kernels.append("compiled")
    for name, loss in ours(classes).items():
        if name == SORTING:
            chosen[name] = (loss, "auto")
            continue
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


def timed(loss: Loss, kernel: str, logits: Tensor, labels: Tensor) -> tuple[float, float]:
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


def peak_memory(loss: Loss, kernel: str, logits: Tensor, labels: Tensor) -> float:
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


def device_time(loss: Loss, kernel: str, logits: Tensor, labels: Tensor) -> float:
    """Return the seconds that the kernels of forward and backward take on a GPU; NaN on a CPU."""
    if logits.device.type != "cuda":
        return math.nan
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(PROFILED):
            timed(loss, kernel, logits, labels)
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.device_time for event in on_device) / PROFILED / 1e6


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


def measure(size: Size, device: str, dtype: torch.dtype, quick: bool, only: list[str], without: list[str]) -> list[Row]:
    """Measure the losses at one size, taking turns."""
    batch, classes, side = size
    generator = torch.Generator().manual_seed(0)
    shape = (batch, classes, side, side, side)
    logits = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.randint(0, max(classes, 2), (batch, 1, side, side, side), generator=generator).to(device)
    labels = labels.float() if classes == 1 else labels
    losses = {
        name: loss
        for name, loss in candidates(classes, device, quick).items()
        if (not only or any(part in name for part in only)) and not any(part in name for part in without)
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    for turn in range(4 if quick else 10):
        for name, (loss, kernel) in losses.items():
            taken = _if_it_fits(lambda: timed(loss, kernel, logits, labels), (math.nan, math.nan))  # noqa: B023
            if turn:  # the first call compiles and warms up
                times[name].append(taken)
    kind = str(dtype).removeprefix("torch.")
    rows = [Row("floor (a copy's speed)", *size, kind, floor(logits), 0.0, 1.0)]
    for name, (loss, kernel) in losses.items():
        forward, backward = (statistics.median(part) for part in zip(*times[name], strict=True))
        peak = _if_it_fits(lambda: peak_memory(loss, kernel, logits, labels), math.nan)  # noqa: B023
        device_seconds = _if_it_fits(lambda: device_time(loss, kernel, logits, labels), math.nan)  # noqa: B023
        rows.append(Row(name, *size, kind, forward, backward, peak, device_seconds))
    return rows


def _if_it_fits(work: Callable[[], _Result], otherwise: _Result) -> _Result:
    """Return what `work` returns, or `otherwise` where the device's memory is too small for it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return otherwise


def peer_of(row: Row) -> str:
    """Return the name of what a row is compared with: the sort, or MONAI's Dice, with a cross-entropy for compounds."""
    if "ovasz" in row.name and row.classes > 1:
        return SORTING
    compound = "CELoss" in row.name or row.name.startswith("IoUFocalLoss")
    return "monai DiceCELoss(jaccard)" if compound else "monai DiceLoss(jaccard)"


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table, with the ratio to the peer's time."""
    on_gpu = any(row.device == row.device for row in rows)
    head = ["loss", "logits", "dtype", "forward ms", "backward ms", "both ms", "x faster", "peak"]
    head += ["on the GPU ms", "x faster there"] if on_gpu else []
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    base = {row.name: row.forward + row.backward for row in rows}
    base_there = {row.name: row.device for row in rows}
    for row in rows:
        both = row.forward + row.backward
        ratio = base.get(peer_of(row), math.nan) / both
        lines.append(
            f"| {row.name} | {row.batch}x{row.classes}x{row.side}^3 | {row.dtype} | {row.forward * 1e3:.1f} | "
            f"{row.backward * 1e3:.1f} | {both * 1e3:.1f} | {ratio:.2f} | {row.peak:.2f} |"
        )
        if on_gpu:
            there = base_there.get(peer_of(row), math.nan) / row.device
            lines[-1] += f" {row.device * 1e3:.3f} | {there:.2f} |"
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Draw forward plus backward times, one panel a size."""
    from matplotlib.figure import Figure

    sizes = sorted({(row.batch, row.classes, row.side, row.dtype) for row in rows})
    figure = Figure(figsize=(9, 4 * len(sizes)), layout="constrained")
    for axis, size in zip(figure.subplots(len(sizes), 1, squeeze=False)[:, 0], sizes, strict=True):
        part = [row for row in rows if (row.batch, row.classes, row.side, row.dtype) == size][::-1]
        names = [row.name for row in part]
        axis.barh(names, [row.forward * 1e3 for row in part], label="forward")
        axis.barh(
            names, [row.backward * 1e3 for row in part], left=[row.forward * 1e3 for row in part], label="backward"
        )
        axis.set(title=f"{size[0]}x{size[1]}x{size[2]}^3, {size[3]}", xlabel="ms")
        axis.legend()
    figure.savefig(path, dpi=110)


def parsed_size(text: str) -> Size:
    """Return (batch, classes, side) of "4x14x128" or "14x128"."""
    parts = [int(part) for part in text.split("x")]
    batch, classes, side = parts if len(parts) == 3 else [1, *parts]
    return batch, classes, side


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small sizes, few repeats")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", action="append", help="[BATCHx]CLASSESxSIDE such as 5x128; may be repeated")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="may be repeated")
    parser.add_argument("--only", action="append", metavar="TEXT", help="losses with TEXT in the name; may be repeated")
    parser.add_argument("--without", action="append", metavar="TEXT", help="no losses with TEXT; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder for losses.json and .png")
    options = parser.parse_args()
    sizes = [parsed_size(size) for size in options.size or []]
    sizes = sizes or (QUICK if options.quick else FULL_CUDA if options.device == "cuda" else FULL)
    kinds = options.dtype or (["float32"] if options.quick else ["float32", "bfloat16"])
    dtypes = [getattr(torch, kind) for kind in kinds]
    where = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.processor() or platform.machine()}"
    )
    print(f"torch {torch.__version__}, MONAI {monai.__version__}, {where}, {torch.get_num_threads()} threads\n")
    rows: list[Row] = []
    for dtype in dtypes:
        for size in sizes:
            part = measure(size, options.device, dtype, options.quick, options.only or [], options.without or [])
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
