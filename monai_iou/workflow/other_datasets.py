"""A trained model on another dataset than its own: whether both mean the same by label values and channels."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.folder import SegmentationFolder
from monai_iou.planning.intensity import is_ct
from monai_iou.planning.plan import Plan

__all__ = ["check_meaning", "tell_other_channels"]

logger = logging.getLogger(__name__)


def check_meaning(folder: SegmentationFolder, plans: Sequence[Plan]) -> None:
    """Check, before cases are scored, that the models know what the labels of a dataset are.

    Other names, regions or channels are logged: they may be other words for the same.

    Args:
        folder: the dataset whose labels are the references.
        plans: of the models, which have the same labels; none for a network without weights.

    Raises:
        DatasetError: the label files hold shares for one of both and values for the other, or one ignores a value that
            the other has for a class.
    """
    if not plans:
        return
    plan = plans[0]
    where = folder.root / "dataset.json"
    if folder.soft != plan.soft_labels:
        message = (
            f"Expected `soft_labels` of {where} to be {str(plan.soft_labels).lower()}, as in the training of the "
            f"model, but got {str(folder.soft).lower()}: evaluate on labels of the kind that the model was trained on."
        )
        raise DatasetError(message)
    for value, names, those in ((plan.ignore, folder.labels, "the model"), (folder.ignore, plan.labels, str(where))):
        if value is not None and value in names:
            other = str(where) if those == "the model" else "the model"
            message = (
                f"Expected the label value {value} to mean the same in {where} as in the training of the model, but "
                f"{those} ignores it and it is {names[value]} in {other}: correct dataset.json, or take another model."
            )
            raise DatasetError(message)
    if not where.is_file():  # names that nobody gave
        return
    own, known = folder.scheme.classes, plan.scheme.classes
    if own != known:
        logger.warning(
            "%s has the classes %s, but the model was trained on %s: the scores are those of the model's classes.",
            where, _shown(own), _shown(known),
        )  # fmt: skip
    tell_other_channels(folder, plan)


def tell_other_channels(folder: SegmentationFolder, plan: Plan) -> None:
    """Log it if the channels of a dataset are CT where those of the model were not, or the other way round."""
    if [is_ct(name) for name in folder.modalities] != [is_ct(name) for name in plan.modalities]:
        logger.warning(
            "%s has the channels %s, but the model was trained on %s: CT is normalised in another way than others.",
            folder.root / "dataset.json", ", ".join(folder.modalities), ", ".join(plan.modalities),
        )  # fmt: skip


def _shown(classes: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} ({', '.join(map(str, values))})" for name, values in classes)
