"""Time a step of the bundle's network in each memory format and precision, with and without torch.compile.

    python -m benchmarks.network                                # the GPU if there is one, otherwise the CPU
    python -m benchmarks.network --patch 48 48 32 --channels 8 --turns 11
    OMP_NUM_THREADS=1 python -m benchmarks.network --device cpu
    python -m benchmarks.network --device cpu --inference       # forward alone

A step is forward, the bundle's loss, backward and the optimizer's step, on random patches; on a GPU with mixed
precision, as the bundle has it. On a CPU, channels last comes with the bundle's forms of convolutions, instance
normalisation and PReLU, and in one form with torch's. The forms take turns, and a figure is the median of a form's
turns. "x the first" is the median over the turns of the first form's time by this one's: above 1, this form is faster.
The first two steps of each form are left out; the very first, in which torch.compile compiles, has a column of its own.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import monai
import torch
from monai.bundle import ConfigParser

from monai_iou.bundle_files import bundle_path
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.workflow.cpu_layers import FAST_FORMS
from monai_iou.workflow.half_precision import amp_type_of
from monai_iou.workflow.settings import amp_type

WARM_UP = 2
FORMATS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
TORCHS, BFLOAT16, COMPILED = ", torch's layers", ", bfloat16", ", compiled"
Step = Callable[[], None]


def bundle(options: argparse.Namespace, folder: Path) -> ConfigParser:
    """Return the training config of the bundle with the patch and the channels asked for.

    The volumes in `folder` are as large as the patch: the plan cuts a patch to the volumes, and with it the levels.
    """
    dataset = write_phantom_dataset(folder, training=2, evaluation=0, shape=tuple(options.patch))
    config = ConfigParser()
    config.read_config(str(bundle_path() / "configs" / "train.json"))
    config.update(
        {
            "dataset_dir": str(dataset),
            "ckpt_dir": str(dataset / "models"),
            "device": options.device,
            "patch_size": options.patch,
            "base_channels": options.channels,
        }
    )
    return config


def forms(device: str, *, compiled: bool) -> list[str]:
    """Return the names of what is compared."""
    of_cpu = [f"channels_last_3d{TORCHS}", f"channels_last_3d{BFLOAT16}"] if device == "cpu" else []
    return [*FORMATS, *of_cpu, *(f"{name}{COMPILED}" for name in FORMATS if compiled)]


def make_step(config: ConfigParser, memory_format: torch.memory_format, options: argparse.Namespace, name: str) -> Step:
    """Return a training step of the bundle's network, loss and optimizer on random patches."""
    config.update({"memory_format": memory_format})
    config.parse(reset=True)
    network: Any = config.get_parsed_content("net")
    loss, optimizer = config.get_parsed_content("loss"), config.get_parsed_content("optimizer")
    if TORCHS in name:
        for module in network.modules():
            module.__class__ = {fast: torchs for torchs, fast in FAST_FORMS.items()}.get(type(module), type(module))
    if COMPILED in name:
        network = torch.compile(network)
    is_half = options.device == "cuda" or BFLOAT16 in name
    precision = amp_type(amp_type_of(options.device))
    shape = (options.batch, 1, *options.patch)
    image = torch.randn(shape, device=options.device)
    label = (torch.rand(shape, device=options.device) < 0.01).to(torch.uint8)
    scaler = torch.amp.GradScaler(enabled=options.device == "cuda")

    def infer() -> None:
        with torch.no_grad(), torch.autocast(options.device, precision, enabled=is_half):
            network(image)
        if options.device == "cuda":
            torch.cuda.synchronize()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(options.device, precision, enabled=is_half):
            output = network(image)
        value = loss(output, label)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return infer if options.inference else step


def seconds(step: Step, clock: Callable[[], float]) -> float:
    """Return how long a step takes."""
    start = clock()
    step()
    return clock() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--patch", type=int, nargs=3, default=[64, 64, 64], metavar="N")
    parser.add_argument("--channels", type=int, default=16, help="of the first level (default: 16)")
    parser.add_argument("--batch", type=int, default=4, help="patches of a step (default: 4)")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="without torch.compile, whose threads slow the others")
    parser.add_argument("--inference", action="store_true", help="forward alone")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for a machine with other work")
    options = parser.parse_args(arguments)
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = bundle(options, Path(folder))
        names = forms(options.device, compiled=not options.eager)
        steps = {name: make_step(config, FORMATS[name.partition(",")[0]], options, name) for name in names}
    first = {name: seconds(step, time.perf_counter) for name, step in steps.items()}
    turns = [{name: seconds(step, clock) for name, step in steps.items()} for _ in range(options.turns + WARM_UP - 1)]
    kept = turns[WARM_UP - 1 :]
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, MONAI {monai.__version__}, Python {platform.python_version()}, {where}, "
        f"{options.batch} patches of {'x'.join(map(str, options.patch))}, {options.channels} channels, "
        f"{options.turns} turns, {'CPU time' if options.cpu_time else 'time passed'}, load {os.getloadavg()[0]:.1f}\n"
    )
    timed = "forward" if options.inference else "step"
    print(f"| form | {timed} ms | x the first | smallest and largest | first {timed} s |")
    print("| --- | --- | --- | --- | --- |")
    for name in names:
        ratios = [turn[names[0]] / turn[name] for turn in kept]
        milliseconds = statistics.median(turn[name] for turn in kept) * 1e3
        spread = f"{min(ratios):.2f}, {max(ratios):.2f}"
        print(f"| {name} | {milliseconds:.0f} | {statistics.median(ratios):.2f} | {spread} | {first[name]:.1f} |")


if __name__ == "__main__":
    main()
