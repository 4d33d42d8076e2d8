"""What a training was made from, kept in its checkpoint, so that nobody resumes it on something else unawares."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.datasets.folder import SegmentationFolder, map_cases
from monai_iou.datasets.patients import patient_of
from monai_iou.planning.plan import Plan
from monai_iou.volumes.reading import volume_files

__all__ = ["check_held_out", "check_unseen", "data_record", "differences", "image_identity", "seen_cases"]

PLANNED = ("modalities", "labels", "regions", "ignore", "pixdim", "patch_size", "channels", "strides", "network")

OWN_NETWORK = "network_def"


def data_record(training: Sequence[Case], validation: Sequence[Case], plan: Plan) -> dict[str, Any]:
    """Return what a later run must have in common: plain values, for a checkpoint.

    Args:
        training: cases that are trained on.
        validation: cases that choose the best weights.
        plan: of the training.

    Returns:
        The names of the cases on both sides, the plan's decisions, and for each case a hash of its label file and the
        size of its image.
    """
    cases = list(dict.fromkeys([*training, *validation]))
    planned = asdict(plan)
    return {
        "training": [case.name for case in training],
        "validation": [case.name for case in validation],
        "files": dict(zip([case.name for case in cases], map_cases(_content, cases), strict=True)),
        **{name: _plain(planned[name]) for name in PLANNED},
    }


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Say in words what two records do not have in common; an empty one, of data that others brought, fits any.

    Example:
        >>> differences({"training": ["a", "b"], "pixdim": [1.0]}, {"training": ["a", "c"], "pixdim": [2.0]})
        ['its training cases lack c', 'its training cases have b', 'its `pixdim` was [1.0] and is [2.0]']
        >>> differences({}, {"training": ["a"]})
        []
    """
    if not stored or not current:
        return []
    differences = []
    for side in ("training", "validation"):
        before, now = set(stored.get(side, ())), set(current.get(side, ()))
        differences += [f"its {side} cases lack {_some(now - before)}"] if now - before else []
        differences += [f"its {side} cases have {_some(before - now)}"] if before - now else []
    old, new = stored.get("files", {}), current.get("files", {})
    changed = {case for case in old.keys() & new.keys() if old[case] != new[case]}
    differences += [f"the label or image of {_some(changed)} has changed"] if changed else []
    stored, current = _with_definition(stored), _with_definition(current)
    differences += [
        "its `network_def` is another one"
        if name == OWN_NETWORK
        else f"its `{name}` was {stored[name]} and is {current[name]}"
        for name in (*PLANNED, OWN_NETWORK)
        if name in stored and name in current and stored[name] != current[name]
    ]
    return differences


def _with_definition(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the definition of the user's own network, which may be a whole program, beside its name."""
    if "network" not in record:
        return dict(record)
    network = dict(record["network"])
    return {**record, OWN_NETWORK: network.pop("definition", None), "network": network}


def image_identity(case: Case) -> str:
    """Return what tells a case's image from others: a hash of its files' sizes, first MiB and last 64 KiB."""
    digest = hashlib.sha256()
    for path in (file for image in case.images for file in volume_files(image)):
        size = path.stat().st_size
        with path.open("rb") as stream:
            digest.update(str(size).encode() + stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 16)))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def check_unseen(folder: SegmentationFolder, plans: Sequence[Plan]) -> None:
    """Check that no model was trained on a case of `test_labelled`.

    Raises:
        DatasetError: one was; the message names the cases.
    """
    seen = seen_cases(folder.evaluation, folder.training, plans, folder.patient_groups)
    if seen:
        message = (
            f"Expected test cases that the model has not seen, but {_some({case.name for case in seen})} of "
            f"`test_labelled` in {folder.root / 'dataset.json'} were trained on, by the same image or the same "
            "patient: remove them there, or set --score_trained_cases true to score them all the same."
        )
        raise DatasetError(message)


def check_held_out(training: Sequence[Case], validation: Sequence[Case], plans: Sequence[Plan]) -> None:
    """Check that no model was trained on a case that is held out.

    Raises:
        DatasetError: one was; the message names the case.
    """
    for plan in plans:
        # With one patient a case is trained on and validated, which the split has said.
        seen = [case.name for case in validation if case not in training and case.name in plan.trained]
        if seen:
            message = (
                f"Expected cases that the model has not seen, but it was trained on {seen[0]}: give "
                "`val_fraction`, `split_seed`, `folds` and `fold` as in its training, and one model, or score "
                "`test_labelled`."
            )
            raise DatasetError(message)


def seen_cases(
    cases: Sequence[Case],
    training: Sequence[Case],
    plans: Sequence[Plan],
    patient_groups: Mapping[str, Sequence[str]],
) -> list[Case]:
    """Return the cases that one of the models has seen in training, under whatever name.

    Args:
        cases: that are to be scored.
        training: the dataset's training cases.
        plans: of the models.
        patient_groups: of the dataset.

    Returns:
        Those whose image is one of a model's training images by its content, or by its path with links followed, or
        whose patient has a case among them.
    """
    known = {identity for plan in plans for identity in plan.trained_images}
    trained = [case for plan in plans for case in training if _is_trained(case, plan)]
    paths = {path.resolve() for case in trained for path in case.images}
    patients = {patient_of(case, patient_groups) for case in trained if _has_group(case, patient_groups)}
    return [
        case
        for case in cases
        if any(path.resolve() in paths for path in case.images)
        or patient_of(case, patient_groups) in patients
        or (known and image_identity(case) in known)
    ]


def _is_trained(case: Case, plan: Plan) -> bool:
    # Another dataset may have cases of the same names.
    same = not plan.trained_images or image_identity(case) in plan.trained_images
    return case.name in plan.trained and same


def _has_group(case: Case, groups: Mapping[str, Sequence[str]]) -> bool:
    return patient_of(case, groups) != patient_of(case, {})


def _content(case: Case) -> str:
    label = hashlib.sha256()
    for path in (file for each in case.labels for file in volume_files(each)):
        label.update(path.read_bytes())
    sizes = [str(path.stat().st_size) for image in case.images for path in volume_files(image)]
    return f"{label.hexdigest()[:16]} {' '.join(sizes)}"


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return {str(key): _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
