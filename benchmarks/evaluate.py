"""Time the evaluation against the same figures through panoptica and MONAI, one after the other.

    python benchmarks/evaluate.py [--only rows] [--match openms_19] [--repeat 3] [--json FILE]
    python benchmarks/evaluate.py --only folder [--count 200] [--workers 2] [--other CHECKOUT]

Four parts, each printed with what it compares:

- rows: every score of a case of Task901 (182x218x182, up to 98 lesions) with a perturbed prediction, from arrays in
  memory. Theirs: IoU, Dice, precision, recall, HD95, NSD, ASSD and per-component Dice from MONAI; PQ, SQ, RQ, F1 from
  panoptica with naive matching at IoU 0.5. Boundary IoU, which neither has, is in our time only.
- classes: IoU of 25 classes on 256x256x128, `iou_counts` on the label maps against MONAI's MeanIoU on their one-hot
  form, with the memory that each adds to the two label maps.
- command: `monai-iou evaluate` on two cases of 35x50x35, with the import.
- folder: `monai-iou evaluate` on many masks of 157x189x136, afresh and again with nothing to do; with `--other`, the
  same by another checkout of this project, in turns. Processor time beside wall time: other work on the machine
  changes the second only.

Needs panoptica for the first part and says so where it is missing. `taskset -c 0,1` gives it two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.metrics import (
    MeanIoU,
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
    compute_surface_dice,
    get_confusion_matrix,
)
from monai.metrics.meandice import DiceHelper
from monai.networks.utils import one_hot

from monai_iou.evaluation.rules import Structure
from monai_iou.evaluation.scoring import evaluate_case
from monai_iou.metrics import iou_counts, iou_from_counts
from monai_iou.volumes.reading import read_labels

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "Task901_MSLesionFLAIR"


def perturbed(mask: np.ndarray, seed: int) -> np.ndarray:
    """A plausible prediction: moved by a voxel, a fifth of the lesions missed, some split, some false ones added."""
    import cc3d

    rng = np.random.default_rng(seed)
    components, count = cc3d.connected_components(np.ascontiguousarray(mask), return_N=True)
    kept = rng.random(count + 1) < 0.8
    kept[0] = False
    result = np.roll(kept[components], 1, axis=int(rng.integers(3)))
    result[::17] = False  # cuts lesions in two
    for corner in rng.integers(40, 120, (8, 3)):
        result[tuple(slice(c, c + 3) for c in corner)] = True
    return result


def theirs(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], panoptica: Any
) -> dict[str, float]:
    """The same figures from MONAI and panoptica."""
    pair = [torch.from_numpy(np.ascontiguousarray(mask)).float()[None, None] for mask in (prediction, reference)]
    surface = {"include_background": True, "spacing": spacing}
    confusion = get_confusion_matrix(*pair).ravel()  # tp, fp, tn, fn
    both = [torch.cat([1 - mask, mask], dim=1) for mask in pair]
    helper = DiceHelper(include_background=False, apply_argmax=False, per_component=True, get_not_nans=False)
    result = panoptica.evaluate(prediction.astype(np.uint8), reference.astype(np.uint8))["ungrouped"]
    return {
        "iou": float(compute_iou(*pair)),
        "dice": float(compute_dice(*pair)),
        "precision": float(confusion[0] / (confusion[0] + confusion[1])),
        "recall": float(confusion[0] / (confusion[0] + confusion[3])),
        "hd95_mm": float(compute_hausdorff_distance(*pair, percentile=95, **surface)),
        "nsd": float(compute_surface_dice(*pair, [1.0], use_subvoxels=True, **surface)),
        "assd_mm": float(compute_average_surface_distance(*pair, symmetric=True, **surface)),
        "cc_dice": float(helper(*both)),
        "lesion_tp": result.tp,
        "lesion_fp": result.fp,
        "lesion_fn": result.fn,
        "pq": result.pq,
        "sq": result.sq,
        "rq": result.rq,
    }


def evaluator() -> Any:
    """Panoptica with the settings of our columns, or None where it is not installed."""
    try:
        from panoptica import (
            ConnectedComponentsInstanceApproximator,
            InputType,
            NaiveThresholdMatching,
            Panoptica_Evaluator,
        )
        from panoptica.metrics import Metric
    except ImportError:
        return None
    return Panoptica_Evaluator(
        expected_input=InputType.SEMANTIC,
        instance_approximator=ConnectedComponentsInstanceApproximator(),
        instance_matcher=NaiveThresholdMatching(matching_threshold=0.5),
        instance_metrics=[Metric.IOU],
        global_metrics=[],
    )


def seconds(function: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """Median wall time of `repeat` calls, and the last result."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def rows_of_cases(data: Path, match: str, repeat: int) -> list[dict[str, Any]]:
    """Time both on every scan of the data set."""
    panoptica = evaluator()
    if panoptica is None:
        print("rows: left out, panoptica is not installed: pip install panoptica")
        return []
    results = []
    for number, path in enumerate(sorted(data.glob(f"labelsT[rs]/*{match}*.nii.gz"))):
        volume = read_labels(path)
        reference = volume.array == 1
        prediction = perturbed(reference, number)
        maps = [mask.astype(np.uint8) for mask in (prediction, reference)]
        ours_time, (rows, lesions) = seconds(
            lambda maps=maps, volume=volume: evaluate_case(*maps, volume.grid, [Structure("1", (1,))]), repeat
        )
        theirs_time, figures = seconds(
            lambda p=prediction, r=reference, s=volume.grid.spacing: theirs(p, r, s, panoptica), 1
        )
        differences = {
            name: abs(rows[0][name] - value) for name, value in figures.items() if name in rows[0] and value == value
        }
        count = sum(lesion["kind"] == "reference" for lesion in lesions)
        result = {
            "case": path.name,
            "lesions": count,
            "ours_s": ours_time,
            "theirs_s": theirs_time,
            "ratio": theirs_time / ours_time,
            "largest_difference": max(differences.items(), key=lambda item: item[1]),
        }
        results.append(result)
        name, value = result["largest_difference"]
        print(
            f"rows: {path.name}, {count} lesions: ours {ours_time:.2f} s, MONAI + panoptica {theirs_time:.2f} s, "
            f"{result['ratio']:.1f} x; largest difference {value:.2g} ({name})",
            flush=True,
        )
    return results


CHILD = """
import sys, time, torch, json
from benchmarks_evaluate import class_scores, label_maps, peak_mb
p, r = label_maps()
class_scores(sys.argv[1], p[..., :8].clone(), r[..., :8].clone())
base = peak_mb(reset=True)
times = []
for _ in range(int(sys.argv[2])):
    start = time.perf_counter(); scores = class_scores(sys.argv[1], p, r); times.append(time.perf_counter() - start)
print(json.dumps({"s": sorted(times)[len(times) // 2], "added_mb": peak_mb() - base, "scores": scores}))
"""


def label_maps(shape: tuple[int, int, int] = (256, 256, 128), classes: int = 25) -> tuple[torch.Tensor, torch.Tensor]:
    """Two uint8 label maps of blocks, the second moved."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, classes, tuple(size // 16 for size in shape), generator=generator, dtype=torch.uint8)
    labels = small
    for axis in range(3):
        labels = labels.repeat_interleave(16, dim=axis)
    return labels.roll(3, dims=0).contiguous(), labels.contiguous()


def class_scores(which: str, prediction: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """IoU of 25 classes by `ours` or `monai`."""
    if which == "ours":
        counts = iou_counts(prediction, reference, 25)
        return [float(v) for v in iou_from_counts(counts.intersection, counts.prediction, counts.reference)]
    metric = MeanIoU(reduction="mean_batch")
    metric(*(one_hot(labels[None, None], 25) for labels in (prediction, reference)))
    return [float(value) for value in metric.aggregate()]


def peak_mb(reset: bool = False) -> float:
    """Peak resident memory of this process in MB; with `reset`, the present one, from which the peak counts anew."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def many_classes(repeat: int) -> dict[str, Any]:
    """Run both in processes of their own, so that each has its own peak of memory."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "benchmarks_evaluate.py").write_text(Path(__file__).read_text())
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *filter(None, sys.path)])}
        results = {
            which: json.loads(
                subprocess.run(
                    [sys.executable, "-c", CHILD, which, str(count)],
                    env=environment,
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for which, count in (("ours", 3 * repeat), ("monai", 1))
        }
    np.testing.assert_allclose(results["ours"].pop("scores"), results["monai"].pop("scores"), rtol=1e-5)
    maps = 2 * 256 * 256 * 128 / 2**20
    for which, result in results.items():
        added = f"{result['added_mb']:.0f} MB beside the two label maps of {maps:.0f} MB"
        print(f"classes: {which} {result['s']:.3f} s, {added}", flush=True)
    print(f"classes: {results['monai']['s'] / results['ours']['s']:.1f} x faster")
    return results


def command() -> float:
    """Seconds of `monai-iou evaluate` on two small cases."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, shift in (("references", 0), ("predictions", 1)):
            (folder / kind).mkdir()
            for case in range(2):
                labels = np.zeros((35, 50, 35), np.uint8)
                labels[8 + shift : 20 + shift, 10 + case : 30, 12:22] = 1
                nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / kind / f"case{case}.nii.gz")
        options = [f"--{kind}={folder / kind}" for kind in ("references", "predictions", "output")]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "monai_iou_command", "evaluate", *options], check=True, capture_output=True
        )
        elapsed = time.perf_counter() - start
    print(f"command: two cases of 35x50x35 in {elapsed:.1f} s with the import")
    return elapsed


def folder_of_masks(folder: Path, count: int) -> None:
    """References with a dozen lesions each, and predictions moved by a voxel with two of them left out."""
    rng = np.random.default_rng(0)
    shape = (157, 189, 136)
    for case in range(count):
        reference, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
        for lesion in range(12):
            corner = [int(rng.integers(10, size - 20)) for size in shape]
            size = int(rng.integers(2, 10))
            box = tuple(slice(low, low + size) for low in corner)
            reference[box] = 1
            if lesion > 1:
                prediction[tuple(slice(low + 1, low + 1 + size) for low in corner)] = 1
        for kind, array in (("references", reference), ("predictions", prediction)):
            (folder / kind).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / kind / f"case{case:03}.nii.gz")


def timed_evaluation(checkout: Path, folder: Path, output: Path, workers: int) -> dict[str, float]:
    """Processor and wall seconds of one `monai-iou evaluate` by the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (checkout, checkout / "monai_iou/launcher")))}
    # In an empty folder, as Python imports from the working folder before anything else.
    place = {"env": environment, "cwd": folder, "check": True, "capture_output": True, "text": True}
    found = subprocess.run([sys.executable, "-c", "import monai_iou; print(monai_iou.__file__)"], **place).stdout
    if not Path(found.strip()).is_relative_to(checkout):
        message = f"Expected the package of {checkout} to be imported, but got {found.strip()}: check PYTHONPATH."
        raise RuntimeError(message)
    options = [f"--{kind}={folder / kind}" for kind in ("references", "predictions")]
    command = [sys.executable, "-m", "monai_iou_command", "evaluate", *options, f"--output={output}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, f"--workers={workers}"], **place)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": cpu, "wall_s": time.perf_counter() - start}


def many_files(count: int, workers: int, other: Path | None) -> dict[str, Any]:
    """Time a fresh evaluation and one with nothing to do, of this checkout and of another one."""
    checkouts = {"this": Path(__file__).resolve().parents[1], **({"other": other.resolve()} if other else {})}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder_of_masks(folder, count)
        for run in ("fresh", "again"):
            for which, checkout in checkouts.items():
                found = timed_evaluation(checkout, folder, folder / which, workers)
                results[f"{which}, {run}"] = found
                print(f"folder: {which}, {run}: {found['cpu_s']:.1f} s CPU, {found['wall_s']:.1f} s", flush=True)
    return results


def machine() -> str:
    """What the times were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "monai", "numpy", "scipy", "nibabel"))
    cores, load = len(os.sched_getaffinity(0)), ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{model}, {cores} cores, {torch.get_num_threads()} torch threads, load {load}; {versions}"


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the scans; Task901 by default")
    parser.add_argument(
        "--only", choices=["command", "classes", "rows", "folder"], action="append", help="a part; may be repeated"
    )
    parser.add_argument("--match", default="", help="only scans whose name holds this")
    parser.add_argument(
        "--repeat", type=int, default=3, help="calls, of which the median counts; theirs in rows has one"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--count", type=int, default=200, help="pairs of the folder")
    parser.add_argument("--workers", type=int, default=2, help="processes of the folder")
    parser.add_argument("--other", type=Path, help="another checkout to time beside this one")
    options = parser.parse_args()
    # MONAI warns of its own deprecated arguments and that Voronoi regions run on the CPU.
    warnings.filterwarnings("ignore", module="monai")
    print(machine())
    parts: dict[str, Callable[[], Any]] = {
        "command": command,
        "classes": lambda: many_classes(options.repeat),
        "folder": lambda: many_files(options.count, options.workers, options.other),
        "rows": lambda: rows_of_cases(options.data, options.match, options.repeat),
    }
    results = {name: run() for name, run in parts.items() if name in (options.only or parts)}
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
