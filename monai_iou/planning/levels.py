"""How deep a U-Net goes on a patch, and along which axes each of its levels is halved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["MIN_BOTTLENECK", "network_size"]

MAX_LEVELS = 4
MIN_BOTTLENECK = 5  # voxels per side: below it, instance normalisation averages over too few values
MAX_CHANNELS = 320


def network_size(
    patch_size: Sequence[int], pixdim: Sequence[float], base_channels: int = 16, *, full_resolution: bool = False
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Return (channels, strides, patch_size rounded up) of a U-Net that fits the patch.

    An axis is halved as long as at least 5 voxels remain, at most four times, and only once the voxels along the other
    axes have become about as long as along this axis: pooling is in-plane until the spacing is nearly isotropic.

    Args:
        patch_size: desired patch in voxels.
        pixdim: spacing in mm along each axis.
        base_channels: number of channels of the first level; doubled at each further level, up to 320.
        full_resolution: add a first level without downsampling. Otherwise the first convolution has stride 2, which is
            faster but loses detail at boundaries.

    Example:
        >>> network_size((35, 50, 35), (1.0, 1.0, 1.0))
        ((16, 32, 64, 128), ((2, 2, 2), (2, 2, 2), (2, 2, 2)), (40, 56, 40))
        >>> network_size((64, 64, 16), (1.0, 1.0, 4.0))[1]
        ((2, 2, 1), (2, 2, 1), (2, 2, 2))
        >>> network_size((35, 50, 35), (1.0, 1.0, 1.0), 8, full_resolution=True)[:2]
        ((8, 16, 32, 64, 128), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)))
    """
    sides, lengths = np.array(patch_size), np.array(pixdim, dtype=float)
    strides: list[tuple[int, ...]] = []
    while len(strides) < MAX_LEVELS:
        possible = np.ceil(sides / 2) >= MIN_BOTTLENECK
        if not possible.any():
            break
        halved = possible & (lengths < 2 * lengths[possible].min() * (1 - 1e-6))
        strides.append(tuple(2 if h else 1 for h in halved))
        sides, lengths = np.where(halved, np.ceil(sides / 2), sides), np.where(halved, 2 * lengths, lengths)
    if full_resolution or not strides:
        strides.insert(0, (1, 1, 1))
    total = np.prod(strides, axis=0)
    channels = tuple(min(MAX_CHANNELS, base_channels * 2**level) for level in range(len(strides) + 1))
    window = tuple(int(side) for side in np.ceil(np.array(patch_size) / total) * total)
    return channels, tuple(strides), window
