"""Which part of a training on a CPU has which share of its time: patches, network, loss, optimizer, metrics, cells.

    python -m benchmarks.shares                                              # the demo's volumes
    OMP_NUM_THREADS=2 python -m benchmarks.shares --data TaskNNN --keys '{"patch_size": [64, 64, 64]}'
    python -m benchmarks.shares --data TaskNNN --keys '{"instance": true}'   # and what the cells cost
    python -m benchmarks.shares --checkout ../old    # an earlier version, as by `git worktree add ../old 127b4c6`

The shipped bundle trains for `--turns` epochs, each followed by a validation, and every moment is charged to the part
that is at work, by the CPU time of the process and by the time that passes. A step is one batch, from the end of the
step before to the end of its handlers. Parts of a step:

- preparing the patches: random transforms and collation of the batch. The bundle does this in a thread, for the next
  batch; here the trainer makes each batch when it needs it, so that no two parts overlap. It is the only change. In the
  bundle's own training, less time passes where a second core is free; the CPU time stays.
- network forward; loss forward, the call of the training's loss; loss backward, from there to the gradient of the
  network's output; network backward, the rest of the backward pass; optimizer, its step.
- else: all other moments, such as handlers, engine, loader, gradients set to none.

Parts of a validation: the network in its sliding window; postprocessing and metrics; else, such as pictures.

The bundle as it is takes the first three steps before, which warms the process up. The run stops unless the first three
measured steps have the same losses. They do not count. Figures of a step are medians over all others, of each part by
itself, and their whole is the sum. An epoch is its number of steps times the mean of a step, so that rare and costly
transforms count, and under "else" the median of what is beside its steps, such as checkpoints. Figures of a validation
are medians over the turns; its shares are of itself.

With an `instance` loss, the cells have rows of their own. In a second part of the run, the batches are prepared with
and without region maps, from the same random numbers, and the trained network's outputs of each get both losses,
forward and backward; the order alternates. The first three batches do not count. Cells are the medians of the
differences, as shares of the step above: carrying the maps through the preparation of a batch, from the crop of the
cached volume to the collation, and the loss. "found in the crop" is the time of `find_cells` alone, which lies inside
the latter and is 0 where the label brings its regions. Making these is CPU time for a volume (median), once, before the
first step, and no part of a step.

CPU time counts torch's second thread also while it waits a few milliseconds for the next operation, so with two threads
the time that passes tells more, and with one thread both do.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.part_times import (
    ELSE,
    LOSS,
    NETWORK,
    PARTS,
    PATCHES,
    SCORES,
    VALIDATION,
    WHOLE,
    Clock,
    Pair,
    Spent,
    figures,
    in_turn,
    instrument,
    module,
    timed_regions,
    total,
)
from benchmarks.training import WARM_UP_STEPS, pause_after, processor, quiet

WITH, WITHOUT, FINDING = "with cells", "without cells", "finding"
CELL_BATCHES = 20
OWN_KEYS = {"bundle_root", "dataset_dir", "ckpt_dir", "output_dir", "device", "epochs", "num_workers", "val_interval"}


@dataclass
class Measured:
    """What a training took.

    Attributes:
        length: steps of an epoch.
        steps: all but the first ones.
        beside: what each epoch took beside its steps and its validation.
        validations: one of each epoch, if there are any.
        losses: of all steps.
        volumes: seconds for the regions of each volume.
        cells: batches and their losses with cells and without.
    """

    length: int
    steps: list[Spent] = field(default_factory=list)
    beside: list[Pair] = field(default_factory=list)
    validations: list[Spent] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    volumes: list[float] = field(default_factory=list)
    cells: list[Spent] = field(default_factory=list)


def opened(folder: Path, keys: dict[str, Any]) -> Any:
    """Return the parser of the bundle's training in a folder of its own, its seed set and nothing read yet."""
    from monai.bundle.workflows import ConfigWorkflow

    folders = {"bundle_root": str(folder), "ckpt_dir": str(folder / "models"), "output_dir": str(folder / "eval")}
    workflow = ConfigWorkflow(
        config_file=str(module("bundle_files", "shipped").bundle_path() / "configs" / "train.json"),
        workflow_type="train",
        **{**folders, "device": "cpu", "epochs": 1000, "num_workers": 0, "val_interval": 1, **keys},
    )
    workflow.initialize()
    return workflow.parser


def record(trainer: Any, losses: list[float]) -> None:
    """Append the loss of each step."""
    from ignite.engine import Events

    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output[0]["loss"]))
    )


def end(trainer: Any) -> None:
    """Let every handler close what it opened."""
    trainer.terminate()
    trainer.run()


def untouched_losses(parser: Any) -> list[float]:
    """Return the losses of the first steps of the bundle as it is."""
    from ignite.engine import Events

    trainer, losses = parser.get_parsed_content("train#trainer"), list[float]()
    record(trainer, losses)
    pause_after(trainer, Events.ITERATION_COMPLETED(once=WARM_UP_STEPS))
    trainer.run()
    end(trainer)
    return losses[:WARM_UP_STEPS]


def check_same_losses(measured: Sequence[float], untouched: Sequence[float], tolerance: float) -> None:
    """Raise RuntimeError unless the measured training computes what the bundle does."""
    first = list(measured[: len(untouched)])
    same = len(first) == len(untouched) > 0 and all(map(partial(math.isclose, rel_tol=tolerance), first, untouched))
    if not same:
        message = f"Expected the measured training to have the bundle's losses, {list(untouched)}, but got {first}."
        raise RuntimeError(message)


def measure(parser: Any, clock: Clock, turns: int) -> Measured:
    """Train for so many epochs."""
    from ignite.engine import Events

    volumes, started, steps = list[float](), list[Pair](), list[Spent]()
    with timed_regions(volumes):
        trainer = instrument(parser, clock)
    measured = Measured(len(trainer.data_loader), volumes=volumes)
    record(trainer, measured.losses)
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: started.append(total(clock.taken())))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: steps.append(clock.taken()))
    pause_after(trainer, Events.EPOCH_COMPLETED)
    for _ in range(turns):
        clock.taken()
        trainer.run()
        spent = clock.taken()
        validation = {part: spent.pop(part) for part in (VALIDATION, NETWORK, SCORES) if part in spent}
        measured.validations += [validation] if validation else []
        measured.beside.append(started.pop() + total(spent))
    end(trainer)
    measured.steps = steps[WARM_UP_STEPS:]
    if not measured.steps:
        message = f"Expected more than {WARM_UP_STEPS} steps, but got {len(steps)}: raise --turns."
        raise RuntimeError(message)
    return measured


def train(folder: Path, keys: dict[str, Any], turns: int) -> Measured:
    """Train as the bundle is and as it is measured; return what the latter took."""
    untouched = untouched_losses(opened(folder / "untouched", keys))
    clock, parser = Clock(), opened(folder / "measured", keys)
    with in_turn(clock):
        measured = measure(parser, clock, turns)
        # Two threads share the tiles of a loss in another way when the machine is busy, and then add in another order.
        check_same_losses(measured.losses, untouched, 0 if torch.get_num_threads() == 1 else 1e-4)
        if has_cells(parser):
            parsers = {WITH: parser, WITHOUT: opened(folder / "plain", {**keys, "instance": False})}
            if has_cells(parsers[WITHOUT]):
                message = "Expected the key `instance` to give the loss its cells, but `loss` has them: use `instance`."
                raise RuntimeError(message)
            measured.cells = cell_times(clock, parsers, min(CELL_BATCHES, len(measured.steps)))
    return measured


def has_cells(parser: Any) -> bool:
    """Return whether the training's loss has cells."""
    from monai_iou import InstanceIoULoss

    name = "training_loss" if "training_loss" in parser.config else "loss"  # an earlier version trains with its loss
    return any(isinstance(part, InstanceIoULoss) for part in parser.get_parsed_content(name).modules())


def cell_times(clock: Clock, parsers: dict[str, Any], count: int) -> list[Spent]:
    """Return what so many batches and their losses take with cells and without, in turns."""
    from monai_iou.losses.cells import find_cells

    network = parsers[WITH].get_parsed_content("net").train()
    losses = {name: parser.get_parsed_content("training_loss") for name, parser in parsers.items()}
    prepare = {name: parser.get_parsed_content("train#trainer#prepare_batch") for name, parser in parsers.items()}
    batches = {name: epochs_of(parser.get_parsed_content("train#dataloader")) for name, parser in parsers.items()}
    taken: list[Spent] = []
    with mock.patch("monai_iou.losses.instance.find_cells", clock.timed(FINDING, find_cells)):
        for turn in range(WARM_UP_STEPS + count):
            pairs, spent = dict[str, Any](), Spent()
            for name in list(parsers)[:: -1 if turn % 2 else 1]:
                clock.taken()
                batch = next(batches[name])
                spent[f"{PATCHES} {name}"] = clock.taken()[PATCHES]
                pairs[name] = prepare[name](batch, torch.device("cpu"))
            check_same_patches(*pairs.values())
            with torch.no_grad():
                output = network(pairs[WITH][0])
            for name, (_, target) in pairs.items():
                leaves = detached(output)
                clock.taken()
                losses[name](leaves, target).mean().backward()
                parts = clock.taken()
                spent |= {f"{LOSS} {name}": total(parts), f"{FINDING} {name}": parts.get(FINDING, np.zeros(2))}
            taken.append(spent)
    return taken[WARM_UP_STEPS:]


def epochs_of(loader: Any) -> Iterator[Any]:
    """Yield the batches of one epoch after the other, from the first one on."""
    loader.begin(1)
    while True:
        yield from loader


def check_same_patches(first: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Raise RuntimeError unless two batches (image, label) differ in the region maps alone."""
    if not torch.equal(first[0], other[0]) or not torch.equal(first[1][:, :1].int(), other[1][:, :1].int()):
        message = "Expected the same patches with cells and without, but got others."
        raise RuntimeError(message)


def detached(output: Any) -> Any:
    """Return a network's output as leaves that get a gradient."""
    return output.detach().requires_grad_() if isinstance(output, Tensor) else [detached(part) for part in output]


def epoch_figures(measured: Measured) -> Spent:
    """Return what an epoch takes: its steps by their mean, and what is beside them."""
    epoch = {part: pair * measured.length for part, pair in figures(measured.steps, PARTS, np.mean).items()}
    beside = np.median(measured.beside, axis=0)
    return {**epoch, ELSE: epoch[ELSE] + beside, WHOLE: epoch[WHOLE] + beside}


def cell_figures(cells: Sequence[Spent]) -> Spent:
    """Return what the cells take in a step: the medians of what each batch takes longer with them."""

    def longer(part: str) -> Pair:
        both = [sample[f"{part} {WITH}"] - sample[f"{part} {WITHOUT}"] for sample in cells]
        return np.asarray(np.median(both, axis=0))

    carried, lost = longer(PATCHES), longer(LOSS)
    return {
        "cells: carried through the transforms": carried,
        "cells: in the loss": lost,
        "cells: both": carried + lost,
        "cells: found in the crop, as a part of the loss": longer(FINDING),
    }


def table(measured: Measured) -> str:
    """Return everything as Markdown."""
    rows = [["part", "epoch, CPU s", "share %", "step, CPU ms", "share %", "step, passed ms", "share %"], ["---"] * 7]
    epoch, step = epoch_figures(measured), figures(measured.steps, PARTS)

    def in_step(pair: Pair) -> list[str]:
        return [cell for k in range(2) for cell in (f"{pair[k] * 1e3:.1f}", f"{pair[k] / step[WHOLE][k] * 100:.1f}")]

    def of_all(pair: Pair, whole: Pair) -> list[str]:
        return [f"{pair[0]:.2f}", f"{pair[0] / whole[0] * 100:.1f}"]

    rows += [[part, *of_all(epoch[part], epoch[WHOLE]), *in_step(pair)] for part, pair in step.items()]
    if measured.validations:
        validation = figures(measured.validations, (NETWORK, SCORES))
        for part, pair in validation.items():
            rows.append([f"{VALIDATION}: {part}", *of_all(pair, validation[WHOLE]), *["-"] * 4])
    if measured.cells:
        rows += [[part, "-", "-", *in_step(pair)] for part, pair in cell_figures(measured.cells).items()]
        made = f"{statistics.median(measured.volumes):.2f} a volume" if measured.volumes else "none"
        rows.append(["cells: regions, made once", made, *["-"] * 5])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a dataset folder; the demo's volumes by default")
    parser.add_argument("--keys", type=json.loads, default={}, metavar="JSON", help="keys of the bundle")
    parser.add_argument("--checkout", type=Path, metavar="FOLDER", help="measure the version in another folder")
    parser.add_argument("--turns", type=int, default=3, help="epochs (default: 3)")
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error(f"--turns must be at least 1, but is {options.turns}")
    if options.data is not None and not (options.data / "dataset.json").is_file():
        parser.error(f"--data must be a folder with a dataset.json, but there is none in {options.data}")
    if not isinstance(options.keys, dict):
        parser.error(f"--keys must be a JSON object, but is {json.dumps(options.keys)}")
    if own := sorted(OWN_KEYS & set(options.keys)):
        parser.error(f"--keys must leave to this command what it sets itself: {', '.join(own)}")
    return options


def take_package(checkout: Path) -> None:
    """Import the package of another checkout, while this file and its neighbours stay those of this one."""
    sys.path.insert(0, str(checkout.resolve()))
    import monai_iou

    del sys.path[0]
    if not Path(monai_iou.__file__).resolve().is_relative_to(checkout.resolve()):
        message = f"Expected the package of {checkout}, but got {monai_iou.__file__}: give the folder of `monai_iou`."
        raise SystemExit(message)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    import monai

    options = parse(arguments)
    if options.checkout is not None:
        take_package(options.checkout)
    write_phantom_dataset = module("datasets.phantoms", "phantoms").write_phantom_dataset
    with tempfile.TemporaryDirectory() as name, quiet(Path(name) / "shares.log"):
        data = options.data or write_phantom_dataset(Path(name) / "phantoms")
        measured = train(Path(name), {**options.keys, "dataset_dir": str(data.resolve())}, options.turns)
    where = options.data.resolve().name if options.data else "the demo's volumes"
    print(
        f"{where}, keys {json.dumps(options.keys)}; torch {torch.__version__}, MONAI {monai.__version__}, "
        f"{processor()}, threads: {torch.get_num_threads()}; {options.turns} epochs of {measured.length} steps, "
        f"of which {len(measured.steps)} steps count\n"
    )
    print(table(measured))


if __name__ == "__main__":
    main()
