"""Time affine and elastic deformation of an image and a label, beside MONAI's.

    OMP_NUM_THREADS=1 python -m benchmarks.deformation
    python -m benchmarks.deformation --patch 40 56 40 --device cuda

The ranges are the bundle's. The forms take turns, and a figure is the median over the turns of one deformation of an
image (interpolated linearly) and a label (nearest), each time with other random numbers: CPU time of the process, or on
a GPU the time that passes until it has finished. The first turn is left out. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from monai.transforms import Compose, Rand3DElasticd, RandAffined

from monai_iou.transforms import RandAffineElasticd, RandCoarseElasticd

KEYS = ("image", "label")
AFFINE = {"rotate_range": (0.5,) * 3, "shear_range": (0.1,) * 6, "scale_range": (0.25,) * 3}
FIELD = {"sigma_range": (3, 5), "magnitude_range": (20, 80)}


def forms(device: str) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Return what is compared, each of which always deforms."""
    how: dict[str, Any] = {"mode": ("bilinear", "nearest"), "padding_mode": "border"}
    there = {**how, "device": device}
    affine = RandAffined(KEYS, prob=1, **AFFINE, **there)
    coarse = RandCoarseElasticd(KEYS, prob=1, **FIELD, **there)
    return {
        "MONAI's RandAffined": affine,
        "RandAffineElasticd, affine alone": RandAffineElasticd(KEYS, **AFFINE, affine_prob=1, elastic_prob=0, **there),
        "MONAI's Rand3DElasticd": Rand3DElasticd(KEYS, prob=1, **FIELD, **there),
        "RandCoarseElasticd": coarse,
        "RandAffineElasticd, elastic alone": RandAffineElasticd(KEYS, **FIELD, affine_prob=0, elastic_prob=1, **there),
        "MONAI's RandAffined, then RandCoarseElasticd": Compose([affine, coarse]),
        "RandAffineElasticd, both": RandAffineElasticd(KEYS, **AFFINE, **FIELD, affine_prob=1, elastic_prob=1, **there),
    }


def timed(deform: Callable[[dict[str, Any]], Any], item: dict[str, Any], device: str) -> float:
    """Return the milliseconds of one deformation."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    deform(dict(item))
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs=3, default=[64, 64, 64], metavar=("X", "Y", "Z"))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error(f"--turns must be at least 1, but is {options.turns}")
    shape = (1, *options.patch)
    item = {"image": torch.rand(shape, device=options.device), "label": (torch.rand(shape) > 0.9).byte()}
    item["label"] = item["label"].to(options.device)
    compared = forms(options.device)
    times: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(options.turns + 1):
        for name, deform in compared.items():
            times[name].append(timed(deform, item, options.device))
    patch = "x".join(map(str, options.patch))
    print(f"| image and label of {patch}, {options.device} | ms | smallest and largest |\n| --- | --- | --- |")
    for name, (_, *counted) in times.items():
        median = statistics.median(counted)
        print(f"| {name} | {median:.1f} | {min(counted):.1f}, {max(counted):.1f} |")


if __name__ == "__main__":
    main()
