"""The rules of `monai-iou plan`: from a fingerprint and a machine to the bundle's keys, each with its reason.

A rule is a function that returns one `Decision`; docs/planning.md lists them. Spacing, patch and network come from
`make_plan`, which training runs again on the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from monai_iou.datasets.cases import CaseFacts
from monai_iou.datasets.folder import SegmentationFolder
from monai_iou.datasets.splits import check_folds, count_patients
from monai_iou.planning.crop_rules import crop_decision, lesion_draw_decision
from monai_iou.planning.fingerprint import Fingerprint
from monai_iou.planning.hardware import Machine
from monai_iou.planning.intensity import looks_like_ct
from monai_iou.planning.loss_rules import label_decisions, loss_decision, unequal_classes
from monai_iou.planning.plan import Plan
from monai_iou.planning.size_rules import (
    Decision,
    batch_decision,
    cache_decision,
    choose_levels,
    format_size,
    network_decision,
    patch_decision,
)
from monai_iou.tables import counted
from monai_iou.weighting import class_weights

__all__ = ["Proposal", "escape_config_text", "propose", "without_signs"]


THICK_SLICES = 3.0  # slices this many times thicker than the pixels of the other axes
STEPS = {"cpu": 3000, "cuda": 25_000}
VALIDATIONS = {"cpu": 20, "cuda": 50}
EPOCH_STEPS = {"cpu": 50, "cuda": 250}
EMA_DECAY = {"cpu": 0.99, "cuda": 0.999}
MIN_EPOCHS = 20


@dataclass(frozen=True)
class Proposal:
    """All decisions, and the plan that a training will derive from them."""

    plan: Plan
    decisions: tuple[Decision, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The bundle's keys with their values."""
        return {key: value for decision in self.decisions for key, value in decision.keys.items()}

    def as_json(self, fingerprint: Fingerprint, machine: Machine) -> dict[str, Any]:
        """Return what `monai-iou plan` writes: the bundle's keys and, under `plan_report`, their reasons."""
        rows = [{"decision": d.name, "value": d.value, "reason": d.reason} for d in self.decisions]
        report = {
            "decisions": rows,
            "device": machine.device,
            "memory": machine.source,
            "fingerprint": fingerprint.as_json(),
        }
        return {**self.config, "plan_report": without_signs(report)}


def propose(
    folder: SegmentationFolder, fingerprint: Fingerprint, machine: Machine, folds: int | None = None, fold: int = 0
) -> Proposal:
    """Decide how to train on a dataset.

    Args:
        folder: the dataset.
        fingerprint: fingerprint of the dataset.
        machine: the machine on which the training will run.
        folds: number of folds of a cross-validation; None for a single split.
        fold: the fold to validate on, counted from 0.

    Returns:
        The decisions, each with its reason, and the plan.

    Raises:
        ValueError: the smallest possible step does not fit into memory, or `folds` or `fold` is out of range.
    """
    split = _split(folder, fingerprint, folds, fold)
    trained = _training_count(folder, split)
    spacing = _spacing(fingerprint)
    facts = [case.facts for case in fingerprint.measures]
    plan, levels = choose_levels(folder, facts, fingerprint, spacing.keys["pixdim"], machine)
    batch = batch_decision(plan, fingerprint, machine, trained)
    length = _length(batch.keys["batch_size"], trained, machine)
    weights = _class_weights(fingerprint)
    decisions = (
        spacing,
        patch_decision(plan, fingerprint, machine),
        network_decision(plan, levels, machine),
        batch,
        cache_decision(plan, fingerprint, machine),
        crop_decision(plan, fingerprint),
        lesion_draw_decision(plan, fingerprint),
        _normalisation(plan, facts),
        *label_decisions(plan, folder),
        weights,
        loss_decision(plan, fingerprint, weights.keys["class_weights"]),
        _lesion_threshold(plan, fingerprint),
        split,
        length,
        _weights(_steps(length, batch, trained), machine),
    )
    return Proposal(plan, decisions)


def _spacing(fingerprint: Fingerprint) -> Decision:
    """Decide the target spacing: the median, but a finer one along an axis with thick slices."""
    spacings = np.array([case.facts.spacing for case in fingerprint.measures])
    target = np.median(spacings, axis=0)
    axis = int(target.argmax())
    others = float(np.delete(target, axis).max())
    reason = "median over the cases" if np.ptp(spacings, axis=0).max() > 1e-3 else "the spacing of every case"
    if target[axis] > THICK_SLICES * others:
        thin = max(float(np.percentile(spacings[:, axis], 10)), others)
        if thin < target[axis] * (1 - 1e-3):
            target[axis] = thin
            reason = (
                f"median; along {'RAS'[axis]}, with thick slices, the 10th percentile to keep the detail of thin ones"
            )
    pixdim = [float(f"{side:.6g}") for side in target]
    return Decision("target spacing", f"{format_size(pixdim)} mm", reason, {"pixdim": pixdim})


def _normalisation(plan: Plan, facts: Sequence[CaseFacts]) -> Decision:
    texts, reasons = [], []
    for index, (name, rule) in enumerate(zip(plan.modalities, plan.intensity, strict=True)):
        is_ct, channel = rule["kind"] == "ct", f"channel {escape_config_text(name)}"
        other = "none" if rule["kind"] == "none" else "z-score"
        texts.append(f"CT window {rule['lower']:.0f} to {rule['upper']:.0f}" if is_ct else other)
        if is_ct:
            reasons.append(f"{channel} is CT, whose values mean the same in every scan")
        elif rule["kind"] == "none":
            reasons.append(f"{channel} is used as it is")
        elif looks_like_ct(name, index, facts):
            reasons.append(f'{channel} looks like CT by its values: if it is CT, name it "CT" in dataset.json')
        else:
            reasons.append(f"{channel} has no common scale")
    return Decision("normalisation", ", ".join(texts), "; ".join(reasons))


def _class_weights(fingerprint: Fingerprint) -> Decision:
    """Decide class weights by the effective number of voxels in the cases that contain the class."""
    voxels = np.array([case.voxels for case in fingerprint.measures], dtype=float)
    weights = class_weights(voxels, "effective")
    rounded = [round(weight, 4) for weight in weights.tolist()]
    reason = "effective number of voxels per case (beta 0.9999)"
    reason += (
        "; used by the loss" if unequal_classes(fingerprint) else "; not used, as the IoU term weights classes alike"
    )
    if unseen := [label.name for label in fingerprint.classes if not label.cases]:
        reason += f"; no voxel of {escape_config_text(', '.join(unseen))}, which cannot be learned"
    return Decision("class weights", ", ".join(map(str, rounded)), reason, {"class_weights": rounded})


def _lesion_threshold(plan: Plan, fingerprint: Fingerprint) -> Decision:
    """Decide the volume below which a predicted component cannot match any annotated one."""
    small: float = min(label.small_mm3 for label in fingerprint.classes if label.components)
    voxel = float(np.prod(plan.pixdim))
    threshold = float(f"{max(small / 2, voxel):.4g}")
    reason = (
        f"99 of 100 annotated components have {small:.4g} mm3 or more; with less than half of it, IoU stays below 0.5"
        if small / 2 >= voxel
        else f"annotated components are as small as {small:.4g} mm3, so it is one voxel at the target spacing"
    )
    return Decision("lesion threshold", f"{threshold:g} mm3", reason, {"lesion_threshold_mm3": threshold})


def _split(folder: SegmentationFolder, fingerprint: Fingerprint, folds: int | None, fold: int) -> Decision:
    sides = "each on one side of the split"
    if folds is not None:
        count = count_patients(folder.labelled, folder.patient_groups)
        check_folds(folds, fold, count)
        keys: dict[str, Any] = {"folds": folds, "fold": fold}
        return Decision(
            "split", f"fold {fold} of {folds}", f"{count} patients, {sides}; every case is validated in one fold", keys
        )
    if folder.validation:
        count = len(folder.validation)
        text = f"the {counted(count, 'case')} of `validation`"
        return Decision("split", text, "dataset.json lists them", {"val_fraction": 0.1})
    fraction = round(max(0.1, min(0.25, 3 / fingerprint.patients)), 2)
    if fingerprint.patients == 1:
        reason = "one patient, whose cases are on both sides: they say nothing of how well others are segmented"
        return Decision("split", "all cases for training and for validation", reason, {"val_fraction": fraction})
    patients = counted(fingerprint.patients, "patient")
    reason = f"{patients}, {sides}; a tenth of the cases, or up to a quarter to hold out three patients"
    return Decision("split", f"{fraction:.0%} for validation", reason, {"val_fraction": fraction})


def _training_count(folder: SegmentationFolder, split: Decision) -> int:
    keys = split.keys
    return len(folder.split(keys.get("val_fraction", 0.0), 0, keys.get("folds"), keys.get("fold", 0))[0])


def _length(batch: int, trained: int, machine: Machine) -> Decision:
    """Decide the number of epochs from a number of steps, and how often an epoch repeats each case."""
    repeats = max(1, EPOCH_STEPS[machine.device] * batch // trained)
    steps = repeats * trained // batch
    epochs = max(MIN_EPOCHS, math.ceil(STEPS[machine.device] / steps))
    interval = max(1, epochs // VALIDATIONS[machine.device])
    again = f", {repeats} times each," if repeats > 1 else ""
    give = f"give{'s' if trained == 1 else ''} {counted(steps, 'step')} per epoch and {epochs * steps} in all"
    reason = f"{counted(trained, 'training case')}{again} {give}"
    value = f"{epochs} epochs, validation every {interval}"
    return Decision("length", value, reason, {"epochs": epochs, "case_repeats": repeats, "val_interval": interval})


def _steps(length: Decision, batch: Decision, trained: int) -> int:
    """Return the steps of the whole training."""
    return int(length.keys["epochs"] * (length.keys["case_repeats"] * trained // batch.keys["batch_size"]))


def _weights(steps: int, machine: Machine) -> Decision:
    """Decide which weights are stored: the final ones, averaged over the last steps."""
    decay = EMA_DECAY[machine.device]
    reason = f"averaged over about {round(1 / (1 - decay))} of {steps} steps; the learning rate has fallen to 0, "
    reason += "and the best of many validations would overfit its cases"
    return Decision(
        "weights", f"final weights, averaged with {decay}", reason, {"ema_decay": decay, "keep_weights": "last"}
    )


def escape_config_text(text: str) -> str:
    """Return a name without the characters that MONAI's configs read as an expression, a reference or a macro.

    Example:
        >>> escape_config_text("$import os"), escape_config_text("T1")
        ('_import os', 'T1')
    """
    return text.replace("$", "_").replace("@", "_").replace("%", "_").replace("\n", " ")


def without_signs(value: Any) -> Any:
    """Return text, or what holds text, as a config can hold it, by `escape_config_text` where it has such characters.

    Example:
        >>> without_signs({"0": "%stenosis", "1": "50 % stenosis"})
        {'0': '_stenosis', '1': '50 % stenosis'}
    """
    if isinstance(value, dict):
        return {key: without_signs(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_signs(item) for item in value]
    # At the start of a text these characters mark an expression, a reference or a macro; "@#" and "%#" count anywhere.
    risky = isinstance(value, str) and (value[:1] in tuple("$@%") or any(sign in value for sign in ("@", "%#", "%::")))
    return escape_config_text(value) if risky else value
