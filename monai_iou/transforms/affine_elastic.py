"""Affine and elastic deformation by one interpolation."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.spatial.array import RandAffineGrid
from monai.transforms.transform import Randomizable
from monai.transforms.utils import create_rotate, create_scale, create_shear, create_translate
from monai.utils.misc import ensure_tuple
from numpy.typing import NDArray
from torch import Tensor

from monai_iou import checks
from monai_iou.transforms.elastic import checked_range, draw_displacements
from monai_iou.transforms.warping import WarpTransform, exact_dtype, nodes_of

__all__ = ["RandAffineElasticd"]

Range: TypeAlias = Sequence[tuple[float, float] | float | None] | float | None


class RandAffineElasticd(Randomizable, WarpTransform):
    r"""Rotate, shear, shift, scale and deform 3D volumes, and read them once.

    An affine map A and a field of displacements d are drawn independently, each with its own probability. The result
    at the voxel v is the value of the volume at

    .. code-block:: text

        A (v + d(v))

    with places in voxels from the centre of the volume. That is what MONAI's `RandAffined` followed by
    :class:`RandCoarseElasticd` reads, with two differences: nothing is interpolated twice, and `padding_mode` decides
    only about places outside of the given volume. A has the distribution of `RandAffined` with the same ranges, and d
    that of `RandCoarseElasticd` if sigma is at least 2 voxels: the noise that is smoothed is uniform instead of normal,
    and with a smaller sigma the displacements are not normal. If neither is drawn, the item is returned as it is.

    The affine in the header of a MetaTensor stays the same, and there is no inverse.

    Args:
        keys: the entries to deform, (C, X, Y, Z) each, of one shape. 2D data have an axis of one voxel.
        rotate_range: largest angles in radians about the three axes, or ranges (smallest, largest) of them. As in
            `RandAffined`, one number is for the first axis alone. None, also in the place of an axis, stands for no
            change.
        shear_range: the same for the six shears: of x by y and z, y by x and z, z by x and y.
        translate_range: the same for the shifts in voxels.
        scale_range: the same for the scale factors of the axes, of which 1 is taken away.
        affine_prob: probability of the affine map.
        sigma_range: range of the standard deviation in voxels by which the displacements are smoothed.
        magnitude_range: range of MONAI's `magnitude`, which sets the displacements' spread, see
            :func:`monai_iou.transforms.elastic.displacement_spread`.
        elastic_prob: probability of the displacements.
        mode: "bilinear" or "nearest", one for all keys or one for each. Whole numbers are rounded.
        padding_mode: "border", "zeros" or "reflection", as for `torch.nn.functional.grid_sample`.
        device: where to deform, and where the results are; the entries' own if None.
        allow_missing_keys: whether absent entries are passed over.

    Raises:
        TypeError: if a probability, or a part of a range of the affine map, is not a number.
        ValueError: if a probability is not from 0 to 1, `sigma_range` or `magnitude_range` is not ascending and
            positive, a range of the affine map is no pair or has no axis, a mode is not one of the above, an entry is
            not three-dimensional, or two differ in shape.

    Example:
        >>> import torch
        >>> from monai_iou.transforms import RandAffineElasticd
        >>> deform = RandAffineElasticd(
        ...     ["image", "label"],
        ...     rotate_range=(0.5, 0.5, 0.5),
        ...     scale_range=(0.25, 0.25, 0.25),
        ...     affine_prob=0.6,
        ...     sigma_range=(3, 5),
        ...     magnitude_range=(20, 80),
        ...     elastic_prob=0.3,
        ...     mode=["bilinear", "nearest"],
        ... )
        >>> item = deform.set_random_state(0)({"image": torch.rand(1, 8, 8, 8), "label": torch.ones(1, 8, 8, 8)})
        >>> tuple(item["image"].shape), item["label"].unique().tolist()
        ((1, 8, 8, 8), [1.0])
    """

    def __init__(
        self,
        keys: KeysCollection,
        rotate_range: Range = None,
        shear_range: Range = None,
        translate_range: Range = None,
        scale_range: Range = None,
        affine_prob: float = 0.1,
        sigma_range: Sequence[float] = (3.0, 5.0),
        magnitude_range: Sequence[float] = (20.0, 80.0),
        elastic_prob: float = 0.1,
        mode: str | Sequence[str] = "bilinear",
        padding_mode: str = "border",
        device: torch.device | str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, mode, padding_mode, device, allow_missing_keys)
        self.affine_prob = checks.check_fraction("affine_prob", affine_prob, allow_one=True)
        self.elastic_prob = checks.check_fraction("elastic_prob", elastic_prob, allow_one=True)
        self.sigma_range = checked_range("sigma_range", sigma_range)
        self.magnitude_range = checked_range("magnitude_range", magnitude_range)
        self._affine = RandAffineGrid(
            _of_axes("rotate_range", rotate_range),
            _of_axes("shear_range", shear_range),
            _of_axes("translate_range", translate_range),
            _of_axes("scale_range", scale_range),
        )
        self._affine.set_random_state(0)
        self._affine.randomize()  # a range that is none is found now
        self._draws_affine = self._draws_elastic = False

    def randomize(self, data: Any = None) -> None:
        """Draw which of the two changes happen."""
        self._draws_affine = self.R.rand() < self.affine_prob
        self._draws_elastic = self.R.rand() < self.elastic_prob

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item, changed or as it is."""
        self.randomize()
        return self._warp(dict(data)) if self._draws_affine or self._draws_elastic else dict(data)

    def _places(self, size: tuple[int, ...], device: torch.device) -> Tensor:
        """Draw the changes and return where the voxels at the nodes are read."""
        matrix = self._matrix(size).to(device) if self._draws_affine else None
        if self._draws_elastic:
            ranges = (self.sigma_range, self.magnitude_range)
            field = draw_displacements(self.R, size, ranges, self._noise, device)
            places = field + nodes_of(size, field.shape[1:], device)
        else:  # the corners determine an affine map
            places = nodes_of(size, [min(length, 2) for length in size], device)
        if matrix is None:
            return places
        dtype = exact_dtype(places)
        turned = (matrix[:3, :3].to(dtype) @ places.flatten(1).to(dtype)).to(places.dtype)
        return (turned + matrix[:3, 3:]).view_as(places)

    def _matrix(self, size: tuple[int, ...]) -> Tensor:
        """Draw an affine map, (4, 4), as `RandAffined` does."""
        # One stream, also in copies: two streams of one seed would tie the angles to the chances.
        self._affine.set_random_state(state=self.R)
        drawn = self._affine
        drawn.randomize()
        # By NumPy, because MONAI's matrices of torch have the default dtype, to which angles would be rounded.
        parts = [
            make(len(size), values)
            for make, values in (
                (create_rotate, drawn.rotate_params),
                (create_shear, drawn.shear_params),
                (create_translate, drawn.translate_params),
                (create_scale, drawn.scale_params),
            )
            if values
        ]
        return torch.from_numpy(functools.reduce(np.matmul, parts, np.eye(len(size) + 1)).astype(np.float32))

    def _noise(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Draw numbers with mean 0 and variance 1, uniform as MONAI's; normal ones take three times as long."""
        numbers: NDArray[np.float64] = (self.R.random_sample(shape) - 0.5) * np.sqrt(12)
        return numbers


def _as_list(part: Any) -> Any:
    """Return the numbers of an array or a tensor, such as `np.deg2rad` returns, and anything else as it is."""
    return part.tolist() if hasattr(part, "tolist") else part


def _of_axes(name: str, given: Range) -> list[tuple[float, float] | float] | None:
    """Return a range with a number for each axis: MONAI passes over a None, and gives its place to the next axis."""
    if given is None:
        return None
    ranges: tuple[Any, ...] = tuple(map(_as_list, ensure_tuple(_as_list(given))))
    count, what = (6, "shear") if name == "shear_range" else (3, "axis")
    if len(ranges) > count:
        message = f"Expected `{name}` to have at most {count} ranges, but got {len(ranges)}: give one for each {what}."
        raise ValueError(message)
    numbers = [part for each in ranges for part in (each if isinstance(each, (list, tuple)) else (each,))]
    wrong = [part for part in numbers if part is not None and not isinstance(part, Real)]
    if wrong:
        message = (
            f"Expected `{name}` to hold numbers or pairs of numbers, but got {wrong[0]!r}: pass for example "
            "(0.5, 0.5, 0.5)."
        )
        raise TypeError(message)
    return [0.0 if each is None else each for each in ranges]
