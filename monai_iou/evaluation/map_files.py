"""Which files of a folder hold the probability maps of which case: by their names alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from monai_iou.evaluation.pairing import PairingError, find_volumes
from monai_iou.volumes.names import PROBABILITIES, RESULTS, composed, files_below, volumes_below

__all__ = ["ARCHIVE", "GRID", "find_maps", "is_archive"]

ARCHIVE = ".npz"
GRID = "grid"  # what the mask beside an archive is listed as: an archive says nothing about its position

Parts = dict[str, dict[str, Path]]


def is_archive(files: Mapping[str, Path]) -> bool:
    """Return whether the maps of a case, as `find_maps` lists them, are in one archive."""
    return "" in files and files[""].suffix.lower() == ARCHIVE


def find_maps(folder: Path, cases: Sequence[str]) -> Parts:
    """Return the probability files of each case, by the structure's name, or by "" for one file with all channels.

    With an archive comes the mask beside it, as `GRID`. Where a case has `CASE_probabilities` or an archive, the other
    volumes of the folder are taken for masks.

    Args:
        folder: folder with `CASE_probabilities.nii.gz` of `monai-iou predict`, `CASE.npz` and the mask of nnU-Net,
            `CASE.nii.gz` with a channel for each class, or `CASE_LABEL.nii.gz`.
        cases: names of the cases.

    Raises:
        PairingError: the folder does not exist or has no file of any case, or one that may belong to two cases.
    """
    found = files_below(folder, ARCHIVE)
    archives = {composed(path.relative_to(folder).with_suffix("").as_posix()): path for path in found}
    only_archives = archives and next(volumes_below(folder, without=()), None) is None
    volumes = {} if only_archives else find_volumes(folder, "--probabilities", without=())
    known = set(cases)
    ours = {case: volumes[name] for case in cases if (name := f"{case}_{PROBABILITIES}") in volumes}
    theirs = {case: archives[case] for case in cases if case in archives}
    results = {f"{case}_{kind}" for case in cases for kind in RESULTS} if ours else set()
    others = {name: path for name, path in volumes.items() if name not in known and name not in results}
    parts = _parts(others, known)
    whole_maps = theirs | ours
    if not whole_maps:
        whole_maps = _whole_maps({case: volumes[case] for case in cases if case in volumes}, parts, known)
    maps = {
        case: {"": whole_maps[case]} if case in whole_maps else dict(sorted(parts[case].items()))
        for case in cases
        if case in whole_maps or case in parts
    }
    if not maps:
        message = (
            f"Expected probability maps in `{folder}` named as the cases, such as {cases[0]}.npz or {cases[0]}.nii.gz, "
            "but got none: rename them."
        )
        raise PairingError(message)
    for case in theirs.keys() - ours.keys():
        maps[case] |= {GRID: volumes[case]} if case in volumes else {}
    return maps


def _parts(volumes: Mapping[str, Path], cases: Set[str]) -> Parts:
    """Return the files CASE_STRUCTURE of each case, by the structure's name; a file is of the longest case it names."""
    found: Parts = {}
    for name, path in volumes.items():
        case, structure = _split(name, cases)
        if case:
            found.setdefault(case, {})[structure] = path
    return found


def _split(name: str, cases: Set[str]) -> tuple[str, str]:
    """Return the longest other case that a name begins with, and the structure after it; no case if there is none."""
    ends = (end for end in range(len(name) - 1, 0, -1) if name[end] == "_")
    return next(((name[:end], name[end + 1 :]) for end in ends if name[:end] in cases), ("", ""))


def _whole_maps(named: Mapping[str, Path], parts: Parts, cases: Set[str]) -> dict[str, Path]:
    """Return the files that hold all maps of a case; a file of a structure of a shorter case is put into `parts`.

    With the cases `p` and `p_1`, the file `p_1` is of the structure 1 of `p` where `p_1` has files of its own
    structures. Where it has none, `p` must have a whole map, or the folder must hold no file of any structure.

    Raises:
        PairingError: a file may be either.
    """
    others = {case: _split(case, cases) for case in named}
    for case in sorted(named, key=len, reverse=True):  # the files of its structures have longer names
        other, structure = others[case]
        if other and _has_parts(parts, case):
            parts.setdefault(other, {})[structure] = named[case]
    whole = {case: path for case, path in named.items() if not _has_parts(parts, case)}
    by_structure = any(_has_parts(parts, case) for case in parts)
    certain = any(not others[case][0] for case in whole)
    for case, path in whole.items():
        other, structure = others[case]
        if other and other not in whole and (by_structure or not certain):
            message = (
                f"Expected the name of `{path}` to say whose map it is, but got that of the case {case} and of the "
                f"structure {structure} of the case {other}: name the maps of whole cases CASE_{PROBABILITIES}, or "
                f"add those of the structures of {case}."
            )
            raise PairingError(message)
    return whole


def _has_parts(parts: Parts, case: str) -> bool:
    """Whether a case has files of its structures; a mask beside its map is none."""
    return bool(parts.get(case, {}).keys() - set(RESULTS))
