r"""Elastic deformation whose displacements are computed on a coarse grid.

A displacement field that is Gaussian noise smoothed with a standard deviation of sigma voxels holds nothing finer than
about sigma. MONAI's `Rand3DElastic` smooths noise of the full size, for each of the three directions; here noise of a
grid `SPACING` times as coarse is smoothed by sigma / `SPACING` and interpolated, an eighth of the numbers.

MONAI's noise is uniform in [-1, 1], with variance 1/3, and smoothing by the weights w of each axis multiplies the
variance by :math:`(\sum_i w_i^2)^3 = (2 \sqrt\pi \sigma)^{-3}`, so that a displacement has the standard deviation

.. code-block:: text

    magnitude sqrt(1/3) (2 sqrt(pi) sigma)^(-3/2)

which the coarse field is scaled to. Linear interpolation between nodes with correlation rho leaves (2 + rho) / 3 of the
variance on average and axis, which is made up for.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform, RandomizableTransform
from monai.utils.misc import ensure_tuple_rep
from monai.utils.type_conversion import convert_to_dst_type, convert_to_tensor
from torch import Tensor

from monai_iou.transforms.shapes import check_same_shape

SPACING = 2  # voxels between nodes
FLOAT32_WHOLE = 1 << 24  # up to here it holds all whole numbers
_REACH = 3  # standard deviations that smoothing looks at, as MONAI does


def displacement_spread(sigma: float, magnitude: float) -> float:
    """Return the standard deviation in voxels of MONAI's displacements along an axis, away from the borders.

    Example:
        >>> from monai_iou.transforms.elastic import displacement_spread
        >>> round(displacement_spread(sigma=4.0, magnitude=50.0), 2)
        0.54
    """
    return float(magnitude * math.sqrt(1 / 3) * (2 * math.sqrt(math.pi) * sigma) ** -1.5)


def smooth_field(noise: Tensor, size: Sequence[int], sigma: float, spread: float) -> Tensor:
    """Smooth noise and interpolate it to `size` voxels.

    Args:
        noise: (D, *nodes), standard normal, with :func:`margin` nodes more on each side than `size` takes.
        size: (X, Y, Z).
        sigma: standard deviation of the smoothing in voxels.
        spread: standard deviation of the field in voxels.

    Returns:
        (D, X, Y, Z) displacements in voxels.
    """
    coarse = sigma / SPACING
    steps = torch.arange(-margin(sigma), margin(sigma) + 1, dtype=noise.dtype, device=noise.device)
    weights = torch.exp(-0.5 * (steps / coarse) ** 2)
    field = noise.unsqueeze(1)
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = len(weights)
        field = F.conv3d(field, (weights / weights.square().sum().sqrt()).view(shape))  # keeps the variance at 1
    nodes_alike = (2 + math.exp(-1 / (4 * coarse**2))) / 3
    field = F.interpolate(field.squeeze(1)[None], tuple(size), mode="trilinear", align_corners=True)[0]
    return field.mul_(spread / nodes_alike**1.5)


def margin(sigma: float) -> int:
    """Return the nodes that smoothing needs beyond each side."""
    return math.ceil(_REACH * sigma / SPACING)


class RandCoarseElasticd(RandomizableTransform, MapTransform):
    """Deform 3D volumes by one smooth random displacement field, as MONAI's `Rand3DElasticd` does and much faster.

    The distribution of displacements is that of `Rand3DElasticd` with the same ranges, but for two things: it is normal
    (a weighted sum of many uniform numbers is nearly so), and it does not fall off towards the borders.

    Args:
        keys: the entries to deform, (C, X, Y, Z) each, of one shape.
        sigma_range: range of the smoothing's standard deviation in voxels.
        magnitude_range: range of MONAI's `magnitude`; the displacements' spread is :func:`displacement_spread`.
        prob: probability of a deformation.
        mode: "bilinear" or "nearest", one for all keys or one for each. Whole numbers are rounded.
        padding_mode: "border", "zeros" or "reflection", as for `torch.nn.functional.grid_sample`.
        device: where to deform, and where the results are; the entries' own if None.
        allow_missing_keys: whether absent entries are passed over.

    Raises:
        ValueError: if a range is not ascending and positive, an entry is not three-dimensional, or two differ in shape.

    Example:
        >>> import torch
        >>> from monai_iou.transforms import RandCoarseElasticd
        >>> deform = RandCoarseElasticd(["image", "label"], (3, 5), (20, 80), prob=1.0, mode=["bilinear", "nearest"])
        >>> item = deform.set_random_state(0)({"image": torch.rand(1, 8, 8, 8), "label": torch.ones(1, 8, 8, 8)})
        >>> tuple(item["image"].shape), item["label"].unique().tolist()
        ((1, 8, 8, 8), [1.0])
    """

    def __init__(
        self,
        keys: KeysCollection,
        sigma_range: Sequence[float],
        magnitude_range: Sequence[float],
        prob: float = 0.1,
        mode: str | Sequence[str] = "bilinear",
        padding_mode: str = "border",
        device: torch.device | str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.sigma_range = _checked_range("sigma_range", sigma_range)
        self.magnitude_range = _checked_range("magnitude_range", magnitude_range)
        self.mode = ensure_tuple_rep(mode, len(self.keys))
        self.padding_mode = padding_mode
        self.device = device

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item, deformed or as it is."""
        item = dict(data)
        self.randomize(None)
        present = [(key, mode) for key, mode in self.key_iterator(item, self.mode)]
        if not self._do_transform or not present:
            return item
        _check_shapes({key: item[key] for key, _ in present})
        tensors = [convert_to_tensor(item[key], track_meta=False) for key, _ in present]
        device = torch.device(tensors[0].device if self.device is None else self.device)
        grid = self._grid(tuple(tensors[0].shape[1:]), device)
        for (key, mode), values in zip(present, tensors, strict=True):
            moved = self._deform(values.to(device), grid, mode)
            item[key] = convert_to_dst_type(moved, item[key], device=device)[0]
        return item

    def _deform(self, values: Tensor, grid: Tensor, mode: str) -> Tensor:
        """Return (C, X, Y, Z) read at the grid, as floating-point numbers that are whole where `values` are."""
        whole = not values.dtype.is_floating_point
        # An atlas has labels beyond the whole numbers of float32.
        wide = whole and values.dtype.itemsize > 2 and values.numel() > 0
        large = wide and max(-int(values.min()), int(values.max())) > FLOAT32_WHOLE
        dtype = torch.float64 if large else grid.dtype
        image, places = values[None].to(dtype), grid.to(dtype)
        moved = F.grid_sample(image, places, mode=mode, padding_mode=self.padding_mode, align_corners=True)[0]
        return moved.round() if whole else moved

    def _grid(self, size: tuple[int, ...], device: torch.device) -> Tensor:
        """Draw a field and return where each voxel is read, (1, X, Y, Z, 3) as `grid_sample` takes it."""
        sigma = float(self.R.uniform(*self.sigma_range))
        spread = displacement_spread(sigma, float(self.R.uniform(*self.magnitude_range)))
        nodes = [math.ceil((length - 1) / SPACING) + 1 + 2 * margin(sigma) for length in size]
        noise = torch.as_tensor(self.R.standard_normal((3, *nodes)).astype(np.float32)).to(device)
        field = smooth_field(noise, size, sigma, spread)
        scale = torch.tensor([2 / max(length - 1, 1) for length in size], device=device)
        # An axis of one voxel, as in 2D data, has its only voxel at 0.
        axes = [torch.linspace(-1, 1, n, device=device) if n > 1 else torch.zeros(1, device=device) for n in size]
        identity = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        return identity.add_(field * scale.view(3, 1, 1, 1)).flip(0).movedim(0, -1)[None]


def _check_shapes(images: Mapping[Hashable, Any]) -> None:
    for key, values in images.items():
        if len(values.shape) != 4:
            message = (
                f"Expected `{key}` to have the shape (C, X, Y, Z), but got {tuple(values.shape)}: an elastic "
                "deformation of this kind is for 3D volumes."
            )
            raise ValueError(message)
    check_same_shape(images)


def _checked_range(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        message = (
            f"Expected `{name}` to be two positive numbers, the smaller first, but got {tuple(values)}: e.g. (3, 5)."
        )
        raise ValueError(message)
    return float(values[0]), float(values[1])
