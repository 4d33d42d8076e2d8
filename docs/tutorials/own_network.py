# %% [markdown]
# # My own network
#
# The bundle trains any network that returns logits for a patch. `--network` selects one of MONAI's by its name; a
# small config uses a class from your own file instead. The model keeps the network, so that prediction needs
# neither config nor file. Everything is written to a new temporary folder; the data are generated here. The page
# networks.md of the documentation has all rules.

# %%
import json
import tempfile
from pathlib import Path

from monai_iou.cli import main
from monai_iou.datasets.phantoms import write_phantom_dataset

folder = Path(tempfile.mkdtemp(prefix="own_network_"))
data = write_phantom_dataset(folder / "data", training=4, evaluation=1, shape=(24, 24, 16))
scan = min((data / "imagesTs").glob("*.nii.gz"))
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


def run(*words: object) -> int:
    """Run a command as in a shell, and return its exit code."""
    return main([str(word) for word in words])


# %% [markdown]
# ## One of MONAI's networks by its name
#
# `resenc` is a U-Net with a deep residual encoder; `mednext` and `swin_unetr` are other choices. Single arguments can
# be overridden too.

# %%
network = ("--network", "resenc", "--network_def::blocks_down", "[1, 2]", "--deep_supervision", "true")
assert run("train", data, "--output", folder / "named", *common, *network) == 0

# %% [markdown]
# ## A class from a file
#
# `@plan` knows the number of channels and classes of the data.

# %%
(folder / "my_network.py").write_text(
    """
from torch import nn


class MyNetwork(nn.Module):
    def __init__(self, in_channels, out_channels, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(in_channels, width, 3, padding=1), nn.InstanceNorm3d(width), nn.ReLU(),
            nn.Conv3d(width, width, 3, padding=2, dilation=2), nn.InstanceNorm3d(width), nn.ReLU(),
            nn.Conv3d(width, out_channels, 1),
        )

    def forward(self, image):
        return self.layers(image)
"""
)
overlay = {
    "network_def": {
        "_target_": "monai_iou.workflow.own_network.from_file",
        "file": str(folder / "my_network.py"),
        "name": "MyNetwork",
        "in_channels": "$@plan.in_channels",
        "out_channels": "$@plan.out_channels",
        "width": 8,
    }
}
(folder / "my_network.json").write_text(json.dumps(overlay))
assert run("train", data, "--output", folder / "mine", "--config", folder / "my_network.json", *common) == 0

# %% [markdown]
# ## Predict without the file
#
# The text of the file is stored in `models/model.json`.

# %%
(folder / "my_network.py").unlink()
assert run("predict", folder / "mine", scan, "--output", folder / "masks") == 0
assert (folder / "masks" / scan.name).is_file()

# %% [markdown]
# ## A network that does not fit is reported before the training
#
# This network has one output too many.

# %%
overlay["network_def"] = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8],
    "strides": [2],
}
(folder / "wrong.json").write_text(json.dumps(overlay))
assert run("train", data, "--output", folder / "wrong", "--config", folder / "wrong.json", *common) == 1
