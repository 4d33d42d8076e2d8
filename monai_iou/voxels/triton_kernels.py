"""The Triton kernel as the pass calls it: options for an input, launches, and the totals of the partial sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from monai_iou.voxels import tiled
from monai_iou.voxels.activations import is_binary
from monai_iou.voxels.compact_labels import IGNORED, fits
from monai_iou.voxels.formulas import sums_entropy
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.single_backward import once_differentiable
from monai_iou.voxels.spec import ROWS, PassSpec
from monai_iou.voxels.triton_programs import add_sums, write_gradient
from monai_iou.voxels.triton_regions import add_region_sums, write_region_gradient

MAX_CLASSES = 256
MAX_IMAGES = 65535  # of a batch: the limit of a launch grid's second axis
CLASS_BLOCK = 16
WARPS = 4
_OF_THREAD = 16  # voxels, so that what a program reads and writes once (gradient of the sums, sums) weighs little
_APART = 16  # numbers that a thread keeps of each sum
_TABLES = 1 << 26  # bytes of all programs' tables of regions
_MOST, _FEWEST = 256, 32  # programs of an image with regions, if it has as many parts
_PARTS = 256  # of a program's voxels at most: each is a rounding of a table's entries
_LEAST_PARTS = 4  # of a program, so that its table is worth its memory; the self-check adds to an entry several times
_ACTIVATIONS = {"softmax": 0, "sigmoid": 1, None: 2}
_ONE_PROBABILITY = 4  # a channel's, with a cross-entropy; 3 is the hinge of `triton_error_pass.py`
_OVERLAPS = {"product": 0, "min_max": 1, None: 2}


def covers(voxels: Voxels) -> bool:
    """Return whether this kernel handles the input; `tiled` does the rest."""
    logits = voxels.logits
    return (
        logits.dtype != torch.float64
        and logits.shape[0] <= MAX_IMAGES
        and logits.shape[1] <= MAX_CLASSES
        and logits.numel() > 0
        and (voxels.groups is None or region_programs(voxels) > 0)
    )


def blocks(classes: int, width: int) -> dict[str, int]:
    """Return how a program divides its work, for logits (and maps) of `width` bytes.

    A thread reads `RUN` voxels in a row, at most 16 bytes of a class, and has all classes of a block of them in its
    registers: 16 to 32 numbers, above which they spill.
    """
    block = min(CLASS_BLOCK, triton.next_power_of_2(classes))
    run = max(2, min(16 // width, 16 // block))
    count = triton.cdiv(classes, block)
    chunks = _OF_THREAD // run if count == 1 else 1
    return {"CLASSES": block, "BLOCKS": count, "RUN": run, "VOXELS": 32 * WARPS * run, "CHUNKS": chunks}


def keeps_apart(sizes: Mapping[str, int]) -> bool:
    """Return whether a thread has room to keep the sums of its own voxels until a program's end."""
    return sizes["BLOCKS"] == 1 and sizes["CLASSES"] * sizes["RUN"] <= _APART


def _mark(voxels: Voxels) -> float | None:
    """Return the label of ignored voxels as a number of the labels' dtype; None if there is none."""
    labels = voxels.labels
    if labels is None or not voxels.has_ignored:
        return None
    if not voxels.as_given:
        return IGNORED[labels.dtype]
    if voxels.ignore_index is None or not fits(labels.dtype, voxels.ignore_index):
        return None
    if labels.is_floating_point():
        return float(torch.tensor(voxels.ignore_index, dtype=labels.dtype, device="cpu"))  # rounded as the labels were
    return voxels.ignore_index


def _width(voxels: Voxels) -> int:
    """Return the bytes of a logit, or of a map's value if that is wider."""
    return max(part.element_size() for part in (voxels.logits, voxels.maps) if part is not None)


def program_options(voxels: Voxels, spec: PassSpec) -> dict[str, Any]:
    """Return the constants that a program is compiled with."""
    classes, smoothing = voxels.logits.shape[1], spec.label_smoothing
    binary = is_binary(spec, classes)
    one_probability = binary and spec.activation is None and spec.cross_entropy
    return {
        "ACTIVATION": _ONE_PROBABILITY if one_probability else _ACTIVATIONS[spec.activation],
        "OVERLAP": _OVERLAPS[spec.overlap],
        "POWER": spec.power,
        "ENTROPY": spec.cross_entropy,
        "FOCAL": spec.focal,
        "KEEP": 1 - smoothing,
        "SHARE": smoothing / 2 if binary else smoothing / classes,
        "CONFIDENT": spec.confidence,
        "SPLIT": spec.split,
        "MAPS": voxels.labels is None,
        "IGNORE": _mark(voxels),
        "MASK": voxels.valid is not None,
        "ROWS": ROWS,
        "num_warps": WARPS,
        **blocks(classes, _width(voxels)),
    }


def program_count(count: int, options: dict[str, Any]) -> int:
    """Return how many programs share the `count` voxels of an image."""
    programs: int = triton.cdiv(count, options["VOXELS"] * options["CHUNKS"])
    return programs


def program_inputs(voxels: Voxels) -> tuple[list[Tensor], list[int]]:
    """Return logits, targets and mask as the kernels take them, and their strides."""
    logits = voxels.logits
    target = voxels.maps if voxels.labels is None else voxels.labels.unsqueeze(1)
    assert target is not None
    target = target.view(torch.uint8) if target.dtype == torch.bool else target
    mask = logits if voxels.valid is None else voxels.valid.view(torch.uint8)
    strides = [*logits.stride(), *target.stride(), mask.stride(0), mask.stride(-1)]
    return [logits, target, mask], strides


class _TritonSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels, spec: PassSpec) -> Tensor:
        batch, classes, count = logits.shape
        options = program_options(voxels, spec)
        tensors, strides = program_inputs(voxels)
        programs = program_count(count, options)
        sums = torch.empty((batch, programs, ROWS, classes), dtype=torch.float32, device=logits.device)
        with torch.cuda.device_of(logits):
            add_sums[(programs, batch)](*tensors, sums, count, classes, *strides, **options, APART=keeps_apart(options))
        ctx.spec, ctx.marks = spec, (voxels.has_ignored, voxels.as_given, voxels.ignore_index)
        ctx.save_for_backward(logits, voxels.labels, voxels.maps, voxels.valid)
        return sums.sum(1, dtype=torch.float64).transpose(0, 1).unsqueeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, maps, valid = ctx.saved_tensors
        batch, classes, count = logits.shape
        has_ignored, as_given, ignore_index = ctx.marks
        voxels = Voxels(logits, labels, maps, valid, has_ignored, None, 1, as_given, ignore_index)
        gradient = gradient.squeeze(-1).transpose(0, 1).to(torch.float32).contiguous()
        options = program_options(voxels, ctx.spec)
        tensors, strides = program_inputs(voxels)
        out = torch.empty_like(logits)
        with torch.cuda.device_of(logits):
            strides += out.stride()
            write_gradient[(program_count(count, options), batch)](
                *tensors, gradient, out, count, classes, *strides, **options
            )
        return out, None, None


def region_blocks(classes: int, width: int) -> dict[str, int]:
    """Return how a program with regions divides its work: as :func:`blocks`, but with one block and half its largest.

    What every voxel adds to the sums is kept while the regions are walked over, besides its logits.
    """
    sizes = blocks(classes, width)
    run = min(sizes["RUN"], 16 // sizes["CLASSES"])
    return {"CLASSES": sizes["CLASSES"], "RUN": run, "VOXELS": 32 * WARPS * run}


def region_programs(voxels: Voxels) -> int:
    """Return how many programs, each with a table of all regions, share an image; 0 if there are too many regions."""
    batch, classes, count = voxels.logits.shape
    if classes > CLASS_BLOCK:
        return 0
    parts = triton.cdiv(count, region_blocks(classes, _width(voxels))["VOXELS"])
    room = _TABLES // (4 * ROWS * batch * classes * voxels.regions)
    longest: int = triton.cdiv(parts, _PARTS)
    wanted: int = triton.cdiv(parts, _LEAST_PARTS)
    programs = min(max(_MOST, longest), wanted, room)
    return programs if programs >= max(longest, min(_FEWEST, wanted)) else 0


def _region_options(voxels: Voxels, spec: PassSpec) -> dict[str, Any]:
    assert voxels.groups is not None
    options = program_options(voxels, spec) | region_blocks(voxels.logits.shape[1], _width(voxels))
    del options["BLOCKS"], options["CHUNKS"]
    return {**options, "EACH": voxels.groups.shape[1] > 1, "JOINT": sums_entropy(voxels.groups, spec)}


class _TritonRegionSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels, spec: PassSpec) -> Tensor:
        batch, classes, count = logits.shape
        groups, options = voxels.groups, _region_options(voxels, spec)
        assert groups is not None
        tensors, strides = program_inputs(voxels)
        parts = triton.cdiv(count, options["VOXELS"])
        span = triton.cdiv(parts, region_programs(voxels)) * options["VOXELS"]
        grid = (triton.cdiv(count, span), batch)
        sums = torch.zeros((batch, grid[0], ROWS, classes, voxels.regions), dtype=torch.float32, device=logits.device)
        with torch.cuda.device_of(logits):
            strides += groups.stride()
            add_region_sums[grid](*tensors, groups, sums, count, classes, voxels.regions, span, *strides, **options)
        ctx.spec, ctx.regions = spec, voxels.regions
        ctx.marks = voxels.has_ignored, voxels.as_given, voxels.ignore_index
        ctx.save_for_backward(logits, voxels.labels, voxels.maps, voxels.valid, groups)
        return sums.sum(1, dtype=torch.float64).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, maps, valid, groups = ctx.saved_tensors
        batch, classes, count = logits.shape
        has_ignored, as_given, ignore_index = ctx.marks
        voxels = Voxels(logits, labels, maps, valid, has_ignored, groups, ctx.regions, as_given, ignore_index)
        gradient = gradient.transpose(0, 1).to(torch.float32).contiguous()
        options = _region_options(voxels, ctx.spec)
        tensors, strides = program_inputs(voxels)
        out = torch.empty_like(logits)
        with torch.cuda.device_of(logits):
            strides += [*groups.stride(), *out.stride()]
            write_region_gradient[(triton.cdiv(count, options["VOXELS"]), batch)](
                *tensors, groups, gradient, out, count, classes, ctx.regions, *strides, **options
            )
        return out, None, None


def compute_sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (7, B, C, R) of `voxels`; by the tiled kernel where this one does not apply."""
    if not covers(voxels):
        return tiled.compute_sums(voxels, spec)
    kernel = _TritonSums if voxels.groups is None else _TritonRegionSums
    result: Tensor = kernel.apply(voxels.logits, voxels, spec)
    return result
