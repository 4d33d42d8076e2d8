"""The Triton programs of errors as the Lovasz losses call them: launches, and the totals of the tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monai_iou.voxels import triton_kernels
from monai_iou.voxels.error_gradient import TILED, ErrorKernel, error_spec
from monai_iou.voxels.histograms import ErrorHistograms
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.spec import COUNT, ROWS, TARGET, PassSpec
from monai_iou.voxels.triton_errors import count_errors, write_error_gradient

_MAX_TABLES = 256  # of an image: as many as a GPU has room for programs, so that few add to one table
_MAX_BYTES = 1 << 26  # of all tables
_HINGE = 3


def covers(voxels: Voxels) -> bool:
    """Return whether these programs handle an input of no more classes than fit one block."""
    return triton_kernels.covers(voxels) and voxels.logits.shape[1] <= triton_kernels.CLASS_BLOCK


def blocks(options: dict[str, Any]) -> dict[str, int]:
    """Return how a program divides its work: with 16 classes, a thread has registers for one voxel, not for two."""
    if options["CLASSES"] == triton_kernels.CLASS_BLOCK:
        voxels = 32 * triton_kernels.WARPS
        return {"RUN": 1, "VOXELS": voxels, "CHUNKS": options["CHUNKS"] * options["VOXELS"] // voxels}
    return {}


def _options(voxels: Voxels, spec: PassSpec) -> dict[str, Any]:
    hinge = {"ACTIVATION": _HINGE} if spec.activation == "hinge" else {}
    options = triton_kernels.program_options(voxels, replace(spec, activation=None) if hinge else spec)
    options = {**options, **hinge, "CELLS": error_spec(spec).cells, "SUMS": spec.has_sums}
    return {**options, **blocks(options)}


def _limits(limit: Tensor, batch: int) -> Tensor:
    """Return the largest error of each image, (B,); 1 where it is 0, as no error is then above 0."""
    return torch.where(limit > 0, limit, 1).to(torch.float32).expand(batch, 1).reshape(-1).contiguous()


def count(voxels: Voxels, spec: PassSpec, limit: Tensor) -> tuple[ErrorHistograms, Tensor]:
    """Return the histograms of errors and the statistics (7, B, C, 1); by torch where the programs do not apply."""
    if not covers(voxels):
        return TILED.count(voxels.compact(), spec, limit)
    logits = voxels.logits
    batch, classes, length = logits.shape
    options = _options(voxels, spec)
    programs = triton_kernels.program_count(length, options)
    cells = options["CELLS"]
    tables = max(1, min(programs, _MAX_TABLES, _MAX_BYTES // (8 * batch * classes * cells)))
    counts = torch.zeros((batch, tables, classes, 2, cells), dtype=torch.int32, device=logits.device)
    shape = (batch, programs if spec.has_sums else 1, ROWS, classes)
    rows = torch.empty(shape, dtype=torch.float32, device=logits.device)
    tensors, strides = triton_kernels.program_inputs(voxels)
    with torch.cuda.device_of(logits):
        count_errors[(programs, batch)](
            *tensors, _limits(limit, batch), counts, rows, length, classes, tables, *strides, **options
        )
    histograms = ErrorHistograms(counts.sum(1, dtype=torch.int64), limit)
    statistics = torch.zeros((ROWS, batch, classes), dtype=torch.float64, device=logits.device)
    if spec.has_sums:
        statistics += rows.sum(1, dtype=torch.float64).transpose(0, 1)
    statistics[TARGET], statistics[COUNT] = histograms.volume, histograms.counts.sum((2, 3))
    return histograms, statistics.unsqueeze(-1)


def write_gradient(out: Tensor, voxels: Voxels, spec: PassSpec, limit: Tensor, slopes: Tensor, of_rows: Tensor) -> None:
    """Write d loss / d logits into `out`; `slopes` is (2, B, C, 2, cells), `of_rows` (7, B, C, 1)."""
    if not covers(voxels):
        TILED.write_gradient(out, voxels.compact(), spec, limit, slopes, of_rows)
        return
    batch, classes, length = out.shape
    options = _options(voxels, spec)
    starts, rises = slopes.to(torch.float32).contiguous()
    pulls = of_rows.squeeze(-1).transpose(0, 1).to(torch.float32).contiguous()
    tensors, strides = triton_kernels.program_inputs(voxels)
    with torch.cuda.device_of(out):
        write_error_gradient[(triton_kernels.program_count(length, options), batch)](
            *tensors, _limits(limit, batch), starts, rises, pulls, out, length, classes,
            *strides, *out.stride(), **options,
        )  # fmt: skip


KERNEL = ErrorKernel(count, write_gradient)
