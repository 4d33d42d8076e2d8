"""What the compiler says of the Triton kernel where there is no GPU: `python -m benchmarks.triton_offline [--arch 90]`.

Each specialisation is compiled for GPUs that may be absent. From ptxas come registers, spills and shared memory; the
global loads and stores in the PTX, each by its width, the threads of a program and how often its loop runs, give the
bytes that a voxel asks for. The floor is what no kernel can do without: forward reads logits and labels once, backward
reads both once more and writes the gradient; with instance cells, groups are read as often as labels. Tables of a
Lovasz loss and of cells, which a cache holds, are among the bytes (a part of a program's voxels is taken to lie in two
cells), and atomic additions to them are not. This bounds the memory traffic from the kernel's side; it is no time, and
says nothing of a cache.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:
    message = f"Expected an environment with Triton, but got none ({error}): `.ci/triton ENVIRONMENT` makes one."
    raise SystemExit(message) from None

from monai_iou.voxels import triton_error_pass, triton_errors, triton_kernels, triton_programs, triton_regions
from monai_iou.voxels.error_bins import DEFAULT_BINS
from monai_iou.voxels.spec import ROWS

ARCHITECTURES = (80, 90, 100)
CLASSES = (2, 4, 8, 16)
FLOATS = {"bf16": 2, "fp16": 2, "fp32": 4}
LABELS = {"u8": 1, "i64": 8, "fp32": 4}
_GROUPS = 4  # bytes of a region number
_REGIONS = 2  # in which the voxels lie that a program holds at a time
_POINTERS = {
    "x": "*LOGITS", "mask": "*LOGITS", "out": "*LOGITS", "y": "*LABELS", "counts": "*i32", "groups": "*i32",
}  # fmt: skip
_FLOATS = ("sums", "gradient", "limit", "starts", "rises")
_FIXED = {"x_voxel": 1, "y_voxel": 1, "mask_voxel": 1, "out_voxel": 1, "group_voxel": 1}
_LABEL = re.compile(r"^(\$L__BB\d+_\d+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\d+_\d+);")
_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\b")
BASE: dict[str, Any] = {
    "ACTIVATION": 0, "OVERLAP": 0, "POWER": 1.0, "ENTROPY": False, "FOCAL": 0.0, "KEEP": 1.0, "SHARE": 0.0,
    "CONFIDENT": False, "SPLIT": False, "MAPS": False, "IGNORE": None, "MASK": False,
}  # fmt: skip
LOSSES: dict[str, dict[str, Any]] = {
    "IoU": {},
    "IoU + CE": {"ENTROPY": True},
    "IoU + CE, ignored voxels": {"ENTROPY": True, "IGNORE": 255},
    "IoU + focal": {"ENTROPY": True, "FOCAL": 2.0},
    "IoU, sigmoid": {"ACTIVATION": 1},
    "IoU + CE, int64 labels, ignored voxels": {"ENTROPY": True, "IGNORE": -100, "y": "i64"},
    "soft labels": {"OVERLAP": 1, "MAPS": True, "y": "fp32"},
    "Lovasz": {"OVERLAP": 2, "CELLS": 2 * DEFAULT_BINS + 2, "SUMS": False},
    "Lovasz + IoU + CE": {"ENTROPY": True, "CELLS": 2 * DEFAULT_BINS + 2, "SUMS": True},
    "IoU, cells": {"EACH": False, "JOINT": False},
    "IoU + CE, cells": {"ENTROPY": True, "EACH": False, "JOINT": False},
    "IoU + CE, cells of each class": {"ENTROPY": True, "EACH": True, "JOINT": True},
}
SUMS = (triton_programs.add_sums, triton_programs.write_gradient)
ERRORS = (triton_errors.count_errors, triton_errors.write_error_gradient)
REGIONS = (triton_regions.add_region_sums, triton_regions.write_region_gradient)


@dataclass(frozen=True)
class Compiled:
    """What is known of one compiled kernel; bytes are for each voxel of a full program."""

    registers: int
    spilled: int
    shared: int
    loaded: float
    stored: float
    asm: dict[str, str]


def compiled(
    kernel: Any,
    arch: int,
    logits: str,
    labels: str,
    options: dict[str, Any],
    integer: str = "i32",
    registers: int | None = None,
) -> Compiled:
    """Compile a kernel for an architecture, with at most so many registers, and read the compiler's report."""
    constants = {**_FIXED, **options}
    signature = {}
    for name in kernel.arg_names:
        kind = _POINTERS.get(name, "*fp32" if name in _FLOATS else integer)
        signature[name] = "constexpr" if name in constants else kind.replace("LOGITS", logits).replace("LABELS", labels)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and name not in ("C", "R")
    }
    given = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature, given, aligned)
    warps = triton_kernels.WARPS
    result = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "maxnreg": registers}
    )
    ptx = result.asm["ptx"]
    used, spilled = _assembled(ptx)
    moved = _moved(ptx, options["CHUNKS"])
    each = 32 * warps / (options["VOXELS"] * options["CHUNKS"])  # threads of a voxel
    return Compiled(used, spilled, result.metadata.shared, moved["ld"] * each, moved["st"] * each, result.asm)


def _moved(ptx: str, chunks: int) -> dict[str, int]:
    """Return the bytes that a thread loads and stores; a program's loop runs once for each chunk of voxels.

    With regions there is a loop over them within it.
    """
    lines = ptx.splitlines()
    places = {found[1]: number for number, line in enumerate(lines) if (found := _LABEL.match(line))}
    branches = [(number, found[1]) for number, line in enumerate(lines) if (found := _BRANCH.search(line))]
    ends = {places[label]: number for number, label in branches if places[label] < number}  # the last that goes back
    loops = [range(*bounds) for bounds in ends.items()]
    moved = {"ld": 0, "st": 0}
    for number, line in enumerate(lines):
        depth = sum(number in loop for loop in loops)
        times = (1, chunks, chunks * _REGIONS)[depth]
        for kind, width, bits in _ACCESS.findall(line):
            moved[kind] += times * int(width or 1) * int(bits) // 8
    return moved


def _assembled(ptx: str) -> tuple[int, int]:
    """Return registers of a thread and spilled bytes."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    name = "ptxas-blackwell" if "100" in target[1] and (tools / "ptxas-blackwell").exists() else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(tools / name), "-v", f"--gpu-name={target[1]}", str(path), "-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert registers is not None, report
    return int(registers[1]), sum(map(int, spills))


def both_passes(
    arch: int, classes: int, logits: str, loss: str, registers: int | None = None
) -> tuple[Compiled, Compiled, int]:
    """Compile forward and backward of one loss; return them and the floor of their bytes."""
    options = {**BASE, **LOSSES[loss]}
    labels = options.pop("y", "u8")
    width = max(FLOATS[logits], LABELS[labels]) if options["MAPS"] else FLOATS[logits]
    options |= {**triton_kernels.blocks(classes, width), "ROWS": ROWS}
    options |= triton_error_pass.blocks(options) if "CELLS" in options else {}
    of_labels = LABELS[labels] * (classes if options["MAPS"] else 1)
    of_groups, kernels = 0, ERRORS if "CELLS" in options else SUMS
    if "EACH" in options:
        options |= {**triton_kernels.region_blocks(classes, width), "CHUNKS": 1}  # each part adds to the table
        of_groups, kernels = _GROUPS * (classes if options["EACH"] else 1), REGIONS
    options |= {"APART": triton_kernels.keeps_apart(options)} if kernels is SUMS else {}
    forward, backward = (compiled(kernel, arch, logits, labels, options, registers=registers) for kernel in kernels)
    return forward, backward, 3 * FLOATS[logits] * classes + 2 * (of_labels + of_groups)


def row(arch: int, classes: int, logits: str, loss: str, registers: int | None = None) -> str:
    """Compile forward and backward of one loss and return its line of the table."""
    forward, backward, floor = both_passes(arch, classes, logits, loss, registers)
    moved = forward.loaded + forward.stored + backward.loaded + backward.stored
    return (
        f"| sm_{arch} | {loss} | {classes} | {logits} | {forward.registers}, {backward.registers} | "
        f"{forward.spilled + backward.spilled} | {forward.shared}, {backward.shared} | {moved:.1f} | {floor} | "
        f"{moved / floor:.2f} |"
    )


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="may be repeated")
    parser.add_argument("--loss", action="append", choices=list(LOSSES), metavar="NAME", help="may be repeated")
    parser.add_argument("--classes", type=int, action="append", choices=CLASSES, help="may be repeated")
    parser.add_argument("--logits", action="append", choices=list(FLOATS), help="may be repeated")
    parser.add_argument("--registers", type=int, metavar="N", help="at most so many of a thread, instead of any number")
    options = parser.parse_args()
    print("# The Triton kernel, compiled for GPUs that are not there\n")
    print("Registers of a thread and shared bytes are given for forward and backward, the bytes that a voxel requests")
    print(f"for both together. Triton {triton.__version__}, {date.today():%d %B %Y}. See")
    print("[performance](../performance.md#the-triton-kernel-without-a-gpu).\n")
    print("| GPU | loss | classes | logits | registers | bytes spilled | shared bytes | bytes | floor | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for arch in options.arch or ARCHITECTURES:
        for loss in options.loss or LOSSES:
            for classes in options.classes or CLASSES:
                for logits in options.logits or FLOATS:
                    print(row(arch, classes, logits, loss, options.registers), flush=True)


if __name__ == "__main__":
    main()
