"""What the ranks tell one another about the images that they have scored; every rank must call these functions.

MONAI's `Cumulative` skips the collective call on a rank without data, so that the other ranks wait forever.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from monai.utils.dist import get_dist_device

from monai_iou.distributed import is_distributed, largest_over_ranks

__all__ = ["gather_rows", "is_true_for_any", "known_to_any"]


def gather_rows(
    rows: torch.Tensor | None, dtype: torch.dtype = torch.float64, *, error: str | None = None
) -> torch.Tensor | None:
    """Concatenate the rows of all ranks in the order of the ranks; every rank must call it, even one without rows.

    The ranks first exchange the shapes of their rows, so that a rank without rows takes part with zero rows.

    Args:
        rows: the rows of this rank, (N, ...), or None if it has none.
        dtype: type of the rows, the same on all ranks.
        error: why this rank cannot give its rows, if it cannot.

    Returns:
        All rows, on the device of this rank's rows (on the CPU if it has none), or None if no rank has any.

    Raises:
        ValueError: the rows of the ranks have different shapes, or a rank has an error; every rank raises it.
    """
    if not is_distributed():
        if error is not None:
            raise ValueError(error)
        return rows
    device = get_dist_device() or torch.device("cpu")
    home = torch.device("cpu") if rows is None else rows.device
    # number of rows (-1 after an error), number of further dimensions, and up to three of them
    mine = torch.zeros(5, dtype=torch.int64, device="cpu")
    if error is not None:
        mine[0] = -1
    elif rows is not None:
        mine[: 1 + rows.ndim] = torch.tensor([len(rows), rows.ndim - 1, *rows.shape[1:]], device="cpu")
    shapes = [s.tolist() for s in _all_gather(mine.to(device))]
    failed = [rank for rank, shape in enumerate(shapes) if shape[0] < 0]
    if error is not None:
        raise ValueError(error)
    if failed:
        message = f"Expected the scores of every rank, but got an error on rank {failed[0]}: see its message."
        raise ValueError(message)
    row_shapes = {tuple(s[2 : 2 + s[1]]) for s in shapes if s[0] > 0}
    if not row_shapes:
        return None
    if len(row_shapes) > 1:
        message = (
            f"Expected every rank to hold scores of the same classes, but got rows of shapes {sorted(row_shapes)}: "
            "give every rank the same `num_classes` and `include_background`."
        )
        raise ValueError(message)
    padded = torch.zeros((max(s[0] for s in shapes), *row_shapes.pop()), dtype=dtype, device=device)
    if rows is not None:
        padded[: len(rows)] = rows.to(device=device, dtype=dtype)
    parts = [part[: s[0]] for part, s in zip(_all_gather(padded), shapes, strict=True)]
    return torch.cat(parts).to(home)


def _all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def known_to_any(number: int | None) -> int | None:
    """Return a number from 0 on that at least one rank knows, the largest if they differ; None if no rank knows it."""
    if not is_distributed():
        return number
    known = torch.tensor([-1 if number is None else number], device=get_dist_device() or torch.device("cpu"))
    largest = int(largest_over_ranks(known))
    return None if largest < 0 else largest


def is_true_for_any(flag: bool) -> bool:
    """Return whether a flag is True on at least one rank."""
    return known_to_any(int(flag)) == 1
