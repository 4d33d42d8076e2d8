"""Cases in which only some classes were annotated: their key `labelled`, from the items to the loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.datasets.folder import SegmentationFolder, is_dataset
from monai_iou.datasets.scheme import LabelScheme
from monai_iou.workflow.settings import exit_with_message

__all__ = [
    "LABELLED",
    "BatchPreparation",
    "PartlyLabelledLoss",
    "case_items",
    "check_raters",
    "draws_raters",
    "labelled_classes",
]

LABELLED = "labelled"


def case_items(
    cases: Sequence[Case], folder: SegmentationFolder, scheme: LabelScheme | None = None
) -> list[dict[str, Any]]:
    """Return the items of cases; with `labelled`, (C,) bool, if one of them, or of the training, lacks classes.

    Args:
        cases: of the folder.
        folder: the dataset.
        scheme: with the classes of the network; None for those of the folder.
    """
    if not folder.is_partly_labelled and all(case.labelled is None for case in cases):
        return [case.as_item() for case in cases]
    known = folder.scheme if scheme is None else scheme
    return [
        {**case.as_item(), LABELLED: np.array(labelled_classes(_renumbered(case, folder.scheme, known), known))}
        for case in cases
    ]


def _renumbered(case: Case, own: LabelScheme, known: LabelScheme) -> Case:
    """Return a case whose annotated classes have the numbers that they have in another scheme, by name or values."""
    if own.classes == known.classes:
        return case
    annotated = [each for number, each in enumerate(own.classes, 1) if case.labelled is None or number in case.labelled]
    names, values = {name for name, _ in own.classes}, {frozenset(held) for _, held in annotated}
    found = [
        number
        for number, (name, held) in enumerate(known.classes, 1)
        if (name in dict(annotated) if name in names else frozenset(held) in values)
    ]
    return replace(case, labelled=tuple(found))


def check_raters(folder: SegmentationFolder, raters: str) -> None:
    """Refuse to draw one of several raters' shares: only their mean is read.

    Raises:
        DatasetError: `raters` is "draw", and cases with `soft_labels` have several raters.
    """
    if raters == "draw" and folder.soft and folder.has_raters:
        message = (
            f"Expected `raters` to be mean for several raters with `soft_labels` in {folder.root / 'dataset.json'}, "
            "but got draw: train on the mean of their shares with --raters mean."
        )
        raise DatasetError(message)


def draws_raters(cases: Any) -> bool:
    """Return whether an epoch has one rater's label of a case instead of the mean of all, for a `BundleCases`."""
    return cases.raters == "draw" and is_dataset(cases.dataset_dir) and bool(cases.folder.has_raters)


def labelled_classes(case: Case, scheme: LabelScheme) -> list[bool]:
    """Return which classes of a scheme were annotated in a case that is numbered by it, the background first.

    Classes that exclude each other keep the background, of which those that were not annotated become a part. Among
    regions, the map of the background is known where all regions are; with an `ignore` value it stays, because a voxel
    of no map at all is an ignored one.

    Example:
        >>> from pathlib import Path
        >>> scheme = LabelScheme({0: "background", 1: "liver", 2: "spleen"})
        >>> labelled_classes(Case("c", Path("c.nii"), labelled=(2,)), scheme)
        [True, False, True]
    """
    numbers = range(1, len(scheme.classes) + 1)
    foreground = [case.labelled is None or number in case.labelled for number in numbers]
    return [not scheme.regions or scheme.ignore is not None or all(foreground), *foreground]


class PartlyLabelledLoss(nn.Module):
    """A loss that is told by `BatchPreparation` which classes of the next batch's images were annotated.

    MONAI's trainer hands over output and label alone.

    Args:
        loss: takes (input, target, labelled).

    Raises:
        DatasetError: the loss has no argument `labelled`.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        if LABELLED not in inspect.signature(loss.forward).parameters:
            with exit_with_message():
                message = (
                    f"Expected a loss that leaves out classes which a case lacks, as `labelled` in dataset.json asks, "
                    f"but got {type(loss).__name__}: take one of monai_iou, or remove `labelled`."
                )
                raise DatasetError(message)
        self.loss = loss
        self.labelled: Tensor | None = None

    @property
    def last_terms(self) -> Mapping[str, Tensor]:
        """The terms of the loss at its last call."""
        terms: Mapping[str, Tensor] = getattr(self.loss, "last_terms", {})
        return terms

    def forward(self, input: Any, target: Tensor) -> Tensor:
        """Return the loss of the batch whose `labelled` came last."""
        value: Tensor = self.loss(input, target, self.labelled)
        return value


class BatchPreparation:
    """MONAI's `default_prepare_batch`, which tells a `PartlyLabelledLoss` what of the batch was annotated.

    Args:
        loss: of the trainer; any other kind is left alone.
    """

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    def __call__(self, batch: Any, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        """Return image and label on the device."""
        if isinstance(self.loss, PartlyLabelledLoss):
            labelled = batch.get(LABELLED) if isinstance(batch, Mapping) else None
            self.loss.labelled = None if labelled is None else torch.as_tensor(labelled).bool()
        from monai.engines.utils import default_prepare_batch  # imports ignite

        return default_prepare_batch(batch, device, non_blocking, **kwargs)
