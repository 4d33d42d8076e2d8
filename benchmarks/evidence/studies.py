"""The studies: what is compared on which data, as overrides of the bundle with everything else equal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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


# Everything that a row's column `loss` may name. An entry may override more than the loss, and add configs.
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
    "instance": {"configs": ["instance"]},
}

# What the column `sampler` may name.
SAMPLERS: dict[str, Overrides] = {"voxels": {}}


@dataclass(frozen=True)
class Data:
    """A data set: its builder in `datasets.py` with arguments, the bundle's settings on it, its folds."""

    builder: str
    arguments: Overrides = field(default_factory=dict)
    settings: Overrides = field(default_factory=dict)
    folds: int = 1


PILOT = {"patch_size": [48, 48, 32], "epochs": 60}

DATA: dict[str, Data] = {
    "phantoms": Data("phantoms", {"training": 12, "evaluation": 24}, PILOT),
    "task901": Data("task901", {}, {"patch_size": [48, 48, 48], "epochs": 60, "case_repeats": 2}, folds=6),
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
    def folder(self) -> str:
        """A file name for it."""
        return "-".join(map(str, self.key)).replace(" ", "_").replace("/", "_")


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
        baseline: the (loss, sampler) that the others are compared with.
        primary: the one score that decides, a column of the table of cases.
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
    quick: Overrides = field(default_factory=lambda: {"epochs": 3})

    def runs(self, *, quick: bool = False) -> list[Run]:
        """Return the runs in the order in which they are made: a seed of everything before the next.

        So a study that is stopped has as many seeds of one choice as of another, but for the seed that was being made.
        """
        data = tuple(self.quick.get("data", self.data)) if quick else self.data
        return [
            Run(self.name, name, loss, sampler, seed, fold)
            for seed in (self.seeds[:1] if quick else self.seeds)
            for name in data
            for fold in range(1 if quick else DATA[name].folds)
            for sampler in self.samplers
            for loss in self.losses
        ]


STUDIES: dict[str, Study] = {
    study.name: study
    for study in [
        Study(
            "compound",
            "How much cross-entropy beside IoU, and beside Dice?",
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
            baseline=("dice+ce", "voxels"),
        ),
    ]
}


def overrides(run: Run, *, quick: bool = False) -> tuple[list[str], dict[str, Any]]:
    """Return the configs behind train.json, and the overrides of the bundle that make this run."""
    chosen: dict[str, Any] = {
        **DATA[run.data].settings,
        "val_fraction": 0,
        **SAMPLERS[run.sampler],
        **LOSSES[run.loss],
        "seed": run.seed,
    }
    if quick:
        chosen["epochs"] = STUDIES[run.study].quick["epochs"]
    configs: list[str] = chosen.pop("configs", [])
    return configs, {**chosen, "val_interval": chosen["epochs"]}


def select(runs: Iterable[Run], words: Iterable[str]) -> list[Run]:
    """Return the runs of which a part is one of the words; all of them without words.

    >>> runs = STUDIES["compound"].runs()
    >>> {run.loss for run in select(runs, ["iou"])}, len(select(runs, []))
    ({'iou'}, 27)
    """
    wanted = set(words)
    return [run for run in runs if not wanted or wanted & {str(part) for part in run.key}]
