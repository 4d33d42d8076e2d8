"""Time an epoch of the shipped bundle against another checkout of this project, in turns.

    python -m benchmarks.epoch CHECKOUT --data TaskNNN [--turns 5] [--keys '{"patch_size": [40, 56, 40]}']

`CHECKOUT` is a folder with another version, such as one made by `git worktree add ../old 127b4c6`. Each version trains
its own bundle in a process of its own, with the same keys, one thread and no validation; the two take turns by the
epoch, and the first epoch is left out. The figure is the CPU time of an epoch in seconds, so that other work on the
machine counts little. The ratio is the median of theirs to ours within each turn: above 1, ours is faster. With
`--batches`, only the preparation of the epoch's batches is timed. With `--other-keys` on this checkout, it shows what a
key costs, such as '{"instance": true}'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.versions import Version

# Runs in both versions, so that it uses only what both have.
WORKER = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
import monai_iou
folder, checkout, batches, keys = json.loads(sys.argv[1])
config = checkout + "/bundles/small_foreground_segmentation/configs/train.json"
workflow = ConfigWorkflow(config_file=config, workflow_type="train", logging_file=False, **keys,
    bundle_root=folder, ckpt_dir=folder + "/models", output_dir=folder + "/eval", epochs=1000, val_fraction=0)
workflow.initialize()
trainer = workflow.parser.get_parsed_content("train#trainer")
loader = workflow.parser.get_parsed_content("train#dataloader")
trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: engine.interrupt())
print(json.dumps([monai_iou.__file__, len(loader)]), file=answers, flush=True)
for line in sys.stdin:
    start = time.process_time()
    if batches:
        for _ in loader:
            pass
    else:
        trainer.run()
    print(time.process_time() - start, file=answers, flush=True)
"""


def trained(checkout: Path, folder: Path, keys: dict[str, object], *, batches: bool) -> Version:
    """Return a process that trains the bundle of one checkout, an epoch at a time."""
    folder.mkdir()
    given = json.dumps([str(folder), str(checkout.resolve()), batches, keys])
    return Version(checkout, WORKER, [given], folder)


def main(arguments: list[str] | None = None) -> None:
    """Print the medians and the ratio as a row of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the other version, which holds `monai_iou`")
    parser.add_argument("--data", type=Path, required=True, help="a dataset folder")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--keys", type=json.loads, default={}, metavar="JSON", help="keys of the bundle for both")
    parser.add_argument("--other-keys", type=json.loads, default={}, metavar="JSON", help="more keys of the other")
    parser.add_argument("--batches", action="store_true", help="time the preparation of the batches alone")
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error(f"--turns must be at least 1, but is {options.turns}")
    for name, given in (("--keys", options.keys), ("--other-keys", options.other_keys)):
        if not isinstance(given, dict):
            parser.error(f"{name} must be a JSON object, but is {json.dumps(given)}")
    keys = {**options.keys, "dataset_dir": str(options.data.resolve())}
    with tempfile.TemporaryDirectory() as name:
        other = trained(options.checkout, Path(name) / "other", {**keys, **options.other_keys}, batches=options.batches)
        ours = trained(Path(__file__).parents[1], Path(name) / "ours", keys, batches=options.batches)
        times = [(other.seconds(), ours.seconds()) for _ in range(options.turns + 1)][1:]
        other.end()
        ours.end()
    ratios = [theirs / own for theirs, own in times]
    theirs, own = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        "| data | steps | other s | ours s | x faster | smallest and largest |\n| --- | --- | --- | --- | --- | --- |"
    )
    print(
        f"| {options.data.name} | {ours.about[0]} | {theirs:.2f} | {own:.2f} | {statistics.median(ratios):.2f} | "
        f"{min(ratios):.2f}, {max(ratios):.2f} |"
    )


if __name__ == "__main__":
    main()
