"""Where the shipped bundle lies, and copying it out."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from monai_iou.files import TEMPORARY_PREFIX

__all__ = ["BUNDLE_NAME", "bundle_path", "copy_bundle"]


BUNDLE_NAME = "small_foreground_segmentation"


def bundle_path() -> Path:
    """Return the shipped bundle's folder: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "bundles", package.parent / "bundles"):
        if (folder / BUNDLE_NAME / "configs" / "train.json").is_file():
            return folder / BUNDLE_NAME
    message = f"Expected the bundle `{BUNDLE_NAME}` inside {package}, but it is not there: install monai-iou again."
    raise FileNotFoundError(message)


def copy_bundle(destination: str | os.PathLike[str]) -> Path:
    """Copy the shipped bundle for editing; a failed copy leaves nothing behind.

    Args:
        destination: a folder that does not exist yet, or is empty.

    Returns:
        The new bundle's folder.

    Raises:
        ValueError: `destination` is a file or holds something.
    """
    target = Path(destination).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        message = f"Expected `{destination}` to be a new or empty folder, but it exists: name another one."
        raise ValueError(message)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=target.parent))
    try:
        # A checkout's bundle may have been trained in place: its results are not part of what is shipped.
        shutil.copytree(
            bundle_path(),
            partial,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("models", "eval", "predictions", "__pycache__"),
        )
        if target.exists():
            target.rmdir()
        partial.chmod(0o777 & ~_umask())  # a temporary folder is its owner's alone
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
