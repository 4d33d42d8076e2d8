"""Sums over the ranks of a process group, with gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from monai_iou.voxels import VoxelSums
from monai_iou.voxels.histograms import ErrorHistograms


def is_distributed() -> bool:
    """Return whether several ranks are running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def fails_together(sync: bool, input: object) -> AbstractContextManager[None]:
    """Return a context that raises on every rank if an error occurs inside the `with` block on one of them.

    Without it, that rank would stop while the others wait for its part of the sums. The block must not contain
    collective calls. The context costs one sum of a single number over the ranks. It has no effect without `sync`, in a
    single process, or on a GPU, where wrong labels make the sums NaN instead of raising an error.

    Args:
        sync: whether the ranks must agree; then every rank must enter the same number of such blocks.
        input: the input of the loss, on the device of the sums.

    Raises:
        ValueError: on all other ranks, if the block raises an error on one rank.

    Example:
        >>> from monai_iou.distributed import fails_together
        >>> with fails_together(True, None):
        ...     "checks of the input"
        'checks of the input'
    """
    if not (sync and is_distributed()) or (isinstance(input, Tensor) and input.device.type == "cuda"):
        return nullcontext()
    return _FailsTogether()


class _FailsTogether(AbstractContextManager[None]):
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # after an interrupt, do not wait for other ranks
        failures = torch.tensor([float(error is not None)])
        dist.all_reduce(failures)
        if error is None and failures.item():
            message = (
                "Expected the input and target of every rank to be valid with sync_batch=True, but got an error on "
                "another rank: see the message of that rank."
            )
            raise ValueError(message)


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks, whose gradient is also summed over ranks.

    Every rank computes the same loss L from the same sums S. Backward gives each of W ranks the gradient W dL/dS, and
    DistributedDataParallel averages the gradients of the parameters over the ranks, which divides by W. The result is
    the gradient of one process that holds the joined batch.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over all ranks, on every rank; in a single process, `tensor` itself.

    The sum is differentiable: under DistributedDataParallel, the gradients of the parameters are those of one process
    on the joined batch.

    Args:
        tensor: of any shape. Every rank must call this function with the same shape; a rank without data passes zeros.

    Example:
        >>> import torch
        >>> from monai_iou import sum_over_ranks
        >>> sum_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_distributed():
        return tensor
    result: Tensor = _SumOverRanks.apply(tensor)
    return result


def sums_over_ranks(sums: VoxelSums) -> VoxelSums:
    """Return voxel sums added over all ranks, with one collective call."""
    if not is_distributed():
        return sums
    return replace(sums, rows=sum_over_ranks(sums.rows))


def errors_over_ranks(errors: ErrorHistograms) -> ErrorHistograms:
    """Return histograms of errors added over all ranks; all ranks must use the same limit.

    Every rank computes the same loss from the sums, and the gradient of its own voxels needs no collective call.
    DistributedDataParallel divides the summed gradients by the number of ranks, for which the slopes compensate.
    """
    if not is_distributed():
        return errors
    slopes = None if errors.slopes is None else errors.slopes * dist.get_world_size()
    return ErrorHistograms(sum_over_ranks(errors.counts), errors.limit, slopes)


def largest_over_ranks(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum of `tensor` over all ranks, without a gradient."""
    if not is_distributed():
        return tensor
    largest = tensor.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest
