r"""Per-class errors of voxels and their cells in a histogram.

The error of class c at voxel v is :math:`e = |y_{cv} - p_{cv}|`, or :math:`\max(0, 1 - s f)` with signs
:math:`s = \pm 1` for the hinge on logits f. Its cell in a histogram is

.. code-block:: text

    u = sqrt(1 - e / limit)      limit: the largest error possible (1), or present (hinge)
    j = floor(M u + 1/2)         M = 2 bins; j = 0 holds the largest errors, j = M the smallest

so that node j stands for the error t_j = limit (1 - (j / M)^2). An error lies within limit / (2 bins) of its node, for
|u - j/M| <= 1/(2M) and |de/du| = 2 limit u <= 2 limit. Errors of 0 and of `limit` are exact. The root makes the cells
finer where it counts: with a small foreground only the few background voxels of largest error have a gradient to
speak of, and near e = limit a cell is 1 / (2 bins) times as wide as elsewhere.

With equally wide cells, floor(M p + 1/2) decides, whatever y is, and is mirrored outside the class. Rounding 1 - e
instead would round a p halfway between two nodes up inside the class and down outside it, so that even a constant p
would separate the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_iou.checks import is_integer
from monai_iou.voxels.in_place import softmax
from monai_iou.voxels.inputs import Tile, Voxels, sum_dtype
from monai_iou.voxels.tiling import tile_size

DEFAULT_BINS = 2048
_MAX_BINS = 1 << 14  # for which float32 still tells places inside a cell apart
_FACTOR = {"cpu": 8}  # of a tile's size: few calls count for more than the cache of a core
_OTHER_FACTOR = 2


@dataclass(frozen=True)
class ErrorSpec:
    """Which errors to count, and how finely.

    Attributes:
        activation: "softmax", "sigmoid" or None for the errors of probabilities, "hinge" for those of logits.
        bins: resolution; M = 2 bins.
        even: whether the cells are equally wide, u = 1 - e, so that errors of probabilities count these.
    """

    activation: str | None
    bins: int = DEFAULT_BINS
    even: bool = False

    @property
    def cells(self) -> int:
        """Cells of one histogram, that of NaN included."""
        return 2 * self.bins + 2


@dataclass(frozen=True)
class ErrorTile:
    """A few thousand voxels, seen as errors.

    Attributes:
        p: (C, n) probabilities (logits for the hinge).
        index: (C * n,) int32, place of each error in the flattened counts (C, 2, cells) of the image; ignored voxels
            have the place behind the last.
        position: (C, n), the same before it is rounded down: its fraction is 0 at the large end of the cell. With even
            cells, it is rounded.
        active: (C, n), 1 where a hinge error is above 0; None for other errors.
        valid: (1, n), 1 and 0, or None if every voxel counts.
    """

    p: Tensor
    index: Tensor
    position: Tensor
    active: Tensor | None
    valid: Tensor | None


@dataclass(frozen=True)
class ErrorSpace:
    """Temporaries of one thread, written over by each of its tiles: `maps` (5, C, n), `index` (C n,), `line` (1, n)."""

    maps: Tensor
    index: Tensor
    line: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> ErrorSpace:
        """Allocate for the tiles of logits (B, C, N)."""
        _, classes, voxels = logits.shape
        size, dtype = min(tile_voxels(logits), voxels), sum_dtype(logits)
        maps = torch.empty((5, classes, size), dtype=dtype, device=logits.device)
        index = torch.empty(classes * size, dtype=torch.int32, device=logits.device)
        return cls(maps, index, torch.empty((1, size), dtype=dtype, device=logits.device))

    def map(self, number: int, voxels: int) -> Tensor:
        """Return one of the maps for a tile of so many voxels, (C, voxels) contiguous."""
        classes = self.maps.shape[1]
        return self.maps[number].view(-1)[: classes * voxels].view(classes, voxels)


def check_bins(bins: int) -> int:
    """Return `bins`; raise unless it is an integer from 1 to 16384."""
    if not is_integer(bins):
        message = (
            f"Expected `bins` to be an integer, or None to sort exactly, but got {type(bins).__name__}: choose for "
            "example 2048."
        )
        raise TypeError(message)
    if not 1 <= bins <= _MAX_BINS:
        message = (
            f"Expected `bins` to be from 1 to {_MAX_BINS}, or None to sort exactly, but got {bins}: choose for example "
            "2048."
        )
        raise ValueError(message)
    return int(bins)


def tile_voxels(logits: Tensor) -> int:
    """Return how many voxels of logits (B, C, N) a tile holds."""
    return tile_size(logits, _FACTOR.get(logits.device.type, _OTHER_FACTOR))


def numbered_tiles(voxels: Voxels) -> list[tuple[int, Tile]]:
    """Return every tile with the number of its image."""
    if voxels.logits.numel() == 0:
        return []
    tiles = voxels.tiles(tile_voxels(voxels.logits))
    return [(image, tile) for image, part in enumerate(tiles) for tile in part]


def probabilities(logits: Tensor, activation: str | None) -> Tensor:
    """Apply the activation to logits (..., C, N)."""
    return logits.softmax(-2) if activation == "softmax" else logits.sigmoid() if activation == "sigmoid" else logits


def errors_of(logits: Tensor, target: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    """Return the probabilities (logits for the hinge) and the errors of (..., C, N) logits and hard targets."""
    if activation == "hinge":
        return logits, (1 - (2 * target - 1) * logits).clamp_min(0)
    p = probabilities(logits, activation)
    return p, (target - p).abs()


def tile_errors(voxels: Tile, spec: ErrorSpec, limit: Tensor, space: ErrorSpace) -> ErrorTile:
    """Return the errors of a part of an image and where they belong, in `space`'s memory; `limit` is (1,)."""
    length = voxels.logits.shape[1]
    own, p, position = (space.map(number, length) for number in range(3))
    logits, target, valid = voxels.read(space.maps.dtype, out=own)
    active = None
    if spec.activation == "hinge":
        p, error = errors_of(logits, target, "hinge")
        active = (error > 0).to(error.dtype)
        torch.sub(1, error / torch.where(limit > 0, limit, 1), out=position).clamp_min_(0)
    else:
        p = _written(logits, spec.activation, p, space.line[:, :length])
        if spec.even:
            _rounded_places(p, target, 2 * spec.bins, out=position)
        else:
            torch.add(p, target, out=position).sub_(1).abs_()  # 1 - |y - p| of a hard y, with fewer digits lost
            if spec.activation is None:
                position.clamp_max_(1)  # a softmax in half precision may go beyond
    if not spec.even:
        position.sqrt_()
    if position.device.type != "cpu" or not bool(position.sum().isfinite()):
        position.nan_to_num_(nan=(spec.cells - 1) / (2 * spec.bins))
    offset = torch.mul(target, spec.cells, out=own).add_(0.5)
    torch.add(offset, position, alpha=2 * spec.bins, out=position)
    index = space.index[: position.numel()].view(position.shape).copy_(position)  # int32: read faster than int64
    index.add_(torch.arange(0, 2 * len(p) * spec.cells, 2 * spec.cells, dtype=torch.int32, device=p.device)[:, None])
    if valid is not None:
        index.masked_fill_(valid == 0, 2 * len(p) * spec.cells)
    return ErrorTile(p, index.view(-1), position, active, valid)


def _rounded_places(p: Tensor, target: Tensor, last: int, out: Tensor) -> None:
    """Write 1 - |y - p| of a hard y in steps of 1 / `last`: p is rounded first, alike inside and outside the class."""
    torch.mul(p, last, out=out).add_(0.5).floor_().clamp_(0, last)
    out.add_(target, alpha=last).sub_(last).abs_().div_(last)


def _written(logits: Tensor, activation: str | None, p: Tensor, line: Tensor) -> Tensor:
    if activation == "softmax":
        softmax(logits, p, line)
    elif activation == "sigmoid":
        torch.sigmoid(logits, out=p)
    else:
        p.copy_(logits)
    return p


def largest_error(voxels: Voxels, spec: ErrorSpec) -> Tensor:
    """Return the largest error of each image, (B, 1)."""
    largest = voxels.logits.new_zeros((len(voxels.logits), 1), dtype=sum_dtype(voxels.logits))
    for image, tile in numbered_tiles(voxels):
        logits, target, valid = tile.read(largest.dtype)
        error = errors_of(logits, target, spec.activation)[1]
        if valid is not None:
            error = error * valid
        largest[image] = torch.maximum(largest[image], error.amax())
    return largest
