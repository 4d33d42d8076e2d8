"""One run: train the bundle by overrides, segment the test volumes, score every case, append the rows."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.evidence.choices import LOSSES
from benchmarks.evidence.contestants import CONTESTANTS, Budget
from benchmarks.evidence.data import DATA
from benchmarks.evidence.datasets import ROOT, build, patient_of
from benchmarks.evidence.studies import Run, overrides
from benchmarks.evidence.tables import add_run, copy_runs_of_other_studies, locked, missing
from benchmarks.losses_train import losses_of_iterations, training_weights
from benchmarks.training import processor

SCORES = ("iou", "dice", "lesion_f1")
# What inference has to be told as training was.
NETWORK = ("network", "network_def", "deep_supervision", "attention", "amp", "amp_dtype")
# What a plan does not decide in a study, so that the budget is the same.
EQUAL = ("epochs", "case_repeats", "val_interval", "val_fraction", "seed")


def run_all(runs: Sequence[Run], jobs: int, results: Path, output: Path, *, quick: bool) -> int:
    """Make the runs that are missing, each in a process of its own; return how many failed."""
    if not quick:  # a quick run has other epochs in each study
        copy_runs_of_other_studies(results, runs)
    todo = missing(results, runs)
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are done", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        return sum(not done for done in pool.map(lambda run: _in_a_process(run, results, output, quick=quick), todo))


def _in_a_process(run: Run, results: Path, output: Path, *, quick: bool) -> bool:
    task = {"run": asdict(run), "results": str(results), "output": str(output), "quick": quick}
    log, threads = output / f"{run.folder}.log", str(DATA[run.data].threads)
    start = time.monotonic()
    with log.open("a") as stream:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.evidence.running", json.dumps(task)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": threads, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": threads},
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )
    word = "done" if done.returncode == 0 else f"FAILED, see {log}"
    print(f"{run.folder}: {word} after {time.monotonic() - start:.0f} s", flush=True)
    return done.returncode == 0


def make_run(run: Run, results: Path, output: Path, *, quick: bool) -> None:
    """Train, segment and score; append the rows; remove the weights."""
    data = build(run.data, run.fold, output / "data", quick=quick)
    folder = output / run.folder
    shutil.rmtree(folder, ignore_errors=True)  # what a kill left
    start, minutes, made_by = time.perf_counter(), DATA[run.data].minutes, commit()
    if minutes:
        steps, epochs = CONTESTANTS[run.loss](data, folder, Budget(minutes, run.seed)), None
        trained = time.perf_counter()  # and segmented: a contestant does both, and prepares what it trains on
    else:
        steps, epochs = train(run, data, folder, quick=quick), overrides(run, quick=quick)["epochs"]
        trained = time.perf_counter()
        segment(run, data, folder)
    cases = score(data, folder / "masks")
    used = os.times()
    seconds = {
        "train_seconds": trained - start,
        "evaluate_seconds": time.perf_counter() - trained,
        # What the wall times would be if nothing else ran.
        "cpu_seconds": used.user + used.system + used.children_user + used.children_system,
    }
    if commit() != made_by:
        message = f"Expected {run.folder} to be made by one commit, but {made_by} became {commit()}: make it again."
        raise RuntimeError(message)
    about = {**circumstances(), "commit": made_by}
    add_run(results, run, {**summary(steps, epochs, cases), **rounded(seconds, 1), **about}, cases)
    shutil.rmtree(folder)


def train(run: Run, data: Path, folder: Path, *, quick: bool) -> list[float]:
    """Train the bundle by this run's overrides; return the loss of every step."""
    from monai_iou.bundle_files import bundle_path
    from monai_iou.demo import run_workflow

    configs, chosen = ["train"], overrides(run, quick=quick)
    if LOSSES[run.loss].get("loss", {}).get("weight"):
        chosen["loss"] = {**chosen["loss"], "weight": training_weights(data)}
    if chosen.pop("planned", False):
        plan = written_plan(data, folder)
        configs = [*configs, str(plan.with_suffix(""))]  # an absolute path stays one behind the bundle's folder
        decided = json.loads(plan.read_text(encoding="utf-8"))
        chosen = kept_beside(decided, chosen, LOSSES[run.loss])
    places = {"dataset_dir": str(data), "ckpt_dir": str(folder / "models"), "output_dir": str(folder / "eval")}
    run_workflow(bundle_path(), configs, {**places, **chosen})
    values = losses_of_iterations(folder / "eval" / "tensorboard")
    if not all(map(math.isfinite, values)):
        message = f"Expected every loss of {run.folder} to be finite, but got {values}."
        raise RuntimeError(message)
    return values


def kept_beside(decided: Collection[str], chosen: Mapping[str, Any], compared: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that a plan leaves alone, those that make the budgets equal, and what is compared.

    >>> kept_beside(["loss", "patch_size"], {"loss": 1, "patch_size": 2, "epochs": 3}, {"loss": 1})
    {'loss': 1, 'epochs': 3}
    """
    return {name: value for name, value in chosen.items() if name not in decided or name in (*EQUAL, *compared)}


def written_plan(data: Path, folder: Path) -> Path:
    """Write the plan of `monai-iou plan` for a CPU."""
    from monai_iou.cli import cli

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    cli.main(["plan", str(data), "--output", str(path), "--device", "cpu"], standalone_mode=False)
    return path


def segment(run: Run, data: Path, folder: Path) -> None:
    """Write masks of the test images in their own geometry, by the bundle's inference as it ships."""
    from monai_iou.bundle_files import bundle_path
    from monai_iou.demo import run_workflow

    places = {"dataset_dir": str(data), "ckpt_dir": str(folder / "models"), "output_dir": str(folder / "masks")}
    network = {name: value for name, value in overrides(run).items() if name in NETWORK}
    run_workflow(bundle_path(), ["inference"], {**places, **network})


def score(data: Path, masks: Path) -> list[dict[str, Any]]:
    """Return a row for every test case and label."""
    from monai_iou.datasets.folder import read_folder
    from monai_iou.volumes.reading import read_labels

    folder = read_folder(data)
    rows = []
    for case in folder.evaluation:
        assert case.label is not None
        reference, prediction = read_labels(case.label), read_labels(masks / f"{case.name}.nii.gz")
        about = {"patient": patient_of(case.name), "case": case.name}
        spacing = reference.grid.spacing
        for label in list(folder.labels)[1:]:
            scores = score_masks(prediction.array == label, reference.array == label, spacing)
            rows.append({**about, "label": label, **rounded(scores)})
    return rows


def score_masks(prediction: Any, reference: Any, spacing: Sequence[float]) -> dict[str, float]:
    """Return the scores of one structure: IoU, Dice, and lesion F1 with the smallest threshold, any shared voxel.

    Lesions are paired one to one: a predicted component finds at most one lesion, and further pieces of a lesion are
    false ones.
    """
    from monai_iou.metrics.lesion import lesion_scores
    from monai_iou.metrics.overlap import overlap_from_counts

    counts = [int(mask.sum()) for mask in (prediction & reference, prediction, reference)]
    overlap = overlap_from_counts(*counts)
    lesions = lesion_scores(prediction, reference, spacing=spacing, threshold="any")
    return {
        "iou": overlap.iou,
        "dice": overlap.dice,
        "lesion_f1": lesions.f1,
        "lesions": lesions.tp + lesions.fn,
        "found": lesions.tp,
        "invented": lesions.fp,
        "missed": lesions.fn,
        "reference_voxels": counts[2],
        "predicted_voxels": counts[1],
    }


def summary(steps: Sequence[float], epochs: int | None, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over the cases, and what the losses were in the first and last epoch, or tenth of the steps."""
    length = max(1, len(steps) // (epochs or 10))
    means = {name: fmean(row[name] for row in cases if not math.isnan(row[name])) for name in SCORES}
    losses = {"first_loss": fmean(steps[:length]), "last_loss": fmean(steps[-length:])}
    count = len({row["case"] for row in cases})
    return {"cases": count, **rounded({**means, **losses}), "epochs": epochs, "steps": len(steps)}


def circumstances() -> dict[str, Any]:
    """Return what the run depended on."""
    import monai
    import torch

    import monai_iou

    return {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "load": round(os.getloadavg()[1], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "monai_iou": monai_iou.__version__,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Return the commit that is checked out, with a + if files of the package, the bundle or this runner differ."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "monai_iou", "bundles", "benchmarks")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def rounded(values: Mapping[str, float], digits: int = 6) -> dict[str, float]:
    """Return the numbers with so many decimals."""
    return {name: round(value, digits) for name, value in values.items()}


def main() -> None:
    """Make the run that the parent process asks for."""
    task = json.loads(sys.argv[1])
    run, results, output = Run(**task["run"]), Path(task["results"]), Path(task["output"])
    warnings.simplefilter("ignore")  # MONAI's and torch's own; the bundle's tests say which
    # Another runner may have made it meanwhile, or be at it; the lock is this process's, which outlives its runner.
    with locked(output / f"{run.folder}.lock", wait=False) as ours:
        if ours and missing(results, [run]):
            make_run(run, results, output, quick=task["quick"])


if __name__ == "__main__":
    main()
