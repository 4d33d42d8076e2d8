"""Small datasets in every layout that users bring, each of a bright ball in noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

SHAPE = (20, 18, 12)
AFFINE = np.diag([-1.0, -1.0, 1.5, 1.0])
TRAINING, TESTING = 3, 2
NAMES = {"0": "background", "1": "oedema", "2": "core", "3": "enhancing"}
REGIONS = {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}

Made = tuple[list[np.ndarray], np.ndarray]  # channels and label


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, AFFINE)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def make_case(index: int) -> Made:
    """Two channels, and a label of three nested balls."""
    rng = np.random.default_rng(index)
    centre = [rng.integers(6, side - 6) if side > 12 else side // 2 for side in SHAPE]
    distance = np.sqrt(sum((grid - c) ** 2 for grid, c in zip(np.indices(SHAPE), centre, strict=True)))
    label = (distance < 6).astype(np.uint8) + (distance < 4) + (distance < 2)
    channels = [rng.normal(0, 0.3, SHAPE) + 2 * (label > 0) + (label > 1), rng.normal(0, 0.3, SHAPE) + 2 * (label > 2)]
    return [channel.astype(np.float32) for channel in channels], label.astype(np.uint8)


def with_values(label: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """The label with other values, in a type that holds them."""
    largest = max(values)
    return np.array([0, *values])[label].astype(np.uint8 if largest < 256 else np.int32)


def with_ignored(label: np.ndarray, value: int) -> np.ndarray:
    label = label.copy()
    label[:, :, :3] = value
    return label


def describe(root: Path, content: Mapping[str, Any], encoding: str = "utf-8") -> Path:
    (root / "dataset.json").write_text(json.dumps(content), encoding=encoding)
    return root


def decathlon(
    root: Path, change: Callable[[np.ndarray], np.ndarray] = lambda label: label, stacked: bool = False, **content: Any
) -> dict[str, Any]:
    """Write the files; return what dataset.json says of them, with changes."""
    listed: dict[str, list[dict[str, Any]]] = {"Tr": [], "Ts": []}
    for index in range(TRAINING + TESTING):
        part = "Tr" if index < TRAINING else "Ts"
        channels, label = make_case(index)
        entry = {"image": f"images{part}/c{index}.nii.gz", "label": f"labels{part}/c{index}.nii.gz"}
        save(root / entry["image"], np.stack(channels, -1) if stacked else channels[0])
        save(root / entry["label"], change(label))
        listed[part].append(entry)
    modality = {"0": "T1", "1": "T2"} if stacked else {"0": "T1"}
    described = {"modality": modality, "labels": NAMES, "training": listed["Tr"], "test_labelled": listed["Ts"]}
    return {**described, "test": [entry["image"] for entry in listed["Ts"]], **content}


def nnunet(
    root: Path, change: Callable[[np.ndarray], np.ndarray] = lambda label: label, channels: int = 2, **content: Any
) -> dict[str, Any]:
    """The same in nnU-Net v2's layout."""
    for index in range(TRAINING + TESTING):
        part = "Tr" if index < TRAINING else "Ts"
        images, label = make_case(index)
        for number in range(channels):
            save(root / f"images{part}/c{index}_{number:04d}.nii.gz", images[number])
        save(root / f"labels{part}/c{index}.nii.gz", change(label))
    labels = {name: int(value) for value, name in NAMES.items()}
    names = {str(number): f"T{number + 1}" for number in range(channels)}
    return {"channel_names": names, "labels": labels, "numTraining": TRAINING, "file_ending": ".nii.gz", **content}


def bom(root: Path) -> Path:
    return describe(root, decathlon(root), "utf-8-sig")


def file_per_channel(root: Path) -> Path:
    content = decathlon(root)
    for index in range(TRAINING + TESTING):
        part = "Tr" if index < TRAINING else "Ts"
        save(root / f"images{part}/c{index}_t2.nii.gz", make_case(index)[0][1])
    for entry in [*content["training"], *content["test_labelled"]]:
        entry["image"] = [entry["image"], entry["image"].replace(".nii", "_t2.nii")]
    content["test"] = [entry["image"] for entry in content["test_labelled"]]
    return describe(root, {**content, "modality": {"0": "T1", "1": "T2"}})


def stacked_channels(root: Path) -> Path:
    return describe(root, decathlon(root, stacked=True))


def validation_list(root: Path) -> Path:
    content = decathlon(root)
    *training, last = content["training"]
    return describe(root, {**content, "training": training, "validation": [last]})


def hidden_entries(root: Path) -> Path:
    content = decathlon(root)
    for part in ("Tr", "Ts"):
        for folder in ("images", "labels"):
            (root / f"{folder}{part}/._c0.nii.gz").write_bytes(b"macOS")
            (root / f"{folder}{part}/.DS_Store").write_bytes(b"macOS")
    return describe(root, content)


def nnunet_channels(root: Path) -> Path:
    (describe(root, nnunet(root)) / "imagesTr/._c0_0000.nii.gz").write_bytes(b"macOS")
    return root


def nnunet_splits(root: Path) -> Path:
    names = [f"c{index}" for index in range(TRAINING)]
    folds = [{"train": [name for name in names if name != held], "val": [held]} for held in names]
    root.mkdir(parents=True, exist_ok=True)
    (root / "splits_final.json").write_text(json.dumps(folds))
    return describe(root, nnunet(root, channels=1))


def nnunet_regions(root: Path) -> Path:
    """With an ignore label too."""
    labels = {"background": 0, **REGIONS, "ignore": 4}
    content = nnunet(root, lambda label: with_ignored(label, 4), labels=labels, regions_class_order=[1, 2, 3])
    return describe(root, content)


def decathlon_regions(root: Path) -> Path:
    """What `nnunet_regions` holds, made by hand in the Decathlon's layout."""
    labels = {**NAMES, "4": "ignore"}
    keys = {"labels": labels, "regions": REGIONS, "regions_class_order": [1, 2, 3]}
    return describe(root, decathlon(root, lambda label: with_ignored(label, 4), stacked=True, **keys))


def ignored(root: Path) -> Path:
    return describe(root, decathlon(root, lambda label: with_ignored(label, 255), ignore=255))


def plain_pair(root: Path) -> Path:
    for index in range(TRAINING):
        channels, label = make_case(index)
        save(root / f"images/c{index}.nii.gz", channels[0])
        save(root / f"labels/c{index}.nii.gz", label)
    return root


def gaps(root: Path) -> Path:
    labels = {"0": "background", "1": "a", "2": "b", "5": "c"}
    return describe(root, decathlon(root, lambda label: with_values(label, (1, 2, 5)), labels=labels))


def atlas_ids(root: Path) -> Path:
    values = (70000, 312782546, 312782550)
    labels = {"0": "background", **{str(value): f"structure {value}" for value in values}}
    return describe(root, decathlon(root, lambda label: with_values(label, values), labels=labels))


def partly_labelled(root: Path) -> Path:
    content = decathlon(root, lambda label: np.minimum(label, 2).astype(np.uint8), labels=dict(list(NAMES.items())[:3]))
    content["training"][0]["labelled"] = ["oedema"]
    content["test_labelled"][0]["labelled"] = [2]
    return describe(root, content)


def several_raters(root: Path) -> Path:
    content = decathlon(root)
    for index in range(2):
        entry = content["training"][index]
        second = entry["label"].replace(".nii", "_second.nii")
        save(root / second, np.roll(make_case(index)[1], 1, 0))
        entry["label"] = [entry["label"], second]
    return describe(root, content)


def soft(root: Path) -> Path:
    labels = {"0": "background", "1": "lesion"}
    return describe(
        root, decathlon(root, lambda label: (label / 3).astype(np.float32), labels=labels, soft_labels=True)
    )


def flat(root: Path) -> Path:
    """2D: images and labels of one slice, without a third axis."""
    content = decathlon(root)
    for path in [*root.glob("images*/*"), *root.glob("labels*/*")]:
        array = np.asanyarray(nib.load(path).dataobj)[:, :, SHAPE[2] // 2]
        save(path, np.ascontiguousarray(array))
    return describe(root, content)


def as_png(root: Path, colours: bool = False) -> None:
    """Replace every volume by a picture of its middle slice; images of two channels become colours if asked for."""
    for path in [*root.glob("images*/*.nii.gz"), *root.glob("labels*/*.nii.gz")]:
        pixels = np.asanyarray(nib.load(path).dataobj)[:, :, SHAPE[2] // 2].T
        if path.parent.name.startswith("images"):
            pixels = (40 * (pixels + 1)).clip(0, 255).astype(np.uint8)
            pixels = np.stack([pixels, 255 - pixels, pixels // 2], -1) if colours else pixels
        Image.fromarray(np.ascontiguousarray(pixels)).save(path.with_name(path.name.replace(".nii.gz", ".png")))
        path.unlink()


def png_decathlon(root: Path) -> Path:
    content = decathlon(root)
    as_png(root)
    return describe(root, json.loads(json.dumps(content).replace(".nii.gz", ".png")))


def png_plain(root: Path) -> Path:
    as_png(plain_pair(root), colours=True)
    return root


def png_nnunet(root: Path) -> Path:
    """Colours in one file, as nnU-Net's own reader of pictures takes them."""
    content = nnunet(root, channels=1)
    as_png(root, colours=True)
    names = {str(number): name for number, name in enumerate(("red", "green", "blue"))}
    return describe(root, {**content, "channel_names": names, "file_ending": ".png"})


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "byte-order mark": bom,
    "list of images": file_per_channel,
    "4D images": stacked_channels,
    "validation list": validation_list,
    "hidden entries": hidden_entries,
    "nnU-Net channels": nnunet_channels,
    "nnU-Net splits": nnunet_splits,
    "nnU-Net regions and ignore": nnunet_regions,
    "Decathlon regions and ignore": decathlon_regions,
    "ignore": ignored,
    "plain pair": plain_pair,
    "gaps": gaps,
    "atlas ids": atlas_ids,
    "partly labelled": partly_labelled,
    "several raters": several_raters,
    "soft": soft,
    "2D": flat,
    "PNG": png_decathlon,
    "PNG plain pair": png_plain,
    "PNG nnU-Net": png_nnunet,
}
