"""The studies: what is compared on which data, as overrides of the bundle with everything else equal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.evidence.choices import LOSSES, RATED, RATES, SAMPLERS, Overrides


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
    **{f"task904, {minutes} min": Data("task904", {"training": 208}, minutes=minutes) for minutes in (10, 30)},
    "task904, 30 min, 2 threads": Data("task904", {"training": 208}, minutes=30, threads=2),
    "task904, 8, 1.5 min": Data("task904", {"training": 8}, minutes=1.5),
}


@dataclass(frozen=True)
class Run:
    """One training: a row of the study's table."""

    study: str
    data: str
    loss: str
    sampler: str
    seed: int
    fold: int

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What tells the run from the others of its study."""
        return (self.data, self.loss, self.sampler, self.seed, self.fold)

    @property
    def words(self) -> tuple[str, ...]:
        """What `--only` may name it by."""
        return (self.data, self.loss, self.sampler, f"seed={self.seed}", f"fold={self.fold}")

    @property
    def folder(self) -> str:
        """A file name for it."""
        return "-".join(map(str, self.key)).replace(" ", "_").replace("/", "_")


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
        baseline: the (loss, sampler) that the others are compared with.
        primary: the one score that decides, a column of the table of cases.
        amounts: of the foreground in each of `data`, in %: the scores are drawn over it.
        quick: what `--quick` changes: `epochs` of every run, and `data` to those named.
    """

    name: str
    question: str
    data: tuple[str, ...]
    losses: tuple[str, ...]
    baseline: tuple[str, str]
    samplers: tuple[str, ...] = ("voxels",)
    seeds: tuple[int, ...] = (0, 1, 2)
    primary: str = "iou"
    amounts: tuple[float, ...] = ()
    quick: Overrides = field(default_factory=lambda: {"epochs": 3})

    def runs(self, *, quick: bool = False) -> list[Run]:
        """Return the runs in the order in which they are made: a seed of everything before the next.

        So a study that is stopped has as many seeds of one choice as of another, but for the seed that was being made.
        """
        if quick:
            return self._quick_runs()
        return [
            Run(self.name, name, loss, sampler, seed, fold)
            for seed in self.seeds
            for name in self.data
            for fold in range(DATA[name].folds)
            for sampler in self.samplers
            for loss in self.losses
        ]

    def _quick_runs(self) -> list[Run]:
        """Return one seed and fold of every loss with the first sampler, and of every other sampler with one loss."""
        pairs = [(loss, self.samplers[0]) for loss in self.losses]
        pairs += [(self.losses[0], sampler) for sampler in self.samplers[1:]]
        data = self.quick.get("data", self.data)
        return [Run(self.name, name, loss, sampler, self.seeds[0], 0) for name in data for loss, sampler in pairs]


STUDIES: dict[str, Study] = {
    study.name: study
    for study in [
        Study(
            "compound",
            "Which weight should the cross-entropy have beside IoU, and beside Dice?",
            ("phantoms",),
            (
                "iou+ce/3",
                "dice+ce",
                "iou",
                "iou+ce",
                "dice+ce/3",
                "iou+ce/10",
                "dice+ce as it comes",
                "dice",
                "dice+ce/10",
            ),
            baseline=("iou+ce/3", "voxels"),
            seeds=(0, 1, 2, 3, 4),
        ),
        Study(
            "sampler",
            "Which sampling of patches is the best if lesions differ greatly in size?",
            ("unequal",),
            ("dice+ce", "iou+ce/3", "instance"),
            samplers=("voxels", "q=1/2", "q=0", "q=1/3", "q=1", "q=1/2, centred", "q=1, centred"),
            baseline=("dice+ce", "voxels"),
            primary="lesion_f1",
            quick={"epochs": 1},
        ),
        Study(
            "longer",
            "Which loss finds small lesions beside a large one after twice the steps?",
            ("unequal, 720 steps",),
            ("dice+ce", "iou+ce/3", "instance"),
            samplers=("q=1/2", "voxels"),
            baseline=("dice+ce", "q=1/2"),
            primary="lesion_f1",
            quick={"epochs": 1},
        ),
        Study(
            "shapes",
            "Do the same losses and samplings work on real lesion shapes in synthetic images?",
            ("shapes",),
            ("dice+ce", "iou+ce/3", "instance"),
            samplers=("voxels", "q=1/2", "q=0"),
            baseline=("dice+ce", "voxels"),
            primary="lesion_f1",
            quick={"epochs": 1},
        ),
        Study(
            "imbalance",
            "How well does each loss work as the foreground becomes smaller?",
            tuple(f"{share:g} %" for share in SHARES),
            ("ce", "weighted ce", "dice+ce", "iou", "iou+ce/3", "lovasz+ce", "generalised iou", "instance"),
            samplers=("q=1/2",),
            baseline=("iou+ce/3", "q=1/2"),
            amounts=SHARES,
            quick={"epochs": 1, "data": ("0.03 %",)},
        ),
        Study(
            "rates",
            "Does the order of the losses depend on the learning rate?",
            ("0.1 %",),
            (*RATED, *(f"{loss}, rate {rate:g}" for loss in RATED for rate in RATES)),
            samplers=("q=1/2",),
            baseline=("iou+ce/3", "q=1/2"),
            quick={"epochs": 1},
        ),
        Study(
            "real",
            "Which loss is the best on real scans?",
            ("task901", "task902", "task904, 8", "task904, 32", "task904, 208"),
            ("dice+ce", "iou+ce/3", "dice+ce as it comes", "iou", "planned"),
            samplers=("q=1/2",),
            baseline=("iou+ce/3", "q=1/2"),
            quick={"epochs": 1, "data": ("task904, 8",)},
        ),
        Study(
            "peers",
            "How does the bundle compare with the settings of MONAI's tutorial at the same number of steps?",
            ("task901", "task904, 208"),
            ("monai tutorial", "dice+ce", "iou+ce/3"),
            samplers=("q=1/2",),
            baseline=("iou+ce/3", "q=1/2"),
            quick={"epochs": 1, "data": ("task901",)},
        ),
        Study(
            "short",
            "How much should a short training change its images at random?",
            ("task904, 468 steps",),
            ("iou+ce/3", "augmentation 0.3", "augmentation 0"),
            samplers=("q=1/2",),
            baseline=("iou+ce/3", "q=1/2"),
            primary="dice",
            quick={"epochs": 1},
        ),
        Study(
            "minutes",
            "How good is the best-known training of each package after the same number of minutes?",
            ("task904, 10 min", "task904, 30 min", "task904, 30 min, 2 threads"),
            ("ours", "bare loop", "nnU-Net, batch of 2", "nnU-Net, IoU, batch of 2"),
            samplers=("own",),
            baseline=("ours", "own"),
            primary="dice",
            quick={"data": ("task904, 8, 1.5 min",)},
        ),
        Study(
            "choices",
            "How much does each of the other settings change the result?",
            ("unequal",),
            (
                "iou+ce/3",
                "empty skip",
                "empty suppress",
                "area labels",
                "max labels",
                "nearest labels",
                "lovasz+ce",
                "lovasz+ce sorted",
                "each image alone",
                "copied lesions",
                "no flips",
                "attention",
                "full resolution",
            ),
            samplers=("q=1/2",),
            baseline=("iou+ce/3", "q=1/2"),
            quick={"epochs": 1},
        ),
    ]
}


def overrides(run: Run, *, quick: bool = False) -> dict[str, Any]:
    """Return the overrides of the bundle that make this run."""
    chosen: dict[str, Any] = {
        "case_repeats": 1,
        **DATA[run.data].settings,
        "val_fraction": 0,
        **SAMPLERS[run.sampler],
        **LOSSES[run.loss],
        "seed": run.seed,
    }
    if quick:
        chosen["epochs"] = STUDIES[run.study].quick["epochs"]
    return {**chosen, "val_interval": chosen["epochs"]}


def select(runs: Iterable[Run], words: Iterable[str]) -> list[Run]:
    """Return the runs that have one of the words in each of their parts that the words name; all of them without words.

    >>> runs = STUDIES["compound"].runs()
    >>> {run.loss for run in select(runs, ["iou"])}, len(select(runs, []))
    ({'iou'}, 45)
    >>> [(run.loss, run.seed) for run in select(runs, ["iou", "dice", "seed=1"])]
    [('iou', 1), ('dice', 1)]
    """
    runs = list(runs)
    named = [set(words) & {run.words[part] for run in runs} for part in range(5)]
    unknown = set(words) - {word for words in named for word in words}
    return (
        [] if unknown else [run for run in runs if all(not n or w in n for n, w in zip(named, run.words, strict=True))]
    )
