"""Sums over the ranks of a process group, with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from monai.utils.dist import get_dist_device
from torch import Tensor, nn

from monai_iou.voxels import VoxelSums, late_checks
from monai_iou.voxels.histograms import ErrorHistograms
from monai_iou.voxels.inputs import plain

# Blocks of this process on a GPU whose answers are not waited for, so that its queue of work does not run dry.
_PENDING = 2

_Value = TypeVar("_Value")


def is_distributed() -> bool:
    """Return whether several ranks are running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_synchronised(loss: nn.Module) -> bool:
    """Return whether a loss, or a loss inside it, adds its sums over all ranks."""
    return any(getattr(part, "sync_batch", False) for part in loss.modules())


def fails_together(sync: bool, input: object) -> AbstractContextManager[None]:
    """Return a context that raises on every rank if an error occurs inside the `with` block on one of them.

    Without it, that rank would stop while the others wait for its part of the sums. The block must not contain
    collective calls. The context costs one sum of a single number over the ranks. It has no effect without `sync` and
    in a single process.

    On a GPU nothing waits for the check of the labels: wrong labels of one rank make the sums of all ranks NaN, and all
    ranks raise the error when they enter the third block after it. Other errors are raised on their rank alone. Inside
    torch.compile and in a CUDA graph no error follows.

    Args:
        sync: whether the ranks must agree; then every rank must enter the same number of such blocks.
        input: the input of the loss, on the device of the sums; of several outputs, the first one tells.

    Raises:
        ValueError: on all other ranks, if the block raises an error on one rank; on a GPU, for an earlier block.

    Example:
        >>> from monai_iou.distributed import fails_together
        >>> with fails_together(True, None):
        ...     "checks of the input"
        'checks of the input'
    """
    if not (sync and is_distributed()):
        return nullcontext()
    while isinstance(input, (list, tuple)) and input:
        input = input[0]
    if not (isinstance(input, Tensor) and late_checks.answers_late(input)):
        return _FailsTogether()
    if torch.compiler.is_compiling() or late_checks.is_captured(input):
        return nullcontext()
    return _fails_later(input.device)


def _of_another_rank() -> ValueError:
    message = (
        "Expected the input and target of every rank to be valid with sync_batch=True, but got an error on another "
        "rank: see the message of that rank."
    )
    return ValueError(message)


class _FailsTogether(AbstractContextManager[None]):
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # after an interrupt, do not wait for other ranks
        failures = torch.tensor([float(error is not None)], device=get_dist_device() or torch.device("cpu"))
        try:
            dist.all_reduce(failures)
        except RuntimeError:
            if error is None:
                raise
            return  # the ranks cannot agree here, and this rank's own error says more than the reason
        if error is None and failures.item():
            raise _of_another_rank()


@contextmanager
def _fails_later(device: torch.device) -> Iterator[None]:
    """Ask with all ranks whether the labels of the block are wrong on one of them; raise the error of an earlier block.

    Every rank gets the same answers and raises in the same call, so that none is left waiting for another's sums.
    """
    late_checks.shared.raise_settled(_PENDING)
    with late_checks.collected() as asked:
        yield
    failures = torch.zeros((), dtype=torch.float32, device=device)
    for bad, _ in asked:
        failures += bad
    dist.all_reduce(failures)

    def error() -> ValueError:
        own = (error() for bad, error in asked if bool(bad))
        return next(own, None) or _of_another_rank()

    late_checks.shared.ask(failures > 0, error)


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
            If the other ranks differentiate the sum, the zeros must depend on the parameters of this rank's network, as
            `output.sum() * 0` does; otherwise the others wait in their backward pass for this one.

    Returns:
        The sum, of the shape and dtype of `tensor`.

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


def depending_on(unused: Sequence[Tensor], value: Tensor) -> Tensor:
    """Return a loss that depends on outputs without a part in it; their gradients are 0, their values have no effect.

    DistributedDataParallel waits for the gradients of all parameters: the step after one that has left out the
    parameters of an output would fail. Without a process group the outputs stay unused, which saves their backward.

    Args:
        unused: outputs of the network that have no part in the loss.
        value: the loss.

    Example:
        >>> import torch
        >>> from monai_iou.distributed import depending_on
        >>> depending_on([torch.ones(2)], torch.tensor(0.5))
        tensor(0.5000)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    for output in unused:
        value = value + plain(output).flatten()[:0].sum().to(value.dtype)
    return value


def sums_over_ranks(sums: VoxelSums) -> VoxelSums:
    """Return voxel sums added over all ranks, with one collective call.

    They are partly labelled if those of some rank are: each rank looks at its own images alone, and every rank must
    divide by the same number of classes.
    """
    if not is_distributed():
        return sums
    marked = sums.rows.new_ones(1) * sums.partly_labelled
    total = sum_over_ranks(torch.cat([sums.rows.flatten(), marked]))
    return VoxelSums(total[:-1].view(sums.rows.shape), partly_labelled=total[-1] > 0)


def errors_over_ranks(errors: ErrorHistograms) -> ErrorHistograms:
    """Return histograms of errors added over all ranks; all ranks must use the same limit.

    Every rank computes the same loss from the sums, and the gradient of its own voxels needs no collective call.
    DistributedDataParallel divides the summed gradients by the number of ranks, for which the slopes compensate.
    """
    if not is_distributed():
        return errors
    slopes = None if errors.slopes is None else errors.slopes * dist.get_world_size()
    return ErrorHistograms(sum_over_ranks(errors.counts), errors.limit, slopes)


def from_all_ranks(value: _Value) -> list[_Value]:
    """Return what each rank has, in the order of the ranks; every rank must call it, one that has nothing too.

    Args:
        value: anything that can be pickled.

    Example:
        >>> from monai_iou.distributed import from_all_ranks
        >>> from_all_ranks(["case_01.nii.gz"])
        [['case_01.nii.gz']]
    """
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def largest_over_ranks(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum of `tensor` over all ranks, without a gradient."""
    if not is_distributed():
        return tensor
    largest = tensor.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest
