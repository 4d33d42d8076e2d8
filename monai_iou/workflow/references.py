"""What a mask is scored against where no single label file says it: the majority of raters, or the largest share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_iou.datasets.folder import SegmentationFolder
from monai_iou.files import write_json
from monai_iou.planning.plan import Plan
from monai_iou.planning.stored import load_plan
from monai_iou.workflow.loading import LabelClassesd, LabelReader
from monai_iou.workflow.masks import ClassValuesd, MaskWriter, mask_dtype
from monai_iou.workflow.targets import LabelTargetsd, hard_labels, ignored_voxels

__all__ = ["with_label_maps", "write_reference"]


def with_label_maps(
    items: Sequence[Mapping[str, Any]], folder: SegmentationFolder, models: Path, output: Path
) -> list[dict[str, Any]]:
    """Return cases with one label map each as label; where one of them has none, they are written for all.

    Args:
        items: with their `case` and `label`.
        folder: the dataset.
        models: of a training on it.
        output: folder for the label maps.

    Raises:
        OutputError: one cannot be written.
    """
    if not folder.soft and all(isinstance(item["label"], str) for item in items):
        return [dict(item) for item in items]
    plan, written = load_plan(models / "model.json"), []
    for item in items:
        files = item["label"] if isinstance(item["label"], list) else [item["label"]]
        path = output / f"{item['case']}.nii.gz"
        write_reference([Path(file) for file in files], plan, path)
        written.append({**item, "label": str(path)})
    if folder.is_partly_labelled:  # which the dataset.json of the references says
        names = {case.name: [folder.scheme.classes[k - 1][0] for k in case.labelled or ()] for case in folder.labelled
                 if case.labelled is not None}  # fmt: skip
        kinds = {"regions": folder.regions, "regions_class_order": folder.regions_order} if folder.regions else {}
        write_json(output / "dataset.json", {"labels": folder.labels, **kinds, "labelled": names})
    return written


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
    ignored, hard = ignored_voxels(target, plan), hard_labels(target, plan)
    if ignored is not None:  # numbered behind the classes
        hard = torch.where(ignored, 0, hard)
    values = ClassValuesd("label", plan.label_values, plan.regions_order)({"label": hard})["label"]
    if ignored is not None:
        values[ignored] = int(plan.ignore or 0)
    writer = MaskWriter(mask_dtype([*plan.label_values, *([] if plan.ignore is None else [plan.ignore])]))
    writer.set_data_array(np.asarray(values))
    writer.set_metadata({"affine": volume.grid.affine, "filename_or_obj": str(labels[0])})
    writer.write(path)
