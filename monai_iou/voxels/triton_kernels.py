"""The Triton kernel as the pass calls it: options for an input, launches, and the totals of the partial sums."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from monai_iou.voxels import tiled
from monai_iou.voxels.inputs import IGNORED, Voxels
from monai_iou.voxels.single_backward import once_differentiable
from monai_iou.voxels.spec import COUNT, ROWS, TARGET, PassSpec
from monai_iou.voxels.triton_programs import add_sums, write_gradient

MAX_CLASSES = 256
MAX_IMAGES = 65535  # of a batch: the limit of a launch grid's second axis
CLASS_BLOCK = 16
TILE = 4096  # elements (classes x voxels) in the registers of a program
WARPS = 8
_ACTIVATIONS = {"softmax": 0, "sigmoid": 1, None: 2}
_OVERLAPS = {"product": 0, "min_max": 1, None: 2}


def covers(voxels: Voxels) -> bool:
    """Return whether this kernel handles the input; `tiled` does the rest."""
    logits = voxels.logits
    return (
        logits.dtype != torch.float64
        and logits.shape[0] <= MAX_IMAGES
        and logits.shape[1] <= MAX_CLASSES
        and logits.numel() > 0
        and voxels.groups is None
    )


def _options(voxels: Voxels, spec: PassSpec) -> dict[str, Any]:
    classes = voxels.logits.shape[1]
    smoothing = spec.label_smoothing
    block = min(CLASS_BLOCK, triton.next_power_of_2(classes))
    ignores = voxels.labels is not None and voxels.has_ignored
    return {
        "ACTIVATION": _ACTIVATIONS[spec.activation],
        "OVERLAP": _OVERLAPS[spec.overlap],
        "POWER": spec.power,
        "ENTROPY": spec.cross_entropy,
        "FOCAL": spec.focal,
        "KEEP": 1 - smoothing,
        "SHARE": smoothing / 2 if spec.activation == "sigmoid" else smoothing / classes,
        "CONFIDENT": spec.confidence,
        "SPLIT": spec.split,
        "MAPS": voxels.labels is None,
        "IGNORE": IGNORED[voxels.labels.dtype] if ignores and voxels.labels is not None else None,
        "MASK": voxels.valid is not None,
        "CLASSES": block,
        "BLOCKS": triton.cdiv(classes, block),
        "VOXELS": min(TILE // block, 1024),
        "num_warps": WARPS,
    }


def _inputs(voxels: Voxels) -> tuple[list[Tensor], list[int]]:
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
        options = _options(voxels, spec)
        tensors, strides = _inputs(voxels)
        programs, rows = triton.cdiv(count, options["VOXELS"]), spec.rows()
        sums = torch.empty((batch, programs, len(rows), classes), dtype=torch.float32, device=logits.device)
        counts = torch.empty((batch, programs, 1), dtype=torch.float32, device=logits.device)
        with torch.cuda.device_of(logits):
            add_sums[(programs, batch)](*tensors, sums, counts, count, classes, *strides, ROWS=len(rows), **options)
        ctx.spec, ctx.has_ignored = spec, voxels.has_ignored
        ctx.save_for_backward(logits, voxels.labels, voxels.maps, voxels.valid)
        totals = dict(zip(rows, sums.sum(1, dtype=torch.float64).unbind(1), strict=True))
        totals[COUNT] = counts.sum(1, dtype=torch.float64).expand(batch, classes)
        unasked = torch.zeros_like(totals[TARGET])
        return torch.stack([totals.get(row, unasked) for row in range(ROWS)]).unsqueeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, maps, valid = ctx.saved_tensors
        batch, classes, count = logits.shape
        voxels = Voxels(logits, labels, maps, valid, ctx.has_ignored, None, 1)
        gradient = gradient.squeeze(-1).transpose(0, 1).to(torch.float32).contiguous()
        options = _options(voxels, ctx.spec)
        tensors, strides = _inputs(voxels)
        out = torch.empty_like(logits)
        programs = triton.cdiv(count, options["VOXELS"])
        with torch.cuda.device_of(logits):
            strides += out.stride()
            write_gradient[(programs, batch)](*tensors, gradient, out, count, classes, *strides, ROWS=ROWS, **options)
        return out, None, None


def compute_sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (7, B, C, 1) of `voxels`; by the tiled kernel where this one does not apply."""
    if not covers(voxels):
        return tiled.compute_sums(voxels, spec)
    result: Tensor = _TritonSums.apply(voxels.logits, voxels, spec)
    return result
