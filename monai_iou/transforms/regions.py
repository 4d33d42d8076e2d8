"""The regions of a label's components, carried with the label through crops and flips."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import MapTransform
from monai.utils.type_conversion import convert_to_tensor

from monai_iou import checks
from monai_iou.components import FIRST_REGION, component_regions, whole_numbers
from monai_iou.spacing import check_spacing, image_spacings
from monai_iou.transforms.lesions import as_array, up_to_date


class ComponentRegionsd(MapTransform):
    """Append to a label map the Voronoi regions of its components, for :class:`monai_iou.InstanceIoULoss`.

    Each foreground class gets one channel, which holds the region number of every voxel. Numbers start at 2; all voxels
    that are nearest, in mm, to the same component of the class have the same number, and without a component every
    voxel has 2. The channels are part of the label, so that crops, flips and other spatial transforms (with nearest
    interpolation) change them alike. Compute them once, before the random transforms: they then also contain the
    components that a crop leaves out. Voxel sizes are those of a MetaTensor, so put the transform after `Spacingd` and
    before `EnsureTyped(track_meta=False)`.

    MONAI's `RandCropByPosNegLabeld` treats every voxel of all channels after the first as foreground, and would draw
    its patches anywhere: crop with `RandCropByLesionsd`, which knows the regions, or let `FgBgToIndicesd` find the
    foreground before this transform and pass its results as `fg_indices_key` and `bg_indices_key`.

    Args:
        keys: label maps (1, *S) with class numbers from 0, the background. Values that differ from a whole number by at
            most 0.0001 (and four float32 steps), as resampling and scale factors of files leave them, are rounded.
        num_classes: number of classes C with the background; the result has C channels.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; the most by default.
        spacing: voxel size in mm, instead of the MetaTensor's.
        allow_missing_keys: do not fail where a key is absent.

    Raises:
        TypeError: `num_classes` is not an integer.
        ValueError: `num_classes` is below 2, or the connectivity does not exist; when called, if a label has several
            channels or too many dimensions, or holds a value that is not a whole number.

    Example:
        >>> import torch
        >>> from monai_iou import ComponentRegionsd
        >>> label = torch.tensor([[[1, 0, 0, 0, 0, 1]]])
        >>> ComponentRegionsd("label")({"label": label})["label"]
        tensor([[[1, 0, 0, 0, 0, 1]],
        <BLANKLINE>
                [[2, 2, 2, 3, 3, 3]]], dtype=torch.int32)
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int = 2,
        connectivity: int | None = None,
        spacing: Sequence[float] | float | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        remedy = "give the number of classes with the background, such as 2"
        num_classes = checks.check_count("num_classes", num_classes, remedy)
        if num_classes < 2:
            message = (
                f"Expected `num_classes` to count the background and at least one class, but got {num_classes}: give "
                "2 for one foreground class."
            )
            raise ValueError(message)
        self.num_classes, self.spacing = num_classes, check_spacing(spacing)
        self.connectivity = checks.check_connectivity(connectivity)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with its labels (1, *S) as int32 (C, *S): class numbers, then regions of each class."""
        items = dict(data)
        for key in self.key_iterator(items):
            items[key] = self._with_regions(str(key), items[key])
        return items

    def _with_regions(self, key: str, label: Any) -> torch.Tensor:
        label = up_to_date(label)
        remedy = "remove the batch dimension"
        checks.check_dimensions(f"`{key}`", label.shape, "(1, *S)", expected="be a label map", too_many=remedy)
        if label.shape[0] != 1:
            message = (
                f"Expected `{key}` to be a label map (1, *S), but got {tuple(label.shape)}: add a missing channel with "
                "label[None], convert per-class maps with argmax(0, keepdim=True), and append regions only once."
            )
            raise ValueError(message)
        plain = convert_to_tensor(label, track_meta=False)
        numbers = whole_numbers(as_array(plain[0]))
        spacing = image_spacings(None, [label], self.spacing, 1, numbers.ndim)[0]
        channels = [numbers.astype(np.int32)]
        for index in range(1, self.num_classes):
            regions, _ = component_regions(numbers == index, "voronoi", spacing, self.connectivity)
            # One region without a component, where there is none: a crop of zeros alone could be per-class maps.
            channels.append((regions.clip(1) + FIRST_REGION - 1).astype(np.int32))
        result = torch.as_tensor(np.stack(channels), device=plain.device)
        return (
            MetaTensor(result, meta=label.meta, applied_operations=label.applied_operations)
            if isinstance(label, MetaTensor)
            else result
        )
