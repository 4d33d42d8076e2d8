"""The probabilities of a validation, kept beside the labels that are made of them, for metrics of probabilities."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform

from monai_iou.planning.plan import Plan
from monai_iou.workflow.labelled import LABELLED
from monai_iou.workflow.targets import ScoredLabelsd, ignored_voxels

__all__ = ["KeptProbabilitiesd"]


class KeptProbabilitiesd(MapTransform):
    """Keep the probabilities of the voxels that count, as `probabilities` (C, N), and their `probability_label`.

    It comes before the predictions are made labels. Ignored voxels are in neither: as background of probability 0 they
    would count as well calibrated. The label is a label map (1, N) or maps (C, N), NaN where nobody annotated.

    Args:
        keys: the output of the network (C, *S), and the target.
        plan: what the labels are.

    Example:
        >>> plan = Plan((), {0: "background", 1: "lesion"}, (), (), (), (), (), ignore=255)
        >>> item = {"pred": torch.zeros(2, 3), "label": torch.tensor([[0, 1, 2]])}
        >>> kept = KeptProbabilitiesd(["pred", "label"], plan)(item)
        >>> kept["probabilities"].tolist(), kept["probability_label"].tolist()
        ([[0.5, 0.5], [0.5, 0.5]], [[0, 1]])
    """

    def __init__(self, keys: KeysCollection, plan: Plan) -> None:
        super().__init__(keys)
        self.plan = plan
        self._scored = ScoredLabelsd("label", plan)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with two keys more."""
        items = dict(data)
        output, target = (torch.as_tensor(items[key]).as_subclass(torch.Tensor) for key in self.keys)
        output = output.float()
        probabilities = output.softmax(0) if self.plan.exclusive else output.sigmoid()
        label = self._scored({"label": target, LABELLED: items.get(LABELLED)})["label"].to(output.device)
        ignored = ignored_voxels(target, self.plan)
        for name, maps in (("probabilities", probabilities), ("probability_label", label)):
            items[name] = maps.flatten(1) if ignored is None else maps[:, ~ignored[0].to(maps.device)]
        return items
