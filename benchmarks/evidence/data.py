"""The data of the studies: how each set is made, and what the bundle is told on it whatever the choice."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.evidence.choices import Overrides


@dataclass(frozen=True)
class Data:
    """A data set: its builder in `datasets.py` with arguments, the bundle's settings on it, its folds.

    With `minutes`, a run is one of `contestants.py` that trains for so long on so many threads, and not the bundle by
    overrides.
    """

    builder: str
    arguments: Overrides = field(default_factory=dict)
    settings: Overrides = field(default_factory=dict)
    folds: int = 1
    minutes: float | None = None
    threads: int = 1


PILOT = {"patch_size": [48, 48, 32], "epochs": 60}
# For the studies of many choices: half the channels and half the patches a step, so that a run takes a few minutes.
SMALL = {**PILOT, "base_channels": 8, "num_samples": 1}

HIPPOCAMPUS = {"patch_size": [40, 56, 40], "base_channels": 8, "batch_size": 4, "flip_prob": 0.0}
CROPS = {"num_samples": 1, "positive_crops": 1, "negative_crops": 1}  # as planned where a patch holds a volume
SHARES = (3.0, 1.0, 0.3, 0.1, 0.03)  # % of the voxels

DATA: dict[str, Data] = {
    "phantoms": Data("phantoms", {"training": 12, "evaluation": 24}, PILOT),
    "unequal": Data("phantoms", {"training": 12, "evaluation": 24, "lesions": "unequal"}, SMALL),
    "unequal, 720 steps": Data(
        "phantoms", {"training": 12, "evaluation": 24, "lesions": "unequal"}, {**SMALL, "epochs": 120}
    ),
    "shapes": Data("shapes", {}, {**SMALL, "patch_size": [48, 48, 48], "epochs": 30}),
    **{
        f"{share:g} %": Data("phantoms", {"training": 12, "evaluation": 24, "foreground": share / 100}, SMALL)
        for share in SHARES
    },
    "task901": Data("task901", {}, {"patch_size": [48, 48, 48], "epochs": 30, "case_repeats": 2}, folds=3),
    "task902": Data("task902", {}, {"patch_size": [64, 64, 32], "epochs": 60}, folds=3),
    # About 600 steps whatever the number of volumes.
    "task904, 8": Data("task904", {"training": 8}, {**HIPPOCAMPUS, "epochs": 300}),
    "task904, 32": Data("task904", {"training": 32}, {**HIPPOCAMPUS, "epochs": 75}),
    "task904, 208": Data("task904", {"training": 208}, {**HIPPOCAMPUS, "epochs": 12}),
    # About the steps of `--minutes 5` on two slow cores, with the network that it plans.
    "task904, 468 steps": Data("task904", {"training": 208}, {**HIPPOCAMPUS, "base_channels": 16, "epochs": 9} | CROPS),
    **{
        f"task904, {minutes} min, 2 threads": Data("task904", {"training": 208}, minutes=minutes, threads=2)
        for minutes in (2, 3, 5, 30)
    },
    "task904, 8, 1.5 min": Data("task904", {"training": 8}, minutes=1.5),
}
