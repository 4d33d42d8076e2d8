# %% [markdown]
# # My first training
#
# From a folder of labelled volumes to masks of new scans and to scores. Everything is written to a new temporary
# folder. The data are generated here, so that nothing is downloaded, and so small that all commands together take
# about a minute at most; the scores after two epochs are meaningless.
#
# The cells call the commands from Python. In a shell, `run("train", data, "--output", model)` is `monai-iou train
# DATA --output MODEL`.

# %%
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from monai_iou.cli import main
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.files import read_csv

folder = Path(tempfile.mkdtemp(prefix="first_training_"))


def run(*words: object) -> None:
    """Run a command as in a shell, and stop if it fails."""
    if main([str(word) for word in words]) != 0:
        message = f"the command {words[0]} failed"
        raise SystemExit(message)


# %% [markdown]
# ## The data
#
# A folder in the layout of the Medical Segmentation Decathlon: `dataset.json` names the images, their labels and what
# the values mean. Four volumes are for training; two have labels that the training does not see.

# %%
data = write_phantom_dataset(folder / "data", training=4, evaluation=2, shape=(24, 24, 16))
print((data / "dataset.json").read_text())

# %% [markdown]
# ## Train
#
# One command copies the bundle, plans the training for the data and this machine, trains, and scores the cases that
# it held out. `--epochs` and the keys after it make this training tiny. Leave them all out for your own data: then the
# plan decides. With `--minutes 60`, the training is planned to end within an hour.

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

# %% [markdown]
# ## Look at it
#
# `summary.html` shows the curves, the scores of the held-out cases, and the worst of them slice by slice. The numbers
# are in `epochs.csv`.

# %%
for row in read_csv(model / "epochs.csv"):
    print(row["epoch"], row["train_loss"], row["val_mean_iou"])
assert (model / "summary.html").is_file()
assert (model / "progress.png").is_file()

# %% [markdown]
# ## Predict
#
# A mask lies on exactly the grid of its image. `--preview` draws its contours over the image.

# %%
scans = data / "imagesTs"
run("predict", model, scans, "--output", folder / "masks", "--preview")
scan = min(scans.glob("*.nii.gz"))
image, mask = nib.load(scan), nib.load(folder / "masks" / scan.name)
assert mask.shape == image.shape
assert np.array_equal(mask.affine, image.affine)

# %% [markdown]
# ## Score the masks
#
# The report has IoU, Dice, surface and lesion scores with confidence intervals; `cases.csv` has a row per case and
# label.

# %%
scores = folder / "scores"
run(
    "evaluate", "--predictions", folder / "masks", "--references", data / "labelsTs", "--output", scores, "--workers", 1
)
for row in read_csv(scores / "cases.csv"):
    print(row["case"], row["label"], row["iou"], row["dice"])
print(f"Open {scores / 'report.html'} in a browser.")
