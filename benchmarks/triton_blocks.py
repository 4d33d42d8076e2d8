"""Times of the Triton kernel's programs with other block sizes: `python -m benchmarks.triton_blocks`, on a GPU.

Forward and backward of `IoUCELoss`, uint8 labels, by torch's profiler: microseconds of the two programs, sums and
gradient, and of all kernels of a call with their number, beside MONAI's `DiceCELoss`. The first row of a size is what
the library uses. `apart`: how many numbers of each sum a thread may keep until the end of its program; 0 for none.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import torch
from monai.losses.dice import DiceCELoss
from torch import Tensor

from monai_iou import IoUCELoss, use_kernel

SIZES = ((2, 128, torch.float32), (5, 128, torch.float32), (14, 96, torch.float32), (5, 128, torch.bfloat16))
CHOICES = ((4, 16, 16), (4, 16, 0), (8, 16, 16), (4, 32, 16), (4, 64, 16))  # warps, voxels of a thread, apart
CALLS = 10


def profiled(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Return the microseconds of every launch of `CALLS` calls, by the kernel's name."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first compiles
        loss(logits, labels).backward()
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(CALLS):
            logits.grad = None
            loss(logits, labels).backward()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.device_time)
    return found


def row(name: str, found: dict[str, list[float]]) -> str:
    """Return a line of the table."""
    of_programs = [sum(found.get(program, ())) / CALLS for program in ("add_sums", "write_gradient")]
    launches = list(itertools.chain(*found.values()))
    sums, gradient = of_programs
    return f"| {name} | {sums:.1f} | {gradient:.1f} | {sum(launches) / CALLS:.0f} | {len(launches) / CALLS:.0f} |"


def main() -> int:
    """Print a table."""
    if not torch.cuda.is_available():
        print("Expected a GPU, but torch finds none: `benchmarks.triton_offline` needs no GPU.", file=sys.stderr)
        return 1
    from monai_iou.voxels import triton_kernels

    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}\n")
    print("| logits, choice | sums | gradient | all kernels | their number |\n| --- | --- | --- | --- | --- |")
    for classes, side, dtype in SIZES:
        shape = (1, classes, side, side, side)
        logits = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
        labels = torch.randint(0, classes, (1, 1, *shape[2:]), device="cuda").to(torch.uint8)
        about = f"1x{classes}x{side}^3, {str(dtype).removeprefix('torch.')}"
        for warps, voxels, apart in CHOICES:
            triton_kernels.WARPS, triton_kernels._OF_THREAD, triton_kernels._APART = warps, voxels, apart
            with use_kernel("triton"):
                found = profiled(IoUCELoss(softmax=True), logits, labels)
            print(row(f"{about}, {warps} warps, {voxels} voxels, apart {apart}", found), flush=True)
        peer = DiceCELoss(softmax=True, to_onehot_y=True, jaccard=True)
        print(row(f"{about}, MONAI's DiceCELoss", profiled(peer, logits, labels)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
