"""What a training was made from, kept in its checkpoint, so that nobody resumes it on something else unawares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.datasets.folder import SegmentationFolder, map_cases
from monai_iou.datasets.lists import FIRST
from monai_iou.datasets.patients import patient_of
from monai_iou.planning.plan import Plan
from monai_iou.volumes.reading import volume_files
from monai_iou.workflow.config_record import config_record

__all__ = [
    "check_held_out",
    "check_unseen",
    "data_record",
    "differences",
    "image_identity",
    "is_same",
    "seen_cases",
]

PLANNED = (
    "modalities", "labels", "regions", "regions_order", "ignore", "soft_labels", "mean_of_raters", "partly_labelled",
    "spatial_dims", "pixdim", "patch_size", "channels", "strides", "network",
)  # fmt: skip
ORDERED = ("labels", "regions")  # in the order of the network's classes

OWN_NETWORK = "network_def"


BLOCK, BLOCKS = 1 << 20, 64  # few blocks, because a disk may need as long to go to one as to read it


def data_record(training: Sequence[Case], validation: Sequence[Case], plan: Plan) -> dict[str, Any]:
    """Return what a later run must have in common: plain values, for a checkpoint.

    Args:
        training: cases that are trained on.
        validation: cases that choose the best weights.
        plan: of the training.

    Returns:
        The names of the cases on both sides, the plan's decisions, for each case a hash of its label file, and the
        size and the identity of its image; and as `config` the keys of the run, which may differ.
    """
    cases = list(dict.fromkeys([*training, *validation]))
    planned = asdict(plan)
    names = {case.name for case in training}  # behind them, a plan may have cases of the model that it started from
    read = zip(plan.trained, plan.trained_images, strict=False)  # for the plan
    images = {name: image for name, image in read if name in names}
    unread = [case for case in cases if case.name not in images]
    images |= dict(zip([case.name for case in unread], map_cases(image_identity, unread), strict=True))
    return {
        "training": [case.name for case in training],
        "validation": [case.name for case in validation],
        "files": dict(zip([case.name for case in cases], map_cases(_content, cases), strict=True)),
        "images": {case.name: images[case.name] for case in cases},
        **{name: _plain(planned[name]) for name in PLANNED},
        "partly_labelled": any(case.labelled is not None for case in cases),  # test cases are not trained on
        "config": config_record(),
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
    stored = _with_present_names(stored, current)
    differences = []
    for side in ("training", "validation"):
        before, now = set(stored.get(side, ())), set(current.get(side, ()))
        differences += [f"its {side} cases lack {_some(now - before)}"] if now - before else []
        differences += [f"its {side} cases have {_some(before - now)}"] if before - now else []
    changed: set[str] = set()
    for what in ("files", "images"):
        old, new = stored.get(what, {}), current.get(what, {})
        changed |= {case for case in old.keys() & new.keys() if old[case] != new[case]}
    differences += [f"the label or image of {_some(changed)} has changed"] if changed else []
    stored, current = _with_definition(stored), _with_definition(current)
    differences += [
        "its `network_def` is another one"
        if name == OWN_NETWORK
        else f"its `{name}` was {stored[name]} and is {current[name]}"
        for name in (*PLANNED, OWN_NETWORK)
        if name in stored and name in current and not is_same(name, stored[name], current[name])
    ]
    return differences


def _with_present_names(stored: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the case `c_0000` of earlier versions called c, or c called `c_0000`, if it is called so now."""
    before, now = ({*record.get("training", ()), *record.get("validation", ())} for record in (stored, current))

    def name_of(case: str) -> str:
        others = (case.removesuffix(FIRST), f"{case}{FIRST}")
        return case if case in now else next((other for other in others if other in now - before), case)

    sides = {side: [name_of(case) for case in stored[side]] for side in ("training", "validation") if side in stored}
    files = {
        what: {name_of(case): value for case, value in stored[what].items()}
        for what in ("files", "images")
        if what in stored
    }
    return {**stored, **sides, **files}


def is_same(name: str, one: Any, other: Any) -> bool:
    """Return whether two values of a plan agree, those of labels and regions in their order too.

    Args:
        name: of the plan's attribute.
        one: its value in one plan.
        other: in another.

    Example:
        >>> is_same("regions", {"whole": [1, 2], "core": [2]}, {"core": [2], "whole": [1, 2]})
        False
    """
    return bool(one == other) and (name not in ORDERED or list(one) == list(other))


def _with_definition(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the definition of the user's own network, which may be a whole program, beside its name."""
    if "network" not in record:
        return dict(record)
    network = dict(record["network"])
    return {**record, OWN_NETWORK: network.pop("definition", None), "network": network}


def image_identity(case: Case) -> str:
    """Return what tells a case's image from others: one hash, or two with a hyphen between them.

    The first is of the files' sizes, first MiB and last 64 KiB, where gzip has the checksum of all that it holds. Other
    files may have only a header and zeros there: the second is of all that they hold or, so that network disks need
    not read large volumes twice, of 64 MiB in blocks that are spread evenly over each.
    """
    files = [file for image in case.images for file in volume_files(image)]
    plain = [file for file in files if file.suffix.lower() != ".gz"]
    return _hash(files, _read_ends) + (f"-{_hash(plain, _read_spread)}" if plain else "")


def _hash(files: Sequence[Path], read: Callable[[BinaryIO, int], Iterable[bytes]]) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for block in read(stream, size):
                digest.update(block)
    return digest.hexdigest()[:16]


def _read_ends(stream: BinaryIO, size: int) -> Iterator[bytes]:
    yield stream.read(1 << 20)
    stream.seek(max(0, size - (1 << 16)))
    yield stream.read()


def _read_spread(stream: BinaryIO, size: int) -> Iterator[bytes]:
    step = max(BLOCK, (size - BLOCK) / (BLOCKS - 1))
    for number in range(BLOCKS):
        stream.seek(int(number * step))
        yield stream.read(BLOCK)


def _is_known(case: Case, known: Collection[str]) -> bool:
    """Whether an image is in a record; those of earlier versions have the first hash of every image alone."""
    identity = image_identity(case)
    return identity in known or identity.partition("-")[0] in known


def check_unseen(folder: SegmentationFolder, plans: Sequence[Plan]) -> None:
    """Check that no model was trained on a case of `test_labelled`.

    Raises:
        DatasetError: one was; the message names the cases.
    """
    seen = seen_cases(folder.evaluation, folder.labelled, plans, folder.patient_groups)
    if seen:
        message = (
            f"Expected test cases that the model has not seen, but {_some({case.name for case in seen})} of "
            f"`test_labelled` in {folder.root / 'dataset.json'} were trained on, by the same image or the same "
            "patient: remove them there, or set --score_trained_cases true to score them all the same."
        )
        raise DatasetError(message)


def check_held_out(
    folder: SegmentationFolder, training: Sequence[Case], validation: Sequence[Case], plans: Sequence[Plan]
) -> None:
    """Check that no model was trained on a case that is held out.

    Raises:
        DatasetError: one was; the message names the case. Or none is held out.
    """
    if not validation:
        message = "Expected cases that are held out, but `val_fraction` is 0: score `test_labelled` cases."
        raise DatasetError(message)
    # With one patient a case is trained on and validated, which the split has said.
    held_out = [case for case in validation if case not in training]
    seen = seen_cases(held_out, folder.labelled, plans, folder.patient_groups)
    if seen:
        message = (
            f"Expected cases that the model has not seen, but it was trained on {seen[0].name}, by the same image or "
            "the same patient: give `val_fraction`, `split_seed`, `folds` and `fold` as in its training, and one "
            "model. If they are the same, the case was seen with an earlier split or by the model it started from: "
            "score `test_labelled`."
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
        training: the dataset's labelled cases, of which a split or a fold may train on any.
        plans: of the models.
        patient_groups: of the dataset.

    Returns:
        Those whose image is one of a model's training images by its content, or by its path with links followed, or
        whose patient has a case among them.
    """
    known = {identity for plan in plans for identity in plan.trained_images}
    is_trained = map_cases(lambda case: any(_is_trained(case, plan) for plan in plans), training)
    trained = [case for case, yes in zip(training, is_trained, strict=True) if yes]
    paths = {path.resolve() for case in trained for path in case.images}
    patients = {patient_of(case, patient_groups) for case in trained if _has_group(case, patient_groups)}

    def is_seen(case: Case) -> bool:
        same = any(path.resolve() in paths for path in case.images) or patient_of(case, patient_groups) in patients
        return same or (bool(known) and _is_known(case, known))

    return [case for case, seen in zip(cases, map_cases(is_seen, cases), strict=True) if seen]


def _is_trained(case: Case, plan: Plan) -> bool:
    names = {case.name, f"{case.name}{FIRST}"}  # as earlier versions named it
    names |= {case.name.removesuffix(FIRST)} if len(case.images) > 1 else set()
    named = not names.isdisjoint(plan.trained)
    # Another dataset may have cases of the same names.
    return named and (not plan.trained_images or _is_known(case, plan.trained_images))


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
