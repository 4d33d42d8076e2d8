"""What the channels of a file of probabilities are, in its header: `predict` writes it, and `evaluate` reads it."""

from __future__ import annotations

from pathlib import Path

from monai_iou.volumes.header import VolumeError
from monai_iou.volumes.names import NIFTI_EXTENSIONS
from monai_iou.volumes.nifti import load_raw_header

__all__ = ["are_separate", "description"]

_KINDS = {False: "monai_iou: classes share one probability", True: "monai_iou: regions have one probability each"}


def description(*, regions: bool) -> str:
    """Return what stands in the header's `descrip`, at most 80 characters.

    >>> description(regions=True)
    'monai_iou: regions have one probability each'
    """
    return _KINDS[regions]


def are_separate(path: Path) -> bool | None:
    """Return whether the channels of a file have a probability each; None if it does not say."""
    if not path.name.lower().endswith(NIFTI_EXTENSIONS):
        return None
    try:
        told = bytes(load_raw_header(path)["descrip"].tobytes()).split(b"\0")[0].decode("ascii", "replace")
    except (VolumeError, OSError):
        return None
    return next((separate for separate, text in _KINDS.items() if text == told), None)
