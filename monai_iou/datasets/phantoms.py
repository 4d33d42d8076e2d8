"""CT-like volumes with small lesions, the same on every machine: data for the demo and for tests.

Each volume has a body with a rim of fat, two organs, a spine, vessels and lesions. Vessels are as bright as lesions, so
that a threshold cannot tell them apart: their shape does. Grids are anisotropic and oblique.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from monai_iou.files import OutputError, replaced_file, write_text

__all__ = ["Phantom", "make_phantom", "write_phantom_dataset"]

Lesions: TypeAlias = Literal["few", "unequal"]
_Placed: TypeAlias = list[tuple[np.ndarray, float]]  # centre and diameter in mm

DESCRIPTIONS: dict[str, str] = {
    "few": "1 to 5 lesions of 4 to 14 mm",
    "unequal": "one lesion of 22 to 28 mm and 15 to 25 of 3 to 6 mm",
}
# Lesions that find no room are left out, so that the first try at a given foreground can miss it.
FOREGROUND_TRIES, FOREGROUND_TOLERANCE = 6, 0.02
AIR, FAT, MUSCLE, LIVER, SPLEEN, BONE, ENHANCED = -1000.0, -100.0, 50.0, 95.0, 110.0, 400.0, 185.0  # HU
NOISE_HU = 18.0
SHORTEST = 4  # voxels along an axis


@dataclass(frozen=True)
class Phantom:
    """A volume in HU (int16), its lesion mask (uint8) of the same shape, and their 4x4 affine in mm."""

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray


def make_phantom(
    seed: int,
    shape: tuple[int, int, int] = (96, 96, 64),
    *,
    lesions: Lesions = "few",
    foreground: float | None = None,
) -> Phantom:
    """Make one volume.

    Args:
        seed: the same seed gives the same volume.
        shape: size in voxels, at least 4 along each axis; the lesions keep their size in mm unless `foreground` is
            given.
        lesions: "few" are 1 to 5 lesions of 4 to 14 mm; "unequal" is one of 22 to 28 mm and 15 to 25 of 3 to 6 mm.
        foreground: share of all voxels that the lesions make up, above 0 and at most 0.05; their diameters are scaled
            accordingly. None keeps the diameters.

    Raises:
        ValueError: `shape`, `lesions` or `foreground` is not one of the above.

    Example:
        >>> phantom = make_phantom(0)
        >>> phantom.image.shape, int(phantom.label.max()), bool(0.0002 < phantom.label.mean() < 0.005)
        ((96, 96, 64), 1, True)
    """
    _check_lesions(lesions, foreground)
    if len(shape) != 3 or min(shape) < SHORTEST:
        message = (
            f"Expected `shape` to be three numbers of at least {SHORTEST} voxels, but got {shape}: give at least "
            f"{SHORTEST} along each of three axes."
        )
        raise ValueError(message)
    rng = np.random.default_rng([seed, 20])
    spacing = np.array([1.0, 1.0, 2.0]) * rng.uniform(0.94, 1.06)
    extent = np.array(shape) * spacing
    axes = [(np.arange(n) + 0.5) * s for n, s in zip(shape, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    centred = (grid - extent.reshape(3, 1, 1, 1) / 2) / (extent.reshape(3, 1, 1, 1) / 2)

    image = np.full(shape, AIR)
    body = _ellipsoid(centred, (0.0, 0.0, 0.0), (0.94, 0.84, 9.0))
    inner = _ellipsoid(centred, (0.0, 0.0, 0.0), (0.86, 0.76, 9.0))
    jitter = rng.uniform(-0.06, 0.06, size=(2, 3))
    liver = _ellipsoid(centred, np.array([-0.34, 0.08, 0.1]) + jitter[0], (0.45, 0.52, 0.7)) & inner
    spleen = _ellipsoid(centred, np.array([0.5, -0.1, -0.1]) + jitter[1], (0.26, 0.36, 0.45)) & inner
    spine = _ellipsoid(centred, (0.0, -0.52, 0.0), (0.16, 0.16, 9.0))
    for mask, value in ((body, FAT), (inner, MUSCLE), (liver, LIVER), (spleen, SPLEEN), (spine, BONE)):
        image[mask] = value

    free = inner & ~spine
    allowed = free & _ellipsoid(centred, (0, 0, 0), (0.72, 0.62, 0.82))
    label, placed = _lesions(rng, grid, allowed, lesions, foreground)
    image[_vessels(rng, grid, extent, placed) & free] = ENHANCED
    image[label] = ENHANCED + rng.normal(0, 5)
    image = _blurred(image, 0.6) + rng.normal(0, NOISE_HU, shape)
    return Phantom(np.clip(image.round(), -1024, 3071).astype(np.int16), label.astype(np.uint8), _affine(rng, spacing))


def write_phantom_dataset(
    folder: str | os.PathLike[str],
    training: int = 9,
    evaluation: int = 3,
    shape: tuple[int, int, int] = (96, 96, 64),
    *,
    lesions: Lesions = "few",
    foreground: float | None = None,
) -> Path:
    """Write volumes as a Decathlon-layout folder, dataset.json last, so that a folder with it is complete.

    Args:
        folder: created if need be.
        training: number of cases to train on, at least 1.
        evaluation: number of cases of `test_labelled`, at least 0.
        shape: see `make_phantom`.
        lesions: see `make_phantom`.
        foreground: see `make_phantom`.

    Returns:
        The folder.

    Raises:
        ValueError: a number of cases is smaller, or as `make_phantom`.
        OutputError: a file cannot be written, for example because the disk is full.
    """
    _check_lesions(lesions, foreground)
    for name, count, least in (("training", training, 1), ("evaluation", evaluation, 0)):
        if count < least:
            message = (
                f"Expected `{name}` to be a number of cases of at least {least}, but got {count}: give {least} or more."
            )
            raise ValueError(message)
    root = Path(folder)
    entries: dict[str, list[dict[str, str]]] = {"Tr": [], "Ts": []}
    for index in range(training + evaluation):
        part = "Tr" if index < training else "Ts"
        entry = {kind: f"./{kind}s{part}/phantom_{index:02d}.nii.gz" for kind in ("image", "label")}
        phantom = make_phantom(index, shape, lesions=lesions, foreground=foreground)
        for kind, voxels in (("image", phantom.image), ("label", phantom.label)):
            _write(root / entry[kind], voxels, phantom.affine)
        entries[part].append(entry)
    content = {
        "name": "Phantoms",
        "description": f"CT-like volumes with {_description(lesions, foreground)} among vessels as bright",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "lesion"},
        "numTraining": training,
        "numTest": evaluation,
        "training": entries["Tr"],
        "test": [entry["image"] for entry in entries["Ts"]],
        "test_labelled": entries["Ts"],
    }
    write_text(root / "dataset.json", json.dumps(content, indent=1) + "\n")
    return root


def _ellipsoid(grid: np.ndarray, centre: ArrayLike, radii: ArrayLike) -> np.ndarray:
    offset = (grid - np.asarray(centre).reshape(3, 1, 1, 1)) / np.asarray(radii).reshape(3, 1, 1, 1)
    inside: np.ndarray = (offset**2).sum(0) <= 1
    return inside


def _check_lesions(lesions: str, foreground: float | None) -> None:
    if lesions not in DESCRIPTIONS:
        message = (
            f"Expected `lesions` to be one of {', '.join(map(repr, DESCRIPTIONS))}, but got {lesions!r}: choose one."
        )
        raise ValueError(message)
    if foreground is not None and not 0 < foreground <= 0.05:
        message = (
            f"Expected `foreground` to be a share of the voxels above 0 and at most 0.05, but got {foreground}: "
            "choose a smaller share, because larger lesions do not fit into the body, or None to keep the diameters."
        )
        raise ValueError(message)


def _description(lesions: Lesions, foreground: float | None) -> str:
    scaled = "" if foreground is None else f", scaled to {100 * foreground:g} % of the voxels,"
    return DESCRIPTIONS[lesions] + scaled


def _lesions(
    rng: np.random.Generator, grid: np.ndarray, allowed: np.ndarray, lesions: Lesions, foreground: float | None
) -> tuple[np.ndarray, _Placed]:
    """Place the lesions, and return their mask with their places; the first of "few" has 0.02 % of the volume."""
    diameters = (
        [rng.uniform(9, 14), *rng.uniform(4, 14, size=rng.integers(0, 5))]
        if lesions == "few"
        else [rng.uniform(22, 28), *rng.uniform(3, 6, size=rng.integers(15, 26))]
    )
    if foreground is None:
        return _placed(rng, grid, allowed, diameters)
    scale = 1.0
    for _ in range(FOREGROUND_TRIES):
        # Every try draws the same numbers, so that it differs from the last by its scale alone.
        label, placed = _placed(copy.deepcopy(rng), grid, allowed, [scale * diameter for diameter in diameters])
        if abs(label.mean() / foreground - 1) < FOREGROUND_TOLERANCE:
            break
        scale *= float((foreground / label.mean()) ** (1 / 3)) if label.any() else 1.5
    return label, placed


def _placed(
    rng: np.random.Generator, grid: np.ndarray, allowed: np.ndarray, diameters: Sequence[float]
) -> tuple[np.ndarray, _Placed]:
    """Place bumpy ellipsoids apart from each other; those that find no room are left out."""
    label = np.zeros(allowed.shape, dtype=bool)
    placed: _Placed = []
    candidates = np.argwhere(allowed)
    for diameter in diameters:
        for _ in range(100):
            index = candidates[rng.integers(len(candidates))]
            centre = grid[:, index[0], index[1], index[2]]
            if all(np.linalg.norm(centre - other) > (diameter + size) / 2 + 5 for other, size in placed):
                break
        else:
            continue
        radii = diameter / 2 * rng.uniform(0.85, 1.0, 3)
        offset = (grid - centre.reshape(3, 1, 1, 1)) / radii.reshape(3, 1, 1, 1)
        bumps = sum(0.08 * np.sin(rng.uniform(1, 3) * axis * 2 + rng.uniform(0, 6)) for axis in offset)
        label |= np.sqrt((offset**2).sum(0)) <= 1 + bumps
        placed.append((centre, float(diameter)))
    return label & allowed, placed


def _vessels(rng: np.random.Generator, grid: np.ndarray, extent: np.ndarray, lesions: _Placed) -> np.ndarray:
    """Draw six winding tubes of 3 to 6 mm that cross the volume and keep 3 mm away from the lesions."""
    mask = np.zeros(grid.shape[1:], dtype=bool)
    spacing = grid[:, 1, 1, 1] - grid[:, 0, 0, 0]
    for _ in range(6):
        along = np.linspace(0, 1, 300)
        start, end = rng.uniform(0.1, 0.9, (2, 3)) * extent
        axis = rng.integers(3)
        start[axis], end[axis] = 0.0, extent[axis]
        phase = rng.uniform(0.5, 1.5, (3, 1)) * along + rng.random((3, 1))
        waves = rng.uniform(4, 10, (3, 1)) * np.sin(2 * np.pi * phase)
        points = (start[:, None] + (end - start)[:, None] * along + waves).T
        radius = rng.uniform(1.5, 3.0)
        for point in points:
            if all(np.linalg.norm(point - centre) > size / 2 + radius + 3 for centre, size in lesions):
                _stamp(mask, point, radius, spacing)
    return mask


def _stamp(mask: np.ndarray, point: np.ndarray, radius: float, spacing: np.ndarray) -> None:
    low = np.maximum(np.floor((point - radius) / spacing).astype(int), 0)
    high = np.minimum(np.ceil((point + radius) / spacing).astype(int) + 1, mask.shape)
    if (high <= low).any():
        return
    axes = [(np.arange(a, b) + 0.5) * s - p for a, b, s, p in zip(low, high, spacing, point, strict=True)]
    near = sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")) <= radius**2
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] |= near


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    blurred: np.ndarray = gaussian_filter(image, (sigma, sigma, sigma / 2))
    return blurred


def _affine(rng: np.random.Generator, spacing: np.ndarray) -> np.ndarray:
    """Return an oblique affine with LPS-like directions, as scanners write."""
    a, b = rng.uniform(-0.25, 0.25, 2)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.diag([-1.0, -1.0, 1.0]) @ np.diag(spacing)
    affine[:3, 3] = rng.uniform(-80, 80, 3)
    return affine


def _write(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    import nibabel as nib

    image = nib.Nifti1Image(voxels, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path, ".nii.gz") as temporary:
            nib.save(image, temporary)
    except OSError as error:
        message = (
            f"Expected to write `{path}`, but got the error '{error.strerror or error}': free space or choose another "
            "folder."
        )
        raise OutputError(message) from error
