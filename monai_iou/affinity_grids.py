"""Checks of the grid of positions of an affinity (B, N, N), for the loss on it and the network that predicts it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

MAX_POSITIONS = 4096


def check_positions(name: str, size: Sequence[int]) -> int:
    """Return the number of positions N of a grid; raise ValueError above 16^3, because memory grows with N^2."""
    positions = math.prod(size)
    if not 1 <= positions <= MAX_POSITIONS or len(size) > 3:
        message = (
            f"Expected `{name}` to have 1 to {MAX_POSITIONS} positions (16x16x16) in 1 to 3 dimensions, but got "
            f"{positions} of {'x'.join(map(str, size))}: choose a coarser grid, because an affinity of N positions "
            "takes 4 N^2 bytes per image."
        )
        raise ValueError(message)
    return positions


def check_grid(name: str, size: Any) -> tuple[int, ...]:
    """Return the shape of a grid; raise TypeError unless it holds integers, and ValueError as `check_positions`."""
    sides = list(size) if isinstance(size, Sequence) and not isinstance(size, str) else []
    if not sides or not all(isinstance(side, numbers.Integral) for side in sides):
        message = (
            f"Expected `{name}` to be one integer per spatial dimension, but got {size!r}: give the shape of the grid."
        )
        raise TypeError(message)
    check_positions(name, sides)
    return tuple(int(side) for side in sides)
