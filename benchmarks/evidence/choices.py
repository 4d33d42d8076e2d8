"""The losses, crops and other settings that the studies compare, by the names that the tables' columns have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.losses_train import CROSS_ENTROPY, REGION

Overrides = Mapping[str, Any]

# MONAI's region losses take label maps only with `to_onehot_y`, and know no `sync_batch`.
MONAI_REGION = {"softmax": True, "to_onehot_y": True}
MONAI_BEST = {**MONAI_REGION, "include_background": False, "batch": True}

THIRD = 1 / 3


def _ours(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": f"monai_iou.{name}", **REGION, **options}


def _iou_ce(weight: float) -> Overrides:
    return {"loss": _ours("IoUCELoss", lambda_ce=weight) if weight else _ours("IoULoss")}


def _dice_ce(weight: float) -> Overrides:
    options = {**MONAI_BEST, "lambda_ce": weight} if weight else MONAI_BEST
    return {"loss": {"_target_": "DiceCELoss" if weight else "DiceLoss", **options}}


def _compound(name: str, **options: Any) -> Overrides:
    return {"loss": {"_target_": "monai_iou.CompoundLoss", "losses": [_ours(name, **options), CROSS_ENTROPY]}}


# As in docs/bundle.md, for the losses that need no cells.
COPIED_LESIONS = {
    "copy_source": {
        "_target_": "monai_iou.workflow.caching.cached_dataset",
        "data": "$@cases.training",
        "transform": {"_target_": "Compose", "transforms": "@train#deterministic_transforms"},
        "cache_rate": "@cache_rate",
        "num_workers": "@cache_workers",
        "cache_dir": "$@settings.cache_dir",
    },
    "copying": {
        "_target_": "monai_iou.RandCopyLesionsd",
        "keys": ["image", "label"],
        "label_key": "label",
        "source": "@copy_source",
        "prob": 0.5,
    },
    "train#preprocessing#transforms": "$@train#deterministic_transforms + [@copying] + @train#random_transforms",
}

# Patches as MONAI's `RandCropByPosNegLabeld` draws them.
AROUND_VOXELS: Overrides = {
    "train#random_transforms#0": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "DeleteItemsd", "keys": ["label_lesions"]},
            {
                "_target_": "RandCropByPosNegLabeld",
                "keys": ["image", "label"],
                "label_key": "label",
                "spatial_size": "$@plan.patch_size",
                "pos": "@positive_crops",
                "neg": "@negative_crops",
                "num_samples": "@num_samples",
            },
        ],
    }
}

# Everything that a row's column `loss` may name. An entry may override more than the loss.
LOSSES: dict[str, Overrides] = {
    "iou+ce": _iou_ce(1.0),
    "iou+ce/3": _iou_ce(THIRD),
    "iou+ce/10": _iou_ce(0.1),
    "iou": _iou_ce(0.0),
    "dice+ce": _dice_ce(1.0),
    "dice+ce/3": _dice_ce(THIRD),
    "dice+ce/10": _dice_ce(0.1),
    "dice": _dice_ce(0.0),
    "dice+ce as it comes": {"loss": {"_target_": "DiceCELoss", **MONAI_REGION}},
    "ce": {"loss": CROSS_ENTROPY},
    "weighted ce": {"loss": {**CROSS_ENTROPY, "weight": "counted in the training labels"}},
    "lovasz+ce": _compound("LovaszSoftmaxLoss"),
    "lovasz+ce sorted": _compound("LovaszSoftmaxLoss", bins=None),
    "generalised iou": {"loss": {**_ours("GeneralizedIoULoss", w_type="simple"), "include_background": True}},
    "instance": {"instance": True},
    "instance, both cells": {
        "instance": True,
        "loss": _ours("InstanceIoULoss", cells="both", global_loss=_ours("IoUCELoss", lambda_ce=THIRD)),
    },
    "planned": {"planned": True},  # what `monai-iou plan` writes for the data, but for the epochs
    "planned, dice+ce": {"planned": True, **_dice_ce(1.0)},
    "planned, bfloat16": {"planned": True, "amp_dtype": "bfloat16"},
    "planned, float16": {"planned": True, "amp_dtype": "float16"},
    "planned, float32": {"planned": True, "amp": False},
    "iou+ce/3, bfloat16": {**_iou_ce(THIRD), "amp": True},  # on a CPU; on a GPU that is the default
    "monai tutorial": {
        # As MONAI's spleen tutorial: DiceCELoss as it comes, Adam at a constant 1e-4, batch normalisation, and no
        # random transforms but patches around voxels. The network has the levels and channels of the others.
        "loss": {"_target_": "DiceCELoss", **MONAI_REGION},
        "optimizer#_target_": "torch.optim.Adam",
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "lr_scheduler": {
            "_target_": "torch.optim.lr_scheduler.ConstantLR",
            "optimizer": "@optimizer",
            "factor": 1.0,
            "total_iters": 1,
        },
        "augmentation": 0.0,
        **AROUND_VOXELS,
        "network_def": {
            "_target_": "UNet",
            "spatial_dims": 3,
            "in_channels": "$@plan.in_channels",
            "out_channels": "$@plan.out_channels",
            "channels": "$@plan.channels",
            "strides": "$@plan.strides",
            "num_res_units": 2,
            "norm": "batch",
        },
        "flip_prob": 0.0,
    },
    "empty skip": {"loss": _ours("IoUCELoss", lambda_ce=THIRD, empty="skip")},
    "empty suppress": {"loss": _ours("IoUCELoss", lambda_ce=THIRD, empty="suppress")},
    "area labels": {"deep_supervision": True, "downsample": "area"},
    "max labels": {"deep_supervision": True, "downsample": "max"},
    "nearest labels": {"deep_supervision": True, "downsample": "nearest"},
    "each image alone": {"loss": _ours("IoUCELoss", lambda_ce=THIRD, batch=False)},
    "copied lesions": {**_iou_ce(THIRD), **COPIED_LESIONS},
    "no flips": {**_iou_ce(THIRD), "flip_prob": 0.0},
    "attention": {"attention": True},
    # The other levels of the network stay as they are.
    "full resolution": {"full_resolution": True, "base_channels": 4},
    "augmentation 0.3": {**_iou_ce(THIRD), "augmentation": 0.3},
    "augmentation 0": {**_iou_ce(THIRD), "augmentation": 0.0},
}
RATES = (0.0005, 0.001, 0.004)  # beside the bundle's 0.002
RATED = ("iou+ce/3", "dice+ce", "iou")
LOSSES |= {f"{loss}, rate {rate:g}": {**LOSSES[loss], "learning_rate": rate} for loss in RATED for rate in RATES}


def _by_size(exponent: float, jitter: float) -> Overrides:
    return {"size_exponent": exponent, "crop_jitter": jitter}


# What the column `sampler` may name: crops around a foreground voxel, as MONAI's, or around components drawn by their
# size to the power of q, with the voxel in the middle of the patch or anywhere in its middle half.
SAMPLERS: dict[str, Overrides] = {
    "voxels": AROUND_VOXELS,
    "q=1, centred": _by_size(1.0, 0.0),
    "q=1": _by_size(1.0, 0.5),
    "q=1/2, centred": _by_size(0.5, 0.0),
    "q=1/2": _by_size(0.5, 0.5),
    "q=1/3": _by_size(THIRD, 0.5),
    "q=0": _by_size(0.0, 0.5),
}
