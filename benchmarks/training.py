"""Time the shipped bundle's training against MONAI's plain settings, and its step against a bare PyTorch loop.

    python -m benchmarks.training                          # the demo's volumes, written into a temporary folder
    python -m benchmarks.training --data TaskNNN --epochs 6
    python -m benchmarks.training --patch 48 48 32         # the demo's patch; without it the bundle's own

Epochs: the bundle as it is, and the same bundle with overrides of its config alone, which give MONAI's uncached
`Dataset`, its `DataLoader` and `DiceCELoss`, and weights in torch's usual memory format. Transforms, optimizer,
handlers, checkpoints and validation are the same. The trainings take turns, an epoch each, in one process; a paused one
does nothing. An epoch lasts until its checkpoint is written, and until its validation has ended where it has one. The
first is left out.

Steps: the bundle's trainer with all its handlers, and a bare loop with the same network, first weights, loss, optimizer
and mixed precision. Both read the same batches from memory, the bare loop as plain tensors, and take turns by the step;
the first three are left out. Before anything is reported, the first losses of both are compared: the work must be the
same.

Prints Markdown; OUTPUT/training.json has every time, OUTPUT/training.log what the bundle said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 3
MAX_BATCHES = 8

PLAIN: dict[str, Any] = {
    "net": "$@network_def.to(@device)",
    "train#dataset": {"_target_": "Dataset", "data": "$@cases.training", "transform": "@train#preprocessing"},
    "train#dataloader": {
        "_target_": "DataLoader",
        "dataset": "@train#repeated_dataset",
        "batch_size": "@batch_size",
        "shuffle": True,
        "num_workers": "@num_workers",
        "drop_last": True,
    },
    "validate#dataset": {"_target_": "Dataset", "data": "$@cases.validation", "transform": "@validate#preprocessing"},
    "loss": {
        "_target_": "DiceCELoss",
        "include_background": False,
        "softmax": True,
        "to_onehot_y": True,
        "batch": True,
    },
}


@dataclass(frozen=True)
class Times:
    """What was measured of one candidate: seconds of all its turns, and how many of the first ones do not count."""

    name: str
    left_out: int
    seconds: list[float]
    steps: int = 1
    prepare_seconds: float | None = None

    @property
    def counted(self) -> list[float]:
        """The turns that count."""
        return self.seconds[self.left_out :]

    @property
    def median(self) -> float:
        """Their median in seconds."""
        return statistics.median(self.counted)


def open_workflow(folder: Path, options: argparse.Namespace, overrides: dict[str, Any]) -> Any:
    """Return the bundle's training as a parsed ConfigWorkflow, its seed set and nothing read or cached yet."""
    from monai.bundle.workflows import ConfigWorkflow

    from monai_iou.bundle_files import bundle_path

    given = {
        "patch_size": options.patch,
        "batch_size": options.batch_size,
        "base_channels": options.base_channels,
        "full_resolution": options.full_resolution or None,
    }
    folders = {
        "dataset_dir": str(options.data.resolve()),
        "ckpt_dir": str(folder / "models"),
        "output_dir": str(folder / "eval"),
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    workflow = ConfigWorkflow(
        config_file=str(bundle_path() / "configs" / "train.json"),
        workflow_type="train",
        **{**folders, "epochs": options.epochs, **chosen, **overrides},
    )
    workflow.initialize()
    return workflow


def pause_after(trainer: Any, event: Any) -> None:
    """Let `trainer.run` return after each such event, and go on from there when it is called again."""
    trainer.add_event_handler(event, lambda engine: engine.interrupt())  # last, behind the bundle's own handlers


def timed(action: Callable[[], Any]) -> float:
    """Return the seconds that it takes."""
    import torch

    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(actions: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Time each action so many times, one after the other, in changing order."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns):
        for name in list(actions)[:: -1 if turn % 2 else 1]:
            seconds[name].append(timed(actions[name]))
    return seconds


def epochs(folder: Path, options: argparse.Namespace) -> list[Times]:
    """Train the candidates side by side, an epoch each in turn."""
    from ignite.engine import Events

    candidates = {"bundle": {}, "plain": {**PLAIN, "num_workers": 0}}
    candidates |= {f"plain, {workers} workers": {**PLAIN, "num_workers": workers} for workers in options.plain_workers}
    trainers, prepared = {}, {}
    for name, overrides in candidates.items():
        start = time.perf_counter()
        workflow = open_workflow(folder / name, options, overrides)
        trainers[name] = workflow.parser.get_parsed_content("train#trainer")
        prepared[name] = time.perf_counter() - start
        pause_after(trainers[name], Events.EPOCH_COMPLETED)
    seconds = take_turns({name: trainer.run for name, trainer in trainers.items()}, options.epochs)
    for trainer in trainers.values():
        trainer.run()  # to the end, so that every handler may close what it opened
    return [
        Times(name, 1, seconds[name], trainer.state.epoch_length, prepared[name]) for name, trainer in trainers.items()
    ]


def steps(folder: Path, options: argparse.Namespace) -> tuple[list[Times], dict[str, Any]]:
    """Time steps of the bundle's trainer and of a bare loop in turn; return them and what a step works on."""
    from ignite.engine import Events
    from monai.utils import convert_to_tensor

    trained, bare = (open_workflow(folder / name, options, {}).parser for name in ("trainer", "bare"))
    networks = [parser.get_parsed_content("net") for parser in (trained, bare)]
    networks[1].load_state_dict(networks[0].state_dict())
    trainer = trained.get_parsed_content("train#trainer")
    batches = list(islice(trained.get_parsed_content("train#dataloader"), MAX_BATCHES))
    turns = options.steps + WARM_UP_STEPS
    trainer.data_loader = batches
    trainer.state.epoch_length = turns + 1  # no step of these ends an epoch: what ends one is timed with the epochs
    losses: dict[str, list[float]] = {"trainer": [], "bare loop": []}
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses["trainer"].append(float(engine.state.output[0]["loss"]))
    )
    pause_after(trainer, Events.ITERATION_COMPLETED)
    tensors = [convert_to_tensor([batch["image"], batch["label"]], track_meta=False) for batch in batches]
    dtype = trainer.amp_kwargs.get("dtype")
    loop = bare_loop(bare, tensors, amp=trainer.amp, dtype=dtype, device=trainer.state.device)
    actions = {"trainer": trainer.run, "bare loop": lambda: losses["bare loop"].append(next(loop))}
    seconds = take_turns(actions, turns)
    trainer.terminate()
    trainer.run()  # to the end, so that every handler may close what it opened
    check_same_work(losses)
    facts = {
        "batch": list(batches[0]["image"].shape),
        "batches": len(batches),
        "classes": trained.get_parsed_content("plan").out_channels,
        "channels": list(trained.get_parsed_content("plan").channels),
        "strides": [list(stride) for stride in trained.get_parsed_content("plan").strides],
        "parameters": sum(weights.numel() for weights in networks[0].parameters()),
        "amp": bool(trainer.amp),
    }
    return [Times(name, WARM_UP_STEPS, seconds[name]) for name in actions], facts


def bare_loop(parser: Any, batches: list[Any], *, amp: bool, dtype: Any, device: Any) -> Iterator[float]:
    """Train as one writes it by hand, a step each time it is asked for the next loss."""
    import torch

    network, loss, optimizer = (parser.get_parsed_content(name) for name in ("net", "training_loss", "optimizer"))
    scaler = torch.amp.GradScaler(device.type, enabled=amp)
    network.train()
    for batch in cycle(batches):
        images, labels = (tensor.to(device) for tensor in batch)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=amp):
            value = loss(network(images), labels)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        yield value.item()


def check_same_work(losses: dict[str, list[float]]) -> None:
    """Compare the first losses of both loops; later ones part, because no two runs of a GPU add in the same order."""
    first, other = (values[0] for values in losses.values())
    if not math.isclose(first, other, rel_tol=1e-3):
        message = f"Expected trainer and bare loop to start with one loss, but got {first} and {other}."
        raise RuntimeError(message)


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the numbers depend on."""
    import monai
    import nibabel
    import torch

    import monai_iou
    from monai_iou.datasets.folder import read_folder

    cases = read_folder(options.data).training
    return {
        "data": options.name,
        "cases": len(cases),
        "shapes": sorted({tuple(nibabel.load(case.image).shape) for case in cases}),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "monai_iou": monai_iou.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_before": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def processor() -> str:
    """Return the CPU's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def epoch_table(results: list[Times]) -> str:
    """Return the epochs as Markdown; the bundle stands first."""
    lines = [
        "| training | preparation s | epoch, median s | fastest to slowest | a step of it, ms | bundle is x faster |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        lines.append(
            f"| {result.name} | {result.prepare_seconds:.1f} | {result.median:.2f} | "
            f"{min(result.counted):.2f} to {max(result.counted):.2f} | {result.median / result.steps * 1e3:.0f} | "
            f"{result.median / results[0].median:.2f} |"
        )
    return "\n".join(lines)


def step_table(results: list[Times]) -> str:
    """Return the steps as Markdown; the trainer stands first, the bare loop last."""
    lines = ["| step of | median ms | fastest to slowest | of the bare loop |", "| --- | --- | --- | --- |"]
    for result in results:
        lines.append(
            f"| {result.name} | {result.median * 1e3:.1f} | {min(result.counted) * 1e3:.1f} to "
            f"{max(result.counted) * 1e3:.1f} | {result.median / results[-1].median:.3f} |"
        )
    return "\n".join(lines)


def report(shared: dict[str, Any], epoch_times: list[Times], step_times: list[Times]) -> str:
    """Return everything as Markdown."""
    about = "\n".join(f"- {key}: {value}" for key, value in shared.items())
    counts = f"{len(epoch_times[0].counted)} epochs of {epoch_times[0].steps} steps; {len(step_times[0].counted)} steps"
    return "\n\n".join([about, f"Medians of {counts}.", epoch_table(epoch_times), step_table(step_times)])


def save(path: Path, shared: dict[str, Any], epoch_times: list[Times], step_times: list[Times]) -> None:
    """Write the JSON under a temporary name first, so that a stopped run leaves the last complete one."""
    content = {
        **shared,
        "epochs": [{**asdict(result), "median": result.median} for result in epoch_times],
        "steps": [{**asdict(result), "median": result.median} for result in step_times],
        "epoch_ratio": {result.name: result.median / epoch_times[0].median for result in epoch_times[1:]},
        "step_ratio": step_times[0].median / step_times[1].median,
    }
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send what the trainings say into a file: two progress bars on one terminal would write over each other."""
    with (
        log.open("w", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # MONAI's and torch's own; the bundle's tests say which
        yield
        root = logging.getLogger()
        for handler in [*root.handlers]:
            if getattr(handler, "stream", None) is stream:
                root.removeHandler(handler)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a dataset folder; the demo's volumes by default")
    parser.add_argument("--epochs", type=int, default=11, help="at least 2; the first is left out")
    parser.add_argument("--steps", type=int, default=30, help=f"behind the first {WARM_UP_STEPS}")
    parser.add_argument("--output", type=Path, default=Path("runs/training"))
    parser.add_argument("--plain-workers", type=int, nargs="*", default=[], metavar="N", help="also with N processes")
    parser.add_argument("--patch", type=int, nargs=3, metavar=("X", "Y", "Z"), help="the bundle's own by default")
    parser.add_argument("--batch-size", type=int, help="the bundle's own by default")
    parser.add_argument("--base-channels", type=int, help="the bundle's own by default")
    parser.add_argument("--full-resolution", action="store_true", help="a first level that halves nothing")
    options = parser.parse_args(arguments)
    if options.epochs < 2 or options.steps < 1:
        parser.error(f"--epochs must be at least 2 and --steps 1, but are {options.epochs} and {options.steps}")
    if options.data is not None and not (options.data / "dataset.json").is_file():
        parser.error(f"--data must be a folder with a dataset.json, but there is none in {options.data}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and save."""
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, quiet(options.output / "training.log"):
        from monai_iou.datasets.phantoms import write_phantom_dataset

        folder = Path(temporary)
        options.name = options.data.resolve().name if options.data else "the demo's phantom volumes"
        options.data = options.data or write_phantom_dataset(folder / "phantoms")
        shared = facts(options)
        step_times, worked_on = steps(folder, options)
        epoch_times = epochs(folder, options)
    shared |= worked_on
    save(options.output / "training.json", shared, epoch_times, step_times)
    print(report(shared, epoch_times, step_times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
