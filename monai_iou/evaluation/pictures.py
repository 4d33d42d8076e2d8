"""Which cases the report shows slice by slice, and the list of missed lesions that leads to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.evaluation import resume
from monai_iou.evaluation.pairing import PairingError, find_volumes
from monai_iou.evaluation.rendering import number
from monai_iou.evaluation.results import Evaluation
from monai_iou.evaluation.thumbnails import show_picture
from monai_iou.volumes.names import RESULTS
from monai_iou.volumes.reading import VolumeError

WORST_SHOWN = 5
MISSED_SHOWN = 100


def shown_pictures(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The pictures of the worst, median and best cases by IoU, or of all, as the request asks.

    Returns:
        One mapping per picture: `case`, `label`, `why` it is shown, `iou`, `dice`, `note`, and the `crop` for the page.
    """
    images, problem = _images(evaluation.request.images)
    shown = []
    for why, row in _chosen(evaluation):
        case = row["case"]
        picture = resume.read_picture(evaluation.request.output, case, row["label"])
        if picture is None:
            continue
        image = images.get(case, images.get(f"{case}_0000"))  # nnU-Net numbers the channels of a case
        note = problem or (f"No image named {case} in the images folder." if images and image is None else "")
        crop, error = _with_image(picture, image)
        cut = "The structure reaches beyond this crop around its largest disagreement. " if picture["cut"] else ""
        note = f"{cut}{evaluation.request.as_typed(error) or note}".strip()
        scores = {name: number(row[name]) for name in ("iou", "dice")}
        shown.append({"case": case, "label": row["label"], "why": why, **scores, "note": note, "crop": crop})
    return shown


def _chosen(evaluation: Evaluation) -> list[tuple[str, Mapping[str, Any]]]:
    """Why a row is shown, and the row: the worst first, then the median and the best."""
    defined = [row for row in evaluation.measured if not math.isnan(row["iou"])]
    ranked = sorted(defined, key=lambda row: (row["iou"], row["case"]))
    wanted = evaluation.request.pictures
    if wanted == "all":
        return [("", row) for row in ranked]
    number_of_worst = WORST_SHOWN if wanted == "worst" else int(wanted)
    chosen: list[tuple[str, Mapping[str, Any]]] = [("worst", row) for row in ranked[:number_of_worst]]
    others = ranked[number_of_worst:]
    if number_of_worst and others:
        middle = ranked[len(ranked) // 2]
        chosen += [("median", middle)] if any(row is middle for row in others) and middle is not ranked[-1] else []
        chosen.append(("best", ranked[-1]))
    return chosen


def _images(folder: Path | None) -> tuple[dict[str, Path], str]:
    try:
        return (find_volumes(folder, "--images", RESULTS) if folder is not None else {}), ""
    except (PairingError, VolumeError) as error:  # at the end of all work, of which nothing would be written
        return {}, str(error)


def _with_image(picture: Mapping[str, Any], image: Path | None) -> tuple[dict[str, Any], str]:
    """A picture, and what went wrong with its image: pictures are extras and never fail an evaluation."""
    try:
        return show_picture(picture, image), ""
    except (VolumeError, OSError, MemoryError) as error:
        return show_picture(picture, None), str(error) or "The image needs more memory than there is."


def missed_lesions(evaluation: Evaluation, pictures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The missed lesions, the largest first: volume, position, and the number of the picture that shows each."""
    viewers = {(picture["case"], picture["label"]): i for i, picture in enumerate(pictures)}
    missed = [row for row in evaluation.counted_lesions if row["status"] == "fn"]
    ranked = sorted(missed, key=lambda row: (-row["volume_ml"], row["case"]))
    return [
        {
            "case": row["case"],
            "label": row["label"],
            "volume": number(row["volume_ml"]),
            "place": _place(row),
            "mm": [row[f"centroid_{axis}_mm"] for axis in "xyz"],
            "viewer": viewers.get((row["case"], row["label"])),
        }
        for row in ranked[:MISSED_SHOWN]
    ]


def _place(row: Mapping[str, Any]) -> str:
    """A position as people write it: R 12.0, A 3.5, S 40.0 mm."""
    letters = (("R", "L"), ("A", "P"), ("S", "I"))
    values = [row[f"centroid_{axis}_mm"] for axis in "xyz"]
    parts = [f"{pair[value < 0]} {abs(value):.1f}" for pair, value in zip(letters, values, strict=True)]
    return ", ".join(parts) + " mm"
