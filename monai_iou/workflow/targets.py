"""The training's target from a label: regions, several raters, soft labels; and the label that scores are taken of.

A label comes as the classes of each rater, (K, *S), see `LabelClassesd`, or as shares of the foreground classes. The
target is a label map (1, *S) where classes exclude each other and one rater has spoken, else maps of all classes,
(C, *S), the background first. An ignored voxel is `plan.ignore_index` in a label map; in maps it is 0 in all of them,
the background included.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import MapTransform, Randomizable
from torch import Tensor

from monai_iou.planning.plan import Plan
from monai_iou.transforms.crops_dictionary import LesionIndicesd
from monai_iou.workflow.dataloader import derive_seed

__all__ = [
    "DrawnRaterd",
    "LabelTargetsd",
    "ScoredLabelsd",
    "hard_labels",
    "has_maps",
    "ignored_voxels",
    "with_drawn_rater",
    "without_lesions",
]


def has_maps(plan: Plan) -> bool:
    """Return whether the target is maps of all classes instead of a label map; for configs, also copied ones."""
    return plan.has_maps


class LabelTargetsd(MapTransform):
    """Turn a label into the training's target; of several raters' labels into their mean, or their majority.

    The mean is over the raters that do not ignore a voxel. The majority, for validation beside a training on one rater
    at a time, is what most of them see there.

    Args:
        keys: labels, see the module.
        plan: what the labels are; nothing else of it is kept, so that every training whose labels mean the same finds
            the prepared volumes of the others, see `DiskCacheDataset`.
        allow_missing_keys: do not fail where a key is absent.

    Example:
        >>> from monai_iou.planning.plan import Plan
        >>> regions = {"whole": (1, 2), "core": (2,)}
        >>> plan = Plan((), {0: "background", 1: "oedema", 2: "core"}, (), (), (), (), (), regions=regions)
        >>> LabelTargetsd("label", plan)({"label": torch.tensor([[0, 1, 2]])})["label"].tolist()
        [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    """

    def __init__(self, keys: KeysCollection, plan: Plan, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.plan = _of_labels(plan)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with targets in place of labels."""
        items = dict(data)
        for key in self.key_iterator(items):
            items[key] = _like(items[key], self.target(_plain(items[key])))
        return items

    def target(self, label: Tensor) -> Tensor:
        """Return the target of a label (K, *S), or of shares (F, *S)."""
        plan = self.plan
        if plan.soft_labels:
            return _with_background(label.to(torch.float32).clamp(0, 1), plan)
        if not plan.has_maps and len(label) == 1:
            return label
        maps = [_class_maps(label[rater], plan) for rater in range(len(label))]
        if not plan.soft and len(label) == 1:
            return maps[0]
        total = torch.stack(maps).sum(0, dtype=torch.float32)
        speakers = torch.stack([each.any(0) for each in maps]).sum(0)
        mean = total / speakers.clamp_min(1)
        return mean if plan.soft else _majority(mean, speakers > 0, plan)


def _of_labels(plan: Plan) -> Plan:
    """Return a plan that holds only what the targets depend on: not the cases, the patch or the network."""
    return Plan(
        modalities=(),
        labels=dict(plan.labels),
        pixdim=(),
        patch_size=(),
        channels=(),
        strides=(),
        intensity=(),
        regions=dict(plan.regions),
        soft_labels=plan.soft_labels,
        mean_of_raters=plan.mean_of_raters,
    )


class DrawnRaterd(Randomizable, MapTransform):
    """Draw one of several raters' labels, each with the same chance, and make the target of it.

    Of a case, one rater is drawn for each epoch: what is told by `set_epoch_seed`, which the training's loader calls,
    and the case's name decide. Without it, each call draws.

    Args:
        keys: labels, see the module; all get the same rater.
        plan: what the labels are.
        name_key: name of the item's case.
        allow_missing_keys: do not fail where a key is absent.
    """

    def __init__(
        self, keys: KeysCollection, plan: Plan, name_key: str = "case", allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.targets = LabelTargetsd(keys, plan, allow_missing_keys)
        self.name_key = name_key
        self.rater = 0
        self._epoch_seed: int | None = None

    def set_epoch_seed(self, seed: int) -> None:
        """Draw by the seed of an epoch from now on."""
        self._epoch_seed = seed

    def randomize(self, data: tuple[int, str]) -> None:
        """Draw one of so many raters for the case of this name."""
        count, name = data
        if self._epoch_seed is None:
            self.rater = int(self.R.randint(count))
        else:
            self.rater = derive_seed(self._epoch_seed, *name.encode()) % count

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with the target of one rater."""
        items = dict(data)
        for key in self.key_iterator(items):
            self.randomize((len(items[key]), str(items.get(self.name_key, ""))))
            items[key] = items[key][self.rater : self.rater + 1]
        return self.targets(items)


def without_lesions(transforms: Sequence[Any]) -> list[Any]:
    """Return transforms without those that find the lesions, which only the crops of a training read."""
    return [each for each in transforms if not isinstance(each, LesionIndicesd)]


def with_drawn_rater(transforms: Sequence[Any], drawn: DrawnRaterd) -> list[Any]:
    """Return transforms that draw a rater where they would take the mean; the lesions differ from rater to rater."""
    return [drawn if isinstance(each, LabelTargetsd) else each for each in without_lesions(transforms)]


class ScoredLabelsd(MapTransform):
    """Prepare predictions and labels for any metric: hard, without ignored voxels, NaN where nobody annotated.

    Soft labels become those of the largest share, or of regions of a share of at least one half. Ignored voxels become
    background in both, so that they count neither way for any foreground class. A class that was not annotated in a
    case gets a map of NaN, which the metrics leave out.

    Args:
        keys: predictions and the label, hard predictions first.
        plan: what the labels are.
        labelled_key: (C,) bool of the item, which classes were annotated; all where it is absent.

    Example:
        >>> from monai_iou.planning.plan import Plan
        >>> plan = Plan((), {0: "background", 1: "lesion"}, (), (), (), (), (), ignore=255)
        >>> item = {"pred": torch.tensor([[1, 1, 1]]), "label": torch.tensor([[0, 1, 2]])}
        >>> scored = ScoredLabelsd(["pred", "label"], plan)(item)
        >>> scored["pred"].tolist(), scored["label"].tolist()
        ([[1, 1, 0]], [[0, 1, 0]])
    """

    def __init__(self, keys: KeysCollection, plan: Plan, labelled_key: str = "labelled") -> None:
        super().__init__(keys)
        self.plan, self.labelled_key = plan, labelled_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with what the metrics take."""
        items = dict(data)
        *predictions, key = self.keys
        label = _plain(items[key])
        ignored = ignored_voxels(label, self.plan)
        label = hard_labels(label, self.plan)
        if ignored is not None:
            label = torch.where(ignored, 0, label)
            for name in predictions:
                values = _plain(items[name])
                items[name] = _like(items[name], torch.where(ignored.to(values.device), 0, values))
        items[key] = _like(items[key], self._annotated(label, items.get(self.labelled_key)))
        return items

    def _annotated(self, label: Tensor, labelled: Any) -> Tensor:
        known = torch.ones(0) if labelled is None else torch.as_tensor(np.asarray(labelled)).bool().flatten()
        if bool(known.all()):
            return label
        classes = torch.arange(self.plan.out_channels, device=label.device)
        maps = label if len(label) > 1 else label == classes.view(-1, *[1] * (label.ndim - 1))
        where = known.to(label.device).view(-1, *[1] * (label.ndim - 1))
        return torch.where(where, maps.to(torch.float32), torch.nan)


def hard_labels(label: Tensor, plan: Plan) -> Tensor:
    """Return a target as whole numbers: a map of classes (1, *S), or of regions maps (C, *S) of 0 and 1."""
    if len(label) == 1:
        return label
    return label.argmax(0, keepdim=True) if plan.exclusive else (label >= 0.5).to(torch.uint8)


def _majority(mean: Tensor, spoken: Tensor, plan: Plan) -> Tensor:
    """Return the target of several raters' mean (C, *S), ignored where nobody has spoken."""
    hard = hard_labels(mean, plan)
    if plan.exclusive:
        return torch.where(spoken, hard, len(plan.labels)).to(torch.int32)
    background = spoken & ~hard[1:].bool().any(0)
    return torch.cat([background[None].to(torch.uint8), hard[1:]])


def _class_maps(classes: Tensor, plan: Plan) -> Tensor:
    """Return the maps (C, *S) of one rater's classes (*S), 0 where the voxel is ignored."""
    ignored = classes == len(plan.labels)
    if plan.exclusive:
        return torch.stack([classes == number for number in plan.classes]).to(torch.uint8)
    numbers = {value: number for number, value in enumerate(plan.labels)}
    inside = [torch.as_tensor([numbers[value] for value in values]) for values in plan.regions.values()]
    regions = torch.stack([torch.isin(classes, each.to(classes)) for each in inside])
    return torch.cat([~(regions.any(0) | ignored)[None], regions]).to(torch.uint8)


def _with_background(shares: Tensor, plan: Plan) -> Tensor:
    """Return shares of all classes; the background has what the others leave, or of regions what the largest leaves."""
    taken = shares.sum(0, keepdim=True).clamp(0, 1) if plan.exclusive else shares.amax(0, keepdim=True)
    return torch.cat([1 - taken, shares])


def ignored_voxels(label: Tensor, plan: Plan) -> Tensor | None:
    """Return where a target (1, *S) or (C, *S) has ignored voxels, (1, *S); None if none can be ignored."""
    if plan.ignore_index is None:
        return None
    return label == plan.ignore_index if len(label) == 1 else (label == 0).all(0, keepdim=True)


def _plain(values: Any) -> Tensor:
    return torch.as_tensor(values).as_subclass(Tensor)


def _like(old: Any, new: Tensor) -> Tensor:
    return MetaTensor(new, meta=old.meta) if isinstance(old, MetaTensor) else new
