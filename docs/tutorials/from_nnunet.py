# %% [markdown]
# # From an nnU-Net folder
#
# The raw data of nnU-Net v2 are read as they are: `dataset.json` with names of channels and labels,
# `imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz`, and `splits_final.json` if there is one. This folder has two
# channels and an `ignore` label. Everything is written to a new temporary folder; the data are generated here.

# %%
import json
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from monai_iou.cli import main
from monai_iou.files import read_csv

folder = Path(tempfile.mkdtemp(prefix="from_nnunet_"))
data = folder / "Dataset042_Nodules"
IGNORE = 3


def run(*words: object) -> None:
    """Run a command as in a shell, and stop if it fails."""
    if main([str(word) for word in words]) != 0:
        message = f"the command {words[0]} failed"
        raise SystemExit(message)


def save(array: np.ndarray, path: Path) -> None:
    """Write a volume with voxels of 1 x 1 x 2 mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 2.0, 1.0])), path)


# %% [markdown]
# ## The data
#
# A nodule with a core, bright in the first channel, its core in the second. The lowest slices were not annotated.

# %%
generator = np.random.default_rng(0)
for number in range(6):
    part = "Tr" if number < 4 else "Ts"
    centre = generator.uniform([8, 8, 6], [16, 16, 10])
    distance = np.linalg.norm(np.moveaxis(np.indices((24, 24, 16)), 0, -1) - centre, axis=-1)
    label = (distance < 5).astype(np.uint8) + (distance < 3).astype(np.uint8)
    for channel in range(2):
        image = generator.normal(0, 0.3, label.shape) + 2 * (label > channel)
        save(image.astype(np.float32), data / f"images{part}" / f"nodule_{number:02d}_{channel:04d}.nii.gz")
    label[:, :, :2] = IGNORE
    save(label, data / f"labels{part}" / f"nodule_{number:02d}.nii.gz")
description = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "rim": 1, "core": 2, "ignore": IGNORE},
    "numTraining": 4,
    "file_ending": ".nii.gz",
}
(data / "dataset.json").write_text(json.dumps(description))

# %% [markdown]
# `splits_final.json` decides the folds as in nnU-Net, if it has as many entries as `--folds` asks for.

# %%
names = [f"nodule_{number:02d}" for number in range(4)]
splits = [{"train": names[2:], "val": names[:2]}, {"train": names[:2], "val": names[2:]}]
(data / "splits_final.json").write_text(json.dumps(splits))

# %% [markdown]
# ## Train both folds
#
# One command trains every fold, predicts the cases that each held out, and scores all of them in one report. If it is
# stopped, the same command continues it. `--epochs` and the keys after it make this training tiny. Leave them all out
# for your own data: then the plan decides.

# %%
model = folder / "model"
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
run("train", data, "--output", model, "--folds", 2, "--epochs", 2, *tiny)
rows = read_csv(model / "validation" / "cases.csv")
assert {row["case"] for row in rows} == set(names), "every case once, by a model that has not seen it"
assert {row["label"] for row in rows} == {"1", "2"}, "the ignored voxels are no class"

# %% [markdown]
# ## Predict with both folds
#
# The probabilities of all folds are averaged. Masks are named as in nnU-Net: CASE without the channel.

# %%
run("predict", model, data / "imagesTs", "--output", folder / "masks", "--folds", "all")
masks = sorted((folder / "masks").glob("*.nii.gz"))
assert [mask.name for mask in masks] == ["nodule_04.nii.gz", "nodule_05.nii.gz"]
assert not any((np.asanyarray(nib.load(mask).dataobj) == IGNORE).any() for mask in masks), "never predicted"
print(f"Open {model / 'validation' / 'report.html'} in a browser.")
