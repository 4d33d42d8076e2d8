"""What a mask is scored against where no single label file says it: the majority of raters, or the largest share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from monai_iou.planning.plan import Plan
from monai_iou.workflow.loading import LabelClassesd, LabelReader
from monai_iou.workflow.masks import ClassValuesd, MaskWriter, mask_dtype
from monai_iou.workflow.targets import LabelTargetsd, hard_labels, ignored_voxels

__all__ = ["write_reference"]


def write_reference(labels: Sequence[Path], plan: Plan, path: Path) -> None:
    """Write the label map that scores are taken of, as NIfTI on the grid of the labels.

    Args:
        labels: files of the case's raters, or the one file of shares.
        plan: what the labels are.
        path: of the label map.

    Raises:
        OutputError: it cannot be written.
    """
    volume = LabelReader(soft=plan.soft_labels).volume(labels)
    array = volume.array if volume.array.ndim == 4 else volume.array[None]
    classes = LabelClassesd("label", plan.label_values, plan.ignore, plan.soft_labels)
    target = LabelTargetsd("label", plan).target(classes({"label": torch.as_tensor(array)})["label"])
    values = ClassValuesd("label", plan.label_values, plan.regions_order)({"label": hard_labels(target, plan)})["label"]
    ignored = ignored_voxels(target, plan)
    if ignored is not None:
        values[ignored] = int(plan.ignore or 0)
    writer = MaskWriter(mask_dtype([*plan.label_values, *([] if plan.ignore is None else [plan.ignore])]))
    writer.set_data_array(np.asarray(values))
    writer.set_metadata({"affine": volume.grid.affine, "filename_or_obj": str(labels[0])})
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write(path)
