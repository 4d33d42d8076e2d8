"""A loader whose thread does not swallow what goes wrong in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from monai.data.dataloader import DataLoader
from monai.data.thread_buffer import ThreadDataLoader, buffer_iterator

__all__ = ["BufferedLoader"]


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class BufferedLoader(ThreadDataLoader):
    """MONAI's ThreadDataLoader that raises in the training what a transform raised in the loader's thread.

    In MONAI 1.6.1 such an error ends the thread alone: the epoch is cut short, training goes on, and a run whose every
    batch fails ends as if it had succeeded.

    Example:
        >>> import torch
        >>> from monai_iou.workflow.dataloader import BufferedLoader
        >>> [batch.tolist() for batch in BufferedLoader(torch.arange(4), batch_size=2)]
        [[0, 1], [2, 3]]
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # as in MONAI's class, a generator
        """Yield the batches; the next one is made in a thread meanwhile."""
        batches = _with_failure(DataLoader.__iter__(self))
        for batch in buffer_iterator(batches, self.buffer_size, self.buffer_timeout, self.repeats):
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch


def _with_failure(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield all batches, and as the last item the error that ended them, if one did."""
    try:
        yield from batches
    except GeneratorExit:
        raise
    except BaseException as error:  # a failed check ends a program with SystemExit
        yield _Failure(error)
