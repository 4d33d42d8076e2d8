"""Trainings that end after the same number of minutes: ours by `--minutes`, a bare loop of MONAI's UNet, nnU-Net v2.

Each returns the loss of every step, and writes a mask for every test image. The minutes count the training:

- ours: the whole program that `monai-iou train --minutes` starts, from reading the cases to the last checkpoint. The
  plan, which times a few steps first, is not part of them, as nnU-Net's is not.
- the bare loop: reading and caching the cases, and the steps.
- nnU-Net: the steps alone. Fingerprint, plan and preprocessing come before, and its online validation is left out. Its
  learning rate falls to 0 over the minutes as it otherwise does over the epochs. Its plan for the hippocampus has nine
  patches a step, which take one CPU core long; it is given two, the fewest that it plans for.
- nnU-Net without mirroring: the same with its `nnUNetTrainerNoMirroring`, as mirroring harms a training on the
  hippocampus (docs/results/hippocampus-cpu.md).
- nnU-Net with our trainer: the same with `nnUNetTrainerIoU`, whose loss is IoU and cross-entropy.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.losses_train import losses_of_iterations


@dataclass(frozen=True)
class Budget:
    """What a contestant may use: minutes of training, and a seed."""

    minutes: float
    seed: int

    def shares(self, start: float) -> Iterator[float]:
        """Yield the share of the minutes that has passed since `start`, before every step, until they are over."""
        while (share := (time.monotonic() - start) / (60 * self.minutes)) < 1:
            yield share


Contestant = Callable[[Path, Path, Budget], list[float]]  # (data, folder, budget); masks go to folder/masks


def ours(data: Path, folder: Path, budget: Budget) -> list[float]:
    """Run `monai-iou train --minutes` and `monai-iou predict`."""
    command = [sys.executable, "-W", "ignore", "-c", "from monai_iou.cli import cli; cli()"]
    length = ["--minutes", str(budget.minutes), "--seed", str(budget.seed), "--device", "cpu"]
    subprocess.run([*command, "train", str(data), "--output", str(folder / "run"), *length], check=True)
    content = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    images = [str(data / image) for image in content["test"]]
    subprocess.run([*command, "predict", str(folder / "run"), *images, "--output", str(folder / "masks")], check=True)
    return losses_of_iterations(folder / "run" / "tensorboard")


def bare_loop(data: Path, folder: Path, budget: Budget) -> list[float]:
    """Train MONAI's strided UNet with DiceCELoss at its best setting on whole crops, without random transforms."""
    import torch
    from monai.data.dataloader import DataLoader
    from monai.data.dataset import CacheDataset
    from monai.losses.dice import DiceCELoss
    from monai.networks.nets.unet import UNet
    from monai.utils.misc import set_determinism

    start = time.monotonic()
    set_determinism(budget.seed)
    content = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    files = [{key: str(data / entry[key]) for key in ("image", "label")} for entry in content["training"]]
    classes = len(content["labels"])
    loader = DataLoader(CacheDataset(files, _preparation(), progress=False), batch_size=4, shuffle=True, drop_last=True)
    network = UNet(3, 1, classes, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2)
    loss = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    losses, batches = [], (batch for _ in count() for batch in loader)
    for share, batch in zip(budget.shares(start), batches, strict=False):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - share)
        optimizer.zero_grad()
        value = loss(network(batch["image"].as_tensor()), batch["label"].as_tensor())
        value.backward()
        optimizer.step()
        losses.append(value.item())
    _write_masks(network.eval(), data, content["test"], folder / "masks")
    return losses


LEARNING_RATE = 2e-3  # the bundle's
PATCH = (40, 56, 40)  # what nnU-Net and our plan choose for the hippocampus


def _preparation() -> Any:
    from monai.transforms.compose import Compose
    from monai.transforms.croppad.dictionary import RandSpatialCropd, SpatialPadd
    from monai.transforms.intensity.dictionary import NormalizeIntensityd
    from monai.transforms.io.dictionary import LoadImaged

    both = ["image", "label"]
    return Compose(
        [
            LoadImaged(both, ensure_channel_first=True),
            NormalizeIntensityd("image"),
            SpatialPadd(both, PATCH),
            RandSpatialCropd(both, PATCH, random_size=False),
        ]
    )


def _write_masks(network: Any, data: Path, images: list[str], masks: Path) -> None:
    import nibabel as nib
    import numpy as np
    import torch
    from monai.inferers.utils import sliding_window_inference
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.array import NormalizeIntensity
    from monai.transforms.io.array import LoadImage

    read = Compose([LoadImage(ensure_channel_first=True), NormalizeIntensity()])
    masks.mkdir(parents=True)
    for image in images:
        with torch.no_grad():
            logits = sliding_window_inference(read(str(data / image)).as_tensor()[None], PATCH, 4, network)
        affine = nib.load(data / image).affine
        mask = logits[0].argmax(0).numpy().astype(np.uint8)
        nib.save(nib.Nifti1Image(mask, affine), masks / Path(image).name)


TRAINERS = "nnunetv2.training.nnUNetTrainer"
OWN_TRAINER = f"{TRAINERS}.nnUNetTrainer.nnUNetTrainer"
NO_MIRRORING = f"{TRAINERS}.variants.data_augmentation.nnUNetTrainerNoMirroring.nnUNetTrainerNoMirroring"


def nnunet(data: Path, folder: Path, budget: Budget, *, kind: str = OWN_TRAINER) -> list[float]:
    """Let nnU-Net plan and preprocess, make its steps for the minutes, and predict as it does after a training.

    `kind` is the trainer's class with its module.
    """
    trainer = nnunet_trainer(data, folder, budget.seed, kind=kind)
    losses = []
    for share in budget.shares(time.monotonic()):
        trainer.optimizer.param_groups[0]["lr"] = trainer.initial_lr * (1 - share) ** 0.9
        losses.append(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))
    _predict(trainer, data, folder)
    return losses


CONFIGURATION = "3d_fullres"
DATASET = 904, "Dataset904_Peer"


def nnunet_trainer(data: Path, folder: Path, seed: int, *, kind: str = OWN_TRAINER) -> Any:
    """Let nnU-Net plan and preprocess; return its trainer before the first step, with two patches a step."""
    plans, dataset = _prepare(data, folder)
    plans["configurations"][CONFIGURATION]["batch_size"] = 2
    plans["continue_training"] = False  # what its command adds

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - nnU-Net draws from it
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    module, _, name = kind.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    trainer = made(plans, CONFIGURATION, "all", dataset, torch.device("cpu"))
    # In this process; nnU-Net's planning takes the number for torch's threads as well.
    os.environ.update({"nnUNet_n_proc_DA": "0"})
    trainer.on_train_start()
    torch.set_num_threads(threads)
    trainer.network.train()
    return trainer


def _prepare(data: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run nnU-Net's planning and preprocessing; return its plans and its dataset.json."""
    number, name = DATASET
    folders = {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
    os.environ.update({**folders, "nnUNet_compile": "f", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"})
    _write_raw_dataset(data, folder / "raw" / name)
    prepare = (
        "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry as e; e()"
    )
    words = ["-d", str(number), "-c", CONFIGURATION, "-np", "1", "-npfp", "1"]
    subprocess.run([sys.executable, "-W", "ignore", "-c", prepare, *words], check=True)
    preprocessed = folder / "preprocessed" / name
    plans, dataset = (json.loads((preprocessed / file).read_text()) for file in ("nnUNetPlans.json", "dataset.json"))
    return plans, dataset


def _predict(trainer: Any, data: Path, folder: Path) -> None:
    """Write masks of the test images with nnU-Net's predictor."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(device=trainer.device, allow_tqdm=False)
    managers = trainer.plans_manager, trainer.configuration_manager
    weights, network = [trainer.network.state_dict()], trainer.network.eval()
    axes = trainer.inference_allowed_mirroring_axes
    predictor.manual_initialization(network, *managers, weights, trainer.dataset_json, "nnUNetTrainer", axes)
    _, name = DATASET
    images = [[str(folder / "raw" / name / "imagesTs" / f"{_stem(image)}_0000.nii.gz")] for image in _tested(data)]
    outputs = [str(folder / "masks" / _stem(image)) for image in _tested(data)]
    (folder / "masks").mkdir()
    predictor.predict_from_files_sequential(images, outputs)


def _tested(data: Path) -> list[str]:
    images: list[str] = json.loads((data / "dataset.json").read_text(encoding="utf-8"))["test"]
    return images


def _stem(path: str) -> str:
    return Path(path).name.removesuffix(".nii.gz")


def _write_raw_dataset(data: Path, raw: Path) -> None:
    """Link the cases in nnU-Net's layout, the test images apart."""
    content = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / folder).mkdir(parents=True)
    for entry in content["training"]:
        (raw / "imagesTr" / f"{_stem(entry['image'])}_0000.nii.gz").symlink_to(data / entry["image"])
        (raw / "labelsTr" / Path(entry["label"]).name).symlink_to(data / entry["label"])
    for image in content["test"]:
        (raw / "imagesTs" / f"{_stem(image)}_0000.nii.gz").symlink_to(data / image)
    described = {
        "channel_names": content["modality"],
        "labels": {name: int(value) for value, name in content["labels"].items()},
        "numTraining": len(content["training"]),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(described), encoding="utf-8")


CONTESTANTS: dict[str, Contestant] = {
    "ours": ours,
    "bare loop": bare_loop,
    "nnU-Net, batch of 2": nnunet,
    "nnU-Net, no mirroring, batch of 2": partial(nnunet, kind=NO_MIRRORING),
    "nnU-Net, IoU, batch of 2": partial(nnunet, kind="monai_iou.integrations.nnunet.nnUNetTrainerIoU"),
}
