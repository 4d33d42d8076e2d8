"""The studies: what is compared on which data, as overrides of the bundle with everything else equal."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.evidence.choices import LOSSES, RATED, RATES, SAMPLERS, Overrides
from benchmarks.evidence.data import DATA, SHARES


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
        more_choices: of (loss, sampler) beside every loss with every sampler, where all of them would cost too much.
        more_seeds: seeds beside `seeds` of single data, losses, data with a loss ("task904, 8, iou"), or losses with a
            sampler ("iou, q=1/2"), where three leave the answer open.
        needs_gpu: whether a run shows nothing without one; quick runs are made on a CPU as well.
        amounts: of the foreground in each of `data`, in %: the scores are drawn over it.
        quick: what `--quick` changes: `epochs` of every run, and `data` to those named.
    """

    name: str
    question: str
    data: tuple[str, ...]
    losses: tuple[str, ...]
    baseline: tuple[str, str]
    samplers: tuple[str, ...] = ("voxels",)
    more_choices: tuple[tuple[str, str], ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    more_seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    primary: str = "iou"
    needs_gpu: bool = False
    amounts: tuple[float, ...] = ()
    quick: Overrides = field(default_factory=lambda: {"epochs": 3})

    @property
    def choices(self) -> list[tuple[str, str]]:
        """Every (loss, sampler) of the study."""
        return [*((loss, sampler) for sampler in self.samplers for loss in self.losses), *self.more_choices]

    def runs(self, *, quick: bool = False) -> list[Run]:
        """Return the runs in the order in which they are made: a seed of everything before the next.

        So a study that is stopped has as many seeds of one choice as of another, but for the seed that was being made.
        """
        if quick:
            return self._quick_runs()
        return [
            Run(self.name, name, loss, sampler, seed, fold)
            for seed in sorted({*self.seeds, *(seed for more in self.more_seeds.values() for seed in more)})
            for name in self.data
            for fold in range(DATA[name].folds)
            for loss, sampler in self.choices
            if seed in self.seeds
            or any(
                seed in self.more_seeds.get(part, ()) for part in (name, loss, f"{name}, {loss}", f"{loss}, {sampler}")
            )
        ]

    def _quick_runs(self) -> list[Run]:
        """Return one seed and fold of every loss, and of every sampler with the first loss that it has."""
        first: list[tuple[str, str]] = []
        for part in (0, 1):
            for pair in self.choices:
                if pair[part] not in {chosen[part] for chosen in first}:
                    first.append(pair)
        data = self.quick.get("data", self.data)
        return [Run(self.name, name, loss, sampler, self.seeds[0], 0) for name in data for loss, sampler in first]


SAMPLINGS = ("voxels", "q=1/2", "q=0", "q=1/3", "q=1", "q=1/2, centred", "q=1, centred")
# Beside three losses with every sampling: losses that two samplings tell enough about.
FEW_SAMPLINGS = tuple((loss, sampler) for loss in ("iou", "instance, both cells") for sampler in ("q=1/2", "voxels"))

# The weights of the cross-entropy beside IoU and Dice.
WEIGHTS = (
    "iou+ce/3",
    "dice+ce",
    "iou",
    "iou+ce",
    "dice+ce/3",
    "iou+ce/10",
    "dice+ce as it comes",
    "dice",
    "dice+ce/10",
)

STUDIES: dict[str, Study] = {
    study.name: study
    for study in [
        Study(
            "compound",
            "Which weight should the cross-entropy have beside IoU, and beside Dice?",
            ("phantoms",),
            WEIGHTS,
            baseline=("iou+ce/3", "voxels"),
            seeds=(0, 1, 2, 3, 4),
        ),
        Study(
            "sampler",
            "Which sampling of patches is the best if lesions differ greatly in size?",
            ("unequal",),
            ("dice+ce", "iou+ce/3", "instance", "iou", "instance, both cells"),
            samplers=SAMPLINGS,
            baseline=("dice+ce", "voxels"),
            # The seeds of the other rows differ by less than 0.02.
            more_seeds=dict.fromkeys(
                ("instance", "iou", "instance, both cells", "dice+ce, voxels", "iou+ce/3, q=1/2"), (3, 4)
            ),
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
            more_seeds={"instance": (3, 4), "dice+ce": (3, 4)},
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
            "patches",
            "Which sampling of patches is the best on MS lesions?",
            ("task901",),
            ("iou+ce/3", "dice+ce", "instance"),
            samplers=("q=1/2", *(sampler for sampler in SAMPLINGS if sampler != "q=1/2")),
            more_choices=FEW_SAMPLINGS,
            baseline=("iou+ce/3", "q=1/2"),
            # Nine of 18 rows whose three seeds differ by 0.02 or more, all above 0.03 among them; and two of `real`.
            more_seeds=dict.fromkeys(
                (
                    *(f"{loss}, q=1/2" for loss in ("iou+ce/3", "dice+ce", "iou")),
                    *(f"{loss}, q=1" for loss in ("iou+ce/3", "dice+ce", "instance")),
                    *(f"{loss}, q=1, centred" for loss in ("iou+ce/3", "dice+ce", "instance")),
                    "dice+ce, q=0",
                    "instance, voxels",
                ),
                (3, 4),
            ),
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
            more_seeds={f"{share:g} %": (3, 4) for share in SHARES},
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
            more_seeds={"0.1 %": (3, 4)},
            quick={"epochs": 1},
        ),
        Study(
            "real",
            "Which loss is the best on real scans?",
            ("task901", "task902", "task904, 8", "task904, 32", "task904, 208"),
            ("dice+ce", "iou+ce/3", "dice+ce as it comes", "iou", "planned"),
            samplers=("q=1/2",),
            baseline=("iou+ce/3", "q=1/2"),
            # With six patients, only more trainings make it more precise; the seeds of "iou" differ by more than 0.1.
            more_seeds=dict.fromkeys(("task901", *(f"task904, {n}, iou" for n in (8, 32, 208))), (3, 4)),
            quick={"epochs": 1, "data": ("task904, 8",)},
        ),
        Study(
            "planned",
            "Does the loss matter with the settings that a plan chooses for the data?",
            ("task901", "task902", "task904, 32"),
            ("planned", "planned, dice+ce"),
            samplers=("q=1/2",),
            more_seeds={"task901": (3, 4)},  # with six patients, only more trainings make it more precise
            baseline=("planned", "q=1/2"),
            quick={"epochs": 1, "data": ("task901",)},
        ),
        Study(
            "weights",
            "Which weight should the cross-entropy have on real lesions?",
            ("task901",),
            WEIGHTS,
            samplers=("q=1/2",),
            baseline=("iou+ce/3", "q=1/2"),
            # The rows whose seeds differ by 0.02 or more, and those that the study of real scans has.
            more_seeds=dict.fromkeys(
                ("iou+ce/3", "dice+ce", "dice+ce as it comes", "iou", "iou+ce/10", "dice"), (3, 4)
            ),
            quick={"epochs": 1},
        ),
        Study(
            "peers",
            "How does the bundle compare with the settings of MONAI's tutorial at the same number of steps?",
            ("task901", "task904, 208"),
            ("monai tutorial", "dice+ce", "iou+ce/3"),
            samplers=("q=1/2",),
            baseline=("iou+ce/3", "q=1/2"),
            more_seeds={"task901": (3, 4), "task904, 208": (3, 4)},
            quick={"epochs": 1, "data": ("task901",)},
        ),
        Study(
            "short",
            "How much should a short training change its images at random?",
            ("task904, 468 steps",),
            ("iou+ce/3", "augmentation 0.3", "augmentation 0"),
            samplers=("q=1/2",),
            baseline=("iou+ce/3", "q=1/2"),
            seeds=(0, 1, 2, 3, 4),
            primary="dice",
            quick={"epochs": 1},
        ),
        Study(
            "early",
            "After how many minutes on two cores does a training reach a Dice of 0.85?",
            tuple(f"task904, {minutes} min, 2 threads" for minutes in (2, 3, 5)),
            ("ours", "bare loop"),
            samplers=("own",),
            baseline=("ours", "own"),
            primary="dice",
            quick={"data": ("task904, 8, 1.5 min",)},
        ),
        Study(
            "minutes",
            "How good is a training of each package after the same number of minutes?",
            ("task904, 30 min, 2 threads",),
            (
                "ours",
                "bare loop",
                "nnU-Net, batch of 2",
                "nnU-Net, no mirroring, batch of 2",
                "nnU-Net, IoU, batch of 2",
            ),
            samplers=("own",),
            baseline=("ours", "own"),
            primary="dice",
            quick={"data": ("task904, 8, 1.5 min",)},
        ),
        Study(
            "precision",
            "In which number format should a GPU train?",
            ("task902",),
            ("planned, bfloat16", "planned, float16", "planned, float32"),
            samplers=("q=1/2",),
            baseline=("planned, bfloat16", "q=1/2"),
            needs_gpu=True,
            quick={"epochs": 1},
        ),
        Study(
            "half",
            "Does bfloat16 on a CPU change what is learnt?",
            ("task901", "task904, 32", "task904, 208"),
            ("iou+ce/3", "iou+ce/3, bfloat16"),
            samplers=("q=1/2",),
            baseline=("iou+ce/3", "q=1/2"),
            quick={"epochs": 1, "data": ("task901",)},
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
            more_seeds={"attention": (3, 4), "iou+ce/3": (3, 4)},
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
    # A copy, because MONAI changes the configs that it is given, and the row's hash is taken after the training.
    return copy.deepcopy({**chosen, "val_interval": chosen["epochs"]})


def settings(run: Run) -> str:
    """Return what a run was told to do, as a short hash: a row with another one was made by other settings."""
    data = DATA[run.data]
    told = {} if data.minutes else overrides(run)
    made = {
        name: value for name, value in asdict(data).items() if name in ("builder", "arguments", "minutes", "threads")
    }
    text = json.dumps([made, told, run.loss if data.minutes else ""], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


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
