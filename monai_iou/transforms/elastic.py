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
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import RandomizableTransform
from numpy.typing import NDArray
from torch import Tensor

from monai_iou import checks
from monai_iou.transforms.warping import WarpTransform, along_axes, nodes_of

SPACING = 2  # voxels between nodes
_REACH = 3  # standard deviations that smoothing looks at, as MONAI does


def displacement_spread(sigma: float, magnitude: float) -> float:
    """Return the standard deviation in voxels of MONAI's displacements along an axis, away from the borders.

    Example:
        >>> from monai_iou.transforms.elastic import displacement_spread
        >>> round(displacement_spread(sigma=4.0, magnitude=50.0), 2)
        0.54
    """
    return float(magnitude * math.sqrt(1 / 3) * (2 * math.sqrt(math.pi) * sigma) ** -1.5)


def draw_displacements(
    state: np.random.RandomState,
    size: Sequence[int],
    ranges: tuple[tuple[float, float], tuple[float, float]],
    noise: Callable[[tuple[int, ...]], NDArray[np.float64]],
    device: torch.device,
) -> Tensor:
    """Draw displacements in voxels on nodes that are about `SPACING` voxels apart, (3, *nodes).

    Args:
        state: draws sigma and magnitude.
        size: (X, Y, Z) in voxels; along an axis of one voxel nothing is displaced.
        ranges: of sigma and of magnitude.
        noise: draws so many numbers with mean 0 and variance 1.
        device: of the result.
    """
    sigma, magnitude = (float(state.uniform(*each)) for each in ranges)
    counts = [math.ceil((length - 1) / SPACING) + 1 + 2 * margin(sigma) for length in size]
    drawn = torch.from_numpy(noise((3, *counts)).astype(np.float32)).to(device)
    field = smooth_noise(drawn, sigma, displacement_spread(sigma, magnitude))
    for axis, length in enumerate(size):
        if length == 1:
            field[axis] = 0
    return field


def smooth_noise(noise: Tensor, sigma: float, spread: float) -> Tensor:
    """Smooth noise of variance 1, so that linear interpolation between its nodes gives the wanted spread.

    Args:
        noise: (D, *nodes), with :func:`margin` nodes more on each side than the result.
        sigma: standard deviation of the smoothing in voxels.
        spread: standard deviation in voxels of the interpolated field.

    Returns:
        (D, *nodes) displacements in voxels.
    """
    coarse = sigma / SPACING
    smoothing = [_smoothing(count, sigma, noise) for count in noise.shape[1:]]
    nodes_alike = (2 + math.exp(-1 / (4 * coarse**2))) / 3
    return along_axes(noise, smoothing).mul_(spread / nodes_alike**1.5)


def _smoothing(count: int, sigma: float, like: Tensor) -> Tensor:
    """Return the matrix that smooths so many nodes of noise and leaves out the margin; it keeps the variance at 1."""
    reach = margin(sigma)
    steps = torch.arange(-reach, count - reach, dtype=like.dtype, device=like.device)
    distances = steps - torch.arange(count - 2 * reach, dtype=like.dtype, device=like.device)[:, None]
    weights = torch.exp(-0.5 * (distances / (sigma / SPACING)) ** 2) * (distances.abs() <= reach)
    return weights / weights.square().sum(1, keepdim=True).sqrt()


def margin(sigma: float) -> int:
    """Return the nodes that smoothing needs beyond each side."""
    return math.ceil(_REACH * sigma / SPACING)


class RandCoarseElasticd(RandomizableTransform, WarpTransform):
    """Deform 3D volumes by one smooth random displacement field, as MONAI's `Rand3DElasticd` does and much faster.

    The distribution of displacements is that of `Rand3DElasticd` with the same ranges, but for two things: it is normal
    (a weighted sum of many uniform numbers is nearly so), and it does not fall off towards the borders. A sigma below 2
    voxels is smoother here: the field is drawn on a grid of half the resolution.

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
        TypeError: if `prob` is not a number.
        ValueError: if `prob` is not from 0 to 1, a range is not ascending and positive, a mode is not one of the above,
            an entry is not three-dimensional, or two differ in shape.

    Example:
        >>> import torch
        >>> from monai_iou.transforms import RandCoarseElasticd
        >>> deform = RandCoarseElasticd(["image", "label"], (3, 5), (20, 80), prob=1.0, mode=["bilinear", "nearest"])
        >>> item = deform.set_random_state(0)({"image": torch.rand(1, 8, 8, 8), "label": torch.ones(1, 8, 8, 8)})
        >>> tuple(item["image"].shape), item["label"].unique().tolist()
        ((1, 8, 8, 8), [1.0])
    """

    _align_corners = True

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
        WarpTransform.__init__(self, keys, mode, padding_mode, device, allow_missing_keys)
        RandomizableTransform.__init__(self, checks.check_fraction("prob", prob, allow_one=True))
        self.sigma_range = checked_range("sigma_range", sigma_range)
        self.magnitude_range = checked_range("magnitude_range", magnitude_range)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item, deformed or as it is."""
        self.randomize(None)
        return self._warp(dict(data)) if self._do_transform else dict(data)

    def _places(self, size: tuple[int, ...], device: torch.device) -> Tensor:
        """Draw a field and return where the voxels at its nodes are read."""
        ranges = (self.sigma_range, self.magnitude_range)
        field = draw_displacements(self.R, size, ranges, self.R.standard_normal, device)
        return field + nodes_of(size, field.shape[1:], device)


def checked_range(name: str, values: Sequence[float]) -> tuple[float, float]:
    """Return two positive numbers; raise ValueError unless they are finite and the smaller is first."""
    given = tuple(values) if isinstance(values, Iterable) else values
    are_two = isinstance(given, tuple) and len(given) == 2 and all(isinstance(value, Real) for value in given)
    if not are_two or not 0 < given[0] <= given[1] < math.inf:
        message = (
            f"Expected `{name}` to be two positive numbers, the smaller first, but got {given!r}: pass for example "
            "(3, 5)."
        )
        raise ValueError(message)
    return float(given[0]), float(given[1])
