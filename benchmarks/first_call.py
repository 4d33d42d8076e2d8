"""What the check of a kernel costs: `python -m benchmarks.first_call`, on a machine with a GPU.

Each row is a process of its own with an empty cache of compiled kernels. "auto" compares the Triton kernel with the
reference before it uses it; `triton` by `use_kernel` does not. The first call compiles; a later one is the median of
100 forward and backward passes on 1x2x128^3 logits. On a CPU all rows are of the kernel that "auto" takes there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

SIDE = 128
CALLS = 100


def measure(kernel: str, device: str, side: int) -> None:
    """Print the seconds of the first call and of a later one."""
    import torch

    from monai_iou import IoUCELoss, kernel_report, use_kernel

    logits = torch.randn(1, 2, side, side, side, device=device, requires_grad=True)
    labels = torch.randint(0, 2, (1, 1, side, side, side), device=device)
    loss = IoUCELoss(softmax=True)
    (logits * 1).sum().backward()  # loads CUDA

    def call() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss(logits, labels).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with use_kernel(kernel):
        first = call()
        later = statistics.median(call() for _ in range(CALLS))
    print(f"| {kernel} | {first:.2f} | {later * 1e3:.3f} |", flush=True)
    print(f"{kernel_report()[device if device == 'cpu' else 'cuda:0']}", file=sys.stderr)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--side", type=int, default=SIDE, help="of the volume, in voxels (default: 128)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.device, options.side)
        return
    print("| kernel | first call s | a later call ms |\n| --- | --- | --- |", flush=True)
    own = [sys.executable, "-W", "ignore", "-m", "benchmarks.first_call", *sys.argv[1:], "--one"]
    for kernel in ("auto", "triton" if options.device == "cuda" else "auto", "auto"):
        with tempfile.TemporaryDirectory() as cache:
            subprocess.run([*own, kernel], check=True, env={**os.environ, "TRITON_CACHE_DIR": cache})


if __name__ == "__main__":
    main()
