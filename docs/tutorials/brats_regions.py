# %% [markdown]
# # BraTS: regions that overlap
#
# The label files of BraTS hold oedema, necrosis and enhancing tumour. The challenge scores the whole tumour, the core
# and the enhancing part, each a union of these values. Two keys of `dataset.json` say so, and everything follows from
# them: sigmoid outputs, losses, the sampling of patches, scores, and masks that are written back in the values of the
# files. Everything is written to a new temporary folder; the data are generated here.

# %%
import json
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from monai_iou.cli import main
from monai_iou.files import read_csv

folder = Path(tempfile.mkdtemp(prefix="brats_regions_"))
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
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0])), path)
    return name


# %% [markdown]
# ## The data
#
# Each case has four sequences, in files whose names end in `_0000` to `_0003`. The labels have the values 1 (oedema),
# 2 (necrosis) and 3 (enhancing). These are the values of nnU-Net's conversion. In the challenge's own files, 1 is
# necrosis and 2 is oedema: exchange the names, and write `"core": [1, 3]` and `"regions_class_order": [2, 1, 3]`. In
# those of 2021 and before, the enhancing tumour is 4: write 4 in the place of 3.

# %%
SEQUENCES = ("flair", "t1", "t1ce", "t2")
generator = np.random.default_rng(0)
cases = []
for number in range(5):
    centre = generator.uniform(9, 15, size=3)
    distance = np.linalg.norm(np.moveaxis(np.indices((24, 24, 24)), 0, -1) - centre, axis=-1)
    label = sum((distance < radius).astype(np.uint8) for radius in (7, 5, 3))
    noise = generator.normal(0, 0.3, (len(SEQUENCES), *label.shape)).astype(np.float32)
    images = [save(noise[k] + (label > k % 3), f"images/c{number}_{k:04d}.nii.gz") for k in range(len(SEQUENCES))]
    cases.append({"image": images, "label": save(label, f"labels/c{number}.nii.gz")})
description = {
    "modality": {str(k): name for k, name in enumerate(SEQUENCES)},
    "labels": {"0": "background", "1": "oedema", "2": "necrosis", "3": "enhancing"},
    "regions": {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
    "regions_class_order": [1, 2, 3],
    "training": cases[:4],
    "test_labelled": cases[4:],
}
(data / "dataset.json").write_text(json.dumps(description))

# %% [markdown]
# ## Train
#
# The validation scores are those of the three regions. `--epochs` and the keys after it make this training tiny. Leave
# them all out for your own data: then the plan decides.

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
run("train", data, "--output", model, "--epochs", 2, "--val_fraction", 0.3, *tiny)
rows = read_csv(model / "validation" / "cases.csv")
assert {row["label"] for row in rows} == {"whole", "core", "enhancing"}

# %% [markdown]
# ## Predict
#
# A region whose probability exceeds one half is written as its value of `regions_class_order`, later regions over
# earlier ones: the mask has the values of the label files. Any one of the four files stands for the
# whole case.

# %%
run("predict", model, data / cases[4]["image"][0], "--output", folder / "masks")
mask = np.asanyarray(nib.load(folder / "masks" / "c4.nii.gz").dataobj)
assert set(np.unique(mask)) <= {0, 1, 2, 3}

# %% [markdown]
# ## Score
#
# The regions are named here (with the challenge's own values, `core=1+3`). Where the references lie in `labelsTr` or
# `labelsTs` of the dataset, `monai-iou evaluate` takes them from its dataset.json.

# %%
scores = folder / "scores"
regions = "whole=1+2+3,core=2+3,enhancing=3"
pair = ("--predictions", folder / "masks" / "c4.nii.gz", "--references", data / cases[4]["label"])
run("evaluate", *pair, "--output", scores, "--regions", regions)
for row in read_csv(scores / "cases.csv"):
    print(row["case"], row["label"], row["iou"], row["lesion_f1"])
