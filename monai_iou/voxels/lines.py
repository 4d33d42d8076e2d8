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


def sum_of(values: Tensor, factors: Tensor | None = None) -> float:
    """Return the sum of values (n,), or of their products, the same for any number of threads."""
    allowed = torch.get_num_threads()
    if allowed > 1:  # as :func:`one_thread`, which takes as long as a short sum
        torch.set_num_threads(1)
    try:
        return (values.sum() if factors is None else torch.dot(values, factors)).item()
    finally:
        if allowed > 1:
            torch.set_num_threads(allowed)
