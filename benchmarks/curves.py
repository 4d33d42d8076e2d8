"""Draw a training's loss and validation scores: `python -m benchmarks.curves BUNDLE/eval/tensorboard curves.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

LOSS, SCORES = "train_loss", ("val_mean_iou", "val_mean_dice")


def read_scalars(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return (steps, values) of every scalar in a TensorBoard folder; a step logged twice has its last value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        values = {event.step: event.value for event in events.Scalars(tag)}
        curves[tag] = (sorted(values), [values[step] for step in sorted(values)])
    return curves


def draw(curves: dict[str, tuple[list[int], list[float]]], path: Path) -> None:
    """Write a PNG of the loss by step and of the scores by epoch.

    Raises:
        ValueError: the folder held no training loss.
    """
    from matplotlib.figure import Figure

    if LOSS not in curves:
        message = f"Expected scalars `{LOSS}`, but got {sorted(curves)}: name a training's folder `eval/tensorboard`."
        raise ValueError(message)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*curves[LOSS])
    left.set(title="Training loss", xlabel="step", ylabel=LOSS)
    for tag in SCORES:
        if tag in curves:
            right.plot(*curves[tag], marker=".", label=tag)
    right.set(title="Validation", xlabel="epoch", ylim=(0, 1))
    if right.lines:
        right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the folder and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the bundle's eval/tensorboard")
    parser.add_argument("output", type=Path, help="PNG to write")
    options = parser.parse_args()
    draw(read_scalars(options.folder), options.output)


if __name__ == "__main__":
    main()
