"""How a channel is normalised: CT by one window for all images, other modalities each by itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monai_iou.datasets.cases import CaseFacts

__all__ = ["intensity_rule", "is_ct", "is_unchanged", "looks_like_ct", "shared_intensity", "warn_of_unnamed_ct"]

logger = logging.getLogger(__name__)

CT_PERCENTILES = (0.5, 99.5)
# Lowest values of a CT image: below lung, and not below what scanners write outside of their field of view (-3024).
UNNAMED_CT = (-3100, -500)
# Cone-beam, non-contrast, contrast-enhanced, low-dose, high-resolution, multi-detector, photon-counting and others, and
# what datasets put behind: angiography, also of the coronary or pulmonary arteries, perfusion, urography, resampled.
CT_PREFIXES = (
    "C", "CB", "FB", "KV", "MV", "NC", "NCE", "NE", "NEC", "CE", "LD", "ULD", "ND", "SD", "FD", "HR", "UHR", "MD", "MS",
    "DE", "DS", "PC", "PCD", "PET", "Q", "PQ",
)  # fmt: skip
CT_SUFFIXES = (
    "A", "AC", "AP", "C", "CA", "CAP", "HU", "P", "PA", "RES", "SCAN", "SCANS", "TAP", "U", "V", "IMAGE", "IMAGES",
    "ANGIO", "ANGIOGRAPHY",
)  # fmt: skip
# Where a capital letter behind a small one starts a word: ChestCT and uCT, but not SDoCT and SpeCT.
CT_WORD_STARTS = re.compile(r"(?<=[a-z])(?:(?<!o)|(?<=micro))(?<![iI]nfar)(?<![sS][pP]e)(?=[A-Z])")


def is_ct(modality: str) -> bool:
    """Whether a channel's name is one of CT: `CT`, `CTA`, `NCCT`, `CECT`, `CTres`, `CT angiography`, and the like.

    Example:
        >>> [is_ct(name) for name in ("CT", "NCCT", "CCTA", "4DCT", "ChestCT", "computed tomography", "ct_1mm")]
        [True, True, True, True, True, True, True]
        >>> [is_ct(name) for name in ("SPECT", "OCT", "T1", "vector")]
        [False, False, False, False]
    """
    name = CT_WORD_STARTS.sub(" ", modality).upper()
    if re.search(r"EMISSION|COHERENCE", name):  # SPECT and OCT in full
        return False
    word = rf"(?<![A-Z])(?:(?<=[2-4])D)?(?:{'|'.join(CT_PREFIXES)})?CT(?:{'|'.join(CT_SUFFIXES)})?(?![A-Z])"
    return re.search(rf"{word}|COMPUT[A-Z]*[\W_]*(?:AXIAL[\W_]*)?TOMOGRA", name) is not None


def is_unchanged(modality: str) -> bool:
    """Whether a channel's name, nnU-Net's `noNorm`, says that its values are used as they are, such as a mask's.

    Example:
        >>> [is_unchanged(name) for name in ("noNorm", "nonorm", "T1")]
        [True, True, False]
    """
    return modality.strip().casefold() == "nonorm"


def looks_like_ct(modality: str, channel: int, cases: Sequence[CaseFacts]) -> bool:
    """Whether a channel that is not named as CT holds numbers like those of CT, with air, in most cases.

    Example:
        >>> case = CaseFacts((9, 9, 9), (1.0, 1.0, 1.0), np.array([[40.0, 55.0]]), lowest=(-1024.0,))
        >>> [looks_like_ct(name, 0, [case]) for name in ("image", "CT")]
        [True, False]
    """
    air = [case for case in cases if case.lowest and UNNAMED_CT[0] <= case.lowest[channel] <= UNNAMED_CT[1]]
    if is_unchanged(modality):
        return False
    whole = all((case.foreground[channel] == np.rint(case.foreground[channel])).all() for case in air)
    return not is_ct(modality) and whole and 2 * len(air) > len(cases)


def warn_of_unnamed_ct(modalities: Sequence[str], cases: Sequence[CaseFacts]) -> None:
    """Log a warning for each channel that is normalised image by image although it `looks_like_ct`."""
    for channel, name in enumerate(modalities):
        if looks_like_ct(name, channel, cases):
            logger.warning(
                "The values of channel %s look like Hounsfield units, but its name is not one of CT, so that every "
                'image is normalised by itself. If the images are CT, name the channel "CT" in dataset.json, as '
                "docs/bundle.md shows.",
                name,
            )


def intensity_rule(modality: str, samples: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return how a channel is normalised, see `Plan.intensity`, from intensities inside the foreground."""
    if is_unchanged(modality):
        return {"kind": "none"}
    values = np.concatenate(samples) if samples else np.zeros(0)
    # CT numbers mean the same in every image, so one window serves them all; other modalities have no common scale.
    if not is_ct(modality) or values.size < 2:
        return {"kind": "zscore"}
    lower, upper = np.percentile(values, CT_PERCENTILES)
    clipped = np.clip(values, lower, upper).astype(np.float64)
    std = max(float(clipped.std()), 1e-3)
    return {"kind": "ct", "lower": float(lower), "upper": float(upper), "mean": float(clipped.mean()), "std": std}


def shared_intensity(intensities: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return how images are normalised once for several models: as for the first, with a window that holds all windows.

    Args:
        intensities: of each model, see `Plan.intensity`, of the same kinds.

    Example:
        >>> windows = [(0.0, 100.0), (-50.0, 90.0)]
        >>> rules = [[{"kind": "ct", "lower": low, "upper": high, "mean": low, "std": 1.0}] for low, high in windows]
        >>> shared_intensity(rules)
        [{'kind': 'ct', 'lower': -50.0, 'upper': 100.0, 'mean': 0.0, 'std': 1.0}]
    """
    shared = []
    for first, *others in zip(*intensities, strict=True):
        rule = dict(first)
        if rule["kind"] == "ct":
            rule["lower"] = min(own["lower"] for own in (first, *others))
            rule["upper"] = max(own["upper"] for own in (first, *others))
        shared.append(rule)
    return shared
