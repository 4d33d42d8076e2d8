"""The rules for the crops of a training: how many contain foreground, and how often a small lesion is drawn."""

from __future__ import annotations

import numpy as np

from monai_iou.components import component_chances
from monai_iou.planning.fingerprint import Fingerprint
from monai_iou.planning.plan import Plan
from monai_iou.planning.size_rules import Decision, holds_a_volume

__all__ = ["crop_decision", "lesion_draw_decision"]


CROP_RATIOS = ((1, 1), (2, 1), (3, 1), (5, 1), (9, 1))
SIZE_EXPONENT, CROP_JITTER = 0.5, 0.5


def crop_decision(plan: Plan, fingerprint: Fingerprint) -> Decision:
    """Decide the ratio of patches with and without a foreground centre."""
    if holds_a_volume(plan, fingerprint):
        reason = "the patch contains the median volume, wherever its centre is"
        return Decision(
            "crops", "1 on foreground : 1 on background", reason, {"positive_crops": 1, "negative_crops": 1}
        )
    empty = len(fingerprint.empty_cases) / fingerprint.cases
    hit = _chance_of_foreground(plan, fingerprint)
    share = 0.5 if hit >= 0.5 else 2 / 3
    reason = f"a random patch contains foreground with a probability of about {hit:.0%}"
    if empty:
        share = share / (1 - empty)
        reason += f"; {empty:.0%} of the cases have none, so that the others provide more"
    ratios: list[tuple[int, int]] = [ratio for ratio in CROP_RATIOS if ratio[0] / sum(ratio) >= share - 1e-9]
    positive, negative = ratios[0] if ratios else CROP_RATIOS[-1]
    keys = {"positive_crops": positive, "negative_crops": negative}
    return Decision("crops", f"{positive} on foreground : {negative} on background", reason, keys)


def _chance_of_foreground(plan: Plan, fingerprint: Fingerprint) -> float:
    """Return the probability that a random patch of a case with foreground contains a component, taken as a point."""
    covered = np.array(plan.patch_size) * plan.pixdim / np.maximum(fingerprint.extent.median, 1e-6)
    part = float(np.prod(np.minimum(1.0, covered)))
    components = sum(label.components for label in fingerprint.classes) / (
        fingerprint.cases - len(fingerprint.empty_cases)
    )
    return float(1 - (1 - part) ** components)


def lesion_draw_decision(plan: Plan, fingerprint: Fingerprint) -> Decision:
    """Decide how the chance of a component depends on its size, and how far from the middle of the patch it may lie."""
    keys = {"size_exponent": SIZE_EXPONENT, "crop_jitter": CROP_JITTER}
    value = f"drawn by size^{SIZE_EXPONENT:g}, in the middle {CROP_JITTER:.0%}"
    sizes = max((size for case in fingerprint.measures for size in case.components), key=_inequality)
    place = "lesions that are always in the middle would teach the network their position"
    if len(sizes) < 2:
        return Decision("lesions in crops", value, f"no case has two components of a class; {place}", keys)
    by_root, by_voxel = (
        component_chances(sizes, np.ones(len(sizes)), exponent)[sizes.argmax()] for exponent in (SIZE_EXPONENT, 1)
    )
    reason = (
        f"where sizes differ most ({len(sizes)} components), the largest is in {by_root:.0%} of its class's patches "
        f"instead of {by_voxel:.0%} if drawn by voxels, and every component can be drawn; {place}"
    )
    return Decision("lesions in crops", value, reason, keys)


def _inequality(sizes: np.ndarray) -> float:
    """Return the ratio of the largest to the median component, 0 for a single one."""
    return float(sizes.max() / np.median(sizes)) if len(sizes) > 1 else 0.0
