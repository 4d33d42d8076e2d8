"""Train the shipped bundle with one loss after the other, each by one override: does the loss fall, what is found?

    python -m benchmarks.losses_train --data demo/dataset --epochs 100
    python -m benchmarks.losses_train --data TaskNNN --epochs 60 --patch 64 64 64 --only ce iou_ce instance

Every run starts from the same seed with the bundle's own settings but those named on the command line, and trains on
all cases of `training`; IoU and Dice are those of `test_labelled`, with 95 % bootstrap intervals over its cases.
Without `test_labelled` a quarter of the cases is held out and scored. Results are printed as Markdown and saved after
each loss in OUTPUT/losses_train.json. Exit code 1 if a loss was not finite or did not fall: the mean over the last
epoch must be below that over the first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

REGION = {"softmax": True, "include_background": False, "batch": True}
CROSS_ENTROPY = {"_target_": "monai_iou.WeightedCrossEntropyLoss"}


def _loss(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": f"monai_iou.{name}", **REGION, **options}


LOSSES: dict[str, dict[str, Any]] = {
    "ce": {"loss": CROSS_ENTROPY},
    "weighted_ce": {"loss": {**CROSS_ENTROPY, "weight": None}},  # filled in from the training labels
    "iou": {"loss": _loss("IoULoss")},
    "iou_ce": {"loss": _loss("IoUCELoss")},
    "lovasz": {"loss": _loss("LovaszSoftmaxLoss")},
    "lovasz_ce": {
        "loss": {"_target_": "monai_iou.CompoundLoss", "losses": [_loss("LovaszSoftmaxLoss"), CROSS_ENTROPY]}
    },
    "generalized_iou": {"loss": {**_loss("GeneralizedIoULoss", w_type="simple"), "include_background": True}},
    "focal_tversky": {"loss": _loss("FocalTverskyLoss")},
    "instance": {"config": "instance"},
    "multi_scale": {"config": "multi_scale"},
    "attention": {"config": "attention"},
}


@dataclass(frozen=True)
class Result:
    """One loss: how it was trained, what became of it, IoU and Dice of each held-out case."""

    name: str
    command: str
    iterations: int
    first_epoch: float
    last_epoch: float
    finite: bool
    train_seconds: float
    evaluate_seconds: float
    cases: dict[str, tuple[float, float]]

    @property
    def fell(self) -> bool:
        """Whether every value was finite and the last epoch's mean is below the first's."""
        return self.finite and self.last_epoch < self.first_epoch


def training_weights(data: Path) -> list[float]:
    """Return inverse-frequency weights of the classes, counted in the label files of `training` alone."""
    from monai_iou import class_weights
    from monai_iou.datasets.folder import read_folder
    from monai_iou.volumes.reading import read_labels

    folder = read_folder(data)
    labels = (read_labels(case.label).array for case in folder.training if case.label is not None)
    counts = [[int((array == value).sum()) for value in sorted(folder.labels)] for array in labels]
    return [round(weight, 6) for weight in class_weights(counts).tolist()]


def train(name: str, options: argparse.Namespace) -> Result:
    """Train with one loss by the bundle, then score the held-out cases."""
    from monai_iou.bundle_files import bundle_path
    from monai_iou.demo import run_workflow

    what = LOSSES[name]
    configs = ["train", *([what["config"]] if "config" in what else [])]
    overrides = settings(options, name)
    if "loss" in what:
        overrides["loss"] = what["loss"] if name != "weighted_ce" else {**what["loss"], "weight": options.weights}
    start = time.perf_counter()
    run_workflow(bundle_path(), configs, overrides)
    trained = time.perf_counter()
    values = losses_of_iterations(Path(overrides["output_dir"]) / "tensorboard")
    epoch = len(values) // options.epochs
    evaluation = run_workflow(bundle_path(), [*configs, "evaluate"], {**overrides, "sw_overlap": 0.25})
    done = time.perf_counter()
    files = [str(bundle_path() / "configs" / f"{config}.json") for config in configs]
    return Result(
        name,
        command_line(files, overrides),
        len(values),
        fmean(values[:epoch]),
        fmean(values[-epoch:]),
        all(map(math.isfinite, values)),
        trained - start,
        done - trained,
        held_out_scores(evaluation),
    )


def settings(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the overrides that all losses share, and this one's folders."""
    folder = options.output / name
    description = json.loads((options.data / "dataset.json").read_text(encoding="utf-8"))
    return {
        "dataset_dir": str(options.data.resolve()),
        "ckpt_dir": str(folder / "models"),
        "output_dir": str(folder / "eval"),
        "epochs": options.epochs,
        "patch_size": options.patch,
        "batch_size": options.batch_size,
        "num_samples": options.num_samples,
        "base_channels": options.base_channels,
        "val_fraction": 0 if description.get("test_labelled") else 0.25,
        "val_interval": options.epochs,
        "seed": options.seed,
    }


def losses_of_iterations(folder: Path) -> list[float]:
    """Read the training loss of every iteration from the TensorBoard files that the bundle wrote."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars("train_loss")]


def held_out_scores(workflow: Any) -> dict[str, tuple[float, float]]:
    """Return case -> IoU and Dice, means over the foreground classes that it has."""
    details = workflow.evaluator.state.metric_details
    (part,) = {name.split("_")[0] for name in details}  # test, or val without test cases
    columns = [details[f"{part}_mean_{score}"].nanmean(dim=1).tolist() for score in ("iou", "dice")]
    cases = [item["case"] for item in workflow.val_dataset_data]
    return {case: (iou, dice) for case, iou, dice in zip(cases, *columns, strict=True)}


def command_line(files: list[str], overrides: Mapping[str, Any]) -> str:
    """Return MONAI's command for the same training."""
    words = ["python", "-m", "monai.bundle", "run", "--config_file", str(files)]
    for name, value in overrides.items():
        words += [f"--{name}", str(value)]
    # A shell shows double quotes as they are; single ones inside single ones would be unreadable.
    return shlex.join(word.replace("'", '"') for word in words)


def table(results: list[Result]) -> str:
    """Return the results as a Markdown table."""
    from monai_iou.evaluation.statistics import describe

    lines = [
        "| loss | first epoch | last epoch | falls | IoU | Dice | training | evaluation |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        cells = []
        for column in zip(*result.cases.values(), strict=True):
            summary = describe(column)
            interval = summary["mean_interval"]  # None below eight cases
            mean = "-" if summary["mean"] is None else f"{summary['mean']:.3f}"
            cells.append(f"{mean} ({interval[0]:.3f} to {interval[1]:.3f})" if interval else mean)
        lines.append(
            f"| {result.name} | {result.first_epoch:.4f} | {result.last_epoch:.4f} | "
            f"{'yes' if result.fell else 'NO'} | "
            f"{cells[0]} | {cells[1]} | {result.train_seconds:.0f} s | {result.evaluate_seconds:.0f} s |"
        )
    return "\n".join(lines)


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the runs share."""
    import monai
    import torch

    import monai_iou

    return {
        "data": options.data.name,
        "seed": options.seed,
        "epochs": options.epochs,
        "patch_size": options.patch,
        "weights_of_weighted_ce": options.weights,
        "torch": torch.__version__,
        "monai": monai.__version__,
        "monai_iou": monai_iou.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def save(path: Path, shared: Mapping[str, Any], results: list[Result]) -> None:
    """Write the JSON under a temporary name first, so that a stopped run leaves the last complete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**shared, "results": [{**asdict(result), "fell": result.fell} for result in results]}
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a dataset folder")
    parser.add_argument("--epochs", type=int, default=100, help="at least 2")
    parser.add_argument("--output", type=Path, default=Path("runs/losses_train"))
    parser.add_argument("--only", nargs="+", choices=list(LOSSES), default=list(LOSSES), metavar="LOSS")
    parser.add_argument("--patch", type=int, nargs=3, default=[48, 48, 32], metavar=("X", "Y", "Z"))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--num-samples", type=int, default=2)
    parser.add_argument("--base-channels", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.epochs < 2:
        parser.error(f"--epochs must be at least 2 to compare the last with the first, but is {options.epochs}")
    if not (options.data / "dataset.json").is_file():
        parser.error(f"--data must be a folder with a dataset.json, but there is none in {options.data}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train, print and save."""
    options = parse(arguments)
    results: list[Result] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's and torch's own; the bundle's tests say which
        options.weights = training_weights(options.data) if "weighted_ce" in options.only else None
        shared = facts(options)
        for name in options.only:
            results.append(train(name, options))
            save(options.output / "losses_train.json", shared, results)
            print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(", ".join(f"{key}: {value}" for key, value in shared.items()), end="\n\n")
    print(table(results), end="\n\n")
    for result in results:
        print(f"    {result.command}")
    return 0 if all(result.fell for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
