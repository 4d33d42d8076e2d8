"""Which patches a training cuts: how many with foreground, and how often from a small lesion."""

from __future__ import annotations

import numpy as np

from monai_iou.components import component_chances
from monai_iou.planning.fingerprint import Fingerprint
from monai_iou.planning.plan import Plan
from monai_iou.planning.size_rules import Decision, holds_a_volume

__all__ = ["crop_decision", "lesion_draw_decision"]


CROP_RATIOS = ((1, 1), (2, 1), (3, 1), (5, 1), (9, 1))
SIZE_EXPONENT, CROP_JITTER = 0.5, 0.5


def crop_decision(plan: Plan, found: Fingerprint) -> Decision:
    """Decide the ratio of patches with and without a foreground centre."""
    if holds_a_volume(plan, found):
        reason = "the patch holds the median volume, wherever its centre is"
        return Decision(
            "crops", "1 on foreground : 1 on background", reason, {"positive_crops": 1, "negative_crops": 1}
        )
    empty = len(found.empty_cases) / found.cases
    hit = _chance_of_foreground(plan, found)
    share = 0.5 if hit >= 0.5 else 2 / 3
    reason = f"a random patch meets foreground with a chance of about {hit:.0%}"
    if empty:
        share = share / (1 - empty)
        reason += f"; {empty:.0%} of the cases have none, so the others give more"
    ratios: list[tuple[int, int]] = [ratio for ratio in CROP_RATIOS if ratio[0] / sum(ratio) >= share - 1e-9]
    positive, negative = ratios[0] if ratios else CROP_RATIOS[-1]
    keys = {"positive_crops": positive, "negative_crops": negative}
    return Decision("crops", f"{positive} on foreground : {negative} on background", reason, keys)


def _chance_of_foreground(plan: Plan, found: Fingerprint) -> float:
    """Return the chance that a random patch of a case with foreground meets one of its components, taken as points."""
    covered = np.array(plan.patch_size) * plan.pixdim / np.maximum(found.extent.median, 1e-6)
    part = float(np.prod(np.minimum(1.0, covered)))
    components = sum(label.components for label in found.classes) / (found.cases - len(found.empty_cases))
    return float(1 - (1 - part) ** components)


def lesion_draw_decision(plan: Plan, found: Fingerprint) -> Decision:
    """Decide how often a component is drawn for its size, and how far from the middle of the patch it lies."""
    keys = {"size_exponent": SIZE_EXPONENT, "crop_jitter": CROP_JITTER}
    value = f"size^{SIZE_EXPONENT:g}, in the middle {CROP_JITTER:.0%}"
    sizes = max((size for case in found.measures for size in case.components), key=_inequality)
    place = "a lesion that is always in the middle teaches its place"
    if len(sizes) < 2:
        return Decision("lesions in crops", value, f"no case has two components of a class; {place}", keys)
    by_root, by_voxel = (
        component_chances(sizes, np.ones(len(sizes)), exponent)[sizes.argmax()] for exponent in (SIZE_EXPONENT, 1)
    )
    reason = (
        f"where sizes differ most ({len(sizes)} components) the largest is drawn in {by_root:.0%} of its class's "
        f"patches instead of {by_voxel:.0%} by voxels, and every one can be; {place}"
    )
    return Decision("lesions in crops", value, reason, keys)


def _inequality(sizes: np.ndarray) -> float:
    """Return how many times as large the largest of several components is as the median one."""
    return float(sizes.max() / np.median(sizes)) if len(sizes) > 1 else 0.0
