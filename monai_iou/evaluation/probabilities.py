"""Probability maps of a case: read onto the reference's grid, and counted so that counts add over cases and workers.

One pass over a map counts the voxels of a structure, and the others, by their probability (`probability_histograms`).
IoU and Dice at every threshold, the best threshold, average precision and calibration follow from these counts alone.
Lesions depend on where voxels lie, so that they are counted at a few thresholds: the operating points of the FROC.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from monai_iou.evaluation.masks import mask_of
from monai_iou.evaluation.pairing import PairingError, find_volumes
from monai_iou.evaluation.probability_channels import channels_of, check_range
from monai_iou.evaluation.rules import Rules, Structure
from monai_iou.evaluation.scoring import lesion_volume_scale
from monai_iou.metrics.components import find_overlaps
from monai_iou.metrics.lesion_maps import lesion_maps
from monai_iou.metrics.lesion_rules import match_components
from monai_iou.volumes.grid import Grid, align
from monai_iou.volumes.memory import room_for
from monai_iou.volumes.names import PROBABILITIES, RESULTS, composed, files_below
from monai_iou.volumes.probability_kind import are_separate
from monai_iou.volumes.reading import Volume, VolumeError, file_hash, read_channels, read_labels, read_volume
from monai_iou.voxels.probability_bins import probability_histograms

__all__ = ["OPERATING_POINTS", "RESOLUTION", "count_files", "count_maps", "find_maps", "hash_maps"]

RESOLUTION = 4000  # nodes of the histograms: the thresholds and the bins of calibration are among them
OPERATING_POINTS = tuple(i / 10 for i in range(1, 10))
ARCHIVE = ".npz"
_KEYS = ("probabilities", "softmax")  # of nnU-Net v2 and v1


def find_maps(folder: Path, cases: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Return the probability files of each case, by the structure's name, or by "" for one file with all channels.

    Where a case has `CASE_probabilities` or an archive, the other volumes of the folder are taken for masks.

    Args:
        folder: folder with `CASE_probabilities.nii.gz` of `monai-iou predict`, `CASE.npz` of nnU-Net, `CASE.nii.gz`
            with a channel for each class, or `CASE_LABEL.nii.gz`.
        cases: names of the cases.

    Raises:
        PairingError: the folder does not exist or has no file of any case.
    """
    found = files_below(folder, ARCHIVE)
    archives = {composed(path.relative_to(folder).with_suffix("").as_posix()): path for path in found}
    try:
        volumes = find_volumes(folder, "--probabilities", without=())
    except PairingError:
        if not archives:
            raise
        volumes = {}
    known = set(cases)
    ours = {case: volumes[name] for case in cases if (name := f"{case}_{PROBABILITIES}") in volumes}
    whole_maps = {case: archives[case] for case in cases if case in archives} | ours or volumes
    results = {f"{case}_{kind}" for case in cases for kind in RESULTS} if ours else set()
    others = {name: path for name, path in volumes.items() if name not in known and name not in results}
    parts = _parts(others, known - whole_maps.keys())
    maps = {
        case: {"": whole_maps[case]} if case in whole_maps else parts[case]
        for case in cases
        if case in whole_maps or case in parts
    }
    if not maps:
        message = (
            f"Expected probability maps in `{folder}` named as the cases, such as {cases[0]}.npz or {cases[0]}.nii.gz, "
            "but got none: rename them."
        )
        raise PairingError(message)
    return maps


def _parts(volumes: Mapping[str, Path], cases: Set[str]) -> dict[str, dict[str, Path]]:
    """Return the files CASE_STRUCTURE of each case, by the structure's name."""
    found: dict[str, dict[str, Path]] = {}
    for name, path in volumes.items():
        ends = [i for i, character in enumerate(name) if character == "_"]
        for case, structure in ((name[:end], name[end + 1 :]) for end in ends):
            if case in cases:
                found.setdefault(case, {})[structure] = path
    return found


def hash_maps(files: Mapping[str, Path]) -> dict[str, str]:
    """Hashes of the files of a case, by what `find_maps` calls them after a slash, which is in no structure's name.

    Raises:
        OSError: one cannot be read.
    """
    return {f"/{name}": file_hash(path) for name, path in files.items()}


def count_files(
    files: Mapping[str, Path], reference: Path, structures: Sequence[Structure], ignore: int | None, rules: Rules
) -> dict[str, Any]:
    """Read the reference of one case, and count its maps; see `count_maps`."""
    digest = file_hash(reference)
    return count_maps(files, read_labels(reference), digest, structures, ignore, rules)


def count_maps(
    files: Mapping[str, Path],
    reference: Volume,
    digest: str | None,
    structures: Sequence[Structure] | None,
    ignore: int | None,
    rules: Rules,
) -> dict[str, Any]:
    """Count the voxels and lesions of one case by their probability.

    Args:
        files: see `find_maps`.
        reference: the label map.
        digest: hash of its file.
        structures: what is scored; None for every label value that has a channel or a file of its own.
        ignore: reference voxels of this value are left out.
        rules: the rules of scoring; those of lesions are used.

    Returns:
        `counts`: for each structure `histogram`, (2, `RESOLUTION` + 1) numbers of voxels outside and inside of it, and
        `lesions`, for each of `OPERATING_POINTS` the numbers of true positives, false positives and false negatives;
        `independent`: whether the channels were chosen by value alone; `inputs`: the hashes of all files.

    Raises:
        ValueError: a file cannot be read, lies on another grid, or has other channels than the structures ask for.
    """
    inputs = {"": digest, **hash_maps(files)}
    ignored = None if ignore is None else reference.array == ignore
    counted = {}
    for structure, probability in _read_maps(files, reference, structures, ignored).items():
        mask = mask_of(reference.array, structure.values)
        mask = mask if ignored is None else mask & ~ignored
        counted[structure.name] = {
            "histogram": _histogram(probability, mask, ignored),
            "lesions": _lesions(probability, mask, reference.grid, rules),
        }
    return {"counts": counted, "independent": structures is None, "inputs": inputs}


def _histogram(
    probability: NDArray[Any], mask: NDArray[np.bool_], ignored: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    if ignored is not None:
        probability, mask = probability[~ignored], mask[~ignored]
    voxels = torch.from_numpy(np.ascontiguousarray(probability, dtype=np.float32).reshape(1, 1, -1))
    inside = torch.from_numpy(np.ascontiguousarray(mask).astype(np.uint8).reshape(1, 1, -1))
    histograms = probability_histograms(voxels, inside, activation=None, resolution=RESOLUTION)
    if undefined := int(histograms.undefined.sum()):
        message = f"Expected probabilities, but got NaN in {undefined} voxels: find out where they come from."
        raise ValueError(message)
    counts: NDArray[np.int64] = histograms.counts[0, 0].numpy()
    return counts


def _lesions(probability: NDArray[Any], mask: NDArray[np.bool_], grid: Grid, rules: Rules) -> list[list[int]]:
    """Return the true positives, false positives and false negatives at each operating point."""
    plane = tuple(axis for axis, size in enumerate(mask.shape) if size == 1)[:1]
    inside, size = mask.squeeze(plane), tuple(np.delete(grid.spacing, plane))
    map_of = np.asarray(probability).squeeze(plane)
    if not inside.any() and not (map_of >= OPERATING_POINTS[0]).any():
        return [[0, 0, 0] for _ in OPERATING_POINTS]
    points = []
    for threshold in OPERATING_POINTS:
        maps = lesion_maps(
            map_of >= threshold,
            inside,
            size,
            connectivity=rules.neighbours(len(size)),
            min_volume_mm3=rules.min_volume_mm3 / lesion_volume_scale(grid, size),
            dilation=rules.dilation,
        )
        overlaps = find_overlaps(maps.reference, maps.prediction, maps.reference_count, maps.prediction_count)
        matching = match_components(overlaps, rules.lesion_rule)
        detected = len(matching.pairs)
        points.append([detected, int(np.count_nonzero(~matching.right)), maps.reference_count - detected])
    return points


def _read_maps(
    files: Mapping[str, Path],
    reference: Volume,
    structures: Sequence[Structure] | None,
    ignored: NDArray[np.bool_] | None,
) -> dict[Structure, NDArray[Any]]:
    if "" not in files:
        if structures is None:
            structures = [Structure(name, (int(name),)) for name in files if name.isdecimal() and int(name)]
        missing = [structure.name for structure in structures if structure.name not in files]
        if missing:
            path = next(iter(files.values()))
            message = (
                f"Expected a probability map for {', '.join(missing)} beside `{path}`, but got those of "
                f"{', '.join(files)}: write one for each label, named CASE_LABEL."
            )
            raise ValueError(message)
        maps = {}
        for structure in structures:
            volume = read_volume(files[structure.name])
            maps[structure] = _without(ignored, align(volume.array, volume.grid, reference.grid))
            check_range(files[structure.name], maps[structure])
        return maps
    path = files[""]
    channels = _archive(path, reference) if path.suffix.lower() == ARCHIVE else _channels(path, reference)
    channels = _without(ignored, channels)
    if structures is None:
        structures = [Structure(str(value), (value,)) for value in range(1, max(2, len(channels)))]
    return channels_of(path, channels, structures, separate=are_separate(path))


def _without(ignored: NDArray[np.bool_] | None, maps: NDArray[Any]) -> NDArray[Any]:
    """Return maps that are 0 in the ignored voxels, where they may hold anything."""
    return maps if ignored is None else np.where(ignored, 0, maps)


def _channels(path: Path, reference: Volume) -> NDArray[Any]:
    volume = read_channels([path])
    return np.stack([align(channel, volume.grid, reference.grid) for channel in volume.array])


def _archive(path: Path, reference: Volume) -> NDArray[Any]:
    """The channels of an archive; its axes are those of the reference's file in reversed order, as in nnU-Net."""
    array, shape = _stored(path), reference.array.shape
    if array.ndim == 4 and array.shape[1:] == shape[::-1]:
        return np.transpose(array, (0, 3, 2, 1))
    if array.ndim == 4 and array.shape[1:] == shape:
        return array
    message = (
        f"Expected `{path}` to hold probabilities of shape (classes, {', '.join(map(str, shape[::-1]))}), as nnU-Net "
        f"writes them, but got {array.shape}: write them on the grid of the image."
    )
    raise ValueError(message)


def _stored(path: Path) -> NDArray[Any]:
    """Return the probabilities of an archive; what its header asks for must fit into the free memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name.removesuffix(".npy"): name for name in archive.namelist()}
            file = next((files[key] for key in (*_KEYS, *files) if key in files), None)
            if file is None:
                return np.zeros(0)
            shape, dtype = _header(archive, file)
            size = math.prod(shape) * (dtype.itemsize + (0 if dtype == np.float32 else 4))
            with room_for(path, size, shape), archive.open(file) as stream:
                return np.asarray(np.lib.format.read_array(stream, allow_pickle=False), dtype=np.float32)
    except VolumeError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        message = f"Expected `{path}` to be an archive of probabilities, but got {error}: write it again."
        raise ValueError(message) from error


def _header(archive: zipfile.ZipFile, file: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and the type of an array in an archive, without reading it."""
    with archive.open(file) as stream:
        first = np.lib.format.read_magic(stream) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    return shape, dtype
