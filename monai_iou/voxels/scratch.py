"""What the pass over errors of one and two classes works with: temporaries that are lent."""

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
