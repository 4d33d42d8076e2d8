"""Made FLAIR-like images around real lesion masks: the shapes are patients', the contrast Task901's, the rest made.

A bridge between phantoms and the few real scans. What is not real: the anatomy, which is a random smooth field; where
the bright distractors lie; that a lesion is as bright inside as at its rim but for the blur. So a difference between
two losses on these images is one on real shapes and sizes, and on no real image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The box of 96x112x64 mm of the MNI grid that holds the most lesion voxels of the 30 masks, 87 % of them.
BOX = (slice(42, 138), slice(52, 164), slice(56, 120))
# The scans of the masks' own source; the others of Task901 come from another scanner.
SCANS = ("imagesTr/openms_07", "imagesTr/openms_19", "imagesTs/openms_26")
CORRELATION_MM, NOISE_MM, BLUR_MM = 3.0, 0.6, 0.6
DISTRACTORS = 12

Volume = NDArray[np.float64]


@dataclass(frozen=True)
class Contrast:
    """Intensities in robust standard deviations of the brain around its median.

    Attributes:
        lesion, lesion_spread: mean and standard deviation of the lesions' voxels.
        tissue, noise: standard deviations of the brain's slow and fast variation, apart at a Gaussian of 1.5 mm.
    """

    lesion: float
    lesion_spread: float
    tissue: float
    noise: float


def measure(source: Path) -> Contrast:
    """Return the mean contrast of Task901's three OpenMS scans inside the box."""
    found = [
        _measure(source / f"{scan}.nii.gz", source / f"{scan.replace('images', 'labels')}.nii.gz") for scan in SCANS
    ]
    return Contrast(*(fmean(column) for column in zip(*found, strict=True)))


def _measure(image_path: Path, label_path: Path) -> tuple[float, float, float, float]:
    from scipy.ndimage import gaussian_filter

    from monai_iou.volumes.reading import read_labels, read_volume

    image, lesion = read_volume(image_path).array[BOX].astype(float), read_labels(label_path).array[BOX] > 0
    brain = (image > 1) & ~lesion  # skull-stripped: outside is 0 but for ringing
    median = np.median(image[brain])
    scaled = (image - median) / (1.4826 * np.median(np.abs(image[brain] - median)))
    slow = gaussian_filter(scaled, 1.5)
    inside = scaled[lesion]
    return float(inside.mean()), float(inside.std()), float(slow[brain].std()), float((scaled - slow)[brain].std())


def make_image(lesions: NDArray[np.bool_], contrast: Contrast, seed: int) -> Volume:
    """Return an image around a mask, as float with a median near 100.

    Args:
        lesions: the mask, on a grid of 1 mm.
        contrast: see `measure`.
        seed: the same seed gives the same image.
    """
    import cc3d
    from scipy.ndimage import distance_transform_edt

    rng = np.random.default_rng([seed, 905])
    components = cc3d.connected_components(lesions, connectivity=26)
    image = contrast.tissue * _field(rng, lesions.shape, CORRELATION_MM)
    image += contrast.noise * _field(rng, lesions.shape, NOISE_MM)
    room = distance_transform_edt(~lesions) > 4
    for part in (components, cc3d.connected_components(_distractors(rng, lesions.shape) & room)):
        # Each lesion and each distractor has a contrast of its own.
        levels = rng.normal(contrast.lesion, contrast.lesion_spread / 2, int(part.max()) + 1).clip(0.5)
        levels[0] = 0
        image += _blurred(levels[part])
    return 100 + 20 * image


def _field(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Volume:
    """Return a random field of standard deviation 1."""
    field = _blurred(rng.normal(size=shape), sigma)
    return np.asarray(field / field.std())


def _blurred(image: Volume, sigma: float = BLUR_MM) -> Volume:
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(image, sigma))


def _distractors(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return straight rods of 15 to 30 mm and 1 to 2 mm radius: as bright as lesions, of another shape."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).astype(float)
    mask = np.zeros(shape, dtype=bool)
    for _ in range(DISTRACTORS):
        middle, direction = rng.uniform(0.1, 0.9, 3) * shape, rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        half, radius = rng.uniform(7.5, 15), rng.uniform(1, 2)
        offset = grid - middle
        along = (offset @ direction).clip(-half, half)
        mask |= ((offset - along[..., None] * direction) ** 2).sum(-1) <= radius**2
    return mask


def write(folder: Path, masks: Path, scans: Path) -> list[dict[str, str]]:
    """Write an image and a label for each of the masks; return the entries for dataset.json."""
    import nibabel as nib

    from monai_iou.volumes.reading import read_labels

    contrast, entries = measure(scans), []
    for seed, path in enumerate(sorted(masks.glob("*.nii.gz"))):
        label = read_labels(path).array[BOX] > 0
        entry = {"image": f"./images/{path.name}", "label": f"./labels/{path.name}"}
        voxels: dict[str, Any] = {
            "image": make_image(label, contrast, seed).astype(np.float32),
            "label": label.astype(np.uint8),
        }
        for kind, array in voxels.items():
            target = folder / entry[kind]
            target.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), target)
        entries.append(entry)
    return entries
