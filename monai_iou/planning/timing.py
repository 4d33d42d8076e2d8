"""How long a training's parts take on this machine: real steps of the shipped bundle on a few cases of the dataset."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from monai_iou.bundle_files import bundle_path
from monai_iou.datasets.folder import SegmentationFolder
from monai_iou.planning.hardware import Machine
from monai_iou.planning.own_errors import own_error
from monai_iou.planning.plan import Plan

__all__ = ["TIMED_KEYS", "Timing", "measure_timing"]


# Keys that change what a validation takes of memory and time, and nothing of the plan: a training is timed with them.
TIMED_KEYS = ("sw_batch_size", "validate#inferer#device", "validate#inferer#sw_device")
SAMPLE_CASES = 4
WARM_UP_STEPS, MIN_STEPS, MAX_STEPS, TIMED_SECONDS = 2, 4, 60, 20.0
IMPORTS = "import monai_iou, monai.bundle, monai.engines, monai.handlers, ignite.engine"


@dataclass(frozen=True)
class Timing:
    """Seconds that a training's parts take.

    Attributes:
        start: until the first step is underway, without what depends on the number of cases.
        case: to check and prepare a labelled case.
        step: of training, the wait for its batch included.
        validation: of one case.
    """

    start: float
    case: float
    step: float
    validation: float


def measure_timing(
    folder: SegmentationFolder,
    plan: Plan,
    config: Mapping[str, Any],
    machine: Machine,
    given: Mapping[str, Any] | None = None,
) -> Timing:
    """Run a few steps and validations of the shipped bundle as a config would run them, without writing anything.

    Args:
        folder: the dataset; the first few cases of `training` are read, of which one must have foreground.
        plan: of the whole dataset.
        config: the bundle's keys.
        machine: its device is used.
        given: keys of the user's over those of `config`, of which those in `TIMED_KEYS` are used.

    Raises:
        ValueError: the machine's device is not here, or these cases cannot be trained on.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        message = (
            "Expected a GPU to time steps on for `--minutes`, but torch finds none: run `plan` on the machine that "
            "trains, or leave `--minutes` out."
        )
        raise ValueError(message)
    bare = {name.lstrip("+~").replace("::", "#"): value for name, value in (given or {}).items()}
    free = {name: value for name, value in bare.items() if name in TIMED_KEYS}
    try:
        return _measured(folder, plan, {**config, **free}, machine)
    except Exception as error:  # MONAI's says which expression raised it, this package's what is wrong with a dataset
        own = own_error(error)
        if own is None or own is error:
            raise
        raise own from None


def _measured(folder: SegmentationFolder, plan: Plan, config: Mapping[str, Any], machine: Machine) -> Timing:
    parser, cases = _parser(folder, plan, config, machine)
    imports = _seconds(lambda: subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTS], check=True))
    checked = _seconds(lambda: folder.check(cases)) / len(cases)
    datasets = [f"{part}#dataset" for part in ("train", "validate")]
    prepared = _seconds(lambda: [parser.get_parsed_content(name) for name in datasets])
    held = sum(len(parser.get_parsed_content(name)) for name in datasets)
    first, step = _time_steps(parser.get_parsed_content("train#trainer"), machine)
    evaluator = parser.get_parsed_content("validate#evaluator")
    validated = _seconds(evaluator.run) / len(parser.get_parsed_content("validate#dataset"))
    return Timing(imports + max(0.0, first - step), checked + prepared / held, step, validated)


def _parser(
    folder: SegmentationFolder, plan: Plan, config: Mapping[str, Any], machine: Machine
) -> tuple[Any, tuple[Any, ...]]:
    """Return the bundle's configuration on a few cases, without the handlers that write, and these cases."""
    from monai.bundle.config_parser import ConfigParser

    sample = max(SAMPLE_CASES, int(config["batch_size"]))
    training = folder.training[:sample]
    held_out = folder.labelled[sample : sample + 1] or training[:1]
    few = replace(folder, training=training, validation=held_out, splits=(), patient_groups={})
    parser = ConfigParser(ConfigParser.load_config_file(bundle_path() / "configs" / "train.json"))
    for key, value in config.items():
        parser[key] = value
    repeats = -(-MAX_STEPS * int(config["batch_size"]) // len(training))
    chosen = {"dataset_dir": str(folder.root), "epochs": 1, "case_repeats": repeats, "plan": plan}
    split = {"folds": None, "fold": 0, "val_fraction": 0.1}
    for key, value in {**chosen, **split, "device": torch.device(machine.device)}.items():
        parser[key] = value
    for part in ("train", "validate"):
        parser[part]["handlers"] = []
    parser.parse()
    # The folder is a property that is read at first use: the sample stands in for it.
    parser.get_parsed_content("cases").folder = few
    return parser, training


def _time_steps(trainer: Any, machine: Machine) -> tuple[float, float]:
    """Return the seconds of the first step, and the mean of those after the warm-up."""
    from ignite.engine import Events

    ends: list[float] = [time.perf_counter()]

    def note(engine: Any) -> None:
        if machine.device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        if ends[-1] - ends[0] > TIMED_SECONDS and len(ends) > WARM_UP_STEPS + MIN_STEPS:
            engine.terminate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.run()
    # Their mean: a step that waits for its batch is as much part of an epoch as one that does not.
    timed = ends[min(WARM_UP_STEPS, len(ends) - 2) :]
    return ends[1] - ends[0], (timed[-1] - timed[0]) / (len(timed) - 1)


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
