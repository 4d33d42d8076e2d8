"""The compiled kernel: the reference's formulas unrolled over classes, fused by torch.compile into one loop on a CPU.

Two things decide whether Inductor makes one vectorised loop of it: classes must be separate rows of a Python list (no
dimension to reduce over inside the loop), and labels must be 32 bits wide like the logits. So labels are widened to
float32 a chunk at a time. Sums run in float32 along lines of `LINE` voxels and in float64 from there on, so that a
volume of any size keeps its digits. Voxels beyond the last full line go through the tiled kernel's functions.
"""

from __future__ import annotations

import functools
import os
import shutil
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor

from monai_iou.voxels import general_tiles, huge_pages, tiled
from monai_iou.voxels.activations import Probabilities, class_probabilities
from monai_iou.voxels.compact_labels import IGNORED
from monai_iou.voxels.formulas import class_slopes, statistics
from monai_iou.voxels.inputs import Voxels, total_dtype
from monai_iou.voxels.labels import narrowed
from monai_iou.voxels.single_backward import once_differentiable
from monai_iou.voxels.spec import COUNT, ROWS, PassSpec

LINE = 2048  # voxels summed in float32
CHUNK = 128  # lines handed to the compiled loop at once: 1 MiB of widened labels
MAX_CLASSES = 16  # compiling 14 takes a minute on one busy core, and the time grows faster than the count
# Inductor's limits split the loop, and write what lies between to memory; without them it stays one.
_ONE_LOOP: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.max_horizontal_fusion_size": 1024,
    "max_fusion_size": 1024,
    "realize_opcount_threshold": 100,
    "realize_reads_threshold": 100,
}
_COMPILERS = ("g++", "clang++", "c++", "cl")


def is_available() -> bool:
    """Return whether a C++ compiler is there for torch.compile to use."""
    chosen = os.environ.get("CXX")
    return any(shutil.which(name) for name in ((chosen,) if chosen else _COMPILERS))


def covers(voxels: Voxels) -> bool:
    """Return whether this kernel handles the input; `tiled` does the rest."""
    logits = voxels.logits
    return (
        logits.device.type == "cpu"
        and logits.dtype != torch.float64
        and logits.shape[1] <= MAX_CLASSES
        and logits.shape[2] >= 2 * LINE
        and logits.stride(2) == 1
        and voxels.groups is None
        and (voxels.maps is None or voxels.maps.stride(2) == 1)
    )


def _class_rows(logits: Sequence[Tensor], valid: Tensor | None, spec: PassSpec, classes: int) -> list[Probabilities]:
    """Return the probabilities of each class, lists of rows being what Inductor keeps in registers."""
    rows = [row.to(torch.float32) for row in logits]
    if valid is not None:
        rows = [torch.where(valid, row, 0.0) for row in rows]
    if spec.activation != "softmax":
        return [class_probabilities(row, spec, classes) for row in rows]
    peak = functools.reduce(torch.maximum, rows)
    rows = [row - peak for row in rows]
    powers = [row.exp() for row in rows]
    norm = functools.reduce(torch.add, powers)
    share, log_norm = 1 / norm, None
    if spec.cross_entropy:  # as in the reference: ln(1 + rest) keeps its digits where the rest is tiny
        below = [torch.where(row >= 0, 0.0, power) for row, power in zip(rows, powers, strict=True)]
        ties = functools.reduce(torch.add, [torch.where(row < 0, 0.0, 1.0) for row in rows]) - 1
        log_norm = (functools.reduce(torch.add, below) + ties).log1p()
    return [
        Probabilities(power * share, None if log_norm is None else row - log_norm, None, classes)
        for row, power in zip(rows, powers, strict=True)
    ]


def _class_targets(target: Any, valid: Tensor | None, classes: int) -> list[Tensor]:
    if isinstance(target, Tensor):
        return [(target == c).to(torch.float32) for c in range(classes)]
    rows = [row.to(torch.float32) for row in target]
    return rows if valid is None else [torch.where(valid, row, 0.0) for row in rows]


def _valid(target: Any, valid: Tensor | None, ignored: int | None) -> Tensor | None:
    return target != ignored if ignored is not None else None if valid is None else valid != 0


def _forward(
    logits: Sequence[Tensor], target: Any, mask: Tensor | None, *, spec: PassSpec, classes: int, ignored: int | None
) -> list[Tensor]:
    """Return, for each class, the sums along lines of every row that `spec` asks for, (lines,) each."""
    valid = _valid(target, mask, ignored)
    share = None if valid is None else valid.to(torch.float32)
    sums = [] if share is None else [share.sum(-1)]
    targets = _class_targets(target, valid, classes)
    for p, y in zip(_class_rows(logits, valid, spec, classes), targets, strict=True):
        sums += [values.sum(-1) for _, values in statistics(p, y, share, spec)]
    return sums


def _backward(
    logits: Sequence[Tensor],
    target: Any,
    mask: Tensor | None,
    gradient: Tensor,
    out: Sequence[Tensor],
    *,
    spec: PassSpec,
    classes: int,
    ignored: int | None,
) -> None:
    """Write d loss / d logits into `out`; `gradient` is (7, C)."""
    valid = _valid(target, mask, ignored)
    rows = _class_rows(logits, valid, spec, classes)
    targets = _class_targets(target, valid, classes)
    slopes = [class_slopes(p, y, gradient[:, c], spec) for c, (p, y) in enumerate(zip(rows, targets, strict=True))]
    if spec.activation == "softmax":
        total = functools.reduce(torch.add, slopes)
        slopes = [slope - p.value * total for slope, p in zip(slopes, rows, strict=True)]
    for c, slope in enumerate(slopes):
        out[c].copy_(slope if valid is None else torch.where(valid, slope, 0.0))


@functools.cache
def _compiled(
    function: Callable[..., Any], spec: PassSpec, classes: int, ignored: int | None, *_: torch.dtype
) -> Callable[..., Any]:
    """Return the compiled form for one class count and specification, for any number of voxels.

    Each has a code object of its own: torch.compile counts recompilations by code object, and these are none.
    """
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    own.__kwdefaults__ = {"spec": spec, "classes": classes, "ignored": ignored}
    compiled = torch.compile(own, fullgraph=True, dynamic=True, options=_ONE_LOOP)
    first = True

    def call(*args: Any) -> Any:
        nonlocal first
        if not first:
            return compiled(*args)
        # Sizes that happen to agree at the first call are no rule; and the compiler warns about its own code.
        with warnings.catch_warnings(), torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            warnings.simplefilter("ignore")
            result = compiled(*args)
        first = False
        return result

    return call


def _chunks(voxels: Voxels) -> list[tuple[int, slice]]:
    """Return (image, voxels) of every chunk; none has a single line, which would be compiled anew."""
    lines = voxels.logits.shape[2] // LINE
    starts = list(range(0, lines - 1, CHUNK))
    stops = [*starts[1:], lines]
    return [
        (image, slice(start * LINE, stop * LINE))
        for image in range(voxels.logits.shape[0])
        for start, stop in zip(starts, stops, strict=True)
    ]


def _arguments(voxels: Voxels, image: int, part: slice) -> tuple[Sequence[Tensor], Any, Tensor | None]:
    """Return the classes' logits, widened labels or the classes' maps, and the mask; each (lines, LINE).

    One tensor per class, because the compiler would make another loop for each relation of strides to sizes.
    """
    logits = _lines(voxels.logits[image, :, part])
    if voxels.labels is not None:
        return logits, _lines(voxels.labels[None, image, part].to(torch.float32).contiguous())[0], None
    assert voxels.maps is not None
    maps = voxels.maps[image, :, part]
    mask = None if voxels.valid is None else _lines(voxels.valid[None, image, part].to(torch.int32))[0]
    return logits, _lines(maps if maps.is_floating_point() else maps.to(torch.float32)), mask


def _lines(tensor: Tensor) -> list[Tensor]:
    """Return the rows of (C, n) as (lines, LINE) each: the same memory, but no views, on whose base it would guard."""
    huge_pages, size = tensor.untyped_storage(), tensor.element_size()
    shape, lines = (tensor.shape[1] // LINE, LINE), []
    for c in range(tensor.shape[0]):
        start = (tensor.storage_offset() + c * tensor.stride(0)) * size  # offsets would tell 0 from others
        part = huge_pages[start : start + tensor.shape[1] * size]
        lines.append(tensor.new_empty(0).set_(part, 0, shape, (LINE, 1)))
    return lines


def _key(voxels: Voxels, spec: PassSpec) -> tuple[Any, ...]:
    ignored = None
    if voxels.labels is not None and voxels.has_ignored:
        ignored = IGNORED[voxels.labels.dtype]
    kinds = [tensor.dtype for tensor in (voxels.logits, voxels.maps) if tensor is not None]
    return spec, voxels.logits.shape[1], ignored, *kinds


def _rest(voxels: Voxels) -> slice:
    return slice(voxels.logits.shape[2] // LINE * LINE, None)


class _CompiledSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels, spec: PassSpec) -> Tensor:
        batch, classes, count = logits.shape
        function = _compiled(_forward, *_key(voxels, spec))
        total = torch.zeros((ROWS, batch, classes, 1), dtype=total_dtype(logits), device="cpu")
        rows = spec.rows()

        for image, part in _chunks(voxels):
            sums = torch.stack(function(*_arguments(voxels, image, part))).sum(-1, dtype=total.dtype)
            has_mask = len(sums) > classes * len(rows)
            total[COUNT, image] += sums[0] if has_mask else part.stop - part.start
            total[rows, image, :, 0] += sums[int(has_mask) :].view(classes, len(rows)).T
        for image in range(batch if count % LINE else 0):
            general_tiles.add_tile(total, voxels, spec, image, _rest(voxels))
        ctx.spec, ctx.has_ignored = spec, voxels.has_ignored
        # Wrong labels may wrap round here; their error follows the sums, and no backward does.
        ctx.save_for_backward(logits, narrowed(voxels.labels, classes), voxels.maps, voxels.valid)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, maps, valid = ctx.saved_tensors
        voxels = Voxels(logits, labels, maps, valid, ctx.has_ignored, None, 1)
        gradient = gradient.to(torch.float32)
        function = _compiled(_backward, *_key(voxels, ctx.spec))
        out = huge_pages.empty_like(logits)
        for image, part in _chunks(voxels):
            slope = gradient[:, image, :, 0].contiguous()
            function(*_arguments(voxels, image, part), slope, _lines(out[image, :, part]))
        for image in range(logits.shape[0] if logits.shape[2] % LINE else 0):
            general_tiles.write_gradient(out, gradient, voxels, ctx.spec, image, _rest(voxels))
        return out, None, None


def compute_sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (7, B, C, 1) of `voxels`; by the tiled kernel where this one does not apply."""
    voxels = voxels.compact()
    if not covers(voxels):
        return tiled.compute_sums(voxels, spec)
    result: Tensor = _CompiledSums.apply(voxels.logits, voxels, spec)
    return result
