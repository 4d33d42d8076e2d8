"""Time the usual passes and the reading of files against another checkout of this project, in turns.

    python -m benchmarks.against CHECKOUT [--turns 15] [--size 96] [--only TEXT]

`CHECKOUT` is a folder with another version, such as one made by `git worktree add ../old 127b4c6`. Each version runs in
a process of its own that stays up; the two take turns, so that other work on the machine hits both alike. The figure is
the median CPU time of one call with one thread, in ms, and the ratio of ours to theirs: below 1, ours is faster. The
ratio is the median of the ratios within each turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.reading import FILES, write_files
from benchmarks.versions import Version

# Runs in both versions, so that it uses only what both have; where a module moved, the newer place comes first.
WORKER = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
import monai_iou
try:
    from monai_iou.volumes.reading import read_volume
except ImportError:
    from monai_iou.evaluation.volumes import read_volume
torch.set_num_threads(1)
size, folder, files = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
generator = torch.Generator().manual_seed(0)

def step(loss, channels):
    shape = (1, channels) + (size,) * 3
    logits = torch.randn(shape, generator=generator, requires_grad=True)
    labels = torch.randint(0, max(channels, 2), (1, 1) + (size,) * 3, generator=generator)
    def run():
        logits.grad = None
        loss(logits, labels).backward()
    return run

names = {1: "sigmoid", 2: "softmax", 5: "softmax", 16: "softmax"}
tasks = {}
for channels, activation in names.items():
    for name in ("IoULoss", "IoUCELoss"):
        loss = getattr(monai_iou, name)(**{activation: True})
        tasks[f"{name} 1x{channels}x{size}^3"] = step(loss, channels)
tasks[f"LovaszSoftmaxLoss 1x5x{size}^3"] = step(monai_iou.LovaszSoftmaxLoss(softmax=True), 5)
tasks[f"IoUFocalLoss 1x2x{size}^3"] = step(monai_iou.IoUFocalLoss(softmax=True), 2)
tasks[f"FocalTverskyLoss 1x5x{size}^3"] = step(monai_iou.FocalTverskyLoss(softmax=True), 5)
prediction, reference = (torch.randint(0, 5, (1, 1) + (size,) * 3, generator=generator) for _ in range(2))
def metric():
    score = monai_iou.IoUMetric(num_classes=5)
    score(prediction, reference)
    return score.aggregate()
tasks[f"IoUMetric 1x5x{size}^3"] = metric
for file in files:
    tasks[f"read {file}"] = lambda file=file: read_volume(__import__("pathlib").Path(folder) / file)
for run in tasks.values():
    run()
print(json.dumps([monai_iou.__file__, *tasks]), file=answers, flush=True)
for line in sys.stdin:
    run = tasks[line.rstrip("\\n")]
    start = time.process_time()
    run()
    print(time.process_time() - start, file=answers, flush=True)
"""


def main() -> None:
    """Print a line per task: milliseconds of the other version and of this one, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the other version, which holds `monai_iou`")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--only", default="", help="a part of the names of the tasks to run, such as 'read'")
    parser.add_argument("--size", type=int, default=96, help="voxels along each axis")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        given = [str(arguments.size), str(folder), ",".join(FILES)]
        other = Version(arguments.checkout, WORKER, given, folder)
        ours = Version(Path(__file__).parents[1], WORKER, given, folder)
        for task in (task for task in ours.about if arguments.only in task):
            times = [(other.seconds(task), ours.seconds(task)) for _ in range(arguments.turns)]
            theirs_ms, ours_ms = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
            ratio = statistics.median(b / a for a, b in times)
            print(f"{task:28} {theirs_ms:8.1f} ms {ours_ms:8.1f} ms {ratio:6.2f}", flush=True)
        other.end()
        ours.end()


if __name__ == "__main__":
    main()
