"""Reading the entries of an item at other places than their voxels' centres, all entries at the same ones.

Places are computed on a few nodes for each axis, because linear interpolation between nodes is exact for an affine map
and close for a smooth field. Interpolating is one small matrix for each axis: on a CPU this takes a fraction of the
time of torch's `affine_grid` or `interpolate`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform
from monai.utils.misc import ensure_tuple_rep
from monai.utils.type_conversion import convert_to_dst_type, convert_to_tensor
from torch import Tensor

from monai_iou import checks
from monai_iou.transforms.shapes import check_same_shape

__all__ = ["WarpTransform", "along_axes", "exact_dtype", "nodes_of", "sampling_grid"]

FLOAT32_WHOLE = 1 << 24  # up to here it holds all whole numbers
MODES = ("bilinear", "nearest")
PADDING_MODES = ("border", "zeros", "reflection")


class WarpTransform(MapTransform):
    """Base of the transforms that draw places and read (C, X, Y, Z) there: a subclass gives `_places`.

    Args:
        keys: the entries to read, of one shape.
        mode: "bilinear" or "nearest", one for all keys or one for each.
        padding_mode: "border", "zeros" or "reflection".
        device: where to read, and where the results are; the entries' own if None.
        allow_missing_keys: whether absent entries are passed over.
    """

    _align_corners = False  # as for `grid_sample`: whether "reflection" is at voxels' centres instead of their edges

    def __init__(
        self,
        keys: KeysCollection,
        mode: str | Sequence[str],
        padding_mode: str,
        device: torch.device | str | None,
        allow_missing_keys: bool,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mode = ensure_tuple_rep(mode, len(self.keys))
        for each in self.mode:
            checks.check_choice("mode", each, MODES)
        checks.check_choice("padding_mode", padding_mode, PADDING_MODES)
        self.padding_mode = padding_mode
        self.device = device

    def _places(self, size: tuple[int, ...], device: torch.device) -> Tensor:
        """Draw and return where voxels are read, (3, *nodes), in voxels from the centre of the volume."""
        raise NotImplementedError

    def _warp(self, item: dict[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item whose entries were read at the places drawn."""
        present = [(key, mode) for key, mode in self.key_iterator(item, self.mode)]
        if not present:
            return item
        _check_shapes({key: item[key] for key, _ in present})
        tensors = [convert_to_tensor(item[key], track_meta=False) for key, _ in present]
        device = torch.device(tensors[0].device if self.device is None else self.device)
        size = tuple(tensors[0].shape[1:])
        with _without_autocast(device):
            grid = sampling_grid(self._places(size, device), size, align_corners=self._align_corners)
            for (key, mode), values in zip(present, tensors, strict=True):
                moved = self._read(values.to(device), grid, mode)
                item[key] = convert_to_dst_type(moved, item[key], device=device)[0]
        return item

    def _read(self, values: Tensor, grid: Tensor, mode: str) -> Tensor:
        """Return (C, X, Y, Z) read at the grid, as floating-point numbers that are whole where `values` are."""
        whole = not values.dtype.is_floating_point
        # An atlas has labels beyond the whole numbers of float32.
        wide = whole and values.dtype.itemsize > 2 and values.numel() > 0
        large = wide and _beyond_float32(values)
        dtype = torch.float64 if large or values.dtype == torch.float64 else grid.dtype
        moved = F.grid_sample(
            values[None].to(dtype),
            grid.to(dtype),
            mode=mode,
            padding_mode=self.padding_mode,
            align_corners=self._align_corners,
        )[0]
        return moved.round() if whole else moved


def _beyond_float32(values: Tensor) -> bool:
    """Return whether whole numbers may be too large for float32; a GPU is waited for once."""
    low, high = values.to(torch.int64).aminmax()  # torch finds no extremes of unsigned numbers so long
    return bool((low < -FLOAT32_WHOLE) | (high > FLOAT32_WHOLE))


def _without_autocast(device: torch.device) -> ExitStack:
    """Return a context in which places are not rounded to half precision, by as much as a quarter of a voxel."""
    stack = ExitStack()
    for kind in {"cpu", device.type}:
        if torch.amp.is_autocast_available(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def nodes_of(size: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """Return so many evenly spaced places for each axis, from its first voxel to its last, (3, *counts).

    Example:
        >>> nodes_of((5, 1, 1), (2, 1, 1), torch.device("cpu")).flatten(1).tolist()
        [[-2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    """
    axes = [
        torch.linspace(0, length - 1, count, dtype=torch.float32, device=device) - (length - 1) / 2
        for length, count in zip(size, counts, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def sampling_grid(places: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """Return the places of all voxels as `grid_sample` takes them, (1, X, Y, Z, 3).

    Args:
        places: (3, *nodes), in voxels from the centre of the volume, see :func:`nodes_of`.
        size: (X, Y, Z).
        align_corners: as `grid_sample` will be told.
    """
    # Without `align_corners`, an axis of one voxel is treated as one of two are, as by MONAI's `Resample`.
    lengths = [max(length - 1, 1) if align_corners else max(length, 2) for length in size]
    # Not by a tensor of the three factors, whose copy to a GPU would have to be waited for.
    scaled = torch.stack([each * (2 / length) for each, length in zip(places, lengths, strict=True)][::-1])
    matrices = [_interpolation(count, length, places) for count, length in zip(places.shape[1:], size, strict=True)]
    return along_axes(scaled, matrices).movedim(0, -1)[None]


def along_axes(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply each of the last three axes of (D, X, Y, Z) by its matrix (new length, length)."""
    dtype = exact_dtype(values)
    first, second, third = (matrix.to(dtype) for matrix in matrices)
    rows = second @ (values.to(dtype) @ third.T)
    return (first @ rows.flatten(2)).view(len(values), -1, *rows.shape[2:]).to(values.dtype)


def exact_dtype(values: Tensor) -> torch.dtype:
    """Return a dtype in which a matrix product does not round its factors to TF32 or bfloat16.

    With TF32 a place would be off by as much as a fifth of a voxel. float64 is used only where torch may round, because
    it takes a CPU two to four times as long.
    """
    if values.device.type == "mps":
        return values.dtype  # neither TF32 nor float64
    backend = torch.backends.cuda if values.device.type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # torch 2.8; in 2.9, this older question warns
        precision = "none" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return torch.float64 if precision in ("tf32", "bf16") else values.dtype


def _interpolation(nodes: int, length: int, like: Tensor) -> Tensor:
    """Return the matrix (length, nodes) that interpolates linearly between evenly spaced nodes."""
    places = torch.linspace(0, nodes - 1, length, device=like.device, dtype=like.dtype)
    distances = places[:, None] - torch.arange(nodes, device=like.device, dtype=like.dtype)
    return (1 - distances.abs()).clamp_min(0)


def _check_shapes(images: Mapping[Hashable, Any]) -> None:
    for key, values in images.items():
        if len(values.shape) != 4:
            missing = "add the channel dimension, or an axis of one voxel to 2D data"
            remedy = missing if len(values.shape) < 4 else "remove the batch dimension"
            message = f"Expected `{key}` to have the shape (C, X, Y, Z), but got {tuple(values.shape)}: {remedy}."
            raise ValueError(message)
    check_same_shape(images)
