"""The rules for the loss: from the classes' sizes, and from what the labels are."""

from __future__ import annotations

from typing import Any

from monai_iou.datasets.folder import SegmentationFolder
from monai_iou.planning.fingerprint import Fingerprint
from monai_iou.planning.plan import Plan
from monai_iou.planning.size_rules import Decision

__all__ = ["CROSS_ENTROPY_WEIGHT", "label_decisions", "loss_decision", "unequal_classes"]

CROSS_ENTROPY_WEIGHT = 1 / 3  # beside IoU: an opinion; the study `compound` of docs/results.md found no better one
MIN_COMPONENTS_FOR_INSTANCE, UNEQUAL_SIZES, UNEQUAL_CLASSES = 3, 4.0, 10.0


def label_decisions(plan: Plan, folder: SegmentationFolder) -> tuple[Decision, ...]:
    """Return what follows from labels that are more than classes which exclude each other; nothing for those."""
    kinds = [
        (f"{len(plan.regions)} regions that overlap", bool(plan.regions)),
        ("shares of the classes", plan.soft_labels),
        ("several raters", folder.has_raters),
        (f"{plan.ignore} ignored", plan.ignore is not None),
        ("partly labelled cases", plan.partly_labelled),
    ]
    value = ", ".join(text for text, holds in kinds if holds)
    if not value:
        return ()
    keys = {"raters": "mean"} if folder.has_raters else {}
    reason = "dataset.json says so" + (
        '; the target is the mean of the raters, `raters: "draw"` draws one of them anew each time' if keys else ""
    )
    return (Decision("labels", value, reason, keys),)


def unequal_classes(fingerprint: Fingerprint) -> bool:
    """Return whether one class has so many more voxels than another that the loss must weigh them."""
    shares = [label.fraction for label in fingerprint.classes if label.cases]
    return len(shares) > 1 and max(shares) >= UNEQUAL_CLASSES * min(shares)


def _label_options(plan: Plan, *, region: bool) -> dict[str, Any]:
    """Return the arguments of a loss that follow from what the labels are."""
    options: dict[str, Any] = {"softmax": True} if plan.exclusive else {"sigmoid": True}
    if plan.soft and region:
        options["soft_label"] = True
    if plan.ignore_index is not None:
        options["ignore_index"] = plan.ignore_index
    return options


def _label_reason(plan: Plan) -> str:
    said = [
        ("regions overlap, so that each has a sigmoid", not plan.exclusive),
        ("labels hold shares, so that the soft-label form is used", plan.soft),
        (f"voxels of the value {plan.ignore} are left out", plan.ignore is not None),
        ("classes that a case was not annotated for are left out of it", plan.partly_labelled),
    ]
    return "".join(f"; {text}" for text, holds in said if holds)


def loss_decision(plan: Plan, fingerprint: Fingerprint, weights: list[float]) -> Decision:
    """Follow the decision guide of docs/losses.md, with what the kind of the labels asks for."""
    chosen = _chosen_loss(plan, fingerprint, weights)
    return Decision(chosen.name, chosen.value, chosen.reason + _label_reason(plan), chosen.keys)


def _chosen_loss(plan: Plan, fingerprint: Fingerprint, weights: list[float]) -> Decision:
    region = {"include_background": False, **_label_options(plan, region=True), "batch": True, "sync_batch": True}
    entropy = {key: value for key, value in _label_options(plan, region=False).items() if key != "softmax"}
    compound = {"_target_": "monai_iou.IoUCELoss", **region, "lambda_ce": CROSS_ENTROPY_WEIGHT}
    main = max(fingerprint.classes, key=lambda label: label.components_a_case)
    if unequal_classes(fingerprint):
        shares = [label.fraction for label in fingerprint.classes if label.cases]
        loss: dict[str, Any] = {
            "_target_": "monai_iou.CompoundLoss",
            "losses": [
                {"_target_": "monai_iou.GeneralizedIoULoss", "w_type": "simple", "empty": "skip", **region},
                {"_target_": "monai_iou.WeightedCrossEntropyLoss", "weight": weights, **entropy, "sync_batch": True},
            ],
        }
        reason = f"the largest class has {max(shares) / min(shares):.0f} times the voxels of the smallest"
        return Decision("loss", "GeneralizedIoULoss + weighted cross-entropy", reason, {"loss": loss})
    if (
        len(fingerprint.classes) == 1
        and main.components_a_case >= MIN_COMPONENTS_FOR_INSTANCE
        and main.size_ratio >= UNEQUAL_SIZES
    ):
        loss = {
            "_target_": "monai_iou.InstanceIoULoss",
            "regions": "voronoi",
            "include_background": False,
            **_label_options(plan, region=True),
            "spacing": "$@plan.pixdim",  # labels in training are plain tensors, without a voxel size
            "global_loss": compound,
        }
        reason = (
            f"{main.components_a_case:.0f} components per case, the largest {main.size_ratio:.0f} times the median: "
            "each one should count"
        )
        return Decision("loss", "InstanceIoULoss + IoUCELoss", reason, {"loss": loss})
    reason = "no lesions or classes of very unequal size, so the default compound loss is used; sums over the batch, "
    reason += f"because {100 * fingerprint.foreground_fraction.median[0]:.3g} % of a case is foreground"
    return Decision("loss", "IoUCELoss", reason, {"loss": compound})
