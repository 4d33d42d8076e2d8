"""The pass over a whole batch by loops that Numba compiles, a tile at a time, in threads.

The loops read the logits and labels where they are. Between forward and backward they keep the probabilities of one
class, or of the second of two, where the gradient will stand; of more classes nothing. A tile whose numbers they do not
take (NaN, infinite, extreme) is left to the general formulas.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterator
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from monai_iou.voxels import general_tiles, huge_pages, in_place
from monai_iou.voxels.compact_labels import IGNORED
from monai_iou.voxels.inputs import Voxels, total_dtype
from monai_iou.voxels.labels import narrowed
from monai_iou.voxels.single_backward import once_differentiable
from monai_iou.voxels.spec import BACKGROUND_ENTROPY, COUNT, CROSS_ENTROPY, ROWS, PassSpec
from monai_iou.voxels.tiling import in_threads

Array = NDArray[Any]
_TILE_ELEMENTS, _SMALLEST_TILE = 1 << 18, 1 << 12
_NO_MASK = np.empty(0, np.bool_)


@functools.cache
def _loaded() -> tuple[ModuleType, ...] | str:
    """Return the modules of the loops, or why there are none."""
    try:
        names = ("usual", "lines", "softmax", "math")
        modules = tuple(importlib.import_module(f"monai_iou.voxels.numba_{name}") for name in names)
        if modules[-1].is_off():
            return "NUMBA_DISABLE_JIT is set"
        value = float(modules[-1].exp(np.float32(-1)))
    except Exception as error:  # whatever is wrong with Numba here, operations of torch do the same
        return f"Numba does not work here ({type(error).__name__}: {error})"
    return modules if abs(value - math.exp(-1)) < 1e-6 else f"Numba computed exp(-1) = {value}"


def hindrance() -> str | None:
    """Return why the loops cannot be used, as the end of a sentence; None if they can."""
    found = _loaded()
    return found if isinstance(found, str) else None


def covers(voxels: Voxels, spec: PassSpec) -> bool:
    """Return whether this pass computes what `spec` asks for."""
    logits = voxels.logits
    return (
        (spec.activation == "sigmoid" or (spec.activation == "softmax" and logits.shape[1] > 1))
        and logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and logits.numel() > 0
        and voxels.groups is None
        and spec.power in (1, 2)
        and spec.bins is None
        and hindrance() is None
    )


class _Flat:
    """Tensors (B, C, N) as float32 in one piece of memory: that of the tensor where it can be, else a tile's copy."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.detach()
        (self._of_image, self.stride, step), (batch, classes, count) = self.values.stride(), self.values.shape
        self._memory: Array | None = None
        if values.dtype == torch.float32 and step == 1:
            extent = (batch - 1) * self._of_image + (classes - 1) * self.stride + count
            self._memory = self.values.as_strided((extent,), (1,)).numpy()

    @property
    def is_shared(self) -> bool:
        """Whether what is written to a tile is written to the tensor."""
        return self._memory is not None

    def tile(self, image: int, part: slice, *, copy: bool = True) -> tuple[Array, int]:
        """Return voxels of an image, those of class c from c * stride on, and the stride."""
        if self._memory is not None:
            return self._memory[image * self._of_image + part.start :], self.stride
        values = self.values[image, :, part]
        if not copy:
            return np.empty(values.numel(), np.float32), values.shape[1]
        return values.to(torch.float32).contiguous().flatten().numpy(), values.shape[1]

    def write(self, tile: Array, image: int, part: slice) -> None:
        """Write what is not shared."""
        place = self.values[image, :, part]
        place.copy_(torch.from_numpy(tile).view(place.shape))


class _Tiles:
    """The tiles of a batch, as the loops take them."""

    def __init__(self, voxels: Voxels, spec: PassSpec) -> None:
        found = _loaded()
        assert not isinstance(found, str)
        self.usual, self.lines, self.softmax, parts = found
        self.terms, self.spec = parts.Terms.of(spec), spec
        batch, self.classes, count = voxels.logits.shape
        labels = voxels.labels
        target = voxels.maps if labels is None else labels.unsqueeze(1)
        assert target is not None
        self.logits, self.target = _Flat(voxels.logits), _Flat(target)
        self.mask = None if voxels.valid is None else voxels.valid.contiguous().numpy()
        self.labels = labels is not None
        self.mark = IGNORED[labels.dtype] if labels is not None and voxels.has_ignored else 0
        self.two = self.labels and self.classes == 2 and spec.activation == "softmax"
        self.is_softmax = spec.activation == "softmax" and not self.two
        self.is_usual = self.mark == 0 and self.mask is None and self.usual.is_usual(self.terms, self.two)
        size = max(_SMALLEST_TILE, _TILE_ELEMENTS // max(2, self.classes))
        self.parts = [
            (image, slice(start, min(start + size, count))) for image in range(batch) for start in range(0, count, size)
        ]

    def of_all_classes(self, image: int, part: slice) -> tuple[Any, ...]:
        """Return what the loops over all classes of a softmax take."""
        (x, stride), (target, map_stride) = self.logits.tile(image, part), self.target.tile(image, part)
        number, mask, count = 0 if self.labels else -1, self._mask(image, part), part.stop - part.start
        return x, stride, self.classes, target, map_stride, number, self.mark, mask, count, self.terms

    def of_each_class(self, image: int, part: slice) -> Iterator[tuple[int, Array, Array, Array, int]]:
        """Yield a class, its logits and those of the other, its target, and its number in labels (-1 in maps)."""
        (x, stride), (target, map_stride) = self.logits.tile(image, part), self.target.tile(image, part)
        count = part.stop - part.start
        for c in [1] if self.two else range(self.classes):
            own, place = x[c * stride : c * stride + count], 0 if self.labels else c * map_stride
            yield c, own, x[:count], target[place : place + count], c if self.labels else -1

    def options(self, image: int, part: slice) -> tuple[Any, ...]:
        """Return what else the loops over a class and the others take."""
        return self.mark, self._mask(image, part), self.two, self.terms

    def _mask(self, image: int, part: slice) -> Array:
        return _NO_MASK if self.mask is None else self.mask[image, part]


class _State(IntEnum):
    """Who computes the gradient of a tile: the general formulas, the loops, or the loops from probabilities kept."""

    GENERAL, COMPUTED, KEPT = range(3)


def _general_sums(voxels: Voxels, spec: PassSpec, image: int, part: slice) -> Array:
    """Return the statistics (C, 7) of a tile that the loops do not take."""
    logits = voxels.logits
    rows = torch.zeros((ROWS, *logits.shape[:2], 1), dtype=total_dtype(logits), device="cpu")
    if in_place.covers(voxels, spec):
        rows[:, image, :, 0] = in_place.sums(voxels.part(image, part), spec)[:, 0]
    else:
        general_tiles.add_tile(rows, voxels, spec, image, part)
    statistics: Array = rows[:, image, :, 0].T.numpy()
    return statistics


def _write_general(out: Tensor, gradient: Tensor, voxels: Voxels, spec: PassSpec, image: int, part: slice) -> None:
    """Write the gradient of a tile that the loops do not take."""
    if in_place.covers(voxels, spec):
        place, pulls = out[image : image + 1, :, part], gradient[:, image : image + 1]
        in_place.write_gradients(place, pulls, voxels.part(image, part), spec)
    else:
        general_tiles.write_gradient(out, gradient, voxels, spec, image, part)


def _tile_sums(tiles: _Tiles, kept: _Flat | None, image: int, part: slice) -> tuple[Array, _State, bool]:
    """Return the statistics (C, 7) of a tile, what becomes of its gradient, and whether all targets are from 0 to 1.

    If its gradient is left to the general formulas, the other two mean nothing.
    """
    rows = np.zeros((tiles.classes, ROWS))
    if tiles.is_softmax:
        if not tiles.softmax.add_classes(*tiles.of_all_classes(image, part), rows):
            return rows, _State.GENERAL, False
        wrong, rows[:, -1] = rows[:, -1].sum(), 0
        return rows, _State.COMPUTED, wrong == 0
    wrong, state = 0.0, int(_State.KEPT)
    place, stride = (None, 0) if kept is None else kept.tile(image, part)
    for c, x, other, target, number in tiles.of_each_class(image, part):
        pair = np.zeros((2, ROWS))
        if tiles.is_usual:
            p = x if place is None else place[c * stride : c * stride + part.stop - part.start]
            options = (tiles.two, tiles.terms, place is not None)
            state = min(state, tiles.usual.add_usual(x, other, target, number, *options, p, pair))
        else:
            taken = tiles.lines.add_line(x, other, target, number, *tiles.options(image, part), pair)
            state = min(state, _State.COMPUTED if taken else _State.GENERAL)
        wrong, pair[0, -1] = wrong + pair[0, -1], 0
        rows[c] = pair[0]
        if tiles.two:
            rows[0], rows[0, COUNT] = pair[1], pair[0, COUNT]
        elif tiles.spec.split:
            rows[c, BACKGROUND_ENTROPY] = pair[1, CROSS_ENTROPY]
        else:
            with np.errstate(invalid="ignore"):  # infinite targets, which are refused later
                rows[c, CROSS_ENTROPY] += pair[1, CROSS_ENTROPY]
    return rows, _State(state), wrong == 0


def _sums(voxels: Voxels, spec: PassSpec, kept: Tensor | None) -> tuple[Tensor, list[_State]]:
    """Return the statistics (7, B, C, 1), and what becomes of each tile's gradient."""
    tiles = _Tiles(voxels, spec)
    places = None if kept is None or not tiles.is_usual else _Flat(kept)
    places = places if places is None or places.is_shared else None

    def work(part: tuple[int, slice]) -> tuple[Array, _State, bool]:
        rows, state, are_shares = _tile_sums(tiles, places, *part)
        return _general_sums(voxels, spec, *part) if state == _State.GENERAL else rows, state, are_shares

    total = np.zeros((*voxels.logits.shape[:2], ROWS))
    results = in_threads(work, tiles.parts)
    for (image, _), (rows, _, _) in zip(tiles.parts, results, strict=True):
        with np.errstate(invalid="ignore"):  # infinite logits or targets
            total[image] += rows
    states = [state for _, state, _ in results]
    # The loops read 1 + 1e-9 as 1, and -1e-60 as 0.
    reads_exactly = voxels.maps is not None and voxels.maps.dtype != torch.float64
    if voxels.findings is not None and reads_exactly and _State.GENERAL not in states:
        voxels.findings.maps_are_shares = all(are_shares for _, _, are_shares in results)
    return torch.from_numpy(total).permute(2, 0, 1).unsqueeze(-1), states


def _write_tile(tiles: _Tiles, out: _Flat, pulls: Array, state: _State, image: int, part: slice) -> None:
    """Write the gradient of a tile into `out` (B, C, N); `pulls` is d loss / d statistics, (B, C, 7) float32."""
    place, stride = out.tile(image, part, copy=False)
    if tiles.is_softmax:
        tiles.softmax.write_classes(*tiles.of_all_classes(image, part), pulls[image], place, stride)
    else:
        count, of_others = part.stop - part.start, BACKGROUND_ENTROPY if tiles.spec.split else CROSS_ENTROPY
        for c, x, other, target, number in tiles.of_each_class(image, part):
            pair = pulls[image, [c, 0]]
            if not tiles.two:
                pair[1, CROSS_ENTROPY] = pulls[image, c, of_others]
            places = place[c * stride : c * stride + count], place[:count]
            if state == _State.KEPT:
                tiles.usual.write_usual(target, number, tiles.two, tiles.terms, pair, *places)
            else:
                tiles.lines.write_line(x, other, target, number, *tiles.options(image, part), pair, *places)
    if not out.is_shared:
        out.write(place, image, part)


class _NumbaSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels, spec: PassSpec, keeps: bool) -> Tensor:
        ctx.kept = huge_pages.empty_like(logits) if keeps else None
        total, ctx.states = _sums(voxels, spec, ctx.kept)
        if _State.KEPT not in ctx.states:
            ctx.kept = None
        ctx.spec, ctx.has_ignored = spec, voxels.has_ignored
        # Wrong labels may wrap round here; their error follows the sums, and no backward does.
        ctx.save_for_backward(logits, narrowed(voxels.labels, logits.shape[1]), voxels.maps, voxels.valid)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, maps, valid = ctx.saved_tensors
        voxels = Voxels(logits, labels, maps, valid, ctx.has_ignored, None, 1)
        gradient, tiles = gradient.to(torch.float32), _Tiles(voxels, ctx.spec)
        pulls = gradient.squeeze(-1).permute(1, 2, 0).contiguous().numpy()
        kept, ctx.kept = ctx.kept, None  # a further backward pass computes the probabilities again
        out = huge_pages.empty_like(logits) if kept is None else kept
        places = _Flat(out)

        def work(task: tuple[tuple[int, slice], _State]) -> None:
            part, state = task
            if state == _State.GENERAL:
                _write_general(out, gradient, voxels, ctx.spec, *part)
            else:
                _write_tile(tiles, places, pulls, state if kept is not None else _State.COMPUTED, *part)

        in_threads(work, list(zip(tiles.parts, ctx.states, strict=True)))
        return out, None, None, None


def compute_sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (7, B, C, 1) of `voxels`."""
    logits = voxels.logits
    keeps = torch.is_grad_enabled() and logits.requires_grad and logits.dtype == torch.float32
    result: Tensor = _NumbaSums.apply(logits, voxels, spec, keeps)
    return result
