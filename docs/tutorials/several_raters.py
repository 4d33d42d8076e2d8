# %% [markdown]
# # Several raters
#
# Three people have drawn the same lesions, and they disagree at the border. A list of files in `dataset.json` keeps
# all of them. The training then aims at the share of raters that see a lesion in a voxel, by losses in their form for
# soft labels; or at the label of one rater who is drawn anew for each case in each epoch. Everything is written to a
# new temporary folder; the data are generated here.

# %%
import json
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from monai_iou import IoULoss
from monai_iou.cli import main

folder = Path(tempfile.mkdtemp(prefix="several_raters_"))
data = folder / "data"


def run(*words: object) -> None:
    """Run a command as in a shell, and stop if it fails."""
    if main([str(word) for word in words]) != 0:
        message = f"the command {words[0]} failed"
        raise SystemExit(message)


def save(array: np.ndarray, name: str) -> str:
    """Write a volume and return its name."""
    path = data / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.5, 1.0])), path)
    return name


# %% [markdown]
# ## The data
#
# Each rater draws a ball of a different radius.

# %%
generator = np.random.default_rng(0)
cases = []
for number in range(4):
    centre = generator.uniform([8, 8, 6], [16, 16, 10])
    distance = np.linalg.norm(np.moveaxis(np.indices((24, 24, 16)), 0, -1) - centre, axis=-1)
    image = generator.normal(0, 0.3, distance.shape) + 2 / (1 + np.exp(distance - 4))
    raters = [(distance < radius).astype(np.uint8) for radius in (3.5, 4, 5)]
    labels = [save(label, f"labels/c{number}_rater{k}.nii.gz") for k, label in enumerate(raters)]
    cases.append({"image": save(image.astype(np.float32), f"images/c{number}.nii.gz"), "label": labels})
description = {"modality": {"0": "MR"}, "labels": {"0": "background", "1": "lesion"}, "training": cases}
(data / "dataset.json").write_text(json.dumps(description))

# %% [markdown]
# ## Why the form for soft labels
#
# A network that predicts exactly the share of the raters should not be penalised. The plain IoU loss penalises even
# this prediction, and penalises an overconfident one less; with `soft_label=True`, the loss is lowest where it should
# be.

# %%
share = torch.as_tensor(np.mean(raters, axis=0), dtype=torch.float32)[None, None]
sure = (share > 0.5).float()
for loss in (IoULoss(), IoULoss(soft_label=True)):
    print(f"the share {loss(share, share):.3f}, an overconfident answer {loss(sure, share):.3f}")
assert IoULoss(soft_label=True)(share, share) < 1e-6
assert IoULoss()(sure, share) < IoULoss()(share, share)

# %% [markdown]
# ## Train on the mean
#
# `monai-iou train` finds the lists of raters and chooses `soft_label`. The reference for the scores is the majority.
# `--epochs` and the keys after it make this training tiny. Leave them all out for your own data: then the plan decides.

# %%
tiny = (
    "--patch_size",
    "[16, 16, 16]",
    "--base_channels",
    4,
    "--batch_size",
    2,
    "--num_samples",
    1,
    "--case_repeats",
    1,
)
common = ("--epochs", 2, "--val_fraction", 0.3, *tiny)
run("train", data, "--output", folder / "mean", *common)
plan = json.loads((folder / "mean" / "configs" / "plan.json").read_text())
assert plan["loss"]["soft_label"] is True

# %% [markdown]
# ## Or draw a rater
#
# The network then sees each opinion as a whole. `seed` decides who is drawn, so that a stopped training continues
# with the same draws.

# %%
loss = {"_target_": "monai_iou.IoUCELoss", "softmax": True, "include_background": False, "batch": True}
run("train", data, "--output", folder / "drawn", *common, "--raters", "draw", "--loss", loss)
for name in ("mean", "drawn"):
    stored = json.loads((folder / name / "models" / "model.json").read_text())
    print(name, "trains on shares" if stored["mean_of_raters"] else "trains on one label at a time")
