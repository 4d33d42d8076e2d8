"""Time and memory of the crops that reach every lesion, beside those that a list of voxels gives.

    python -m benchmarks.crops --labels ../shared/data/Masks905_OpenMS/labels

For each label: what is kept of a volume (bytes, and seconds to find it), and seconds a patch, image and label, with
MONAI's `FgBgToIndicesd` (every voxel's index), with at most 10 000 evenly spaced voxels of a class, and with
`LesionIndicesd`, as in the bundle. The ways take turns, and medians over the labels are printed; on a GPU nothing
differs, as patches are cut before they go there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.transforms import FgBgToIndicesd, MapTransform, RandCropByPosNegLabeld

from monai_iou.transforms import LesionIndicesd, RandCropByLesionsd

KEYS = ("image", "label")


class SpacedIndicesd(MapTransform):
    """Keep evenly spaced voxels of each class, whose list leaves out most small lesions."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with the indices of foreground and background voxels."""
        items = dict(data)
        label = np.asarray(items["label"]).ravel()
        classes = [_spaced(np.flatnonzero(label == value)) for value in np.unique(label[label > 0])]
        most = max((len(found) for found in classes), default=0)
        items["label_fg_indices"] = np.stack([np.resize(found, most) for found in classes], 1).ravel()
        items["label_bg_indices"] = _spaced(np.flatnonzero(label == 0))
        return items


def _spaced(indices: np.ndarray, most: int = 10_000) -> np.ndarray:
    return indices[:: max(1, -(-len(indices) // most))]


def ways(side: int, patches: int) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Return what finds the places and what cuts the patches, by name."""
    size = (side,) * 3
    by_voxel = RandCropByPosNegLabeld(
        KEYS, "label", size, 2, 1, patches, fg_indices_key="label_fg_indices", bg_indices_key="label_bg_indices"
    )
    return {
        "every voxel": (FgBgToIndicesd("label"), by_voxel),
        "spaced voxels": (SpacedIndicesd("label"), by_voxel),
        "runs of components": (LesionIndicesd("label"), RandCropByLesionsd(KEYS, "label", size, patches, 2, 1)),
    }


def kept_bytes(item: Mapping[Hashable, Any]) -> int:
    """Return the size of what an item holds beside image and label."""
    rest = [value for key, value in item.items() if key not in KEYS]
    arrays = [part for value in rest for part in (value.values() if isinstance(value, dict) else [value])]
    return sum(array.nbytes for array in arrays)


def measure(path: Path, side: int, patches: int, repeats: int) -> dict[str, tuple[float, float, float]]:
    """Return megabytes kept, seconds to find the places, and milliseconds a patch, for each way."""
    label = torch.as_tensor(np.asanyarray(nib.load(path).dataobj).astype(np.uint8))[None]
    item = {"image": torch.rand(label.shape), "label": label}
    chosen = ways(side, patches)
    prepared, found = {}, {}
    for name, (find, _) in chosen.items():
        start = time.perf_counter()
        prepared[name] = find(item)
        found[name] = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(repeats):
        for name, (_, crop) in chosen.items():
            start = time.perf_counter()
            crop(prepared[name])
            times[name].append((time.perf_counter() - start) / patches * 1e3)
    return {name: (kept_bytes(prepared[name]) / 1e6, found[name], statistics.median(times[name])) for name in chosen}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, help="folder of NIfTI label files")
    parser.add_argument("--side", type=int, default=64, help="side of the patches in voxels")
    parser.add_argument("--patches", type=int, default=2, help="patches cut from a volume at once")
    parser.add_argument("--repeats", type=int, default=50, help="times that a volume is cut")
    parser.add_argument("--limit", type=int, default=None, help="number of label files")
    options = parser.parse_args()
    paths = sorted(options.labels.glob("*.nii.gz"))[: options.limit]
    rows = [measure(path, options.side, options.patches, options.repeats) for path in paths]
    print(f"{len(paths)} labels, patches of {options.side}^3, {options.patches} at once; medians\n")
    print("| kept | MB a volume | s to find them | ms a patch |\n| --- | --- | --- | --- |")
    for name in rows[0]:
        size, found, crop = (statistics.median(row[name][column] for row in rows) for column in range(3))
        print(f"| {name} | {size:.2f} | {found:.2f} | {crop:.3f} |")


if __name__ == "__main__":
    main()
