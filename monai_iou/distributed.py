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
    """Return whether several ranks run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def fails_together(sync: bool, input: object) -> AbstractContextManager[None]:
    """Return a context that raises on every rank if one of them finds its input wrong inside the `with` block.

    Without it that rank would leave, and the others would wait for its part of the sums. The block itself makes none.
    The context costs a sum of one number over the ranks; nothing without `sync`, in a single process, or on
    a GPU, where wrong labels make the sums NaN instead.

    Args:
        sync: whether the ranks are to agree; each must enter as many such blocks.
        input: what the loss was called with, on the device of the sums.
    """
    if not (sync and is_distributed()) or (isinstance(input, Tensor) and input.device.type == "cuda"):
        return nullcontext()
    return _FailsTogether()


class _FailsTogether(AbstractContextManager[None]):
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # interrupted: wait for nobody
        failures = torch.tensor([float(error is not None)])
        dist.all_reduce(failures)
        if error is None and failures.item():
            message = (
                "Expected the input and target of every rank to be right with sync_batch=True, but those of another "
                "rank are not: its error says what is wrong."
            )
            raise ValueError(message)


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks whose adjoint is the sum over ranks again.

    Every rank computes the same loss L from the same sums. The adjoint gives each rank W dL/dS for W ranks, and
    DistributedDataParallel's mean over ranks of the parameters' gradients divides by W: together, dL/dparameters of one
    process that holds the joined batch.
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
    """Return the sum of `tensor` over all ranks, on each of them; `tensor` itself in a single process.

    Every rank must call it, with the same shape; a rank without data passes zeros. Differentiable: see
    :class:`_SumOverRanks` for why DDP then gives the gradients of one process on the joined batch.

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
    """Add voxel sums over all ranks: one collective call for all fields."""
    if not is_distributed():
        return sums
    return replace(sums, rows=sum_over_ranks(sums.rows))


def errors_over_ranks(errors: ErrorHistograms) -> ErrorHistograms:
    """Add histograms of errors with one limit over all ranks.

    Each rank computes the same loss of them, and its voxels take the derivative from the sums at no collective call.
    DistributedDataParallel divides the sum of the ranks' gradients by their number W; the slopes make up for it.
    """
    if not is_distributed():
        return errors
    slopes = None if errors.slopes is None else errors.slopes * dist.get_world_size()
    return ErrorHistograms(sum_over_ranks(errors.counts), errors.limit, slopes)


def largest_over_ranks(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum of `tensor` over all ranks, without gradients."""
    if not is_distributed():
        return tensor
    largest = tensor.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest
