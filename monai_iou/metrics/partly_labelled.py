"""Which classes of which images were annotated, for metrics, and what is left of their references."""

from __future__ import annotations

from typing import Any

import torch

from monai_iou.tables import counted
from monai_iou.voxels.partly_labelled import blank_unlabelled, labelled_table

__all__ = ["annotated", "labelled_rows"]


def labelled_rows(labelled: Any, count: int) -> list[torch.Tensor | None]:
    """Which classes each of the images was annotated for, None for all."""
    if labelled is None:
        return [None] * count
    rows = labelled_table(labelled, f"({count}, C)")
    if rows.dtype != torch.bool or rows.ndim != 2 or len(rows) != count:
        message = (
            f"Expected `labelled` to be bool of shape ({count}, C), one row per image, but got {rows.dtype} of shape "
            f"{tuple(rows.shape)}: say for each image which classes were annotated."
        )
        raise ValueError(message)
    return list(rows)


def annotated(
    reference: torch.Tensor, classes: int, labelled: torch.Tensor | None, ignore_index: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reference without the maps of classes that were not annotated, and which were; None for all.

    Their maps become 0, or what says which voxels are ignored.
    """
    known = torch.ones(classes, dtype=torch.bool, device="cpu") if labelled is None else labelled.cpu()
    if known.shape != (classes,):
        message = (
            f"Expected `labelled` to have {counted(classes, 'column')}, one per class, but got {len(known)}: count the "
            "background too where there is one."
        )
        raise ValueError(message)
    if len(reference) == classes and reference.is_floating_point():
        # The first voxel tells nearly always, and costs no pass.
        absent = [bool(m.flatten()[:1].isnan().any()) and bool(m.isnan().all()) for m in reference]
        known = known & ~torch.tensor(absent, dtype=torch.bool, device="cpu")
    if bool(known.all()):
        return reference, None
    return blank_unlabelled(reference[None], known[None].to(reference.device), ignore_index)[0], known
