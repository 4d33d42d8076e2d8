"""Tensors as the loops that Numba compiles take them, a tile at a time, and the loops themselves."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from monai_iou.voxels.compact_labels import IGNORED
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.spec import PassSpec

Array = NDArray[Any]
# Elements (classes x voxels, of one class as of two) of a tile: with fewer, Python takes longer than the loops.
_LEAST_ELEMENTS, _MOST_ELEMENTS = 1 << 18, 1 << 19
_LEAST_VOXELS = 1 << 12
_SHARES = 8  # the tiles of a large volume are a multiple of it, so that up to as many threads have equally much to do
_NO_MASK, _NO_GROUPS = np.empty(0, np.bool_), np.empty(0, np.int32)


@functools.cache
def loaded() -> tuple[ModuleType, ...] | str:
    """Return the modules of the loops, or why there are none."""
    try:
        names = ("usual", "lines", "softmax", "cells", "cell_slopes", "regions", "math")
        modules = tuple(importlib.import_module(f"monai_iou.voxels.numba_{name}") for name in names)
        if modules[-1].is_off():
            return "NUMBA_DISABLE_JIT is set"
        value, vectors_work = float(modules[-1].exp(np.float32(-1))), modules[-2].vectors_work()
    except Exception as error:  # whatever is wrong with Numba here, operations of torch do the same
        return f"Numba does not work here ({type(error).__name__}: {error})"
    if not vectors_work:
        return "vectors do not work in Numba here"
    return modules if abs(value - math.exp(-1)) < 1e-6 else f"Numba computed exp(-1) = {value}"


def _tile_size(voxels: int, classes: int) -> int:
    """Return the voxels of a tile, of so many in a batch.

    >>> _tile_size(1 << 18, 2), _tile_size(1 << 21, 2), _tile_size(1 << 24, 2)
    (131072, 262144, 262144)
    """
    least, most = (max(_LEAST_VOXELS, elements // classes) for elements in (_LEAST_ELEMENTS, _MOST_ELEMENTS))
    return max(least, math.ceil(voxels / (_SHARES * math.ceil(voxels / (_SHARES * most)))))


class Flat:
    """Tensors (B, C, N) of a dtype in one piece of memory: that of the tensor where it can be, else a tile's copy."""

    def __init__(self, values: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.values, self.dtype = values.detach(), dtype
        (self._of_image, self.stride, step), (batch, classes, count) = self.values.stride(), self.values.shape
        self._memory: Array | None = None
        if values.dtype == dtype and step == 1:
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
        return values.to(self.dtype).contiguous().flatten().numpy(), values.shape[1]

    def write(self, tile: Array, image: int, part: slice) -> None:
        """Write what is not shared."""
        place = self.values[image, :, part]
        place.copy_(torch.from_numpy(tile).view(place.shape))


def _each_by_itself(groups: Tensor) -> Tensor:
    """Return maps of regions (B, C, N) of which no two share memory: their stride would be that of a single map."""
    return groups.contiguous() if groups.shape[1] > 1 and groups.stride(1) == 0 else groups


class Tiles:
    """The tiles of a batch, as the loops take them."""

    def __init__(self, voxels: Voxels, spec: PassSpec) -> None:
        found = loaded()
        assert not isinstance(found, str)
        self.usual, self.lines, self.softmax, self.cells, self.cell_slopes, self.by_region, parts = found
        self.terms, self.spec = parts.Terms.of(spec), spec
        batch, self.classes, count = voxels.logits.shape
        labels = voxels.labels
        target = voxels.maps if labels is None else labels.unsqueeze(1)
        assert target is not None
        self.logits, self.target = Flat(voxels.logits), Flat(target)
        self.mask = None if voxels.valid is None else voxels.valid.contiguous().numpy()
        self.groups = None if voxels.groups is None else Flat(_each_by_itself(voxels.groups), torch.int32)
        self.region_maps, self.regions = 0 if voxels.groups is None else voxels.groups.shape[1], voxels.regions
        self.labels = labels is not None
        self.mark = IGNORED[labels.dtype] if labels is not None and voxels.has_ignored else 0
        self.two = self.labels and self.classes == 2 and spec.activation == "softmax" and self.region_maps < 2
        self.is_softmax = spec.activation == "softmax" and not self.two
        self.is_usual = self.mark == 0 and self.mask is None and self.usual.is_usual(self.terms, self.two)
        if self.groups is not None:
            self.is_usual &= spec == PassSpec(spec.activation, cross_entropy=spec.cross_entropy, split=spec.split)
        self.of_cells = self.two, self.terms.entropy
        reads_whole = self.groups is not None and self.is_usual and not self.labels and target.dtype == torch.int32
        whole = Flat(target, torch.int32) if reads_whole else None
        self.whole = whole if whole is not None and whole.is_shared else None
        size = _tile_size(batch * count, max(2, self.classes))
        self.parts = [
            (image, slice(start, min(start + size, count))) for image in range(batch) for start in range(0, count, size)
        ]

    def groups_of(self, image: int, part: slice) -> tuple[Array, int]:
        """Return the regions of voxels, those of class c from c * stride on, and the stride; of no length without."""
        if self.groups is None:
            return _NO_GROUPS, 0
        groups, stride = self.groups.tile(image, part)
        return groups, stride if self.region_maps > 1 else 0

    def of_all_classes(self, image: int, part: slice) -> tuple[Any, ...]:
        """Return what the loops over all classes of a softmax take."""
        (x, stride), (target, map_stride) = self.logits.tile(image, part), self.target.tile(image, part)
        number, mask, count = 0 if self.labels else -1, self._mask(image, part), part.stop - part.start
        return x, stride, self.classes, target, map_stride, number, self.mark, mask, count, self.terms

    def of_each_class(
        self, image: int, part: slice, *, reads_target: bool = True
    ) -> Iterator[tuple[int, Array, Array, Array, int]]:
        """Yield a class, its logits and those of the other, its target, and its number in labels (-1 in maps).

        Without `reads_target`, the yielded target is a placeholder.
        """
        x, stride = self.logits.tile(image, part)
        target, map_stride = self.target.tile(image, part) if reads_target else (x, stride)
        count = part.stop - part.start
        for c in [1] if self.two else range(self.classes):
            own, place = x[c * stride : c * stride + count], 0 if self.labels else c * map_stride
            yield c, own, x[:count], target[place : place + count], c if self.labels else -1

    def whole_numbers(self, image: int, part: slice, c: int) -> Array:
        """Return the target of a class as it is, int32; of no length where the loops are to read it as float32."""
        if self.whole is None:
            return _NO_GROUPS
        target, stride = self.whole.tile(image, part)
        return target[c * stride : c * stride + part.stop - part.start]

    def options(self, image: int, part: slice) -> tuple[Any, ...]:
        """Return what else the loops over a class and the others take, but for the regions."""
        return self.mark, self._mask(image, part), self.two, self.terms

    def _mask(self, image: int, part: slice) -> Array:
        return _NO_MASK if self.mask is None else self.mask[image, part]
