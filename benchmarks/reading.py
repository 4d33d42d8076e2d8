"""Time the reader of volumes against nibabel's and SimpleITK's own reading of the same files.

    python benchmarks/reading.py [--repeat 7]

CPU time, the best of several alternating repeats, of a 192x192x128 scan (int16) and label map (uint8) that are made
here. nibabel reads NIfTI, SimpleITK the other formats. They verify less: the figures say what the checks cost.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from scipy.ndimage import gaussian_filter

from monai_iou.volumes.reading import read_volume

SHAPE = (192, 192, 128)
FILES = ("scan.nii.gz", "labels.nii.gz", "scan.nii", "scan.nrrd", "scan.mha", "raw.mha")


def write_files(folder: Path) -> None:
    """Write one scan in every format, and a label map."""
    rng = np.random.default_rng(0)
    scan = (gaussian_filter(rng.normal(size=SHAPE), 1) * 800).astype(np.int16)
    labels = (gaussian_filter(rng.normal(size=SHAPE), 6) > 0.03).astype(np.uint8)
    for name, array in (("scan.nii.gz", scan), ("labels.nii.gz", labels), ("scan.nii", scan)):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / name)
    for name, compressed in (("scan.nrrd", True), ("scan.mha", True), ("raw.mha", False)):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(scan.transpose()), str(folder / name), compressed)


def theirs(path: Path) -> Any:
    """The voxels by the library that reads this format; nibabel would only map a .nii that is not compressed."""
    if path.name.endswith((".nii", ".nii.gz")):
        image: Any = nibabel.load(path, mmap=False)
        return np.asanyarray(image.dataobj)
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def main() -> None:
    """Print a line per file: milliseconds of theirs and of ours, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7)
    repeat = parser.parse_args().repeat
    readers: dict[str, Callable[[Path], Any]] = {"theirs": theirs, "ours": read_volume}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        for file in FILES:
            best = dict.fromkeys(readers, float("inf"))
            for _ in range(repeat):
                for who, read in readers.items():
                    start = time.process_time()
                    read(folder / file)
                    best[who] = min(best[who], time.process_time() - start)
            ratio = best["ours"] / best["theirs"]
            print(f"{file:14} {best['theirs'] * 1e3:7.1f} ms {best['ours'] * 1e3:7.1f} ms {ratio:6.2f}")


if __name__ == "__main__":
    main()
