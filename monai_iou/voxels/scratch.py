"""What the passes over one and two classes work with: temporaries that are lent, and sums of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from monai_iou.voxels.inputs import sum_dtype


class Lines:
    """Temporaries of one thread by name, allocated when they are first asked for."""

    def __init__(self, logits: Tensor, size: int) -> None:
        self.dtype = sum_dtype(logits)
        self.length = self._size = min(size, logits.shape[2])
        self._lines: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """Return a line of `length` voxels, with whatever was written to it last."""
        if name not in self._lines:
            self._lines[name] = torch.empty(self._size, dtype=self.dtype, device="cpu")
        line = self._lines[name]
        return line if self.length == self._size else line[: self.length]


class Spare:
    """Temporaries that nobody uses: memory that was written to before is faster than new memory."""

    def __init__(self, logits: Tensor, size: int) -> None:
        self._logits, self._size = logits, size
        self._spare: list[Lines] = []

    @contextmanager
    def lines(self) -> Iterator[Lines]:
        """Lend temporaries to a thread."""
        lines = self._spare.pop() if self._spare else Lines(self._logits, self._size)
        yield lines
        self._spare.append(lines)


def sum_of(values: Tensor) -> float:
    """Return the sum of values (n,), the same for any number of threads."""
    allowed = torch.get_num_threads()
    if allowed > 1:  # as :func:`one_thread`, which takes as long as a short sum
        torch.set_num_threads(1)
    try:
        return values.sum().item()
    finally:
        if allowed > 1:
            torch.set_num_threads(allowed)


def sum_of_products(values: Tensor, factors: Tensor, out: Tensor) -> float:
    """Return the sum of products, which are written to `out`.

    A dot product would be faster, but it adds up thousands of numbers one after the other in float32: where they are
    nearly equal, each is rounded alike, and four digits are all that is left. A sum is made of sums of sums.
    """
    return sum_of(torch.mul(values, factors, out=out))


def sum_of_squares(labels: Tensor) -> float:
    """Return the sum of squares of small whole numbers, of which float32 rounds none."""
    return torch.dot(labels, labels).item()
