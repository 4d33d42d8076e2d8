"""Time steps of the training that nnU-Net v2 plans for a folder, on a CPU: `python -m benchmarks.nnunet_steps FOLDER`.

It answers whether a training by nnU-Net can be compared on this machine at all. nnU-Net plans and preprocesses as it
does; a step has two patches, the fewest that it plans for. The first step is left out. nnU-Net has to be installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.training import processor

MINUTES = 30


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table of one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="FOLDER", help="in the Decathlon's layout")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, but is {options.steps}")
    if not (options.data / "dataset.json").is_file():
        parser.error(f"FOLDER must have a dataset.json, but there is none in {options.data}")

    import torch

    from benchmarks.evidence.contestants import CONFIGURATION, nnunet_trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = nnunet_trainer(options.data.resolve(), Path(folder), seed=0)
        plan = trainer.plans_manager.get_configuration(CONFIGURATION)
        seconds = []
        for _ in range(options.steps + 1):
            start = time.perf_counter()
            trainer.train_step(next(trainer.dataloader_train))
            seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds[1:])
    place = f"{torch.get_num_threads()} threads on {processor()}, load {os.getloadavg()[0]:.1f}"
    print(f"torch {torch.__version__}, {place}, {options.steps} steps\n")
    print(f"| patch | patches a step | seconds a step | smallest and largest | steps in {MINUTES} minutes |")
    print("| --- | --- | --- | --- | --- |")
    patch = "x".join(map(str, plan.patch_size))
    extremes = f"{min(seconds[1:]):.1f}, {max(seconds[1:]):.1f}"
    print(f"| {patch} | {plan.batch_size} | {middle:.1f} | {extremes} | {60 * MINUTES / middle:.0f} |")


if __name__ == "__main__":
    main()
