"""Probability maps of a case: read onto the reference's grid, and counted so that counts add over cases and workers.

One pass over a map counts the voxels of a structure, and the others, by their probability (`probability_histograms`).
IoU and Dice at every threshold, the best threshold, average precision and calibration follow from these counts alone.
Lesions depend on where voxels lie, so that they are counted at a few thresholds: the operating points of the FROC.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from monai_iou.evaluation.map_files import ARCHIVE, GRID
from monai_iou.evaluation.masks import mask_of
from monai_iou.evaluation.probability_channels import channels_of, check_range
from monai_iou.evaluation.rules import Rules, Structure
from monai_iou.evaluation.scoring import lesion_volume_scale
from monai_iou.metrics.components import find_overlaps
from monai_iou.metrics.lesion_maps import lesion_maps
from monai_iou.metrics.lesion_rules import match_components
from monai_iou.tables import counted
from monai_iou.volumes.grid import Grid, GridError, align, same_grid, spatial_grid
from monai_iou.volumes.memory import room_for
from monai_iou.volumes.names import is_png
from monai_iou.volumes.png import of_slice
from monai_iou.volumes.probability_kind import kind_of
from monai_iou.volumes.reading import (
    Volume,
    VolumeError,
    file_hash,
    read_channels,
    read_header,
    read_labels,
    read_volume,
)
from monai_iou.voxels.probability_bins import probability_histograms

__all__ = ["OPERATING_POINTS", "RESOLUTION", "count_files", "count_maps", "hash_maps"]

RESOLUTION = 4000  # nodes of the histograms: the thresholds and the bins of calibration are among them
OPERATING_POINTS = tuple(i / 10 for i in range(1, 10))
_KEYS = ("probabilities", "softmax")  # of nnU-Net v2 and v1


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
        files: see `monai_iou.evaluation.map_files.find_maps`.
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
        message = f"Expected probabilities, but got NaN in {counted(undefined, 'voxel')}: correct the map."
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
            (array,) = _on_reference(volume.path, volume.array[None], volume.grid, reference.grid)
            maps[structure] = _without(ignored, array)
            check_range(files[structure.name], maps[structure])
        return maps
    path = files[""]
    if path.suffix.lower() == ARCHIVE:
        channels = _archive(path, reference, files.get(GRID))
    else:
        volume = read_channels([path])
        channels = _on_reference(path, volume.array, volume.grid, reference.grid)
    channels = _without(ignored, channels)
    kind = kind_of(path)
    if structures is None and kind.values == ():
        message = (
            f"Expected `{path}` to name the label values of its channels, but its header has no room for them: name "
            "all of them in `--labels`, in the order of the channels."
        )
        raise ValueError(message)
    if structures is None:
        named = (kind.values or ())[1:] or range(1, max(2, len(channels)))
        structures = [Structure(str(value), (value,)) for value in named]
    return channels_of(path, channels, structures, kind=kind)


def _without(ignored: NDArray[np.bool_] | None, maps: NDArray[Any]) -> NDArray[Any]:
    """Return maps that are 0 in the ignored voxels, where they may hold anything."""
    return maps if ignored is None else np.where(ignored, 0, maps)


def _on_reference(path: Path, channels: NDArray[Any], grid: Grid, onto: Grid) -> NDArray[Any]:
    """Channels (C, X, Y, Z) with the axes of the reference's grid; they are not copied where these are their own."""
    if is_png(path):  # it states no place
        return np.stack([of_slice(channel, onto.shape, path) for channel in channels])
    if same_grid(grid, onto):
        return channels
    try:
        return np.stack([align(channel, grid, onto) for channel in channels])
    except GridError as error:
        message = (
            f"Expected the probabilities of `{path}` on the reference's grid ({onto}), but got {grid}: write them on "
            "that grid, because `--resample` takes masks only."
        )
        raise ValueError(message) from error


def _archive(path: Path, reference: Volume, mask: Path | None = None) -> NDArray[Any]:
    """The channels of an archive on the reference: nnU-Net writes them for its mask, with the axes in reversed order.

    Without a mask, or a prediction in its place, their grid is taken to be the reference's.
    """
    grid = reference.grid if mask is None or is_png(mask) else _grid_of(mask)
    array, shape = _stored(path), grid.shape[::-1]
    if array.ndim == 4 and array.shape[1:] == shape:
        return _on_reference(path, np.transpose(array, (0, 3, 2, 1)), grid, reference.grid)
    message = (
        f"Expected `{path}` to hold probabilities of shape (classes, {', '.join(map(str, shape))}), as nnU-Net writes "
        f"them for the mask `{mask or reference.path}`, but got {array.shape}: put the two files of one prediction "
        "there."
    )
    raise ValueError(message)


def _grid_of(mask: Path) -> Grid:
    header = None if mask.is_dir() else read_header(mask)
    return read_volume(mask).grid if header is None else spatial_grid(header.shape, header.affine)


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
